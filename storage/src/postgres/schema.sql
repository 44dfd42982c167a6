-- Version 1 of the tables, for PostgreSQL 14 and CockroachDB 23.1. SCHEMA stands for the name of the
-- schema. A statement ends with a semicolon at the end of a line, and changes nothing if it has been run
-- before.

-- One row: which store this is, who may write, and how far it has come.
CREATE TABLE IF NOT EXISTS SCHEMA.head (
    one smallint PRIMARY KEY CHECK (one = 1),
    store_id bytea NOT NULL CHECK (length(store_id) = 16),
    -- Raised by a promotion. A transaction under another epoch leaves no revision, which NOT NULL
    -- refuses.
    epoch bigint NOT NULL,
    revision bigint NOT NULL CHECK (revision >= 0),
    row_count bigint NOT NULL,
    -- Raised to wait for, and then rule out, a transaction whose outcome is unknown.
    openings bigint NOT NULL
);

CREATE TABLE IF NOT EXISTS SCHEMA.rows (
    space smallint NOT NULL,
    key bytea NOT NULL,
    value bytea NOT NULL,
    revision bigint NOT NULL,
    PRIMARY KEY (space, key)
);

-- The rows that each of the last revisions wrote, and the random id of the group that did.
CREATE TABLE IF NOT EXISTS SCHEMA.changes (
    revision bigint PRIMARY KEY,
    group_id bytea NOT NULL,
    spaces smallint[] NOT NULL,
    keys bytea[] NOT NULL
);
