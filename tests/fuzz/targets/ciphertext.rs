//! See `polykey::fuzzing::ciphertext`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::ciphertext(data));
