//! `polykey completion|man|version`: what the command line knows of itself.

use std::path::Path;

use clap::{CommandFactory, ValueEnum};
use serde::Serialize;

use super::error::{CliError, Exit};
use super::output::{Human, View, write_out};
use super::{App, Cli};

/// Shells with completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// Bash.
    Bash,
    /// Z shell.
    Zsh,
    /// Fish.
    Fish,
}

/// The completion script for a shell.
fn script(shell: Shell) -> Vec<u8> {
    let mut out = Vec::new();
    let generator = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    clap_complete::generate(generator, &mut Cli::command(), "polykey", &mut out);
    out
}

pub(super) fn completion(shell: Shell) -> Result<(), CliError> {
    write_out(&script(shell))
}

/// Writes a man page for every command.
pub(super) fn man(directory: &Path) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::file(directory, &error);
    std::fs::create_dir_all(directory).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), directory).map_err(failed)
}

/// This build.
#[derive(Serialize)]
struct VersionView {
    version: &'static str,
    /// Absent where the build was not told.
    commit: Option<&'static str>,
}

impl View for VersionView {
    fn human(&self) -> Human {
        let commit = self.commit.map(|c| format!(" ({c})")).unwrap_or_default();
        Human::Text(format!("polykey {}{commit}", self.version))
    }
}

pub(super) fn version(app: &App) -> Result<(), CliError> {
    app.out.print(&VersionView {
        version: env!("CARGO_PKG_VERSION"),
        commit: option_env!("POLYKEY_BUILD_COMMIT"),
    })
}

/// An error of the runtime.
pub(super) fn no_runtime(error: &std::io::Error) -> CliError {
    CliError::new(Exit::Other, format!("cannot start: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_know_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(script(shell)).unwrap();
            for word in ["cancel-destroy", "rotate-api-key", "rewrap", "ecdsa-p384", "whoami"] {
                assert!(script.contains(word), "{shell:?} {word}");
            }
        }
    }

    #[test]
    fn man_pages_are_written() {
        let dir = tempfile::tempdir().unwrap();
        man(dir.path()).unwrap();
        let page = std::fs::read_to_string(dir.path().join("polykey-key-create.1")).unwrap();
        assert!(page.contains("rotation"));
    }
}
