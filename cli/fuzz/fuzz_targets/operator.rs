#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| belay_command::fuzzing::operator(data));
