//! See `polykey::fuzzing::certificate`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::certificate(data));
