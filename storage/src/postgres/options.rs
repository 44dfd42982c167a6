//! What an operator chooses, and what is found out about the database's durability.

use std::{fmt, time::Duration};

use super::target::{PasswordSource, Target};
use crate::memory;

/// How a store is opened. None of it is part of the store.
#[derive(Clone)]
pub struct Options {
    /// `postgres://USER@HOST:PORT/DATABASE`, without a password. Several hosts may be named, with
    /// commas between: the first that takes writes is used. Parameters are those of libpq as far as
    /// they make sense here, among them `sslrootcert` (a PEM file; by default, and with `system`, the
    /// system's authorities), `sslcert` and `sslkey` (PEM files), and `sslmode`: `disable`, or any of
    /// `require`, `verify-ca` and `verify-full`, which all verify chain and name. TLS is the default
    /// for all but local sockets.
    pub url: String,
    /// Where the password comes from, if one is needed.
    pub password: Option<PasswordSource>,
    /// The PostgreSQL schema that holds the tables: lower-case letters, digits and `_`, at most 63.
    /// It is created if it is not there. Default `polykey`.
    pub schema: String,
    /// The most connections that read, 1 at least; one more commits. Default 8.
    pub connections: usize,
    /// How many revisions [`Store::changes`](crate::Store::changes) goes back, as long as no other node keeps fewer.
    /// Default 100,000.
    pub changes: u64,
    /// By when each call ends. Default 5 s.
    pub call_timeout: Duration,
    /// By when a connection stands or is given up; counts within [`Self::call_timeout`]. Default 2 s.
    pub connect_timeout: Duration,
    /// How long a snapshot may be read from: it holds back the database's clean-up. Default 60 s.
    pub snapshot_life: Duration,
    /// Between node and database stands a pooler that gives each transaction another session, such as
    /// PgBouncer in transaction mode: nothing is prepared, nothing is set for a session. Default no.
    pub transaction_pooler: bool,
    /// Refuse a database that would lose acknowledged commits in a crash. Default yes.
    pub durable: bool,
    /// The epoch to write under. By default the one that the store has when it is opened first.
    pub epoch: Option<u64>,
}

impl Options {
    /// The defaults, for the database at `url`.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            password: None,
            schema: "polykey".into(),
            connections: 8,
            changes: memory::DEFAULT_CHANGES,
            call_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            snapshot_life: Duration::from_secs(60),
            transaction_pooler: false,
            durable: true,
            epoch: None,
        }
    }

    /// Whether they make sense, as far as that can be told without the database.
    ///
    /// # Errors
    /// What does not. Never repeats the connection string.
    pub fn validate(&self) -> Result<(), String> {
        self.check()?;
        Target::parse(&self.url, None, self.connect_timeout).map(drop)
    }

    /// Quoted, because it may be a reserved word.
    pub(super) fn quoted_schema(&self) -> String {
        format!("\"{}\"", self.schema)
    }

    /// Whether they make sense.
    pub(super) fn check(&self) -> Result<(), String> {
        let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let starts = self.schema.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
        if !starts || self.schema.len() > 63 || !self.schema.chars().all(letters) {
            return Err(
                "a schema's name has 1 to 63 lower-case letters, digits and _, and starts \
                        with no digit"
                    .into(),
            );
        }
        if self.connections == 0 {
            return Err("at least one connection has to read".into());
        }
        Ok(())
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL is left out: nobody has checked it for a password yet.
        f.debug_struct("Options")
            .field("schema", &self.schema)
            .field("connections", &self.connections)
            .field("call_timeout", &self.call_timeout)
            .field("transaction_pooler", &self.transaction_pooler)
            .field("durable", &self.durable)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// What the database does for the durability of a commit, as its settings say. All absent on
/// CockroachDB, which replicates a commit before it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Durability {
    /// `off` lets the last commits be lost in a crash of the server.
    pub synchronous_commit: Option<String>,
    /// Off lets everything be lost in a crash of the machine.
    pub fsync: Option<bool>,
    /// Off lets pages be torn in a crash of the machine.
    pub full_page_writes: Option<bool>,
    /// The standbys that have a commit before it is acknowledged. Without any, promoting a standby
    /// may lose the last commits.
    pub synchronous_standby_names: Option<String>,
}

impl Durability {
    /// The settings with which a crash of the database loses acknowledged commits.
    #[must_use]
    pub fn weaknesses(&self) -> Vec<&'static str> {
        let mut found = Vec::new();
        if self.synchronous_commit.as_deref() == Some("off") {
            found.push("synchronous_commit = off");
        }
        if self.fsync == Some(false) {
            found.push("fsync = off");
        }
        if self.full_page_writes == Some(false) {
            found.push("full_page_writes = off");
        }
        found
    }
}
