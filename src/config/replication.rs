//! `[replication]`: the database that a node with a store of its own ships it to.

use std::time::Duration;

use polykey_hsm::SecretSource;

use super::read::{Section, refuse, string};

/// `[replication]`
#[derive(Clone, PartialEq, Eq)]
pub struct Replication {
    /// `postgres://USER@HOST:PORT/DATABASE?PARAMETERS`, without a password.
    pub target: String,
    /// The password.
    pub password: Option<SecretSource>,
    /// The schema of the tables.
    pub schema: String,
    /// Whether a commit waits for the target.
    pub mode: Mode,
    /// How long it does.
    pub timeout: Duration,
    /// How far the target may be behind before health says so.
    pub max_lag: Duration,
    /// Whether a node whose target was promoted goes on reading.
    pub reads_when_fenced: bool,
    /// Between node and database stands a pooler that gives each transaction another session.
    pub transaction_pooler: bool,
    /// Refuse a database that would lose acknowledged commits in a crash.
    pub durable: bool,
}

/// When a commit is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Once it is durable here.
    Async,
    /// Once it is durable here and on the target; while that is away, none is taken.
    SyncOrRefuse,
    /// Once it is durable here and on the target; while that is away, once it is durable here.
    SyncOrDegrade,
}

impl std::fmt::Debug for Replication {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The target is left out: in a build that knows no databases nobody has checked it for a password.
        f.debug_struct("Replication").field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl Replication {
    /// The settings in effect, by name.
    pub(super) fn entries(&self, time: impl Fn(Duration) -> String) -> Vec<(&'static str, String)> {
        let Self {
            target,
            password,
            schema,
            mode,
            timeout,
            max_lag,
            reads_when_fenced,
            transaction_pooler,
            durable,
        } = self;
        let (mode, when_away) = match mode {
            Mode::Async => ("async", ""),
            Mode::SyncOrRefuse => ("sync", "refuse"),
            Mode::SyncOrDegrade => ("sync", "degrade"),
        };
        let password = password.as_ref().map(ToString::to_string).unwrap_or_default();
        vec![
            ("replication.target", target.clone()),
            ("replication.password", password),
            ("replication.schema", schema.clone()),
            ("replication.mode", mode.to_owned()),
            ("replication.when_away", when_away.to_owned()),
            ("replication.timeout", time(*timeout)),
            ("replication.max_lag", time(*max_lag)),
            (
                "replication.when_fenced",
                if *reads_when_fenced { "read" } else { "stop" }.to_owned(),
            ),
            ("replication.transaction_pooler", transaction_pooler.to_string()),
            ("replication.durable", durable.to_string()),
        ]
    }
}

pub(super) fn section(section: Section<'_, '_>) -> Option<Replication> {
    if !section.present() {
        return None;
    }
    if !cfg!(feature = "postgres") {
        section.note(
            "[replication]: this build knows no databases",
            "remove the section, or run a build with the cargo feature `postgres`",
        );
    }
    let schema = section.get("schema", |value| string(value).map(str::to_owned));
    let schema = schema.unwrap_or_else(|| "polykey".to_owned());
    let target = section.need("target", "\"postgres://USER@HOST:PORT/DATABASE\"", |value| {
        let target = string(value)?;
        match sensible(target, &schema) {
            Ok(()) => Ok(target.to_owned()),
            Err(why) => refuse(
                why,
                "write postgres://USER@HOST:PORT/DATABASE?PARAMETERS, and refer to the password in \
                 `password`",
            ),
        }
    });
    let password = section.reference("password");
    let sync = section.word("mode", &[("async", false), ("sync", true)], false);
    let words = [("refuse", Mode::SyncOrRefuse), ("degrade", Mode::SyncOrDegrade)];
    let when_away = section.word("when_away", &words, Mode::SyncOrRefuse);
    if !sync && section.has("when_away") {
        section.complain(
            "when_away",
            (
                "nothing waits for the target".to_owned(),
                "remove it, or write mode = \"sync\"".to_owned(),
            ),
        );
    }
    let replication = Replication {
        target: target.unwrap_or_default(),
        password,
        schema,
        mode: if sync { when_away } else { Mode::Async },
        timeout: section.duration("timeout", ("100ms", "30s"), Duration::from_secs(2)),
        max_lag: section.duration("max_lag", ("1s", "24h"), Duration::from_secs(60)),
        reads_when_fenced: section.word("when_fenced", &[("stop", false), ("read", true)], false),
        transaction_pooler: section.boolean("transaction_pooler", false),
        durable: section.boolean("durable", true),
    };
    section.finish();
    Some(replication)
}

#[cfg(feature = "postgres")]
fn sensible(target: &str, schema: &str) -> Result<(), String> {
    let mut options = polykey_storage::postgres::Options::new(target);
    schema.clone_into(&mut options.schema);
    options.validate()
}

#[cfg(not(feature = "postgres"))]
fn sensible(_: &str, _: &str) -> Result<(), String> {
    Ok(())
}
