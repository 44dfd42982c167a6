//! The `polykey` binary: parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    polykey::cli::main()
}
