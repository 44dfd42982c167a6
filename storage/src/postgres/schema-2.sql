-- Version 2 of the tables: the nodes that have the store open, each with the last revision of which
-- it remembers nothing older. Not part of the store: copies and backups leave it out.
CREATE TABLE IF NOT EXISTS SCHEMA.nodes (
    node text PRIMARY KEY,
    name text NOT NULL,
    seen bigint NOT NULL,
    beats bigint NOT NULL,
    since timestamptz NOT NULL
);
