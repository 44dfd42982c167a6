//! See `polykey::fuzzing::metadata`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::metadata(data));
