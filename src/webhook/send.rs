//! One message to one receiver: over a connection of its own, signed, no redirect followed.
//!
//! The signature is that of Standard Webhooks 1.0.0 (standard-webhooks/spec): HMAC-SHA-256 over
//! `id.timestamp.body`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use bytes::Bytes;
use data_encoding::BASE64;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use http::{Request, StatusCode};
use http_body_util::Full;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use zeroize::Zeroizing;

use crate::config::Webhook;
use crate::net::tls::{TlsConfigError, provider, roots_in};
use crate::time::Time;

/// What Standard Webhooks puts in front of a secret in base64.
const PREFIX: &str = "whsec_";
/// Lengths of a secret, in bytes.
const SECRET: std::ops::RangeInclusive<usize> = 24..=64;
/// Longest text of a failure.
const WORDS: usize = 200;
/// Addresses at which clouds tell a machine its secrets and that are not link-local.
const METADATA: [IpAddr; 4] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// Why a webhook cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// Something of its section.
    #[error("[webhooks.{name}] {key}: {why}")]
    Setting {
        /// Its name.
        name: String,
        /// Which setting.
        key: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// Its authorities.
    #[error("[webhooks.{name}] ca: {error}")]
    Authorities {
        /// Its name.
        name: String,
        /// What is wrong.
        error: TlsConfigError,
    },
}

/// What came from references, in their place.
#[derive(Default)]
pub struct Secrets {
    /// What messages are signed with, as it was read.
    pub secret: Zeroizing<Vec<u8>>,
    /// The authorities of the receiver, PEM.
    pub ca: Option<Zeroizing<Vec<u8>>>,
    /// Values of headers, by their names.
    pub headers: Vec<(String, Zeroizing<Vec<u8>>)>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Secrets").field("headers", &names).finish_non_exhaustive()
    }
}

/// What became of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The receiver has it.
    Taken,
    /// It may be taken later.
    Refused(String),
    /// The receiver wants nothing more: 410.
    Gone,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The way to a receiver.
pub struct Sender {
    tls: Option<(TlsConnector, ServerName<'static>)>,
    host: String,
    port: u16,
    authority: String,
    path: String,
    key: hmac::Key,
    headers: Vec<(HeaderName, Zeroizing<Vec<u8>>)>,
    timeout: Duration,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("host", &self.host).finish_non_exhaustive()
    }
}

/// The bytes that messages are signed with: base64 behind `whsec_`, or as they are.
fn key(text: &[u8]) -> Option<hmac::Key> {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    let decoded = match text.strip_prefix(PREFIX.as_bytes()) {
        Some(encoded) => Zeroizing::new(BASE64.decode(encoded).ok()?),
        None => Zeroizing::new(text.to_vec()),
    };
    SECRET.contains(&decoded.len()).then(|| hmac::Key::new(hmac::HMAC_SHA256, &decoded))
}

fn connector(webhook: &Webhook, name: &str, ca: Option<&[u8]>) -> Result<TlsConnector, Unusable> {
    let roots = match (&webhook.ca, ca) {
        (Some((path, _)), Some(text)) => authorities(path, text)
            .map_err(|error| Unusable::Authorities { name: name.to_owned(), error })?,
        _ => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                let why = "the system has no certificate authorities; name those of the receiver";
                return Err(Unusable::Setting { name: name.to_owned(), key: "ca", why });
            }
            roots
        }
    };
    let unusable = |_| Unusable::Setting {
        name: name.to_owned(),
        key: "url",
        why: "this build speaks no TLS",
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

fn authorities(path: &Path, text: &[u8]) -> Result<RootCertStore, TlsConfigError> {
    roots_in(path, text)
}

/// Why nothing is sent to an address, if nothing is. A name is resolved anew for each message, and what
/// is connected to is what was looked at here.
fn forbidden(ip: IpAddr, tls: bool) -> Option<&'static str> {
    let ip = ip.to_canonical();
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if link_local || METADATA.contains(&ip) {
        return Some("an address of the machine's own surroundings, such as a cloud's metadata");
    }
    if ip.is_unspecified() || ip.is_multicast() {
        return Some("not the address of one machine");
    }
    (!tls && !ip.is_loopback()).then_some("without TLS only this machine is spoken to")
}

impl Sender {
    /// A way that connects for each message.
    ///
    /// # Errors
    /// What of the section or of what it refers to cannot be used.
    pub fn new(name: &str, webhook: &Webhook, secrets: Secrets) -> Result<Self, Unusable> {
        let unusable = |key, why| Unusable::Setting { name: name.to_owned(), key, why };
        let host = webhook.url.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = if webhook.tls() {
            let server = ServerName::try_from(host.clone())
                .map_err(|_| unusable("url", "its host is neither a name nor an address"))?;
            let ca = secrets.ca.as_ref().map(|ca| ca.as_slice());
            Some((connector(webhook, name, ca)?, server))
        } else {
            None
        };
        let why = "not `whsec_` and base64, or raw bytes, of a secret of 24 to 64 bytes";
        let key = key(&secrets.secret).ok_or_else(|| unusable("secret", why))?;
        let mut headers = Vec::new();
        for (header, mut value) in secrets.headers {
            let header = HeaderName::from_bytes(header.as_bytes());
            let header = header.map_err(|_| unusable("headers", "not the name of a header"))?;
            while value.last().is_some_and(|byte| matches!(byte, b'\r' | b'\n')) {
                value.pop();
            }
            if HeaderValue::from_bytes(&value).is_err() {
                let why = "a value has characters that a header cannot have";
                return Err(unusable("headers", why));
            }
            headers.push((header, value));
        }
        let port = webhook.url.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
        let path = webhook.url.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let authority = webhook.url.authority().map_or("", |authority| authority.as_str());
        let (authority, timeout) = (authority.to_owned(), webhook.timeout);
        Ok(Self { tls, host, port, authority, path, key, headers, timeout })
    }

