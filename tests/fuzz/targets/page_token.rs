//! See `polykey::fuzzing::page_token`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::page_token(data));
