//! The session against a scripted server: which calls it makes, with which tokens and keys.

use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use polykey_proto::Codec;
use tonic::transport::Endpoint;
use tower::service_fn;

use super::*;
use crate::client::{ProfileText, rpc};

/// What the server was asked, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Authenticate { client_id: String, api_key: String, grant_type: String },
    Refresh(String),
    Key { token: String, idempotency_key: Option<String> },
}

#[derive(Default)]
struct Script {
    asked: Vec<Asked>,
    /// Answers to calls about keys, first to last; afterwards all succeed.
    failures: Vec<Code>,
    /// Whether refresh tokens work.
    refreshable: bool,
    /// Seconds that tokens live.
    lifetime: i64,
    issued: usize,
}

impl Script {
    fn issue(&mut self) -> (String, String) {
        self.issued += 1;
        (format!("access-{}", self.issued), format!("refresh-{}", self.issued))
    }

    fn authenticate(&mut self, request: pb::AuthenticateRequest) -> pb::AuthenticateResponse {
        let pb::AuthenticateRequest { client_id, api_key, grant_type } = request;
        self.asked.push(Asked::Authenticate { client_id, api_key, grant_type });
        let (access_token, refresh_token) = self.issue();
        pb::AuthenticateResponse {
            access_token,
            refresh_token,
            expires_in: self.lifetime,
            refresh_expires_in: 3600,
            ..Default::default()
        }
    }

    fn refresh(
        &mut self,
        request: pb::RefreshTokenRequest,
    ) -> Result<pb::RefreshTokenResponse, Status> {
        self.asked.push(Asked::Refresh(request.refresh_token));
        if !self.refreshable {
            return Err(Status::unauthenticated("no"));
        }
        let (access_token, refresh_token) = self.issue();
        Ok(pb::RefreshTokenResponse {
            access_token,
            refresh_token,
            expires_in: self.lifetime,
            refresh_expires_in: 3600,
            ..Default::default()
        })
    }

    fn create(
        &mut self,
        request: &Request<pb::CreateKeyRequest>,
    ) -> Result<pb::CreateKeyResponse, Status> {
        let text = |name: &str| {
            request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned())
        };
        self.asked.push(Asked::Key {
            token: text("authorization").unwrap().strip_prefix("Bearer ").unwrap().to_owned(),
            idempotency_key: text("idempotency-key"),
        });
        if self.failures.is_empty() {
            return Ok(pb::CreateKeyResponse { key_id: "made".into(), ..Default::default() });
        }
        Err(Status::new(self.failures.remove(0), "scripted"))
    }
}

type Shared = Arc<Mutex<Script>>;

async fn route(
    script: Shared,
    request: http::Request<hyper::body::Incoming>,
) -> Result<http::Response<tonic::body::Body>, std::convert::Infallible> {
    let path = request.uri().path().to_owned();
    Ok(match path.rsplit('/').next().unwrap() {
        "Authenticate" => {
            let answer = service_fn(move |request: Request<pb::AuthenticateRequest>| {
                let answer = script.lock().authenticate(request.into_inner());
                async { Ok::<_, Status>(Response::new(answer)) }
            });
            tonic::server::Grpc::new(Codec::default()).unary(answer, request).await
        }
        "RefreshToken" => {
            let answer = service_fn(move |request: Request<pb::RefreshTokenRequest>| {
                let answer = script.lock().refresh(request.into_inner());
                async { answer.map(Response::new) }
            });
            tonic::server::Grpc::new(Codec::default()).unary(answer, request).await
        }
        _ => {
            let answer = service_fn(move |request: Request<pb::CreateKeyRequest>| {
                let answer = script.lock().create(&request);
                async { answer.map(Response::new) }
            });
            tonic::server::Grpc::new(Codec::default()).unary(answer, request).await
        }
    })
}

async fn serve(script: Shared) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let script = Arc::clone(&script);
            let service = service_fn(move |request| route(Arc::clone(&script), request));
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)),
            );
        }
    });
    address
}

struct Fixture {
    script: Shared,
    address: std::net::SocketAddr,
    dir: tempfile::TempDir,
}

impl Fixture {
    async fn new(script: Script) -> Self {
        let script = Arc::new(Mutex::new(script));
        let address = serve(Arc::clone(&script)).await;
        let dir = tempfile::tempdir().unwrap();
        file::write(&dir.path().join("api-key"), b"pk_canary\n", file::PRIVATE).unwrap();
        Self { script, address, dir }
    }

    /// A session as another process would have it: only the directory is shared.
    fn session(&self, directory: &Path) -> Session {
        let text = ProfileText {
            address: self.address.to_string(),
            server_name: None,
            ca: "ca".into(),
            certificate: "cert".into(),
            key: "key".into(),
            client_id: Some("alice".into()),
            api_key_file: Some(self.dir.path().join("api-key")),
        };
        let profile = Profile::resolve(&directory.join("profile.toml"), text).unwrap();
        let binding = Binding {
            address: profile.address.clone(),
            client_id: profile.client_id.clone(),
            certificate_sha256: String::new(),
        };
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        Session {
            channel: endpoint.connect_lazy(),
            cache: TokenCache::new(profile.token_path()),
            profile,
            binding,
            current: Mutex::new(None),
            exchange: tokio::sync::Mutex::new(()),
        }
    }

    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.script.lock().asked)
    }
}

