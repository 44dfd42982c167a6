//! `[master_key]` and `[wrappers.NAME]`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use polykey_hsm::aws::AwsKms;
use polykey_hsm::pkcs11::{KeySelector, MechanismChoice, Pkcs11Config, TokenSelector};
use polykey_hsm::{MasterKeySource, PassphraseParams, QuorumWrapper};

use toml::Spanned;
use toml::de::DeValue;

use super::read::{Section, integer, refuse, string};
use super::sections::connection;
use super::{Pkcs11, Quorum, Wrapper};
use crate::custody::MASTER_KEY;

#[derive(Clone, Copy)]
enum Kind {
    Local,
    Pkcs11,
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
    const WORDS: &str = "write \"local\", \"pkcs11\", \"aws\" or \"quorum\"";
    let kind = section.get("kind", |value| match string(value)? {
        "local" => Ok(Kind::Local),
        "aws" if cfg!(feature = "aws") => Ok(Kind::Aws),
        "aws" => refuse(
            "this build has no AWS KMS backend",
            "write another kind, or run a build with the cargo feature `aws`",
        ),
        "pkcs11" => Ok(Kind::Pkcs11),
        "quorum" => Ok(Kind::Quorum),
        "aws-kms" => refuse("not a kind of wrapper", "write \"aws\""),
        _ => refuse("not a kind of wrapper", WORDS),
    });
    let wrapper = match kind {
        // What is wrong with the kind is noted; the rest would be judged by the wrong rules.
        None if section.has("kind") => return None,
        None | Some(Kind::Local) => local(&section).map(Wrapper::Local),
        Some(Kind::Pkcs11) => pkcs11(&section).map(Wrapper::Pkcs11),
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

fn pkcs11(section: &Section<'_, '_>) -> Option<Pkcs11> {
    let module = section.need_path("module", "\"/usr/lib/softhsm/libsofthsm2.so\"");
    let pin = section.need("pin", "{ file = \"hsm.pin\" }", |value| {
        super::read::reference(section.document, value)
    });
    let text = |inner: &Section<'_, '_>, key| inner.get(key, |v| string(v).map(str::to_owned));
    let missing = |key, example: &str| {
        if !section.has(key) {
            let remedy = format!("add `{key} = {example}` to [{}]", section.name());
            section.complain(key, ("missing".to_owned(), remedy));
        }
    };
    missing("token", "{ label = \"polykey\" }");
    let token = section.inner("token").and_then(|inner| {
        let found = [
            text(&inner, "label").map(TokenSelector::Label),
            text(&inner, "serial").map(TokenSelector::Serial),
            inner.get("slot", |value| integer(value, &(0..=i64::MAX))).map(TokenSelector::Slot),
        ];
        let mut found = found.into_iter().flatten();
        let (one, more) = (found.next(), found.next());
        if one.is_none() || more.is_some() {
            inner.note(
                format!("[{}]: not exactly one of label, serial and slot", inner.name()),
                "name the token by one of them",
            );
        }
        inner.finish();
        one
    });
    missing("key", "{ label = \"kek\" }");
    let key = section.inner("key").and_then(|inner| {
        let label = text(&inner, "label");
        let id = inner.get("id", |value| {
            let hex = string(value)?;
            let id = data_encoding::HEXLOWER_PERMISSIVE.decode(hex.as_bytes());
            id.or_else(|_| refuse("not hexadecimal", "write CKA_ID as \"01af\""))
        });
        if label.is_none() && id.is_none() {
            inner.note(
                format!("[{}]: neither label nor id", inner.name()),
                "name the key by its label, its id, or both",
            );
        }
        inner.finish();
        (label.is_some() || id.is_some()).then_some(KeySelector { label, id })
    });
    let choice = section.get("mechanism", |value| {
        MechanismChoice::from_name(string(value)?).map_or_else(
            || {
                refuse(
                    "not a mechanism",
                    "write \"auto\", \"aes-gcm\", \"aes-kw\", \"aes-kwp\", \"rsa-oaep-sha256\" or \
                     \"rsa-oaep-sha1\"",
                )
            },
            Ok,
        )
    });
    let timeout = section.duration("timeout", ("100ms", "1m"), Pkcs11Config::CALL_TIMEOUT);
    let queue = section.integer("queue", 1..=4096, Pkcs11Config::QUEUE);
    let environment = section.get("environment", |value| {
        let remedy = "write a table of texts, such as { SOFTHSM2_CONF = \"/etc/softhsm2.conf\" }";
        let Some(table) = value.as_table() else {
            return refuse(format!("a {}", value.type_str()), remedy);
        };
        let pair = |(name, value): (&Spanned<Cow<'_, str>>, &Spanned<DeValue<'_>>)| match value
            .get_ref()
            .as_str()
        {
            Some(text) => Ok((name.get_ref().to_string(), text.to_owned())),
            None => refuse("a variable that is no text", remedy),
        };
        table.iter().map(pair).collect::<Result<Vec<_>, _>>()
    });
    let mut token = Pkcs11Config::new(module?, token?, pin?);
    token.mechanism = choice.unwrap_or_default();
    token.call_timeout = timeout;
    token.queue = queue;
    token.environment = environment.unwrap_or_default();
    if let Err(error) = token.check() {
        section.note(format!("[{}]: {error}", section.name()), "correct it");
    }
    Some(Pkcs11 { token, key: key? })
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
