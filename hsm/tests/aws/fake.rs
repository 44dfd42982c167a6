//! A small KMS of our own, over HTTP/1 on loopback: it encrypts and decrypts by remembering, and
//! does the wrong thing when told to. It counts the calls. It is STS as well.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use data_encoding::BASE64;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::support::REGION;

/// What one call gets instead of its answer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// HTTP status, error code, message.
    Error(u16, &'static str, &'static str),
    /// HTTP status and a body that is not AWS'.
    Garbage(u16, &'static str),
    /// Never an answer.
    Silent,
    /// The connection is reset before the answer,
    Reset,
    /// or in the middle of its body,
    ResetMidBody,
    /// or closed there.
    CutShort,
    /// Another key's ARN.
    WrongKeyId,
    /// None.
    NoKeyId,
    /// Other bytes of the right length: as plaintext, or as ciphertext.
    WrongBytes,
    /// Too few of them.
    FewBytes,
    /// None.
    NoBytes,
}

#[derive(Default)]
struct State {
    calls: usize,
    next: VecDeque<Fault>,
    always: Option<Fault>,
    /// Plaintext, context and key by ciphertext.
    made: HashMap<String, (String, Value, String)>,
    /// The plaintexts it was given or gave, as they went over the wire.
    seen: Vec<String>,
}

pub(crate) struct Fake {
    pub(crate) url: String,
    pub(crate) key: String,
    state: Arc<Mutex<State>>,
    task: tokio::task::JoinHandle<()>,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::<Mutex<State>>::default();
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        let key =
            format!("arn:aws:kms:{REGION}:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab");
        Self { url, key, state, task }
    }

    /// Each of the next calls gets one of these.
    pub(crate) fn then(&self, faults: &[Fault]) {
        self.state.lock().unwrap().next.extend(faults);
    }

    /// Every call gets this.
    pub(crate) fn always(&self, fault: impl Into<Option<Fault>>) {
        self.state.lock().unwrap().always = fault.into();
    }

    pub(crate) fn calls(&self) -> usize {
        self.state.lock().unwrap().calls
    }

    pub(crate) fn seen(&self) -> Vec<String> {
        self.state.lock().unwrap().seen.clone()
    }

    /// As if it had made this ciphertext before.
    pub(crate) fn made(&self, blob: &[u8], plaintext: &[u8], context: Value) {
        let made = (BASE64.encode(plaintext), context, self.key.clone());
        self.state.lock().unwrap().made.insert(BASE64.encode(blob), made);
    }

    /// The encryption contexts it was given.
    pub(crate) fn contexts(&self) -> Vec<Value> {
        self.state.lock().unwrap().made.values().map(|(_, context, _)| context.clone()).collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The id in an ARN: replicas of a key share it, and no others.
fn id(arn: &str) -> &str {
    arn.rsplit('/').next().unwrap()
}

const ROLE: &str = "<AssumeRoleResponse><AssumeRoleResult><Credentials>\
    <AccessKeyId>ASIAROLE</AccessKeyId><SecretAccessKey>x</SecretAccessKey>\
    <SessionToken>y</SessionToken><Expiration>2100-01-01T00:00:00Z</Expiration>\
    </Credentials></AssumeRoleResult></AssumeRoleResponse>";

/// Action and body of the next request; `None` at the end.
async fn request(stream: &mut TcpStream) -> Option<(String, Value)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    let field = |name: &str| {
        head.lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(found, _)| found.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim().to_owned())
    };
    let mut body = vec![0; field("content-length").unwrap().parse().unwrap()];
    stream.read_exact(&mut body).await.ok()?;
    let Some(target) = field("x-amz-target") else {
        // STS speaks forms and XML.
        assert!(body.starts_with(b"Action=AssumeRole&"), "{}", String::from_utf8_lossy(&body));
        return Some(("AssumeRole".to_owned(), Value::Null));
    };
    Some((target.rsplit('.').next().unwrap().to_owned(), serde_json::from_slice(&body).unwrap()))
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>) {
    while let Some((action, body)) = request(&mut stream).await {
        let (fault, (status, mut answer)) = {
            let mut state = state.lock().unwrap();
            state.calls += 1;
            let fault = state.next.pop_front().or(state.always);
            (fault, state.answer(&action, &body))
        };
        let mut status = status;
        let bytes = if action == "Encrypt" { "CiphertextBlob" } else { "Plaintext" };
        let mut text = (action == "AssumeRole").then(|| ROLE.to_owned());
        match fault {
            None => {}
            Some(Fault::Error(code, name, message)) if action == "AssumeRole" => {
                status = code;
                text = Some(format!(
                    "<ErrorResponse><Error><Type>Sender</Type><Code>{name}</Code>\
                     <Message>{message}</Message></Error></ErrorResponse>"
                ));
            }
            Some(Fault::Error(code, name, message)) => {
                status = code;
                answer = json!({ "__type": name, "message": message });
            }
            Some(Fault::Garbage(code, body)) => (status, text) = (code, Some(body.to_owned())),
            Some(Fault::Silent) => {
                // Until the client goes away.
                while stream.read_u8().await.is_ok() {}
                return;
            }
            Some(Fault::Reset) => return stream.set_zero_linger().unwrap(),
            Some(Fault::ResetMidBody | Fault::CutShort) => {
                let _ =
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 400\r\n\r\n{\"Key").await;
                if matches!(fault, Some(Fault::ResetMidBody)) {
                    stream.set_zero_linger().unwrap();
                }
                return;
            }
            Some(Fault::WrongKeyId) => {
                let key =
                    answer["KeyId"].as_str().unwrap_or_default().replace("1234abcd", "9999abcd");
                answer["KeyId"] = key.into();
            }
            Some(Fault::NoKeyId) => drop(answer.as_object_mut().unwrap().remove("KeyId")),
            Some(Fault::WrongBytes) => answer[bytes] = BASE64.encode(&[0x5a; 32]).into(),
            Some(Fault::FewBytes) => answer[bytes] = BASE64.encode(&[0x5a; 5]).into(),
            Some(Fault::NoBytes) => drop(answer.as_object_mut().unwrap().remove(bytes)),
        }
        let text = text.unwrap_or_else(|| answer.to_string());
        let head = format!(
            "HTTP/1.1 {status} x\r\ncontent-type: application/x-amz-json-1.1\r\n\
             content-length: {}\r\n\r\n",
            text.len()
        );
        if stream.write_all(format!("{head}{text}").as_bytes()).await.is_err() {
            return;
        }
    }
}

impl State {
    fn answer(&mut self, action: &str, body: &Value) -> (u16, Value) {
        let key = body["KeyId"].as_str().unwrap_or_default().to_owned();
        let context = body["EncryptionContext"].clone();
        match action {
            "AssumeRole" => (200, Value::Null),
            "Encrypt" => {
                let plaintext = body["Plaintext"].as_str().unwrap().to_owned();
                let blob = BASE64.encode(format!("ciphertext {}", self.calls).as_bytes());
                self.seen.push(plaintext.clone());
                self.made.insert(blob.clone(), (plaintext, context, key.clone()));
                (200, json!({ "CiphertextBlob": blob, "KeyId": key }))
            }
            "Decrypt" => match self.made.get(body["CiphertextBlob"].as_str().unwrap()) {
                Some((plaintext, with, by)) if *with == context && id(by) == id(&key) => {
                    (200, json!({ "Plaintext": plaintext, "KeyId": key }))
                }
                _ => (400, json!({ "__type": "InvalidCiphertextException" })),
            },
            other => (400, json!({ "__type": "UnknownOperationException", "message": other })),
        }
    }
}
