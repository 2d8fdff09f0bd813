#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| belay_vmm_glue::fuzzing::kept(data));
