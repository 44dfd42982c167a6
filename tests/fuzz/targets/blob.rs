//! See `polykey::fuzzing::blob`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::blob(data));
