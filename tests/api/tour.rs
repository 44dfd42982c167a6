//! The tour of the README, typed as it stands in an empty directory.
//!
//! It stands between `<!-- tour -->` and `<!-- /tour -->`. In a fence of `sh` every line is a command; in
//! one of `console` the lines that begin with `$ ` are, and the others are what they print, where `…`
//! stands for anything. `… dev` starts the server in the background; the rest is one shell session.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{POLYKEY, Server};

/// A command and the lines that it is said to print.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    command: String,
    output: Vec<String>,
}

fn tour() -> (PathBuf, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = root.join("README.md");
    let path = if readme.exists() { readme } else { root.join("tests/cli/tour.md") };
    let text = std::fs::read_to_string(&path).unwrap();
    let start = text
        .find("<!-- tour -->")
        .unwrap_or_else(|| panic!("{}: no <!-- tour -->", path.display()));
    let length = text[start..]
        .find("<!-- /tour -->")
        .unwrap_or_else(|| panic!("{}: no <!-- /tour -->", path.display()));
    let tour = text[start..start + length].to_owned();
    (path, tour)
}

fn steps(tour: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let (mut fence, mut continued) = (String::new(), false);
    for line in tour.lines() {
        if let Some(language) = line.strip_prefix("```") {
            fence = if fence.is_empty() { format!("-{language}") } else { String::new() };
            continue;
        }
        let command = match fence.as_str() {
            "-sh" | "-bash" | "-shell" if line.trim().is_empty() || line.starts_with('#') => {
                continue;
            }
            "-sh" | "-bash" | "-shell" => Some(line),
            "-console" => line.strip_prefix("$ "),
            _ => continue,
        };
        match (continued, command.unwrap_or(line)) {
            (true, line) => {
                let step = steps.last_mut().unwrap();
                step.command.push('\n');
                step.command.push_str(line);
                continued = line.ends_with('\\');
            }
            (false, line) if command.is_some() => {
                continued = line.ends_with('\\');
                steps.push(Step { command: line.to_owned(), output: Vec::new() });
            }
            (false, line) => steps.last_mut().unwrap().output.push(line.to_owned()),
        }
    }
    steps
}

/// Whether `line` is `pattern`, in which `…` stands for anything.
fn fits(pattern: &str, line: &str) -> bool {
    let parts: Vec<&str> = pattern.trim_end().split('…').collect();
    let (first, rest) = parts.split_first().unwrap();
    let Some(mut line) = line.trim_end().strip_prefix(first) else { return false };
    let Some((last, middle)) = rest.split_last() else { return line.is_empty() };
    for part in middle {
        let Some(at) = line.find(part) else { return false };
        line = &line[at + part.len()..];
    }
    line.ends_with(last)
}

fn is_server(command: &str) -> bool {
    let words: Vec<&str> = command.trim_end_matches('&').split_whitespace().collect();
    (words.first() == Some(&"cargo") && words.contains(&"dev"))
        || words.starts_with(&["polykey", "dev"])
}

#[test]
fn the_tour_of_the_readme_works_as_it_stands() {
    let (path, tour) = tour();
    let steps = steps(&tour);
    assert!(steps.len() >= 5, "{}: {} commands", path.display(), steps.len());
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().join("home");
    let bin = directory.path().join("bin");
    let work = directory.path().join("work");
    for new in [&home, &bin, &work] {
        std::fs::create_dir(new).unwrap();
    }
    std::os::unix::fs::symlink(POLYKEY, bin.join("polykey")).unwrap();
    // What a reader has built with the command above the tour.
    std::fs::create_dir_all(work.join("target/release")).unwrap();
    std::os::unix::fs::symlink(POLYKEY, work.join("target/release/polykey")).unwrap();
    let mut server = None;
    if !steps.iter().any(|s| is_server(&s.command)) {
        server = Some(Server::try_again(&work.join(".polykey")).unwrap());
    }
    let mark = "-- end of step --";
    let mut script = String::from("set -eu\n");
    for step in &steps {
        if is_server(&step.command) {
            // The port of the README may be taken where tests run.
            server = Some(Server::try_again(&work.join(".polykey")).unwrap());
        } else if !step.command.starts_with("git clone") && !step.command.starts_with("cd ") {
            script.push_str(&step.command);
            script.push('\n');
        }
        script.push_str(&format!("echo '{mark}'\n"));
    }
    assert!(server.is_some());
    let system = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(&work)
        .env_clear()
        .env("HOME", &home)
        .env("PATH", format!("{}:{system}", bin.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{out}\n{err}", path.display());
    let parts: Vec<&str> = out.split(&format!("{mark}\n")).collect();
    for (step, printed) in steps.iter().zip(parts) {
        if step.output.is_empty() || is_server(&step.command) {
            continue;
        }
        let printed: Vec<&str> = printed.lines().collect();
        let mut rest = printed.iter();
        for pattern in &step.output {
            if pattern.trim() == "…" {
                continue;
            }
            let found = rest.any(|line| fits(pattern, line));
            assert!(
                found,
                "{}: `{}` did not print {pattern:?} but\n{}",
                path.display(),
                step.command,
                printed.join("\n")
            );
        }
    }
}

#[test]
fn a_tour_is_read_as_it_is_meant() {
    let text =
        "```sh\n# a comment\npolykey dev\na \\\n  b\n```\ntext\n```console\n$ c d\nout …\n```\n";
    let step = |command: &str, output: &[&str]| Step {
        command: command.to_owned(),
        output: output.iter().map(|line| (*line).to_owned()).collect(),
    };
    assert_eq!(
        steps(text),
        [step("polykey dev", &[]), step("a \\\n  b", &[]), step("c d", &["out …"])]
    );
    assert!(fits("key …  ACTIVE", "key 1234  ACTIVE") && fits("…", "x") && fits("a…b…c", "a1b2c"));
    assert!(!fits("key …  ACTIVE", "key 1234  REVOKED") && !fits("a", "ab") && !fits("a…c", "ab"));
    assert!(
        is_server("cargo run --release -- dev")
            && is_server("polykey dev &")
            && !is_server("polykey key list")
    );
}
