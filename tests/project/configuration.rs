//! `docs/configuration.md` is what the example says and what the parser answers; `POLYKEY_REGENERATE=1` makes it so.
//!
//! The words are those of `packaging/polykey.example.toml`. Which options there are, what each takes, which are
//! needed and what holds without the others is asked of the parser: it is given every option with a value that
//! it does not take, without it, and with the value of the example.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use polykey::config::{Config, Problem};

use super::packaging::skipped;
use super::root;

/// The least that is a configuration, for what is probed to be part of.
const LEAST: &[(&str, &[(&str, &str)])] = &[
    ("node", &[("data_dir", "\"d\"")]),
    ("listen", &[("certificate", "\"c\""), ("key", "\"k\""), ("client_ca", "\"a\"")]),
    ("master_key", &[("source", "{ file = \"m\" }")]),
];

/// What stands in the place of `source`.
const INSTEAD_OF_SOURCE: &[&str] = &["passphrase", "argon2"];

/// A section of the example, or those of its options that are for one kind.
#[derive(Default)]
struct Part {
    name: String,
    text: String,
    options: Vec<Choice>,
}

/// An option as the example has it.
struct Choice {
    key: String,
    value: String,
    text: String,
}

impl Part {
    /// What the others depend on: `kind = "…"`.
    fn kind(&self) -> Option<&Choice> {
        self.options.iter().find(|option| option.key == "kind")
    }
}

/// The words before the first section, and the sections.
fn parts(example: &str) -> (String, Vec<Part>) {
    let (mut intro, mut parts, mut text) = (None, Vec::<Part>::new(), String::new());
    for line in example.lines() {
        let marked = ["#:", "#?"].iter().find_map(|mark| line.strip_prefix(mark));
        let indented = line.strip_prefix("#     ");
        let content = marked.or(indented).unwrap_or(line).trim();
        let header = content.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        if let Some(name) = header {
            let text = std::mem::take(&mut text);
            parts.push(Part { name: name.to_owned(), text, options: Vec::new() });
        } else if let Some(comment) = line.strip_prefix("# ").filter(|_| indented.is_none()) {
            let _ = write!(text, "{}{comment}", if text.is_empty() { "" } else { " " });
            if let Some(kind) = comment.strip_prefix("With kind = ") {
                let kind = kind.split(',').next().unwrap().to_owned();
                let name = parts.last().unwrap().name.clone();
                let words = std::mem::take(&mut text);
                let choice = Choice { key: "kind".into(), value: kind, text: String::new() };
                parts.push(Part { name, text: words, options: vec![choice] });
            }
        } else if line == "#" {
            text.push_str("\n\n");
        } else if content.is_empty() {
            // The first blank line ends the words about the file; any other one only sets apart.
            intro.get_or_insert_with(|| std::mem::take(&mut text));
        } else {
            let (key, value) = content.split_once(" = ").unwrap_or_else(|| panic!("{line}"));
            let text = std::mem::take(&mut text);
            let option = Choice { key: key.to_owned(), value: value.to_owned(), text };
            parts.last_mut().unwrap().options.push(option);
        }
    }
    (intro.unwrap(), parts)
}

/// The least configuration with `lines` in the section `name`, without its own lines that they replace.
fn with(name: &str, lines: &[(&str, &str)]) -> Result<Config, Vec<Problem>> {
    let mut text = String::new();
    let has = |key: &str| lines.iter().any(|(other, _)| *other == key);
    let replaced = |key: &str| {
        has(key) || key == "source" && INSTEAD_OF_SOURCE.iter().any(|instead| has(instead))
    };
    let sections = LEAST.iter().map(|(section, _)| *section);
    let sections = sections.chain(Some(name).filter(|n| !LEAST.iter().any(|(s, _)| s == n)));
    for section in sections {
        let least = LEAST.iter().find(|(s, _)| *s == section).map_or(&[][..], |(_, lines)| lines);
        let kept = least.iter().filter(|(key, _)| section != name || !replaced(key));
        let added = lines.iter().filter(|_| section == name);
        let _ = writeln!(text, "[{section}]");
        for (key, value) in kept.chain(added) {
            let _ = writeln!(text, "{key} = {value}");
        }
    }
    let parsed = Config::parse(Path::new("/etc/polykey/polykey.toml"), &text);
    parsed.map_err(|errors| errors.0)
}

