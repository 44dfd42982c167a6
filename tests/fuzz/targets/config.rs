//! See `polykey::fuzzing::config`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::config(data));
