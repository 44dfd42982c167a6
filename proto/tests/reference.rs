//! `docs/api-reference.md` is what the `.proto` files say; `POLYKEY_REGENERATE=1` makes it so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod sources;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
};

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    ServiceDescriptorProto,
};
use sources::{ON_DISK, compile, root};

const HEAD: &str = "\
# API reference

Generated from the comments of `proto/polykey/v2/*.proto`; edit those and run
`POLYKEY_REGENERATE=1 cargo test -p polykey-proto --test reference`. How to connect, log in and call:
[integration-guide.md](integration-guide.md).

Fields marked *new* have numbers from 100 on: the published stubs of the first service do not know
them. For those clients they have twins in the metadata of a call:

| metadata | with | stands for |
|---|---|---|
| `idempotency-key` | every mutation | the same call with the same key has the first one's result for 24 hours |
| `polykey-export` | GetKey | `export`: `plain` or `hpke` |
| `polykey-recipient-bin` | GetKey | `export_recipient`: the public key an HPKE export is made to |
| `polykey-exportable` | CreateKey | `exportable`: `true` or `false` |
| `polykey-value-bin` | CreateKey, RotateKey | `value`: a supplied credential |
| `polykey-alias` | CreateKey | `alias` |
| `polykey-expected-revision` | changes of one key | `expected_revision` |
| `polykey-request-id` | every call | names the call in logs and audit; 1 to 64 of `[A-Za-z0-9._:-]` |

Answers carry `polykey-request-id`, and where it applies `polykey-refresh-token`, `polykey-revision`
and `polykey-plaintext-bin`, as trailers.

| code | when |
|---|---|
| UNAUTHENTICATED | no, bad, expired or foreign certificate or token; one text for all |
| PERMISSION_DENIED | the caller may know of it and may not do this |
| NOT_FOUND | there is none, or the caller may not know that there is |
| INVALID_ARGUMENT | a malformed field, with `google.rpc.BadRequest` naming it |
| FAILED_PRECONDITION | revoked, expired, disabled, a version out of bounds: `google.rpc.ErrorInfo` has the reason |
| ABORTED | changed concurrently: read again and retry |
| RESOURCE_EXHAUSTED | over a limit, with `google.rpc.RetryInfo`; without it, and with the reason `KEY_QUOTA`, waiting does not help |
| UNAVAILABLE | the store or a key backend is away, with `google.rpc.RetryInfo` |
| DATA_LOSS | a stored record fails authentication; the request id, nothing else |

The key types and signature schemes, one by one: [algorithms.md](algorithms.md).

Errors come in this order: authentication, the form of the fields, visibility, permission, state.
";

/// Comments by the path of what they stand at.
struct Comments(BTreeMap<Vec<i32>, String>);

impl Comments {
    fn of(file: &FileDescriptorProto) -> Self {
        let locations = &file.source_code_info.as_ref().unwrap().location;
        let text = |l: &prost_types::source_code_info::Location| {
            let comment = [l.leading_comments(), l.trailing_comments()].concat();
            let lines: Vec<&str> = comment.lines().map(str::trim).collect();
            lines.join(" ").trim().to_owned()
        };
        Self(locations.iter().map(|l| (l.path.clone(), text(l))).collect())
    }

    fn at(&self, path: &[i32]) -> &str {
        self.0.get(path).map_or("", String::as_str)
    }
}

fn short(name: &str) -> &str {
    name.trim_start_matches('.').trim_start_matches("polykey.v2.")
}

/// A type as a link where it stands in this page.
fn linked(name: &str, here: &BTreeSet<String>) -> String {
    let name = short(name);
    if here.contains(name) { format!("[{name}](#{})", anchor(name)) } else { name.to_owned() }
}

/// As GitHub makes anchors of headings: lower case, dots dropped.
fn anchor(heading: &str) -> String {
    heading.to_lowercase().replace('.', "")
}

fn entry<'m>(
    field: &FieldDescriptorProto,
    message: &'m DescriptorProto,
) -> Option<&'m DescriptorProto> {
    let name = field.type_name().rsplit('.').next()?;
    message
        .nested_type
        .iter()
        .find(|n| n.name() == name && n.options.as_ref().is_some_and(|o| o.map_entry()))
}

fn scalar(field: &FieldDescriptorProto, here: &BTreeSet<String>) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => linked(field.type_name(), here),
        other => other.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