/// What the parser says of one option.
fn said_of<'p>(problems: &'p [Problem], part: &Part, key: &str) -> Option<&'p Problem> {
    let label = format!("[{}] {key}:", part.name);
    problems.iter().find(|problem| problem.what.starts_with(&label))
}

/// The lines that a section of this kind does not go without, but for `key`.
fn needed<'p>(part: &'p Part, key: &str) -> Vec<(&'p str, &'p str)> {
    let kind: Vec<_> =
        part.kind().into_iter().map(|k| (k.key.as_str(), k.value.as_str())).collect();
    let problems = with(&part.name, &kind).err().unwrap_or_default();
    let missing = |option: &&Choice| {
        said_of(&problems, part, &option.key)
            .is_some_and(|problem| problem.what.contains("missing"))
    };
    let more = part.options.iter().filter(missing);
    let more = more.map(|option| (option.key.as_str(), option.value.as_str()));
    kind.into_iter().chain(more).filter(|(other, _)| *other != key).collect()
}

/// What it takes, in the parser's words.
fn takes(part: &Part, key: &str) -> String {
    let answer = |value| {
        let mut lines = needed(part, key);
        lines.push((key, value));
        let problems = with(&part.name, &lines).err().unwrap_or_default();
        said_of(&problems, part, key).map(|problem| problem.remedy.clone())
    };
    let words = answer("\"?\"").or_else(|| answer("1")).unwrap_or_default();
    let words = words.strip_prefix("write ").unwrap_or(&words);
    match words {
        // The value is one; what it stands beside is not right.
        "it in quotes" | "remove it" | "add `ca`, or remove it" | "add `keep`, or remove it" => {
            "text".to_owned()
        }
        "it as a table { … }" => "a table".to_owned(),
        // Any time within its bounds will do as an example.
        time if time.starts_with("a time from") => {
            time.split(", such as").next().unwrap_or(time).to_owned()
        }
        _ => words.replace("refer to the secret with", "a reference:"),
    }
}

/// What holds when it does not stand there.
fn without(part: &Part, option: &Choice) -> String {
    let key = option.key.as_str();
    let bare = with(&part.name, &needed(part, key));
    let missing =
        bare.as_ref().err().is_some_and(|problems| said_of(problems, part, key).is_some());
    let least = |(section, lines): &(&str, &[(&str, &str)])| {
        *section == part.name && lines.iter().any(|(other, _)| *other == key)
    };
    // The others of its kind are refused without the kind.
    if missing || LEAST.iter().any(least) || key == "kind" && bare.is_err() {
        return "needed".to_owned();
    }
    let example = format!("–, for example `{}`", option.value);
    // One that depends on the machine is not of this page.
    if option.text.contains("(default:") {
        return example;
    }
    // Where a line stands is not what it says.
    let meaning = |parsed: Result<Config, _>| {
        parsed.ok().map(|config| Config { written: BTreeMap::new(), ..config })
    };
    let bare = meaning(bare);
    let same = |value: &String| {
        let mut lines = needed(part, key);
        lines.push((key, value));
        bare.is_some() && meaning(with(&part.name, &lines)) == bare
    };
    // If not what the example has, one of the words that it takes.
    let words = takes(part, key);
    let words = words.split('"').skip(1).step_by(2).map(|word| format!("\"{word}\""));
    match std::iter::once(option.value.clone()).chain(words).find(same) {
        Some(value) => format!("`{value}`"),
        None => example,
    }
}

