//! See `polykey::fuzzing::key`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::key(data));