fn kind(
    field: &FieldDescriptorProto,
    message: &DescriptorProto,
    here: &BTreeSet<String>,
) -> String {
    if let Some(entry) = entry(field, message) {
        let value = scalar(&entry.field[1], here);
        return format!("map of {} to {value}", scalar(&entry.field[0], here));
    }
    let inner = scalar(field, here);
    match field.label() {
        Label::Repeated => format!("repeated {inner}"),
        _ if field.proto3_optional() => format!("optional {inner}"),
        _ if field.oneof_index.is_some() => {
            let oneof = &message.oneof_decl[field.oneof_index() as usize];
            format!("{inner}, one of `{}`", oneof.name())
        }
        _ => inner,
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn service(
    out: &mut String,
    service: &ServiceDescriptorProto,
    path: &[i32],
    comments: &Comments,
    here: &BTreeSet<String>,
) {
    write!(out, "\n## {}\n\n{}\n", service.name(), comments.at(path)).unwrap();
    for (i, method) in service.method.iter().enumerate() {
        let stream = |yes: bool| if yes { "stream of " } else { "" };
        let at = [path, &[2, i as i32]].concat();
        write!(
            out,
            "\n### {}\n\n`/polykey.v2.{}/{}` — {}{} → {}{}\n\n{}\n",
            method.name(),
            service.name(),
            method.name(),
            stream(method.client_streaming()),
            linked(method.input_type(), here),
            stream(method.server_streaming()),
            linked(method.output_type(), here),
            comments.at(&at),
        )
        .unwrap();
    }
}

fn message(
    out: &mut String,
    message: &DescriptorProto,
    name: &str,
    path: &[i32],
    comments: &Comments,
    here: &BTreeSet<String>,
) {
    write!(out, "\n### {name}\n").unwrap();
    if !comments.at(path).is_empty() {
        write!(out, "\n{}\n", comments.at(path)).unwrap();
    }
    if !message.field.is_empty() {
        out.push_str("\n| no. | field | type | |\n|---|---|---|---|\n");
    }
    for (i, field) in message.field.iter().enumerate() {
        let text = comments.at(&[path, &[2, i as i32]].concat());
        let new = if field.number() >= 100 { "*new* " } else { "" };
        writeln!(
            out,
            "| {} | `{}` | {} | {new}{} |",
            field.number(),
            field.name(),
            kind(field, message, here),
            cell(text)
        )
        .unwrap();
    }
    for (i, nested) in message.enum_type.iter().enumerate() {
        let name = format!("{name}.{}", nested.name());
        enumeration(out, nested, &name, &[path, &[4, i as i32]].concat(), comments);
    }
    for (i, nested) in message.nested_type.iter().enumerate() {
        if nested.options.as_ref().is_some_and(|o| o.map_entry()) {
            continue;
        }
        let name = format!("{name}.{}", nested.name());
        self::message(out, nested, &name, &[path, &[3, i as i32]].concat(), comments, here);
    }
}

fn enumeration(
    out: &mut String,
    kind: &EnumDescriptorProto,
    name: &str,
    path: &[i32],
    comments: &Comments,
) {
    write!(out, "\n### {name}\n").unwrap();
    if !comments.at(path).is_empty() {
        write!(out, "\n{}\n", comments.at(path)).unwrap();
    }
    out.push_str("\n| no. | value | |\n|---|---|---|\n");
    for (i, value) in kind.value.iter().enumerate() {
        let text = comments.at(&[path, &[2, i as i32]].concat());
        writeln!(out, "| {} | `{}` | {} |", value.number(), value.name(), cell(text)).unwrap();
    }
}

fn names(message: &DescriptorProto, prefix: &str, out: &mut BTreeSet<String>) {
    let name = format!("{prefix}{}", message.name());
    for nested in &message.enum_type {
        out.insert(format!("{name}.{}", nested.name()));
    }
    for nested in &message.nested_type {
        names(nested, &format!("{name}."), out);
    }
    out.insert(name);
}

fn render() -> String {
    let all = compile();
    let files: Vec<_> = all
        .file
        .iter()
        .filter(|f| !f.package().starts_with(ON_DISK))
        .filter(|f| f.package() == "polykey.v2" || f.package() == "common.v2")
        .collect();
    let mut here = BTreeSet::new();
    for file in &files {
        let prefix = if file.package() == "polykey.v2" { "" } else { "common.v2." };
        file.message_type.iter().for_each(|m| names(m, prefix, &mut here));
        here.extend(file.enum_type.iter().map(|e| format!("{prefix}{}", e.name())));
    }
    let mut out = HEAD.to_owned();
    for first in ["PolykeyService", "KeyLifecycleService", ""] {
        for file in &files {
            let comments = Comments::of(file);
            for (i, s) in file.service.iter().enumerate() {
                let leads = ["PolykeyService", "KeyLifecycleService"].contains(&s.name());
                if s.name() == first || (first.is_empty() && !leads) {
                    service(&mut out, s, &[6, i as i32], &comments, &here);
                }
            }
        }
    }
    for file in &files {
        let (comments, prefix) =
            (Comments::of(file), if file.package() == "polykey.v2" { "" } else { "common.v2." });
        if file.message_type.is_empty() && file.enum_type.is_empty() {
            continue;
        }
        write!(out, "\n## {}\n", file.name()).unwrap();
        for (i, m) in file.message_type.iter().enumerate() {
            message(
                &mut out,
                m,
                &format!("{prefix}{}", m.name()),
                &[4, i as i32],
                &comments,
                &here,
            );
        }
        for (i, e) in file.enum_type.iter().enumerate() {
            enumeration(&mut out, e, &format!("{prefix}{}", e.name()), &[5, i as i32], &comments);
        }
    }
    out
}

#[test]
fn the_api_reference_is_current() {
    let path = root().join("../docs/api-reference.md");
    let fresh = render();
    if std::env::var_os("POLYKEY_REGENERATE").is_some() {
        fs::write(&path, &fresh).unwrap();
        return;
    }
    let stored = fs::read_to_string(&path).unwrap();
    let differs = stored.lines().zip(fresh.lines()).find(|(a, b)| a != b);
    assert!(
        stored == fresh,
        "docs/api-reference.md differs from the .proto files, first at {differs:?}; \
         run POLYKEY_REGENERATE=1 cargo test -p polykey-proto --test reference"
    );
}

#[test]
fn every_call_is_in_the_reference_with_a_text() {
    let text = render();
    let all = compile();
    let mut calls = 0;
    for file in all.file.iter().filter(|f| f.package() == "polykey.v2") {
        for method in file.service.iter().flat_map(|s| &s.method) {
            calls += 1;
            let heading = format!("\n### {}\n", method.name());
            let at = text.find(&heading).unwrap_or_else(|| panic!("{} is missing", method.name()));
            let body = text[at + heading.len()..].split("\n### ").next().unwrap();
            assert!(body.trim().lines().count() >= 3, "{} has no text", method.name());
        }
    }
    assert!(calls >= 23, "{calls} calls");
}
