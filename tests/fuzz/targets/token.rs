//! See `polykey::fuzzing::token`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::token(data));
