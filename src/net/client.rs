//! The client's side of the same TLS: a gRPC channel with a client certificate.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower_service::Service;

use super::tls::{ALPN_H2, TlsConfigError, provider, read_certificates, read_key, read_roots};

/// What a client needs to reach a server. All files are PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFiles {
    /// The authorities that may have issued the server's certificate.
    pub server_ca: PathBuf,
    /// The client's certificate, leaf first.
    pub certificate: PathBuf,
    /// Its private key, readable by its user alone.
    pub key: PathBuf,
}

/// How to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectOptions {
    /// The name the server's certificate must have; `None` = the host of the address.
    pub server_name: Option<String>,
    /// Time for TCP and TLS together.
    pub connect_timeout: Duration,
    /// How often an idle connection is asked whether it lives.
    pub keepalive_interval: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            server_name: None,
            connect_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(30),
        }
    }
}

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The client's files cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsConfigError),
    /// Not an `https://host:port` address.
    #[error("{0}: not an address of the form https://host:port")]
    Address(String),
    /// The server's name is neither a DNS name nor an IP address.
    #[error("{0}: neither a DNS name nor an IP address")]
    ServerName(String),
    /// The connection was not made.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// The address asked for.
        address: String,
        /// What went wrong.
        source: tonic::transport::Error,
    },
}

/// A client's TLS configuration, to be shared by all its channels: sessions are resumed across them.
#[derive(Debug, Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
}

impl ClientTls {
    /// Reads the files.
    ///
    /// # Errors
    /// As [`TlsState::load`](super::tls::TlsState::load).
    pub fn load(files: &ClientFiles) -> Result<Self, TlsConfigError> {
        let chain = read_certificates(&files.certificate)?;
        let key = read_key(&files.key)?;
        let roots = read_roots(&files.server_ca)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsConfigError::Library(error.to_string()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|error| TlsConfigError::Unusable {
                file: files.key.clone(),
                problem: format!("does not go with {}: {error}", files.certificate.display()),
                remedy: "give the key that this certificate was issued for",
            })?;
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        Ok(Self { config: Arc::new(config) })
    }

    /// Takes a configuration made elsewhere; its ALPN must offer `h2`.
    #[must_use]
    pub fn from_config(config: Arc<ClientConfig>) -> Self {
        Self { config }
    }

    /// Connects now.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn connect(
        &self,
        address: &str,
        options: &ConnectOptions,
    ) -> Result<Channel, ClientError> {
        let (endpoint, connector) = self.endpoint(address, options)?;
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|source| ClientError::Connect { address: address.to_owned(), source })
    }

    /// A channel that connects with its first request, and again after it was lost.
    ///
    /// # Errors
    /// [`ClientError::Address`] or [`ClientError::ServerName`].
    pub fn connect_lazy(
        &self,
        address: &str,
        options: &ConnectOptions,
    ) -> Result<Channel, ClientError> {
        let (endpoint, connector) = self.endpoint(address, options)?;
        Ok(endpoint.connect_with_connector_lazy(connector))
    }

    fn endpoint(
        &self,
        address: &str,
        options: &ConnectOptions,
    ) -> Result<(Endpoint, Connector), ClientError> {
        let bad = || ClientError::Address(address.to_owned());
        let uri: Uri = address.parse().map_err(|_| bad())?;
        if uri.scheme_str() != Some("https") {
            return Err(bad());
        }
        let host = uri.host().ok_or_else(bad)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = options.server_name.as_deref().unwrap_or(host).to_owned();
        let server_name =
            ServerName::try_from(name.clone()).map_err(|_| ClientError::ServerName(name))?;
        let endpoint = Endpoint::from(uri)
            .connect_timeout(options.connect_timeout)
            .http2_keep_alive_interval(options.keepalive_interval)
            .keep_alive_while_idle(true);
        Ok((endpoint, Connector { tls: TlsConnector::from(Arc::clone(&self.config)), server_name }))
    }
}

/// Opens TCP and TLS for tonic.
#[derive(Clone)]
struct Connector {
    tls: TlsConnector,
    server_name: ServerName<'static>,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (tls, server_name) = (self.tls.clone(), self.server_name.clone());
        Box::pin(async move {
            let host = uri
                .host()
                .unwrap_or_default()
                .trim_start_matches('[')
                .trim_end_matches(']')
                .to_owned();
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?;
            stream.set_nodelay(true)?;
            let stream = tls.connect(server_name, stream).await?;
            if stream.get_ref().1.alpn_protocol() != Some(ALPN_H2) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the server does not speak HTTP/2",
                ));
            }
            Ok(TokioIo::new(stream))
        })
    }
}