/// The options that the parser knows in a section of this kind.
fn known(part: &Part) -> Vec<String> {
    let mut lines = needed(part, "");
    lines.push(("xxxxxxxxxxxxxxxx", "1"));
    let problems = with(&part.name, &lines).unwrap_err();
    let list = problems.iter().find_map(|p| p.remedy.strip_prefix("remove it; options are: "));
    list.unwrap_or_else(|| panic!("[{}]: {problems:?}", part.name))
        .split(", ")
        .map(str::to_owned)
        .collect()
}

fn cell(text: &str) -> String {
    text.trim().replace('|', "\\|").replace("\n\n", "<br>")
}

fn page() -> String {
    let example = root().join("packaging/polykey.example.toml");
    let (intro, parts) = parts(&std::fs::read_to_string(example).unwrap());
    let mut page = "# Configuration\n\n<!-- Generated: POLYKEY_REGENERATE=1 cargo test --test project configuration. -->\n\n\
        Every option, from [packaging/polykey.example.toml](../packaging/polykey.example.toml), which is the same as a \
        file to copy. What an option takes and what holds without it is what the program answers. \
        A dash: nothing, and the words say what follows.\n\n"
        .to_owned();
    // The first line says what the file is.
    for words in intro.split("\n\n").skip(1) {
        let _ = writeln!(page, "{}\n", words.trim());
    }
    for part in &parts {
        let kind =
            part.kind().filter(|kind| part.name.contains("wrappers") || kind.text.is_empty());
        let of = kind.map(|kind| format!(", kind = {}", kind.value)).unwrap_or_default();
        let any = ["wrappers", "audit.sinks", "rates", "quotas", "webhooks"];
        let any = any.iter().find(|any| part.name.starts_with(&format!("{any}.")));
        let name = any.map_or_else(|| part.name.clone(), |any| format!("{any}.NAME"));
        let _ = writeln!(page, "## [{name}]{of}\n");
        if !part.text.is_empty() {
            let _ = writeln!(page, "{}\n", part.text.trim());
        }
        page.push_str("| option | takes | without it | |\n|---|---|---|---|\n");
        for option in &part.options {
            let (takes, without) = (takes(part, &option.key), without(part, option));
            let cells =
                [format!("`{}`", option.key), cell(&takes), cell(&without), cell(&option.text)];
            let _ = writeln!(page, "| {} |", cells.join(" | "));
        }
        page.push('\n');
    }
    page
}

/// A build without a backend does not know its options.
fn whole() -> bool {
    cfg!(all(feature = "aws", feature = "postgres"))
}

#[test]
fn the_page_of_the_configuration_is_what_the_example_and_the_parser_say() {
    const TEST: &str = "the_page_of_the_configuration_is_what_the_example_and_the_parser_say";
    if !whole() {
        return skipped(TEST, "this build has not all features");
    }
    let path = root().join("docs/configuration.md");
    let page = page();
    if std::env::var_os("POLYKEY_REGENERATE").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = there.lines().zip(page.lines()).find(|(there, made)| there != made);
    assert!(
        there == page,
        "docs/configuration.md differs from the example and the parser, first at {differs:?}; \
         POLYKEY_REGENERATE=1 cargo test --test project configuration"
    );
}

/// An option that the example leaves out is on no page.
#[test]
fn every_option_of_every_kind_is_documented() {
    const TEST: &str = "every_option_of_every_kind_is_documented";
    if !whole() {
        return skipped(TEST, "this build has not all features");
    }
    let example = std::fs::read_to_string(root().join("packaging/polykey.example.toml")).unwrap();
    let (_, parts) = parts(&example);
    assert!(parts.len() > 15, "{}", parts.len());
    for part in &parts {
        for key in known(part) {
            // What opens the root key has the same options wherever it stands, and so has AWS.
            let wraps =
                |other: &Part| other.name == "master_key" || other.name.contains("wrappers");
            let same = |other: &&Part| other.name == part.name || wraps(other);
            let told = parts.iter().filter(same).flat_map(|p| &p.options).any(|o| o.key == key);
            let inner = format!("{}.{key}.", part.name);
            let told = told || parts.iter().any(|other| other.name.starts_with(&inner));
            assert!(told, "[{}] {key} is not in the example", part.name);
        }
    }
}
