//! The child process of the tests: what `polykey pkcs11-worker` is in the binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    polykey_hsm::pkcs11::worker::run()
}
