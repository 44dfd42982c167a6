//! What clients rely on stays as it is: names, numbers and types against `contract.txt`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod sources;

use std::{collections::BTreeSet, fmt::Write, fs};

use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use sources::{ON_DISK, compile, root};

/// The files of the published contract. Below `FIRST_NEW` they never change, not even by addition.
const CONTRACT: &[&str] = &[
    "common/v2/common.proto",
    "polykey/v2/auth.proto",
    "polykey/v2/batch_operations.proto",
    "polykey/v2/common.proto",
    "polykey/v2/key_types.proto",
    "polykey/v2/metrics.proto",
    "polykey/v2/service.proto",
    "polykey/v2/single_operations.proto",
    "polykey/v2/stream_operations.proto",
];
/// Enums in those files that the published contract does not have.
const NEW_ENUMS: &[&str] =
    &["KeyState", "KeyVersionState", "KeyOrigin", "KeyPurpose", "ExportMode", "MaterialWrapping"];
/// Where the numbers of new fields and enum values begin.
const FIRST_NEW: i32 = 100;
/// The size of the published contract, so that an emptied golden file is noticed.
const PUBLISHED: Counts = Counts { methods: 23, messages: 63, fields: 286, values: 25 };

#[derive(Debug, PartialEq, Eq, Default)]
struct Counts {
    methods: usize,
    messages: usize,
    fields: usize,
    values: usize,
}

fn wire() -> FileDescriptorSet {
    let mut set = compile();
    set.file.retain(|f| !f.package().starts_with(ON_DISK));
    set
}

fn own(set: &FileDescriptorSet) -> Vec<&FileDescriptorProto> {
    let mut files: Vec<_> =
        set.file.iter().filter(|f| !f.package().starts_with("google.protobuf")).collect();
    files.sort_by_key(|f| f.name());
    files
}

fn dump_message(out: &mut String, file: &str, path: &str, m: &DescriptorProto) {
    for f in &m.field {
        let kind = match f.r#type() {
            Type::Message | Type::Enum => f.type_name().trim_start_matches('.').to_owned(),
            t => t.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
        };
        let label = match (f.label(), f.proto3_optional()) {
            (Label::Repeated, _) => "repeated ",
            (_, true) => "optional ",
            _ => "",
        };
        let oneof = match f.oneof_index {
            Some(i) if !f.proto3_optional() => {
                format!(" oneof {}", m.oneof_decl[usize::try_from(i).unwrap()].name())
            }
            _ => String::new(),
        };
        let map = if m.options.as_ref().is_some_and(|o| o.map_entry()) { " map" } else { "" };
        writeln!(out, "{file} {path} {} {label}{kind} {}{oneof}{map}", f.number(), f.name())
            .unwrap();
    }
    if m.field.is_empty() {
        writeln!(out, "{file} {path} (empty)").unwrap();
    }
    for n in &m.nested_type {
        dump_message(out, file, &format!("{path}.{}", n.name()), n);
    }
    for e in &m.enum_type {
        dump_enum(out, file, &format!("{path}.{}", e.name()), e);
    }
}

fn dump_enum(out: &mut String, file: &str, path: &str, e: &EnumDescriptorProto) {
    for v in &e.value {
        writeln!(out, "{file} {path} {} = {}", v.number(), v.name()).unwrap();
    }
}

/// One line for every field, enum value and method of the wire.
fn dump(set: &FileDescriptorSet) -> String {
    let mut out = String::new();
    for f in own(set) {
        let (file, package) = (f.name(), f.package());
        for m in &f.message_type {
            dump_message(&mut out, file, &format!("{package}.{}", m.name()), m);
        }
        for e in &f.enum_type {
            dump_enum(&mut out, file, &format!("{package}.{}", e.name()), e);
        }
        for s in &f.service {
            for r in &s.method {
                let stream = |on| if on { "stream " } else { "" };
                writeln!(
                    out,
                    "{file} /{package}.{}/{} {}{} -> {}{}",
                    s.name(),
                    r.name(),
                    stream(r.client_streaming()),
                    r.input_type().trim_start_matches('.'),
                    stream(r.server_streaming()),
                    r.output_type().trim_start_matches('.'),
                )
                .unwrap();
            }
        }
    }
    out
}

