#![no_main]
#![allow(dead_code, reason = "the modules are the command's, and the target uses its part of them")]

#[path = "../../src/fuzzing.rs"]
mod fuzzing;
#[path = "../../src/options.rs"]
mod options;
#[path = "../../src/quantity.rs"]
mod quantity;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzing::config(data));