    /// Sends a message once. `now` stands in its signature.
    pub(super) async fn send(&self, id: &str, body: &Bytes, now: Time) -> Outcome {
        match tokio::time::timeout(self.timeout, self.attempt(id, body, now)).await {
            Err(_) => Outcome::Refused("no answer in time".to_owned()),
            Ok(Err(why)) => Outcome::Refused(shown(&why)),
            Ok(Ok(StatusCode::GONE)) => Outcome::Gone,
            Ok(Ok(status)) if status.is_success() => Outcome::Taken,
            Ok(Ok(status)) if status.is_redirection() => {
                Outcome::Refused(format!("HTTP {status}: redirects are not followed"))
            }
            Ok(Ok(status)) => Outcome::Refused(format!("HTTP {status}")),
        }
    }

    async fn attempt(&self, id: &str, body: &Bytes, now: Time) -> Result<StatusCode, String> {
        let failed = |error: &dyn std::fmt::Display| error.to_string();
        let stream = self.connect().await?;
        let (mut open, connection) =
            handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
        // It ends with this try, whatever the receiver still says.
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let seconds = now.seconds().to_string();
        let mut request = Request::post(&self.path)
            .header(HOST, &self.authority)
            .header(USER_AGENT, concat!("polykey/", env!("CARGO_PKG_VERSION")))
            .header(CONTENT_TYPE, "application/json")
            .header(CONNECTION, "close")
            .header("webhook-id", id)
            .header("webhook-timestamp", &seconds)
            .header("webhook-signature", self.signature(id, &seconds, body))
            .body(Full::<Bytes>::from(body.clone()))
            .map_err(|error| failed(&error))?;
        for (name, value) in &self.headers {
            // It was tried when it was read.
            if let Ok(mut value) = HeaderValue::from_bytes(value) {
                value.set_sensitive(true);
                request.headers_mut().insert(name.clone(), value);
            }
        }
        let answer = open.send_request(request).await.map_err(|error| failed(&error))?;
        Ok(answer.status())
    }

    fn signature(&self, id: &str, seconds: &str, body: &[u8]) -> String {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [id.as_bytes(), b".", seconds.as_bytes(), b".", body] {
            context.update(part);
        }
        format!("v1,{}", BASE64.encode(context.sign().as_ref()))
    }

    async fn connect(&self) -> Result<Box<dyn Stream>, String> {
        let found = tokio::net::lookup_host((self.host.as_str(), self.port)).await;
        let found = found.map_err(|error| format!("{} has no address: {error}", self.host))?;
        let mut why = format!("{} has no address", self.host);
        for address in found {
            if let Some(forbidden) = forbidden(address.ip(), self.tls.is_some()) {
                why = format!("{}: {forbidden}", address.ip());
                continue;
            }
            match self.connect_to(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => why = format!("{address}: {error}"),
            }
        }
        Err(why)
    }

    async fn connect_to(&self, address: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(match &self.tls {
            None => Box::new(stream),
            Some((tls, name)) => Box::new(tls.connect(name.clone(), stream).await?),
        })
    }
}

/// Words of others, cut and without what would not stand in a line.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(WORDS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_the_specification() {
        // The example of the specification's reference libraries.
        let key = key(b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n").unwrap();
        let sender = Sender {
            tls: None,
            host: String::new(),
            port: 0,
            authority: String::new(),
            path: String::new(),
            key,
            headers: Vec::new(),
            timeout: Duration::ZERO,
        };
        let body = br#"{"test": 2432232314}"#;
        let signature = sender.signature("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", body);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert!(super::key(&[7; 24]).is_some() && super::key(&[7; 23]).is_none());
        assert!(super::key(b"whsec_AAAA").is_none() && super::key(b"whsec_!").is_none());
    }

    #[test]
    fn nothing_goes_to_metadata_services_or_in_the_clear_over_a_network() {
        let goes = |ip: &str, tls| forbidden(ip.parse().unwrap(), tls).is_none();
        for ip in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "fe80::1",
            "fd00:ec2::254",
            "168.63.129.16",
            "100.100.100.200",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!goes(ip, true) && !goes(ip, false), "{ip}");
        }
        for ip in ["10.0.0.7", "192.0.2.1", "2001:db8::1", "fd12::1"] {
            assert!(goes(ip, true) && !goes(ip, false), "{ip}");
        }
        for ip in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            assert!(goes(ip, true) && goes(ip, false), "{ip}");
        }
    }
}