/// Whether a line of the dump is part of the published contract: in its files, numbered below 100.
fn published(line: &str) -> bool {
    let mut words = line.split(' ');
    let (file, name) = (words.next().unwrap(), words.next().unwrap());
    CONTRACT.contains(&file)
        && !NEW_ENUMS.iter().any(|e| name == format!("polykey.v2.{e}"))
        && (name.starts_with('/')
            || words.next().unwrap().parse::<i32>().is_ok_and(|number| number < FIRST_NEW))
}

fn golden_path() -> std::path::PathBuf {
    root().join("tests/contract.txt")
}

#[test]
fn every_line_of_the_golden_file_still_stands() {
    let now = dump(&wire());
    if std::env::var_os("POLYKEY_REGENERATE").is_some() {
        // Only what is new may be written down: the published part is not ours to change.
        if let Ok(golden) = fs::read_to_string(golden_path()) {
            let kept: Vec<_> = golden.lines().filter(|l| published(l)).collect();
            let fresh: Vec<_> = now.lines().filter(|l| published(l)).collect();
            assert_eq!(kept, fresh, "the published contract cannot be regenerated");
        }
        fs::write(golden_path(), &now).unwrap();
        return;
    }
    let golden = fs::read_to_string(golden_path()).unwrap();
    let (old, new): (BTreeSet<_>, BTreeSet<_>) = (golden.lines().collect(), now.lines().collect());
    let gone: Vec<_> = old.difference(&new).collect();
    let added: Vec<_> = new.difference(&old).collect();
    assert!(gone.is_empty(), "changed or removed: {gone:#?}\nnow: {added:#?}");
    assert!(
        added.is_empty(),
        "not in tests/contract.txt; if meant, run POLYKEY_REGENERATE=1 cargo test -p polykey-proto: \
         {added:#?}"
    );
}

#[test]
fn the_published_part_has_its_published_size() {
    let text = dump(&wire());
    let mut counts = Counts::default();
    let mut messages = BTreeSet::new();
    for line in text.lines().filter(|l| published(l)) {
        let words: Vec<_> = line.split(' ').collect();
        if words[1].starts_with('/') {
            counts.methods += 1;
        } else if words[3] == "=" {
            counts.values += 1;
        } else if !line.ends_with(" map") {
            counts.fields += 1;
            messages.insert(words[1]);
        }
    }
    counts.messages = messages.len();
    assert_eq!(counts, PUBLISHED);
}

#[test]
fn everything_on_the_wire_is_documented() {
    let mut bare = Vec::new();
    for f in own(&wire()) {
        let info = f.source_code_info.as_ref().unwrap();
        let documented: BTreeSet<&[i32]> = info
            .location
            .iter()
            .filter(|l| l.leading_comments.as_ref().is_some_and(|c| !c.trim().is_empty()))
            .map(|l| l.path.as_slice())
            .collect();
        let mut check = |path: &[i32], name: String| {
            if !documented.contains(path) {
                bare.push(format!("{}: {name}", f.name()));
            }
        };
        // Field numbers of descriptor.proto: file 4 messages, 5 enums, 6 services; message 2 fields,
        // 3 nested messages; enum 2 values; service 2 methods.
        for (i, m) in (0..).zip(&f.message_type) {
            check(&[4, i], m.name().to_owned());
            for (j, x) in (0..).zip(&m.field) {
                check(&[4, i, 2, j], format!("{}.{}", m.name(), x.name()));
            }
        }
        for (i, e) in (0..).zip(&f.enum_type) {
            check(&[5, i], e.name().to_owned());
            for (j, v) in (0..).zip(&e.value) {
                check(&[5, i, 2, j], v.name().to_owned());
            }
        }
        for (i, s) in (0..).zip(&f.service) {
            check(&[6, i], s.name().to_owned());
            for (j, r) in (0..).zip(&s.method) {
                check(&[6, i, 2, j], format!("{}.{}", s.name(), r.name()));
            }
        }
    }
    assert!(bare.is_empty(), "without a comment: {bare:#?}");
}
