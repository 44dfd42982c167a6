//! Every limit on what a request may carry, in one place, with the words that refuse it.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, FieldViolation};

/// Bytes of a description.
pub const DESCRIPTION: usize = 1024;
/// Tags of a key.
pub const TAGS: usize = 50;
/// Bytes of a tag's key, its first letter included.
pub const TAG_KEY: usize = 128;
/// Bytes of a tag's value.
pub const TAG_VALUE: usize = 256;
/// Authorized contexts of a key.
pub const CONTEXTS: usize = 100;
/// Bytes of an authorized context.
pub const CONTEXT: usize = 256;
/// Access policies of a key.
pub const POLICIES: usize = 50;
/// Items of a batch.
pub const BATCH: usize = 1000;
/// Keys of a page, at most, and if nothing is said.
pub const PAGE: u32 = 1000;
/// See [`PAGE`].
pub const PAGE_DEFAULT: u32 = 100;
/// Characters of an idempotency key.
pub const IDEMPOTENCY_KEY: usize = 128;
/// Bytes of a revocation reason.
pub const REASON: usize = 1024;
/// Bytes of an alias, `alias/` included.
pub const ALIAS: usize = 256;
/// Aliases of a key.
pub const ALIASES: usize = 50;
/// Bytes of a supplied value.
pub const VALUE: usize = 4096;
/// Entries of `generation_params`, and bytes of a value there.
pub const PARAMS: usize = 16;
/// Bytes of a claim about the caller, and entries of a list or map of them.
pub const CLAIM: usize = 256;
/// See [`CLAIM`].
pub const CLAIMS: usize = 50;
/// Bytes of the caller's own id of a request.
pub const CORRELATION_ID: usize = 128;
/// Shortest and longest rotation period, in seconds: one hour to ten years.
pub const ROTATION_PERIOD: std::ops::RangeInclusive<i64> = 3600..=315_576_000;
/// Longest grace period, in seconds: ten years.
pub const GRACE: i32 = 315_576_000;
/// Bytes of a request message: 4 MiB of payload and 64 KiB for the rest.
pub const MESSAGE: usize = 4 * 1024 * 1024 + 64 * 1024;
/// Bytes of a plaintext or message in one call.
pub const PLAINTEXT: usize = 4 * 1024 * 1024;
/// Pairs of an encryption context, and bytes of its names and values together.
pub const BOUND_PAIRS: usize = 32;
/// See [`BOUND_PAIRS`].
pub const BOUND_BYTES: usize = 8 * 1024;
/// Bytes of additional authenticated data.
pub const ADDITIONAL_DATA: usize = 64 * 1024;
/// Bytes of the salt of a derivation.
pub const SALT: usize = 1024;
/// Bytes of a signature that is to be verified.
pub const SIGNATURE: usize = 8 * 1024;
/// Bytes of a public key, or of wrapped key material.
pub const PUBLIC_KEY: usize = 8 * 1024;
/// Bytes of imported material in its protection.
pub const MATERIAL: usize = 16 * 1024;
/// Bytes of the reference of an operation.
pub const REFERENCE: usize = 256;
/// The data classifications there are.
pub const CLASSIFICATIONS: [&str; 5] = ["", "public", "internal", "confidential", "secret"];
/// Rows and bytes that one page looks at before it returns short.
pub const PAGE_SCAN: usize = 20_000;
/// Counts are exact up to here; this number then means "at least".
pub const COUNT: usize = 10_000;

/// Collects what is wrong with a request, so that all of it is said at once.
#[derive(Debug, Default)]
pub struct Violations(Vec<FieldViolation>);

impl Violations {
    /// Nothing wrong so far.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes one.
    pub fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        // A stranger's request must not make an answer of any size.
        if self.0.len() < 32 {
            self.0.push(FieldViolation::new(field.into(), description.into()));
        }
    }

    /// Notes one unless `ok`.
    pub fn check(&mut self, ok: bool, field: &str, description: &str) {
        if !ok {
            self.add(field, description);
        }
    }

    /// Whether nothing was noted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// # Errors
    /// [`Error::Invalid`] if anything was noted.
    pub fn finish(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Invalid(self.0)) }
    }
}

/// Checks a description.
pub fn description(v: &mut Violations, field: &str, text: &str) {
    v.check(text.len() <= DESCRIPTION, field, "must have at most 1024 bytes");
}

/// Whether `key` is `^[a-zA-Z][a-zA-Z0-9_.:/-]{0,127}$`.
#[must_use]
pub fn is_tag_key(key: &str) -> bool {
    let mut bytes = key.bytes();
    key.len() <= TAG_KEY
        && bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.:/-".contains(&b))
}

