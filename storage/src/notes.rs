//! Short texts beside a store, in the same database and no part of it: copies, replicas and backups leave them out.

use futures::future::BoxFuture;

use crate::ReadError;

/// Texts by their names.
pub trait Notes: Send + Sync {
    /// The text of this name, if there is one.
    ///
    /// # Errors
    /// [`ReadError`].
    fn note<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<String>, ReadError>>;

    /// Puts a text under a name, in place of what was there. Durable on return.
    ///
    /// # Errors
    /// [`ReadError`]; it may be there all the same.
    fn put_note<'a>(&'a self, name: &'a str, text: &'a str)
    -> BoxFuture<'a, Result<(), ReadError>>;
}
