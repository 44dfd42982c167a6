//! See `polykey::fuzzing::policy`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::policy(data));
