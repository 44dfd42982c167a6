//! Polykey.
