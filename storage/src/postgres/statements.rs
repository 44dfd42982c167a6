//! Every statement on rows. docs/storage.md argues for each that it is CockroachDB's, too.
//!
//! Rows are found by their primary key alone. Many rows at once travel as arrays, one statement for
//! any number of them.

use tokio_postgres::types::Type;

/// A statement that is prepared once a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Query {
    Head,
    LockHead,
    Old,
    Bump,
    Upsert,
    Delete,
    Change,
    Trim,
    Settle,
    GroupOf,
    TakeOver,
    Get,
    Scan { bounded: bool, backward: bool },
    Count { bounded: bool },
    OldestChange,
    Changes,
    Announce,
    Nodes,
    Beat,
    Strike,
    Note,
    PutNote,
}

/// How many old revisions a [`Query::Trim`] removes at most, and every how many revisions one runs:
/// twice as many as arrive meanwhile, so that a retention lowered by the operator makes no commit
/// slow.
pub(super) const TRIM_STEP: u64 = 32;
pub(super) const TRIM_EVERY: u64 = 16;

impl Query {
    /// What a connection that commits prepares, since what is sent in one go must be prepared before.
    pub(super) const WRITING: [Self; 8] = [
        Self::Head,
        Self::LockHead,
        Self::Old,
        Self::Bump,
        Self::Upsert,
        Self::Delete,
        Self::Change,
        Self::Trim,
    ];
    /// What a connection that reads prepares for the same reason.
    pub(super) const READING: [Self; 4] =
        [Self::Head, Self::Get, Self::OldestChange, Self::Changes];

