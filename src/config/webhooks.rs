//! `[webhooks.NAME]`: whom the node tells what became of keys.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use polykey_hsm::SecretSource;
use toml::de::DeValue;

use super::read::{Refused, Section, refuse, string};
use super::telemetry::{may_be_set, on_loopback};
use crate::webhook::Kind;

/// One receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    /// `https://HOST[:PORT]/PATH`; `http://` to loopback alone.
    pub url: Uri,
    /// What it is told, in the order of [`Kind::ALL`].
    pub events: Vec<Kind>,
    /// What its messages are signed with.
    pub secret: SecretSource,
    /// The authorities of its certificate; `None`: those of the system.
    pub ca: Option<(PathBuf, Option<SecretSource>)>,
    /// Headers of every message, by their names.
    pub headers: BTreeMap<String, SecretSource>,
    /// By when each try ends.
    pub timeout: Duration,
}

impl Webhook {
    /// Whether the way there is encrypted.
    #[must_use]
    pub fn tls(&self) -> bool {
        self.url.scheme_str() == Some("https")
    }

    /// The settings in effect, by name.
    pub(super) fn entries(
        &self,
        name: &str,
        time: impl Fn(Duration) -> String,
    ) -> Vec<(String, String)> {
        let Self { url, events, secret, ca, headers, timeout } = self;
        let headers: Vec<String> =
            headers.iter().map(|(name, source)| format!("{name} ({source})")).collect();
        let ca = ca.as_ref().map(|(path, _)| path.display().to_string());
        let events: Vec<&str> = events.iter().map(|kind| kind.name()).collect();
        let all = [
            ("url", url.to_string()),
            ("events", events.join(", ")),
            ("secret", secret.to_string()),
            ("ca", ca.unwrap_or_default()),
            ("headers", headers.join(", ")),
            ("timeout", time(*timeout)),
        ];
        all.into_iter().map(|(key, value)| (format!("webhooks.{name}.{key}"), value)).collect()
    }
}

const URL: &str = "write https://HOST/PATH (http:// to this machine alone), and what is secret in \
                   `headers`";

fn url(value: &DeValue<'_>) -> Result<Uri, Refused> {
    let Ok(uri) = string(value)?.parse::<Uri>() else {
        return refuse("not the address of a receiver", URL);
    };
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let host = uri.host().is_some_and(|host| !host.is_empty());
    if !host || !matches!(uri.scheme_str(), Some("http" | "https")) || authority.contains('@') {
        return refuse("not the address of a receiver", URL);
    }
    if uri.scheme_str() == Some("http") && !on_loopback(&uri) {
        return refuse("its messages would go over the network in the clear", URL);
    }
    Ok(uri)
}

fn events(value: &DeValue<'_>) -> Result<Vec<Kind>, Refused> {
    let remedy = || {
        let all: Vec<_> = Kind::ALL.iter().map(|kind| format!("\"{}\"", kind.name())).collect();
        format!("write a list of {}", all.join(", "))
    };
    let Some(list) = value.as_array() else {
        return refuse(format!("a {}, not a list", value.type_str()), remedy());
    };
    let mut kinds = Vec::new();
    for item in list.iter() {
        match item.get_ref().as_str().and_then(Kind::parse) {
            Some(kind) if kinds.contains(&kind) => {
                return refuse("a word stands in it twice", remedy());
            }
            Some(kind) => kinds.push(kind),
            None => return refuse("not one of its words", remedy()),
        }
    }
    if kinds.is_empty() {
        return refuse("empty", "name what is to be told, or remove the section");
    }
    kinds.sort_unstable();
    Ok(kinds)
}

/// All `[webhooks.NAME]`.
pub(super) fn sections(section: &Section<'_, '_>) -> BTreeMap<String, Webhook> {
    let mut found = BTreeMap::new();
    for (name, at, inner) in section.each() {
        let fit = (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        if !fit {
            section.document.note(
                at,
                "[webhooks]: a section whose name is none of a webhook",
                "name it with 1 to 64 of a-z A-Z 0-9 _ -",
            );
        }
        if let Some(webhook) = inner.and_then(self::section) {
            found.insert(name, webhook);
        }
    }
    found
}

fn section(section: Section<'_, '_>) -> Option<Webhook> {
    let url = section.need("url", "\"https://HOST/PATH\"", url);
    let events = section.get("events", events).unwrap_or_else(|| Kind::ALL.to_vec());
    let secret = section.need_reference("secret", "{ file = \"webhook.secret\" }");
    let ca = section.pem("ca");
    let headers = section.references("headers");
    let timeout = section.duration("timeout", ("100ms", "1m"), Duration::from_secs(10));
    let complain = |key, what: &str, remedy: &str| {
        section.complain(key, (what.to_owned(), remedy.to_owned()));
    };
    if ca.is_some() && url.as_ref().is_some_and(|url| url.scheme_str() == Some("http")) {
        complain("ca", "the receiver has no TLS", "remove it, or write https:// in `url`");
    }
    let own = |name: &str| name.starts_with("webhook-") || name == "user-agent";
    if !headers.keys().all(|name| may_be_set(name) && !own(name)) {
        complain(
            "headers",
            "not the name of a header that may be set",
            "write names in lower case, and none of the transport's or the signature's own",
        );
    }
    section.finish();
    Some(Webhook { url: url?, events, secret: secret?, ca, headers, timeout })
}