async fn create(session: &Session) -> Result<String, ClientError> {
    let request = pb::CreateKeyRequest::default();
    let answer = session.mutate(request, rpc!(PolykeyServiceClient, create_key)).await?;
    Ok(answer.into_inner().key_id)
}

fn login() -> Asked {
    Asked::Authenticate {
        client_id: "alice".into(),
        api_key: "pk_canary".into(),
        grant_type: "api_key".into(),
    }
}

fn tokens(asked: &[Asked]) -> Vec<&str> {
    let mut found = Vec::new();
    for asked in asked {
        if let Asked::Key { token, .. } = asked {
            found.push(token.as_str());
        }
    }
    found
}

fn keys(asked: &[Asked]) -> Vec<&str> {
    let mut found = Vec::new();
    for asked in asked {
        if let Asked::Key { idempotency_key: Some(key), .. } = asked {
            found.push(key.as_str());
        }
    }
    found
}

#[tokio::test]
async fn one_login_serves_many_calls_and_processes() {
    let fixture =
        Fixture::new(Script { lifetime: 900, refreshable: true, ..Script::default() }).await;
    let session = fixture.session(fixture.dir.path());
    assert_eq!(create(&session).await.unwrap(), "made");
    create(&session).await.unwrap();
    create(&fixture.session(fixture.dir.path())).await.unwrap();
    let asked = fixture.asked();
    assert_eq!(asked[0], login());
    assert_eq!(tokens(&asked), ["access-1"; 3]);
    let keys = keys(&asked);
    assert!(keys.len() == 3 && keys[0] != keys[1] && keys[1] != keys[2], "{keys:?}");
}

#[tokio::test]
async fn two_processes_use_up_one_refresh_token_once() {
    let fixture =
        Fixture::new(Script { lifetime: 10, refreshable: true, ..Script::default() }).await;
    create(&fixture.session(fixture.dir.path())).await.unwrap();
    assert_eq!(fixture.asked().len(), 2);
    fixture.script.lock().lifetime = 900;
    let (one, two) = (fixture.session(fixture.dir.path()), fixture.session(fixture.dir.path()));
    let (a, b) = tokio::join!(create(&one), create(&two));
    assert!(a.is_ok() && b.is_ok());
    let asked = fixture.asked();
    let refreshes = asked.iter().filter(|asked| matches!(asked, Asked::Refresh(_))).count();
    assert_eq!(refreshes, 1, "{asked:?}");
    assert_eq!(tokens(&asked), ["access-2"; 2]);
}

#[tokio::test]
async fn a_refused_token_is_exchanged_once_and_a_refused_refresh_logs_in() {
    let fixture = Fixture::new(Script { lifetime: 900, ..Script::default() }).await;
    let session = fixture.session(fixture.dir.path());
    fixture.script.lock().failures = vec![Code::Unauthenticated];
    create(&session).await.unwrap();
    let asked = fixture.asked();
    assert_eq!(asked[2], Asked::Refresh("refresh-1".into()));
    assert_eq!(asked[3], login());
    assert_eq!(tokens(&asked), ["access-1", "access-2"]);
    let keys = keys(&asked);
    assert_eq!(keys[0], keys[1]);

    fixture.script.lock().failures = vec![Code::Unauthenticated; 2];
    let error = create(&session).await.unwrap_err();
    assert!(matches!(&error, ClientError::Call(f) if f.code == Code::Unauthenticated), "{error}");
}

#[tokio::test]
async fn an_unknown_outcome_is_asked_for_once_more_under_the_same_key() {
    let fixture = Fixture::new(Script { lifetime: 900, ..Script::default() }).await;
    let session = fixture.session(fixture.dir.path());
    for code in [Code::Unavailable, Code::Unknown] {
        fixture.script.lock().failures = vec![code];
        create(&session).await.unwrap();
        let asked = fixture.asked();
        let keys = keys(&asked);
        assert!(keys.len() == 2 && keys[0] == keys[1], "{keys:?}");
        fixture.script.lock().failures = vec![code; 2];
        assert!(matches!(create(&session).await, Err(ClientError::Call(f)) if f.code == code));
        fixture.asked();
    }
    // What is certain is not repeated.
    fixture.script.lock().failures = vec![Code::FailedPrecondition];
    assert!(create(&session).await.is_err());
    assert_eq!(fixture.asked().len(), 1);
}

#[tokio::test]
async fn without_a_place_for_tokens_the_session_still_works() {
    let fixture = Fixture::new(Script { lifetime: 900, ..Script::default() }).await;
    let session = fixture.session(Path::new("/nonexistent"));
    create(&session).await.unwrap();
    create(&session).await.unwrap();
    assert_eq!(tokens(&fixture.asked()), ["access-1"; 2]);
}

#[tokio::test]
async fn no_secret_is_in_an_error() {
    let fixture = Fixture::new(Script { lifetime: 900, ..Script::default() }).await;
    let session = fixture.session(fixture.dir.path());
    fixture.script.lock().failures = vec![Code::Internal];
    let error = create(&session).await.unwrap_err();
    let shown = format!("{error} {error:?} {session:?}");
    assert!(!shown.contains("canary") && !shown.contains("access-1"), "{shown}");
    let path = fixture.dir.path().join("api-key");
    file::write(&path, b"pk_canary", file::PUBLIC).unwrap();
    session.forget().await.unwrap();
    let error = create(&session).await.unwrap_err().to_string();
    assert!(error.contains("chmod 600") && !error.contains("canary"), "{error}");
}
