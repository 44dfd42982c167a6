//! See `polykey::fuzzing::record`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::record(data));
