//! See `polykey::fuzzing::wrapped`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::wrapped(data));