    /// The text, for tables in `schema`, and the types of its parameters.
    pub(super) fn text(self, schema: &str) -> (String, &'static [Type]) {
        match self {
            Self::Head => (
                format!(
                    "SELECT store_id, epoch, revision, row_count FROM {schema}.head WHERE one = 1"
                ),
                &[],
            ),
            // Writers queue here, before anything is decided.
            Self::LockHead => (
                format!(
                    "SELECT store_id, epoch, revision, row_count FROM {schema}.head WHERE one = 1 \
                     FOR UPDATE"
                ),
                &[],
            ),
            Self::Old => (
                format!(
                    "SELECT t.n, r.revision, CASE WHEN t.v THEN r.value END \
                     FROM unnest($1::int4[], $2::int2[], $3::bytea[], $4::bool[]) AS t (n, s, k, v) \
                     JOIN {schema}.rows AS r ON r.space = t.s AND r.key = t.k"
                ),
                &[Type::INT4_ARRAY, Type::INT2_ARRAY, Type::BYTEA_ARRAY, Type::BOOL_ARRAY],
            ),
            // The fence: where epoch or revision is not the expected one, NULL meets NOT NULL, and
            // the transaction is gone with all that was sent after this.
            Self::Bump => (
                format!(
                    "UPDATE {schema}.head SET \
                     revision = CASE WHEN epoch = $1::int8 AND revision = $2::int8 THEN revision + 1 END, \
                     row_count = row_count + $3::int8 - (SELECT count(*) \
                     FROM unnest($4::int2[], $5::bytea[]) AS t (s, k) \
                     JOIN {schema}.rows AS r ON r.space = t.s AND r.key = t.k) \
                     WHERE one = 1 RETURNING row_count"
                ),
                &[Type::INT8, Type::INT8, Type::INT8, Type::INT2_ARRAY, Type::BYTEA_ARRAY],
            ),
            Self::Upsert => (
                format!(
                    "INSERT INTO {schema}.rows (space, key, value, revision) \
                     SELECT t.s, t.k, t.v, $4::int8 \
                     FROM unnest($1::int2[], $2::bytea[], $3::bytea[]) AS t (s, k, v) \
                     ON CONFLICT (space, key) \
                     DO UPDATE SET value = excluded.value, revision = excluded.revision"
                ),
                &[Type::INT2_ARRAY, Type::BYTEA_ARRAY, Type::BYTEA_ARRAY, Type::INT8],
            ),
            Self::Delete => (
                format!(
                    "DELETE FROM {schema}.rows WHERE (space, key) IN \
                     (SELECT t.s, t.k FROM unnest($1::int2[], $2::bytea[]) AS t (s, k))"
                ),
                &[Type::INT2_ARRAY, Type::BYTEA_ARRAY],
            ),
            Self::Change => (
                format!(
                    "INSERT INTO {schema}.changes (revision, group_id, spaces, keys) \
                     VALUES ($1::int8, $2::bytea, $3::int2[], $4::bytea[])"
                ),
                &[Type::INT8, Type::BYTEA, Type::INT2_ARRAY, Type::BYTEA_ARRAY],
            ),
            Self::Trim => (
                format!(
                    "DELETE FROM {schema}.changes WHERE revision IN (SELECT revision \
                     FROM {schema}.changes WHERE revision <= $1::int8 ORDER BY revision \
                     LIMIT {TRIM_STEP})"
                ),
                &[Type::INT8],
            ),
            Self::Settle => (
                format!(
                    "UPDATE {schema}.head SET openings = openings + 1 \
                     WHERE one = 1 AND epoch = $1::int8"
                ),
                &[Type::INT8],
            ),
            Self::GroupOf => (
                format!("SELECT group_id FROM {schema}.changes WHERE revision = $1::int8"),
                &[Type::INT8],
            ),
            Self::TakeOver => (
                format!("UPDATE {schema}.head SET epoch = epoch + 1 WHERE one = 1 RETURNING epoch"),
                &[],
            ),
            Self::Get => (
                format!(
                    "SELECT key, value, revision FROM {schema}.rows \
                     WHERE space = $1::int2 AND key = $2::bytea"
                ),
                &[Type::INT2, Type::BYTEA],
            ),
            Self::Scan { bounded, backward } => {
                let until = if bounded { " AND key < $4::bytea" } else { "" };
                let order = if backward { " DESC" } else { "" };
                (
                    format!(
                        "SELECT key, value, revision FROM {schema}.rows \
                         WHERE space = $1::int2 AND key >= $2::bytea{until} \
                         ORDER BY key{order} LIMIT $3::int8"
                    ),
                    range_types(bounded),
                )
            }
            Self::Count { bounded } => {
                let until = if bounded { " AND key < $4::bytea" } else { "" };
                (
                    format!(
                        "SELECT count(*) FROM (SELECT key FROM {schema}.rows \
                         WHERE space = $1::int2 AND key >= $2::bytea{until} LIMIT $3::int8) AS t"
                    ),
                    range_types(bounded),
                )
            }
            Self::OldestChange => (format!("SELECT min(revision) FROM {schema}.changes"), &[]),
            Self::Changes => (
                format!(
                    "SELECT revision, spaces, keys FROM {schema}.changes \
                     WHERE revision > $1::int8 ORDER BY revision LIMIT $2::int8"
                ),
                &[Type::INT8, Type::INT8],
            ),
            Self::Announce => (
                format!(
                    "INSERT INTO {schema}.nodes (node, name, seen, beats, since) \
                     VALUES ($1::text, $2::text, 0, 0, now()) ON CONFLICT (node) DO NOTHING"
                ),
                &[Type::TEXT, Type::TEXT],
            ),
            Self::Nodes => {
                (format!("SELECT node, name, seen, beats FROM {schema}.nodes ORDER BY node"), &[])
            }
            Self::Beat => (
                format!(
                    "UPDATE {schema}.nodes SET seen = $2::int8, beats = beats + 1 \
                     WHERE node = $1::text RETURNING beats"
                ),
                &[Type::TEXT, Type::INT8],
            ),
            Self::Strike => (
                format!("DELETE FROM {schema}.nodes WHERE node = $1::text AND beats = $2::int8"),
                &[Type::TEXT, Type::INT8],
            ),
            Self::Note => {
                (format!("SELECT note FROM {schema}.notes WHERE name = $1::text"), &[Type::TEXT])
            }
            Self::PutNote => (
                format!(
                    "INSERT INTO {schema}.notes (name, note) VALUES ($1::text, $2::text) \
                     ON CONFLICT (name) DO UPDATE SET note = excluded.note"
                ),
                &[Type::TEXT, Type::TEXT],
            ),
        }
    }
}

fn range_types(bounded: bool) -> &'static [Type] {
    const TYPES: &[Type] = &[Type::INT2, Type::BYTEA, Type::INT8, Type::BYTEA];
    if bounded { TYPES } else { TYPES.split_at(3).0 }
}
