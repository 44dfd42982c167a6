//! A session of the command line: calls that show that they take long, and lists read page by page.

use std::future::Future;
use std::path::Path;

use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::error::CliError;
use super::progress;
use crate::client::{ClientError, Failure, Profile, Session};

/// A session, and how it is reached.
pub(super) struct Remote {
    pub(super) session: Session,
    waiting: String,
}

impl Remote {
    /// Connects as the profile says.
    pub(super) async fn connect(profile: Option<&Path>) -> Result<Self, CliError> {
        let profile = Profile::find(profile).map_err(ClientError::from)?;
        let waiting = format!("waiting for {}", profile.host_port());
        let connecting = format!("connecting to {}", profile.host_port());
        let session = progress::watch(&connecting, Session::connect(profile)).await?;
        Ok(Self { session, waiting })
    }

    /// A call that changes nothing.
    pub(super) async fn read<T, R, F, Fut>(&self, message: T, rpc: F) -> Result<R, CliError>
    where
        T: Clone,
        F: Fn(Channel, Request<T>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        let answer = progress::watch(&self.waiting, self.session.read(message, rpc)).await?;
        Ok(answer.into_inner())
    }

    /// A call that changes something.
    pub(super) async fn mutate<T, R, F, Fut>(&self, message: T, rpc: F) -> Result<R, CliError>
    where
        T: Clone,
        F: Fn(Channel, Request<T>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        let answer = progress::watch(&self.waiting, self.session.mutate(message, rpc)).await?;
        Ok(answer.into_inner())
    }

    /// A call whose answer is a stream.
    pub(super) async fn stream<T, R, F, Fut>(
        &self,
        message: T,
        rpc: F,
    ) -> Result<Streaming<R>, CliError>
    where
        T: Clone,
        F: Fn(Channel, Request<T>) -> Fut,
        Fut: Future<Output = Result<Response<Streaming<R>>, Status>>,
    {
        let answer = progress::watch(&self.waiting, self.session.stream(message, rpc)).await?;
        Ok(answer.into_inner())
    }
}

/// The next message of a stream.
pub(super) async fn next<R>(stream: &mut Streaming<R>) -> Result<Option<R>, CliError> {
    stream.message().await.map_err(|status| Failure::from(status).into())
}

/// Largest page that a server sends.
const PAGE: usize = 1_000;

/// Reads pages until there are no more, or `limit` things have come.
pub(super) async fn pages<T>(
    limit: Option<usize>,
    mut page: impl AsyncFnMut(i32, String) -> Result<(Vec<T>, String), CliError>,
) -> Result<Vec<T>, CliError> {
    let limit = limit.unwrap_or(usize::MAX);
    let mut all = Vec::new();
    let mut token = String::new();
    while all.len() < limit {
        let size = i32::try_from(PAGE.min(limit - all.len())).unwrap_or(i32::MAX);
        let (things, next) = page(size, token).await?;
        all.extend(things);
        if next.is_empty() {
            break;
        }
        token = next;
    }
    all.truncate(limit);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pages_end_at_the_last_or_at_the_limit() {
        // Page 1 is short, page 2 empty: neither ends the list.
        let numbers = async |limit| {
            pages(limit, async |size, token: String| {
                assert!((1..=1_000).contains(&size));
                Ok(match token.as_str() {
                    "" => (vec![1, 2], "a".to_owned()),
                    "a" => (vec![], "b".to_owned()),
                    _ => (vec![3, 4, 5], String::new()),
                })
            })
            .await
            .unwrap()
        };
        assert_eq!(numbers(None).await, [1, 2, 3, 4, 5]);
        assert_eq!(numbers(Some(3)).await, [1, 2, 3]);
        assert_eq!(numbers(Some(0)).await, [0; 0]);
    }
}
