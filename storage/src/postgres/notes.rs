//! Texts beside a store: the table `notes`, which is made with the first.
//!
//! No version of the tables has it, so that nodes of this version and the one before open one store.

use std::sync::Arc;

use futures::future::BoxFuture;
use tokio_postgres::error::SqlState;

use super::{
    Inner, Postgres,
    failure::Failure,
    group::column,
    joined,
    schema::{self, explained},
    snapshot,
    statements::Query,
};
use crate::{Notes, ReadError};

impl Notes for Postgres {
    fn note<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<String>, ReadError>> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        joined(self.inner.handle.spawn(async move {
            snapshot::with(&inner, &inner.watchers, |lease| {
                let name = name.as_str();
                async move {
                    match lease.connection.query(Query::Note, &[&name]).await {
                        Ok(rows) => rows.first().map(|row| column(row, 0)).transpose(),
                        Err(failure) if missing(&failure) => Ok(None),
                        Err(failure) => Err(failure),
                    }
                }
            })
            .await
        }))
    }

    fn put_note<'a>(
        &'a self,
        name: &'a str,
        text: &'a str,
    ) -> BoxFuture<'a, Result<(), ReadError>> {
        let (inner, name, text) = (Arc::clone(&self.inner), name.to_owned(), text.to_owned());
        joined(self.inner.handle.spawn(async move { put(&inner, &name, &text).await }))
    }
}

async fn put(inner: &Arc<Inner>, name: &str, text: &str) -> Result<(), ReadError> {
    snapshot::with(inner, &inner.watchers, |lease| async move {
        let put = lease.connection.query(Query::PutNote, &[&name, &text]).await;
        match put {
            Err(failure) if missing(&failure) => {
                let options = inner.options();
                let quoted = options.quoted_schema();
                schema::notes(&lease.connection, &quoted, inner.deadline()).await.map_err(
                    |mut failure| {
                        failure.error = explained(failure.error, &options.schema);
                        failure
                    },
                )?;
                lease.connection.query(Query::PutNote, &[&name, &text]).await.map(drop)
            }
            other => other.map(drop),
        }
    })
    .await
}

fn missing(failure: &Failure) -> bool {
    failure.is(&SqlState::UNDEFINED_TABLE)
}
