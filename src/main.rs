//! Polykey.
fn main() {}