/// Checks tags.
pub fn tags(v: &mut Violations, field: &str, tags: &BTreeMap<String, String>) {
    v.check(tags.len() <= TAGS, field, "must have at most 50 entries");
    for (key, value) in tags.iter().take(TAGS + 1) {
        if !is_tag_key(key) {
            v.add(
                format!("{field}[{}]", shown(key)),
                "the key must match ^[a-zA-Z][a-zA-Z0-9_.:/-]{0,127}$",
            );
        }
        if value.len() > TAG_VALUE {
            v.add(format!("{field}[{}]", shown(key)), "the value must have at most 256 bytes");
        }
    }
}

/// Whether `text` is `^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,255}$`.
#[must_use]
pub fn is_context(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= CONTEXT
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"._:/@-".contains(&b))
}

/// Checks authorized contexts.
pub fn contexts(v: &mut Violations, field: &str, contexts: &[String]) {
    v.check(contexts.len() <= CONTEXTS, field, "must have at most 100 entries");
    let mut seen = BTreeSet::new();
    for (i, context) in contexts.iter().take(CONTEXTS + 1).enumerate() {
        if !is_context(context) {
            v.add(format!("{field}[{i}]"), "must match ^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,255}$");
        }
        if !seen.insert(context) {
            v.add(format!("{field}[{i}]"), "stands there twice");
        }
    }
}

/// Checks a data classification.
pub fn classification(v: &mut Violations, field: &str, text: &str) {
    v.check(
        CLASSIFICATIONS.contains(&text),
        field,
        "must be empty, public, internal, confidential or secret",
    );
}

/// Checks an alias without its `alias/`: AWS's characters, `aws/` and `polykey/` reserved.
pub fn alias(v: &mut Violations, field: &str, name: &str) {
    let ok = !name.is_empty()
        && name.len() + "alias/".len() <= ALIAS
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":/_-".contains(&b));
    v.check(ok, field, "must be alias/ and then 1 to 250 of [A-Za-z0-9:/_-]");
    let reserved = name.starts_with("aws/") || name.starts_with("polykey/");
    v.check(!reserved, field, "alias/aws/ and alias/polykey/ are reserved");
}

/// Checks a revocation reason.
pub fn reason(v: &mut Violations, field: &str, text: &str) {
    v.check(text.len() <= REASON, field, "must have at most 1024 bytes");
}

/// A name as it may be shown in an answer: bounded, control characters escaped.
#[must_use]
pub fn shown(text: &str) -> String {
    let mut end = text.len().min(64);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().escape_debug().to_string()
}

/// A text of several lines as it may be shown in an answer: bounded, otherwise as it is.
#[must_use]
pub fn shown_text(text: &str) -> String {
    text.chars().take(1024).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(check: impl FnOnce(&mut Violations)) -> bool {
        let mut v = Violations::new();
        check(&mut v);
        v.finish().is_err()
    }

    #[test]
    fn each_limit_holds_at_one_below_at_and_one_above() {
        for (n, bad) in [(1023, false), (1024, false), (1025, true)] {
            assert_eq!(refused(|v| description(v, "d", &"x".repeat(n))), bad, "description {n}");
            assert_eq!(refused(|v| reason(v, "r", &"x".repeat(n))), bad, "reason {n}");
        }
        for (n, bad) in [(49, false), (50, false), (51, true)] {
            let map = (0..n).map(|i| (format!("k{i}"), String::new())).collect();
            assert_eq!(refused(|v| tags(v, "tags", &map)), bad, "tags {n}");
        }
        for (n, bad) in [(127, false), (128, false), (129, true)] {
            assert_eq!(is_tag_key(&"k".repeat(n)), !bad, "tag key {n}");
        }
        for (n, bad) in [(255, false), (256, false), (257, true)] {
            let map = BTreeMap::from([("k".into(), "v".repeat(n))]);
            assert_eq!(refused(|v| tags(v, "tags", &map)), bad, "tag value {n}");
            assert_eq!(is_context(&"c".repeat(n)), !bad, "context {n}");
        }
        for (n, bad) in [(99, false), (100, false), (101, true)] {
            let list: Vec<String> = (0..n).map(|i| format!("c{i}")).collect();
            assert_eq!(refused(|v| contexts(v, "contexts", &list)), bad, "contexts {n}");
        }
        for (n, bad) in [(249, false), (250, false), (251, true)] {
            assert_eq!(refused(|v| alias(v, "alias", &"a".repeat(n))), bad, "alias {n}");
        }
    }

    #[test]
    fn names_take_only_their_characters() {
        for bad in ["", "1a", "-a", "a b", "ä", "a\0", "a=b"] {
            assert!(!is_tag_key(bad), "{bad:?}");
        }
        for bad in ["", "-a", ".a", "a b", "a*", "a,b", "ROOT\n", "ä"] {
            assert!(!is_context(bad), "{bad:?}");
        }
        for bad in ["", "a b", "aws/x", "polykey/x", "a.b", "ä"] {
            assert!(refused(|v| alias(v, "alias", bad)), "{bad:?}");
        }
        for good in CLASSIFICATIONS {
            assert!(!refused(|v| classification(v, "c", good)));
        }
        assert!(refused(|v| classification(v, "c", "Secret")));
    }
}
