//! See `polykey::fuzzing::audit_export`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| polykey::fuzzing::audit_export(data));
