//! Connecting with real certificates: what succeeds, and what is said when it does not.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::*;
use crate::cli::{CliError, Exit};
use crate::client::ProfileText;
use crate::pki::{Authority, Issued, KeyKind, Validity};

fn authority() -> Authority {
    let validity = Validity::days(SystemTime::now(), 2).unwrap();
    Authority::create("test", KeyKind::P256, validity).unwrap().0
}

fn write(directory: &Path, name: &str, issued: &Issued) -> (PathBuf, PathBuf) {
    let at = |end: &str| directory.join(format!("{name}{end}"));
    issued.write(&at(".pem"), &at(".key")).unwrap();
    (at(".pem"), at(".key"))
}

fn profile(directory: &Path, address: &str, ca: &Authority, client: &Issued) -> Profile {
    std::fs::write(directory.join("ca.pem"), ca.certificate()).unwrap();
    let (certificate, key) = write(directory, "client", client);
    let text = ProfileText {
        address: address.to_owned(),
        server_name: Some("localhost".into()),
        ca: "ca.pem".into(),
        certificate,
        key,
        client_id: None,
        api_key_file: None,
    };
    Profile::resolve(&directory.join("profile.toml"), text).unwrap()
}

/// A server that answers every call with UNIMPLEMENTED to whoever has a certificate of `authority`.
async fn serve(authority: &Authority) -> String {
    let dir = tempfile::tempdir().unwrap();
    let validity = Validity::days(SystemTime::now(), 2).unwrap();
    let issued = authority.server(&["localhost"], KeyKind::P256, validity).unwrap();
    let (certificate, key) = write(dir.path(), "server", &issued);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.certificate().as_bytes()).unwrap()).unwrap();
    let provider = crate::net::tls::provider();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_file(certificate).unwrap()],
            PrivateKeyDer::from_pem_file(key).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let answer = hyper::service::service_fn(|_request| async {
                    let status = Status::unimplemented("nothing here");
                    Ok::<_, std::convert::Infallible>(status.into_http::<tonic::body::Body>())
                });
                drop(
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), answer)
                        .await,
                );
            });
        }
    });
    address
}

fn client(authority: &Authority) -> Issued {
    let validity = Validity::days(SystemTime::now(), 2).unwrap();
    authority.client("alice", KeyKind::P256, validity).unwrap()
}

#[tokio::test]
async fn the_right_certificates_connect() {
    let (ours, dir) = (authority(), tempfile::tempdir().unwrap());
    let address = serve(&ours).await;
    let session =
        Session::connect(profile(dir.path(), &address, &ours, &client(&ours))).await.unwrap();
    let error = session.login().await.unwrap_err();
    let ClientError::Login { failure, .. } = &error else { panic!("{error:?}") };
    assert_eq!(failure.code, Code::Unimplemented);
}

#[tokio::test]
async fn nobody_listening_is_told_from_the_wrong_server() {
    let (ours, other) = (authority(), authority());
    let dir = tempfile::tempdir().unwrap();
    let closed = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let at = profile(dir.path(), &closed, &ours, &client(&ours));
    let error = CliError::from(Session::connect(at).await.unwrap_err());
    assert_eq!(error.exit, Exit::Unavailable);
    assert_eq!(error.message, format!("cannot reach {closed}: connection refused"));
    assert!(error.hint.contains("polykey dev"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let address = serve(&other).await;
    let at = profile(dir.path(), &address, &ours, &client(&ours));
    let error = CliError::from(Session::connect(at).await.unwrap_err());
    assert!(error.message.contains("certificate") && error.hint.contains("`ca`"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let at = Profile {
        server_name: Some("elsewhere".into()),
        ..profile(dir.path(), &address, &other, &client(&other))
    };
    let error = CliError::from(Session::connect(at).await.unwrap_err());
    assert!(error.hint.contains("`server_name`"), "{error}");
}

#[tokio::test]
async fn a_certificate_the_server_does_not_take_is_told() {
    let (ours, other, dir) = (authority(), authority(), tempfile::tempdir().unwrap());
    let address = serve(&ours).await;
    // The refusal comes after the handshake is done on our side, with the first call.
    let at = profile(dir.path(), &address, &ours, &client(&other));
    let error = match Session::connect(at).await {
        Err(error) => error,
        Ok(session) => session.login().await.unwrap_err(),
    };
    let error = CliError::from(error);
    assert!(matches!(error.exit, Exit::Denied | Exit::Unavailable), "{error}");
    assert!(error.hint.contains("client certificate"), "{error}");
}
