//! `[master_key]` and `[wrappers.NAME]`.

use std::collections::BTreeMap;

use polykey_hsm::aws::AwsKms;
use polykey_hsm::{MasterKeySource, PassphraseParams, QuorumWrapper};

use super::read::{Section, integer, refuse, string};
use super::sections::connection;
use super::{Quorum, Wrapper};
use crate::custody::MASTER_KEY;

#[derive(Clone, Copy)]
enum Kind {
    Local,
    Aws,
    Quorum,
}

/// All `[wrappers.NAME]`.
pub(super) fn sections(section: &Section<'_, '_>) -> BTreeMap<String, Wrapper> {
    let mut found = BTreeMap::new();
    for (name, at, inner) in section.each() {
        let fit = (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
            && name != MASTER_KEY;
        if !fit {
            section.document.note(
                at,
                "[wrappers]: a section whose name is none of a wrapper".to_owned(),
                format!("name it with 1 to 64 of a-z A-Z 0-9 _ -, other than {MASTER_KEY}"),
            );
        }
        let Some(inner) = inner else { continue };
        if let Some(wrapper) = self::section(inner) {
            found.insert(name, wrapper);
        }
    }
    found
}

/// One of them, or `[master_key]`.
pub(super) fn section(section: Section<'_, '_>) -> Option<Wrapper> {
    const WORDS: &str = "write \"local\", \"aws\" or \"quorum\"";
    let kind = section.get("kind", |value| match string(value)? {
        "local" => Ok(Kind::Local),
        "aws" if cfg!(feature = "aws") => Ok(Kind::Aws),
        "aws" => refuse(
            "this build has no AWS KMS backend",
            "write another kind, or run a build with the cargo feature `aws`",
        ),
        "quorum" => Ok(Kind::Quorum),
        "aws-kms" => refuse("not a kind of wrapper", "write \"aws\""),
        _ => refuse("not a kind of wrapper", WORDS),
    });
    let wrapper = match kind {
        // What is wrong with the kind is noted; the rest would be judged by the wrong rules.
        None if section.has("kind") => return None,
        None | Some(Kind::Local) => local(&section).map(Wrapper::Local),
        Some(Kind::Aws) => aws(&section).map(Wrapper::Aws),
        Some(Kind::Quorum) => quorum(&section).map(Wrapper::Quorum),
    };
    section.finish();
    wrapper
}

fn aws(section: &Section<'_, '_>) -> Option<AwsKms> {
    let connection = connection(section);
    let key = section.need("key", "\"arn:aws:kms:REGION:ACCOUNT:key/ID\"", |value| {
        Ok(string(value)?.to_owned())
    });
    Some(AwsKms { key: key?, connection })
}

fn quorum(section: &Section<'_, '_>) -> Option<Quorum> {
    let of = section.need("of", "[\"NAME\", \"NAME\"]", |value| {
        let remedy = "write a list of names of wrappers, such as [\"master_key\", \"cloud\"]";
        let Some(list) = value.as_array() else {
            return refuse(format!("a {}, not a list", value.type_str()), remedy);
        };
        let mut names: Vec<String> = Vec::new();
        for item in list.iter() {
            let name = string(item.get_ref())?;
            if names.iter().any(|known| known == name) {
                return refuse("a wrapper stands in it twice", "name each one once");
            }
            names.push(name.to_owned());
        }
        if !(2..=QuorumWrapper::MAX_MEMBERS).contains(&names.len()) {
            return refuse("not 2 to 16 wrappers", remedy);
        }
        Ok(names)
    });
    let threshold = section.need("threshold", "2", |value| integer(value, &(2..=16)));
    let (of, threshold) = (of?, threshold?);
    if usize::from(threshold) > of.len() {
        let said = ("more than there are members".to_owned(), "make it at most as many".to_owned());
        section.complain("threshold", said);
    }
    Some(Quorum { threshold, of })
}

/// Whether each member of a quorum is a wrapper, and no quorum itself.
pub(super) fn check_quorums(
    section: &Section<'_, '_>,
    (name, wrapper): (&str, &Wrapper),
    known: impl Fn(&str) -> Option<bool>,
) {
    let Wrapper::Quorum(Quorum { of, .. }) = wrapper else { return };
    for member in of {
        let said = match known(member) {
            _ if member == name => "a quorum cannot be its own member",
            None => "no wrapper has one of these names",
            Some(true) => "a quorum cannot be a member of a quorum",
            Some(false) => continue,
        };
        let remedy = "name master_key or a section [wrappers.NAME] that is no quorum";
        section.note(format!("[{name}] of: {said}"), remedy);
    }
}

fn local(section: &Section<'_, '_>) -> Option<MasterKeySource> {
    let source = section.reference("source");
    let passphrase = section.reference("passphrase");
    let (has_source, has_passphrase) = (section.has("source"), section.has("passphrase"));
    let default = PassphraseParams::default();
    let argon2 = section.inner("argon2");
    let (least, most) = (PassphraseParams::MIN, PassphraseParams::MAX);
    let range = |least: u32, most: u32| i64::from(least)..=i64::from(most);
    let params = argon2.map_or(default, |inner| {
        let params = PassphraseParams {
            memory_kib: inner.integer(
                "memory_kib",
                range(least.memory_kib, most.memory_kib),
                default.memory_kib,
            ),
            passes: inner.integer("passes", range(least.passes, most.passes), default.passes),
            lanes: inner.integer("lanes", range(least.lanes, most.lanes), default.lanes),
        };
        inner.finish();
        if !has_passphrase {
            section.complain(
                "argon2",
                ("there is no passphrase to stretch".to_owned(), "remove it".to_owned()),
            );
        }
        params
    });
    match (has_source, has_passphrase) {
        (true, true) => section.complain(
            "passphrase",
            (
                "there is a `source` as well".to_owned(),
                "keep one of `source` (a master key) and `passphrase`".to_owned(),
            ),
        ),
        (false, false) => section.complain(
            "source",
            (
                "missing".to_owned(),
                format!("add `source = {{ file = \"master.key\" }}` to [{}]", section.name()),
            ),
        ),
        _ => {}
    }
    match (source, passphrase) {
        (_, Some(from)) => Some(MasterKeySource::Passphrase { from, params }),
        (Some(source), None) => Some(source.into()),
        (None, None) => None,
    }
}
