//! `[storage]`: a file, or a database that several nodes share.

use std::time::Duration;

use super::read::{Section, refuse, string};
use super::{Database, Node, Storage, WhenFenced};

/// The section, which need not be there.
pub(super) fn storage(section: Section<'_, '_>, node: Option<&Node>) -> Option<Storage> {
    let database = section.get("kind", |value| match string(value)? {
        "redb" => Ok(false),
        "memory" => refuse(
            "a store that forgets everything is not offered",
            "write \"redb\"; to lose it on purpose, put `path` on a tmpfs",
        ),
        "postgres" if cfg!(feature = "postgres") => Ok(true),
        "postgres" => refuse(
            "this build knows no databases",
            "run one with the cargo feature `postgres`, or write \"redb\"",
        ),
        _ => refuse("not a kind of store", "write \"redb\" or \"postgres\""),
    });
    let changes = section.integer("changes", 1_000..=10_000_000, 100_000);
    let default = || Some(node?.data_dir.join("polykey.redb"));
    let storage = if database == Some(true) {
        let database = Some(self::database(&section)?);
        let path = default().unwrap_or_default();
        Storage { path, database, cache_mib: 32, changes, reserve_mib: 0 }
    } else {
        Storage {
            path: section.path("path").or_else(default).unwrap_or_default(),
            database: None,
            cache_mib: section.integer("cache_mib", 1..=65_536, 32),
            changes,
            reserve_mib: section.integer("reserve_mib", 0..=1_048_576, 64),
        }
    };
    section.finish();
    Some(storage)
}

fn database(section: &Section<'_, '_>) -> Option<Database> {
    let url = section.need("url", "\"postgres://USER@HOST/DATABASE\"", |value| {
        let url = string(value)?;
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let Some(rest) = rest else {
            return refuse(
                "not a connection string",
                "write \"postgres://USER@HOST:PORT/DATABASE\"",
            );
        };
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        // Up to the last one: a password may hold any other.
        let user = place.rsplit_once('@').map_or("", |(user, _)| user);
        let parameters = query.to_ascii_lowercase();
        if user.contains([':', '/'])
            || query.contains('@')
            || parameters.contains("pass")
            || parameters.contains("%70")
        {
            return refuse(
                "a connection string with a password in it",
                "leave it out, and write password = { file = \"PATH\" }",
            );
        }
        Ok(url.to_owned())
    });
    let schema = section.get("schema", |value| {
        let name = string(value)?;
        let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let starts = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
        if starts && name.len() <= 63 && name.chars().all(letters) {
            Ok(name.to_owned())
        } else {
            refuse("not the name of a schema", "write 1 to 63 of a-z, 0-9 and _, no digit first")
        }
    });
    let name = section.get("name", |value| {
        let name = string(value)?;
        let printable =
            !name.is_empty() && name.len() <= 64 && name.chars().all(|c| c.is_ascii_graphic());
        if printable { Ok(name.to_owned()) } else { refuse("not a name", "write 1 to 64 letters") }
    });
    let when_fenced = section.get("when_fenced", |value| match string(value)? {
        "refuse" => Ok(WhenFenced::Refuse),
        "read" => Ok(WhenFenced::Read),
        _ => refuse("not a way to go on", "write \"refuse\" or \"read\""),
    });
    let password = section.reference("password");
    let connections = section.integer("connections", 2..=200, 8);
    let call_timeout = section.duration("call_timeout", ("100ms", "60s"), Duration::from_secs(5));
    let freshness = section.duration("freshness", ("200ms", "1s"), Duration::from_secs(1));
    let transaction_pooler = section.boolean("transaction_pooler", false);
    let durable = section.boolean("durable", true);
    let strict = section.boolean("strict", false);
    Some(Database {
        url: url?,
        password,
        schema: schema.unwrap_or_else(|| "polykey".to_owned()),
        connections,
        call_timeout,
        transaction_pooler,
        durable,
        name,
        freshness,
        strict,
        when_fenced: when_fenced.unwrap_or_default(),
    })
}
