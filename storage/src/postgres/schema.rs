//! The tables, and how they come to be of this program's version.
//!
//! Several nodes may try at once. What makes tables is a statement by itself (CockroachDB has no
//! transactions of those), does nothing if it has been run, and is repeated where two meet. What
//! writes rows is one transaction for each version, under a lock: the row of `migrations` for version
//! 0, which is written first.

use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use super::{
    SCHEMA,
    connection::Connection,
    failure::{Backoff, Failure, Kind, within},
};
use crate::{StoreError, memory};

/// What leads to each version from the one before it.
const MIGRATIONS: [&str; SCHEMA as usize] =
    [include_str!("schema.sql"), include_str!("schema-2.sql")];

/// Why a schema cannot be worked with.
#[derive(Debug)]
pub(super) enum Refused {
    Newer(u32),
    Failed(Failure),
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Makes the schema this program's version, if it is older or not there.
pub(super) async fn prepare(
    connection: &Connection,
    (schema, quoted): (&str, &str),
    deadline: Instant,
) -> Result<(), Refused> {
    match within(deadline, version(connection, quoted)).await? {
        Some(SCHEMA) => return Ok(()),
        Some(found) if found > SCHEMA => return Err(Refused::Newer(found)),
        Some(_) => {}
        None => {
            let exists =
                format!("SELECT 1 FROM information_schema.schemata WHERE schema_name = '{schema}'");
            // Whoever may not create schemas may be given one.
            if within(deadline, connection.value(&exists)).await?.is_none() {
                let create = format!("CREATE SCHEMA IF NOT EXISTS {quoted}");
                repeated(connection, &create, deadline).await?;
            }
            let table = format!(
                "CREATE TABLE IF NOT EXISTS {quoted}.migrations \
                 (version bigint PRIMARY KEY, applied timestamptz NOT NULL)"
            );
            repeated(connection, &table, deadline).await?;
        }
    }
    // Version 0 is the lock.
    let lock = format!(
        "INSERT INTO {quoted}.migrations (version, applied) VALUES (0, now()) \
         ON CONFLICT (version) DO NOTHING"
    );
    repeated(connection, &lock, deadline).await?;
    let done = within(deadline, version(connection, quoted)).await?.unwrap_or_default();
    for (number, migration) in (1..).zip(MIGRATIONS).filter(|(number, _)| *number > done) {
        for statement in migration.replace("SCHEMA", quoted).split(";\n") {
            repeated(connection, statement, deadline).await?;
        }
        let mut backoff = Backoff::new();
        while let Err(failure) = within(deadline, note(connection, quoted, number)).await {
            let over = within(deadline, connection.batch("ROLLBACK")).await;
            let again = may_repeat(&failure) && over.is_ok();
            if !again || !backoff.pause(deadline).await {
                return Err(failure.into());
            }
        }
    }
    Ok(())
}

/// Makes the table of notes, which no version of the tables has.
pub(super) async fn notes(
    connection: &Connection,
    quoted: &str,
    deadline: Instant,
) -> Result<(), Failure> {
    let table = format!(
        "CREATE TABLE IF NOT EXISTS {quoted}.notes (name text PRIMARY KEY, note text NOT NULL)"
    );
    repeated(connection, &table, deadline).await
}

// The version of the tables; None if there are none.
async fn version(connection: &Connection, quoted: &str) -> Result<Option<u32>, Failure> {
    let text = format!("SELECT max(version) FROM {quoted}.migrations");
    match connection.value(&text).await {
        Ok(found) => {
            let found = found.as_deref().unwrap_or("0").parse();
            found.map(Some).map_err(|_| Failure::damaged("the version of the tables"))
        }
        Err(failure)
            if failure.is(&SqlState::UNDEFINED_TABLE)
                || failure.is(&SqlState::INVALID_SCHEMA_NAME) =>
        {
            Ok(None)
        }
        Err(failure) => Err(failure),
    }
}

// Under the lock, the rows that a version begins with, and that it is done; unless it is.
async fn note(connection: &Connection, quoted: &str, number: u32) -> Result<(), Failure> {
    connection.batch("BEGIN ISOLATION LEVEL SERIALIZABLE").await?;
    let lock = format!("UPDATE {quoted}.migrations SET applied = now() WHERE version = 0");
    connection.batch(&lock).await?;
    if version(connection, quoted).await?.unwrap_or_default() < number {
        if number == 1 {
            let id = memory::random_id().map_err(Failure::answer)?;
            let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
            let head = format!(
                "INSERT INTO {quoted}.head \
                 (one, store_id, epoch, revision, row_count, openings) \
                 VALUES (1, decode('{id}', 'hex'), 1, 0, 0, 0)"
            );
            connection.batch(&head).await?;
        }
        let note =
            format!("INSERT INTO {quoted}.migrations (version, applied) VALUES ({number}, now())");
        connection.batch(&note).await?;
    }
    connection.batch("COMMIT").await
}

// Runs a statement that is done if another node is doing it.
async fn repeated(connection: &Connection, text: &str, deadline: Instant) -> Result<(), Failure> {
    let mut backoff = Backoff::new();
    loop {
        match within(deadline, connection.batch(text)).await {
            Err(failure) if may_repeat(&failure) && backoff.pause(deadline).await => {}
            other => return other,
        }
    }
}

// Two nodes have met. `IF NOT EXISTS` is no help while the other has not committed.
fn may_repeat(failure: &Failure) -> bool {
    const MET: [SqlState; 4] = [
        SqlState::UNIQUE_VIOLATION,
        SqlState::DUPLICATE_SCHEMA,
        SqlState::DUPLICATE_TABLE,
        SqlState::DUPLICATE_OBJECT,
    ];
    // PostgreSQL's "tuple concurrently updated".
    let internal = failure.is(&SqlState::INTERNAL_ERROR);
    internal || failure.kind == Kind::Serialization || MET.iter().any(|code| failure.is(code))
}

/// What a role lacks that may not make the tables.
pub(super) fn explained(error: StoreError, schema: &str) -> StoreError {
    match error {
        StoreError::Refused(why) => StoreError::Refused(format!(
            "{why}; the role has to own the schema {schema}, or be able to create it, when a new \
             version makes its tables"
        )),
        other => other,
    }
}
