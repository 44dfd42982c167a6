//! A session: a channel to a server, and calls over it that carry a valid token.

use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::polykey_service_client::PolykeyServiceClient;
use rustls_pki_types::pem::PemObject;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use uuid::Uuid;

use super::failure::{Beneath, Failure, causes};
use super::file;
use super::profile::{Profile, ProfileError};
use super::token::{Binding, Token, TokenCache, TokenError, TokenLock};
use crate::net::client::{ClientTls, ConnectOptions};
use crate::net::tls::TlsConfigError;
use crate::time::Time;

/// Largest answer that is taken, in bytes: a page of 1,000 keys with their policies fits.
pub const MAX_MESSAGE: usize = 64 * 1024 * 1024;
/// Largest API key file, in bytes.
const MAX_API_KEY: u64 = 512;
/// How long a call may take. Generating an RSA key takes seconds on a small machine.
const DEADLINE: Duration = Duration::from_secs(60);
/// Wait before a call is sent again, unless the server says how long.
const AGAIN: Duration = Duration::from_millis(200);
/// Longest wait before a call is sent again.
const AGAIN_AT_MOST: Duration = Duration::from_secs(5);

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There is no usable profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The profile's certificates or key cannot be used.
    #[error(transparent)]
    Files(#[from] TlsConfigError),
    /// The address or server name of the profile is no such thing.
    #[error("{}: {problem}", path.display())]
    Address {
        /// The profile.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// There is no connection.
    #[error("cannot reach {address}: {problem}")]
    Connect {
        /// `host:port`.
        address: String,
        /// The last thing that went wrong beneath.
        problem: String,
        /// Whether nobody listens there.
        refused: bool,
    },
    /// The API key file cannot be used.
    #[error("{}: {source}", path.display())]
    ApiKey {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The server does not let us in.
    #[error("cannot log in at {address}: {failure}")]
    Login {
        /// `host:port`.
        address: String,
        /// What it said.
        failure: Box<Failure>,
    },
    /// The call failed.
    #[error(transparent)]
    Call(Box<Failure>),
    /// The token cache cannot be changed.
    #[error(transparent)]
    Token(#[from] TokenError),
}

/// A connection to a server as the client of a profile. It logs in when a call first needs it.
#[derive(Debug)]
pub struct Session {
    channel: Channel,
    profile: Profile,
    cache: TokenCache,
    binding: Binding,
    current: parking_lot::Mutex<Option<Token>>,
    /// One exchange of tokens at a time in this process; the file lock is for the others.
    exchange: tokio::sync::Mutex<()>,
}

impl Session {
    /// Connects. Nothing is asked of the server yet.
    ///
    /// # Errors
    /// [`ClientError::Files`], [`ClientError::Address`] or [`ClientError::Connect`].
    pub async fn connect(profile: Profile) -> Result<Self, ClientError> {
        use crate::net::client::ClientError as Net;
        let tls = ClientTls::load(&profile.files)?;
        let options = ConnectOptions {
            server_name: profile.server_name.clone(),
            ..ConnectOptions::default()
        };
        let channel = match tls.connect(&profile.address, &options).await {
            Ok(channel) => channel,
            Err(Net::Tls(error)) => return Err(error.into()),
            Err(Net::Connect { source, .. }) => {
                let Beneath { texts, refused, .. } = causes(&source);
                let problem = match texts.into_iter().next_back() {
                    _ if refused => "connection refused".to_owned(),
                    Some(cause) => cause,
                    None => source.to_string(),
                };
                let address = profile.host_port().to_owned();
                return Err(ClientError::Connect { address, problem, refused });
            }
            Err(other) => {
                return Err(ClientError::Address {
                    path: profile.path.clone(),
                    problem: other.to_string(),
                });
            }
        };
        let binding = Binding {
            address: profile.address.clone(),
            client_id: profile.client_id.clone(),
            certificate_sha256: certificate_sha256(&profile)?,
        };
        Ok(Self {
            channel,
            cache: TokenCache::new(profile.token_path()),
            profile,
            binding,
            current: parking_lot::Mutex::new(None),
            exchange: tokio::sync::Mutex::new(()),
        })
    }

    /// The profile.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The channel, for calls without a token.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Makes a call that changes nothing. It is sent again once when the server was away.
    ///
    /// # Errors
    /// [`ClientError::Call`], or what logging in fails with.
    pub async fn read<T, R, F, Fut>(&self, message: T, rpc: F) -> Result<Response<R>, ClientError>
    where
        T: Clone,
        F: Fn(Channel, Request<T>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        self.call(message, None, Some(DEADLINE), rpc).await
    }

    /// Makes a call that changes something, under an idempotency key of its own: it is sent again
    /// once when its outcome is unknown, and takes effect once.
    ///
    /// # Errors
    /// [`ClientError::Call`], or what logging in fails with.
    pub async fn mutate<T, R, F, Fut>(&self, message: T, rpc: F) -> Result<Response<R>, ClientError>
    where
        T: Clone,
        F: Fn(Channel, Request<T>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        self.call(message, Some(Uuid::now_v7()), Some(DEADLINE), rpc).await
    }

    /// Begins a call whose answer is a stream; it has no deadline.
    ///
    /// # Errors
    /// [`ClientError::Call`], or what logging in fails with.
    pub async fn stream<T, R, F, Fut>(&self, message: T, rpc: F) -> Result<Response<R>, ClientError>
    where
        T: Clone,
        F: Fn(Channel, Request<T>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        self.call(message, None, None, rpc).await
    }

    async fn call<T, R, F, Fut>(
        &self,
        message: T,
        idempotency_key: Option<Uuid>,
        deadline: Option<Duration>,
        rpc: F,
    ) -> Result<Response<R>, ClientError>
    where
        T: Clone,
        F: Fn(Channel, Request<T>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        let mut token = self.token(None).await?;
        let (mut exchanged, mut sent_again) = (false, false);
        loop {
            let mut request = Request::new(message.clone());
            if let Some(deadline) = deadline {
                request.set_timeout(deadline);
            }
            request.metadata_mut().insert("authorization", bearer(&token)?);
            if let Some(key) = idempotency_key {
                let key = ascii(&key.to_string())?;
                request.metadata_mut().insert("idempotency-key", key);
            }
            let failure = match rpc(self.channel.clone(), request).await {
                Ok(response) => return Ok(response),
                Err(status) => Failure::from(status),
            };
            match failure.code {
                Code::Unauthenticated if !exchanged => {
                    exchanged = true;
                    token = self.token(Some(&token)).await?;
                }
                Code::Unavailable | Code::Unknown if !sent_again => {
                    sent_again = true;
                    let wait = failure.retry_after.unwrap_or(AGAIN).min(AGAIN_AT_MOST);
                    tokio::time::sleep(wait).await;
                }
                _ => return Err(ClientError::Call(Box::new(failure))),
            }
        }
    }

    /// Logs in now, whatever tokens there are.
    ///
    /// # Errors
    /// [`ClientError::ApiKey`] or [`ClientError::Login`].
    pub async fn login(&self) -> Result<Token, ClientError> {
        let _exchange = self.exchange.lock().await;
        let lock = self.lock().await;
        let token = self.authenticate().await?;
        Ok(self.keep(lock.as_ref(), token))
    }

    /// Forgets the tokens, here and in the cache. They work on until they expire or are revoked.
    ///
    /// # Errors
    /// [`ClientError::Token`].
    pub async fn forget(&self) -> Result<(), ClientError> {
        let _exchange = self.exchange.lock().await;
        *self.current.lock() = None;
        if let Some(lock) = self.lock().await {
            self.cache.clear(&lock)?;
        }
        Ok(())
    }

    /// The tokens in use or in the cache, if there are any for this profile; no call is made.
    #[must_use]
    pub fn cached(&self) -> Option<Token> {
        let current = self.current.lock().clone();
        current.or_else(|| self.cache.read()).filter(|token| token.binding == self.binding)
    }

    /// A token that works: not `refused`, and not about to end.
    async fn token(&self, refused: Option<&Token>) -> Result<Token, ClientError> {
        let usable = |token: &Token| {
            token.is_fresh(now()) && refused.is_none_or(|r| r.access_token != token.access_token)
        };
        let current = self.current.lock().clone();
        if let Some(token) = current.filter(usable) {
            return Ok(token);
        }
        let _exchange = self.exchange.lock().await;
        let current = self.current.lock().clone();
        if let Some(token) = current.filter(usable) {
            return Ok(token);
        }
        let lock = self.lock().await;
        // Only now is it certain that nobody else is using up the refresh token.
        let cached = self.cached();
        if let Some(token) = &cached {
            if usable(token) {
                *self.current.lock() = cached.clone();
                return Ok(token.clone());
            }
            if token.can_refresh(now()) {
                match self.refresh(token).await {
                    Ok(token) => return Ok(self.keep(lock.as_ref(), token)),
                    // Used up, revoked or forgotten: log in anew.
                    Err(failure) if failure.code == Code::Unauthenticated => {}
                    Err(failure) => return Err(self.refused(*failure)),
                }
            }
        }
        let token = self.authenticate().await?;
        Ok(self.keep(lock.as_ref(), token))
    }

    async fn authenticate(&self) -> Result<Token, ClientError> {
        let api_key = match &self.profile.api_key_file {
            None => None,
            Some(path) => Some(
                file::read_secret(path, MAX_API_KEY)
                    .map_err(|source| ClientError::ApiKey { path: path.clone(), source })?,
            ),
        };
        let grant_type = if api_key.is_some() { "api_key" } else { "mtls" };
        let mut request = Request::new(pb::AuthenticateRequest {
            client_id: self.profile.client_id.clone(),
            api_key: api_key.map(|key| (*key).clone()).unwrap_or_default(),
            grant_type: grant_type.to_owned(),
        });
        request.set_timeout(DEADLINE);
        let mut client = PolykeyServiceClient::new(self.channel.clone());
        let answer = client.authenticate(request).await.map_err(|s| self.refused(s.into()))?;
        let answer = answer.into_inner();
        Ok(self.issued(
            answer.access_token,
            answer.expires_in,
            answer.refresh_token,
            answer.refresh_expires_in,
        ))
    }

    async fn refresh(&self, token: &Token) -> Result<Token, Box<Failure>> {
        let mut request =
            Request::new(pb::RefreshTokenRequest { refresh_token: token.refresh_token.clone() });
        request.set_timeout(DEADLINE);
        let mut client = PolykeyServiceClient::new(self.channel.clone());
        let answer = client.refresh_token(request).await;
        let answer = answer.map_err(|status| Box::new(status.into()))?.into_inner();
        Ok(self.issued(
            answer.access_token,
            answer.expires_in,
            answer.refresh_token,
            answer.refresh_expires_in,
        ))
    }

    fn issued(&self, access: String, access_for: i64, refresh: String, refresh_for: i64) -> Token {
        let now = now();
        Token {
            binding: self.binding.clone(),
            access_token: access,
            access_expires_at: now.plus_seconds(access_for).micros(),
            refresh_token: refresh,
            refresh_expires_at: now.plus_seconds(refresh_for).micros(),
        }
    }

    fn keep(&self, lock: Option<&TokenLock>, token: Token) -> Token {
        if let Some(lock) = lock
            && let Err(error) = self.cache.write(lock, &token)
        {
            tracing::warn!(%error, "tokens are not cached");
        }
        *self.current.lock() = Some(token.clone());
        token
    }

    /// The lock of the cache; `None` where its directory cannot be written to, and nothing is cached.
    async fn lock(&self) -> Option<TokenLock> {
        let cache = self.cache.clone();
        match tokio::task::spawn_blocking(move || cache.lock()).await {
            Ok(Ok(lock)) => Some(lock),
            Ok(Err(error)) => {
                tracing::warn!(%error, "tokens are not cached");
                None
            }
            Err(_) => None,
        }
    }

    fn refused(&self, failure: Failure) -> ClientError {
        let address = self.profile.host_port().to_owned();
        ClientError::Login { address, failure: Box::new(failure) }
    }
}

fn now() -> Time {
    SystemTime::now().into()
}

fn certificate_sha256(profile: &Profile) -> Result<String, ClientError> {
    let path = &profile.files.certificate;
    let leaf = rustls_pki_types::CertificateDer::from_pem_file(path).map_err(|_| {
        TlsConfigError::Missing { file: path.clone(), what: "certificate", label: "CERTIFICATE" }
    })?;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &leaf);
    Ok(data_encoding::HEXLOWER.encode(digest.as_ref()))
}

fn bearer(token: &Token) -> Result<MetadataValue<Ascii>, ClientError> {
    let mut value = ascii(&zeroize::Zeroizing::new(format!("Bearer {}", token.access_token)))?;
    value.set_sensitive(true);
    Ok(value)
}

fn ascii(text: &str) -> Result<MetadataValue<Ascii>, ClientError> {
    text.parse().map_err(|_| {
        // Only a server that breaks the contract issues such a token.
        let status = Status::internal("the server's token cannot be sent");
        ClientError::Call(Box::new(status.into()))
    })
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
