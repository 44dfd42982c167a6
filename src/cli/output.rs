//! Everything that goes to standard output and standard error: tables for people, JSON for programs.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use clap::ValueEnum;
use serde::Serialize;

use super::error::{CliError, Exit};

/// The form in which data is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned text for people; it may change.
    #[default]
    Table,
    /// JSON for programs; it only grows.
    Json,
}

/// Data with a form for people.
pub(super) enum Human {
    /// One thing: names and values.
    Record(Vec<(&'static str, String)>),
    /// Several things: a heading and a row for each.
    Rows(&'static [&'static str], Vec<Vec<String>>),
    /// Text as it is.
    Text(String),
    /// One below the other, with an empty line between them.
    Parts(Vec<Human>),
}

/// Data that can be printed in either form.
pub(super) trait View: Serialize {
    /// The form for people.
    fn human(&self) -> Human;
}

/// Standard output in the form asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    pub(super) format: Format,
}

impl Output {
    /// Prints one answer.
    pub(super) fn print(self, view: &impl View) -> Result<(), CliError> {
        let text = match self.format {
            Format::Json => {
                let mut text = serde_json::to_string_pretty(view)
                    .map_err(|e| CliError::new(Exit::Other, e.to_string()))?;
                text.push('\n');
                text
            }
            Format::Table => render(&view.human()),
        };
        write_out(text.as_bytes())
    }

    /// Prints one of many answers: JSON on a line of its own, or the lines given.
    pub(super) fn print_line(self, view: &impl Serialize, line: &str) -> Result<(), CliError> {
        let mut text = match self.format {
            Format::Json => serde_json::to_string(view)
                .map_err(|e| CliError::new(Exit::Other, e.to_string()))?,
            Format::Table => line.to_owned(),
        };
        text.push('\n');
        write_out(text.as_bytes())
    }
}

/// Writes to standard output. A reader that has gone away ends the process in silence.
pub(super) fn write_out(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(CliError::silent(Exit::Ok)),
        Err(error) => Err(CliError::file(Path::new("standard output"), &error)),
    }
}

/// Whether a person reads standard output.
pub(super) fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// A remark for people, on standard error. That nobody reads it is no error.
pub(super) fn remark(text: &str) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// Asks a yes-or-no question at the terminal. Without one, the answer must have been given by `--yes`.
pub(super) fn confirm(question: &str) -> Result<(), CliError> {
    if !io::stdin().is_terminal() {
        return Err(CliError::usage(format!("{question} needs a yes"))
            .hint("Add `--yes` where nobody can be asked."));
    }
    drop(write!(io::stderr().lock(), "{question} [y/N] "));
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .map_err(|error| CliError::file(Path::new("standard input"), &error))?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(CliError::new(Exit::Other, "not confirmed; nothing was done")),
    }
}

/// Text of others, so that it cannot drive the terminal or reorder a line.
pub(super) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.extend(c.escape_unicode());
            }
            c if c.is_control() => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

fn render(human: &Human) -> String {
    match human {
        Human::Parts(parts) => parts.iter().map(render).collect::<Vec<_>>().join("\n"),
        Human::Text(text) => {
            let mut out: String = text.lines().fold(String::new(), |mut out, line| {
                out.push_str(&clean(line));
                out.push('\n');
                out
            });
            if text.is_empty() {
                out.clear();
            }
            out
        }
        Human::Record(fields) => {
            let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
            fields.iter().filter(|(_, value)| !value.is_empty()).fold(
                String::new(),
                |mut out, (name, value)| {
                    // Writing to a String cannot fail.
                    let _infallible = writeln!(out, "{name:width$}  {}", clean(value));
                    out
                },
            )
        }
        Human::Rows(heading, rows) => {
            let heading = heading.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
            let lines: Vec<Vec<String>> = std::iter::once(heading)
                .chain(rows.iter().map(|row| row.iter().map(|cell| clean(cell)).collect()))
                .collect();
            let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
            let widths: Vec<usize> = (0..columns)
                .map(|i| {
                    lines
                        .iter()
                        .filter_map(|l| l.get(i))
                        .map(|c| c.chars().count())
                        .max()
                        .unwrap_or(0)
                })
                .collect();
            let mut out = String::new();
            for line in &lines {
                let padded = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
                out.push_str(padded.collect::<Vec<_>>().join("  ").trim_end());
                out.push('\n');
            }
            out
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_show_no_control_characters() {
        let rows = Human::Rows(
            &["ID", "NAME"],
            vec![vec!["1".into(), "é\u{1b}[31m".into()], vec!["100".into(), String::new()]],
        );
        assert_eq!(render(&rows), "ID   NAME\n1    é\\u{1b}[31m\n100\n");
        let record = Human::Record(vec![
            ("id", "1".into()),
            ("none", String::new()),
            ("longer", "\u{202e}x".into()),
        ]);
        assert_eq!(render(&record), "id      1\nlonger  \\u{202e}x\n");
        assert_eq!(render(&Human::Text("a\r\nb".into())), "a\nb\n");
    }
}
