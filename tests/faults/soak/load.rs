//! Callers of a soak: a mixed load, a model of what was acknowledged, and every error with the fault that explains it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};
use tonic::Code;

use crate::common::PATIENCE;
use crate::common::client::{Client, Fail};
use crate::support::Random;

/// What a call may take.
const TIMEOUT: (&str, &[u8]) = ("grpc-timeout", b"5S");
/// Ciphertexts that one caller keeps.
const SEALED: usize = 500;

/// What is wrong with a node, as far as its callers may notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wrong {
    Nothing,
    NoRoom,
    Stopped,
    Killed,
    TokenAway,
    DatabaseAway,
}

/// An error as a program tells it from others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Told {
    code: String,
    reason: String,
    /// Made by the client: the answer was lost, or its time was over.
    lost: bool,
}

impl Wrong {
    /// Whether it explains an error of a call, which may have been `in_token`.
    fn explains(self, told: &Told, in_token: bool) -> bool {
        let Told { code, reason, lost } = told;
        let late = ["Cancelled", "DeadlineExceeded"].contains(&code.as_str());
        match self {
            Self::Nothing => false,
            Self::NoRoom => code == "ResourceExhausted" && reason == "DISK_FULL",
            // Who asked it before it stopped has waited in vain.
            Self::Stopped => late,
            Self::Killed => *lost,
            Self::TokenAway => {
                let unavailable = ["Unavailable", "DeadlineExceeded", "ResourceExhausted"];
                in_token && !lost && unavailable.contains(&code.as_str())
            }
            // The only UNKNOWN there may be says of itself that a change may have happened.
            Self::DatabaseAway => {
                late || code == "Unavailable" || code == "Unknown" && reason == "OUTCOME_UNKNOWN"
            }
        }
    }
}

/// A node as its callers find it.
pub(super) struct Place {
    pub(super) address: RwLock<String>,
    /// What was wrong, one after the other; the last is what is.
    history: RwLock<Vec<Wrong>>,
    errors: Mutex<BTreeMap<(Wrong, Told), usize>>,
    unexplained: Mutex<Vec<String>>,
    pub(super) calls: AtomicUsize,
    pub(super) done: AtomicBool,
}

impl Place {
    pub(super) fn new(address: &str) -> Arc<Self> {
        Arc::new(Self {
            address: RwLock::new(address.to_owned()),
            history: RwLock::new(vec![Wrong::Nothing]),
            errors: Mutex::default(),
            unexplained: Mutex::default(),
            calls: AtomicUsize::new(0),
            done: AtomicBool::new(false),
        })
    }

    pub(super) fn is(&self, wrong: Wrong) {
        self.history.write().push(wrong);
    }

    /// An error of a call that began when the history was so long.
    fn judge(&self, began: usize, what: &str, in_token: bool, told: Told, text: &str) {
        let history = self.history.read();
        let mut during = history[began - 1..].iter();
        match during.find(|wrong| wrong.explains(&told, in_token)) {
            Some(wrong) => *self.errors.lock().entry((*wrong, told)).or_default() += 1,
            None => {
                let during = &history[began - 1..];
                let text = format!("{what}: {told:?}: {text}, while {during:?}");
                self.unexplained.lock().push(text);
            }
        }
    }

    /// Fails if an error had no fault that explains it.
    pub(super) fn all_explained(&self, name: &str) {
        let unexplained = self.unexplained.lock();
        let some: Vec<_> = unexplained.iter().take(20).collect();
        assert!(some.is_empty(), "{name}: {} errors unexplained: {some:#?}", unexplained.len());
    }

    /// Every error with how often it came.
    pub(super) fn errors(&self) -> Vec<String> {
        let line = |((wrong, told), count): (&(Wrong, Told), &usize)| {
            let Told { code, reason, lost } = told;
            let whose = if *lost { " (no answer)" } else { "" };
            let space = if reason.is_empty() { "" } else { " " };
            format!("{wrong:?}: {code}{space}{reason}{whose}: {count}")
        };
        self.errors.lock().iter().map(line).collect()
    }
}

/// A key that was acknowledged.
struct Held {
    id: String,
    version: i64,
    revoked: bool,
    /// A change was asked for, and what became of it was not told.
    unsure: bool,
}

/// One caller, which alone changes its keys.
pub(super) struct Caller {
    place: Arc<Place>,
    client: Client,
    random: Random,
    keys: Vec<Held>,
    sealed: Vec<(usize, Value, String)>,
    /// A key that signs, and one in a token that does.
    signs: String,
    in_token: Option<String>,
    /// Milliseconds between calls, on average.
    pace: usize,
}

fn standard(kind: &str) -> Value {
    json!({"key_type": kind, "storage_profile": "STORAGE_PROFILE_STANDARD"})
}

/// An answer, also from a node whose database is late on a machine that has much else to do.
async fn patiently(client: &Client, name: &str, body: Value) -> Value {
    let since = Instant::now();
    loop {
        match client.call(name, body.clone()).await {
            Err(fail) if fail.code == Code::Unavailable && since.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            result => return result.unwrap(),
        }
    }
}

impl Caller {
    pub(super) async fn new(
        place: &Arc<Place>,
        client: Client,
        in_token: Option<String>,
        (random, pace): (Random, usize),
    ) -> Self {
        let made = client.call("CreateKey", standard("KEY_TYPE_ECDSA_P256")).await.unwrap();
        Self {
            place: Arc::clone(place),
            client,
            random,
            keys: Vec::new(),
            sealed: Vec::new(),
            signs: made["key_id"].as_str().unwrap().to_owned(),
            in_token,
            pace,
        }
    }

    /// Calls until it is told to stop.
    pub(super) async fn run(mut self) -> Self {
        while !self.place.done.load(Ordering::SeqCst) {
            self.step().await;
            self.place.calls.fetch_add(1, Ordering::SeqCst);
            let pause = self.random.below(2 * self.pace);
            tokio::time::sleep(Duration::from_millis(u64::try_from(pause).unwrap())).await;
        }
        self
    }

    /// A call, judged; its answer.
    async fn call(&mut self, name: &str, body: Value, in_token: bool) -> Option<Value> {
        let address = self.place.address.read().clone();
        if address != self.client.address {
            self.client = self.client.at(&address);
        }
        let began = self.place.history.read().len();
        let result = match name {
            "Authenticate" => self.client.login().await,
            "StreamCreateKeys" => {
                let bodies = body.as_array().unwrap().clone();
                self.client.stream_with(name, bodies, &[TIMEOUT]).await.map(|reply| reply.body)
            }
            _ => self.client.call_with(name, body, &[TIMEOUT]).await.map(|reply| reply.body),
        };
        match result {
            Ok(answer) => {
                let items = answer.get("results").unwrap_or(&answer);
                for item in items.as_array().into_iter().flatten() {
                    self.judge_item(began, name, item);
                }
                Some(answer)
            }
            Err(Fail { code, reason, text, status, .. }) => {
                // Every answer of a node names its request.
                let lost = !status.metadata().contains_key("polykey-request-id");
                let told = Told { code: format!("{code:?}"), reason, lost };
                self.place.judge(began, name, in_token, told, &text);
                None
            }
        }
    }

    /// An item that failed within an answer.
    fn judge_item(&self, began: usize, name: &str, item: &Value) {
        let (code, reason) = match &item["error"] {
            Value::Object(error) => (&error["code"], &error["reason"]),
            _ => (&item["error_code"], &item["error_reason"]),
        };
        let code = Code::from_i32(i32::try_from(code.as_i64().unwrap_or(0)).unwrap());
        let reason = reason.as_str().unwrap_or_default().to_owned();
        // What was not tried is explained by the item that was.
        if code != Code::Ok && reason != "NOT_ATTEMPTED" {
            let told = Told { code: format!("{code:?}"), reason, lost: false };
            self.place.judge(began, name, false, told, &item.to_string());
        }
    }

    fn made(&mut self, created: &Value) {
        let Some(id) = created["key_id"].as_str() else { return };
        self.keys.push(Held { id: id.to_owned(), version: 1, revoked: false, unsure: false });
    }

    async fn step(&mut self) {
        let live: Vec<usize> = (0..self.keys.len()).filter(|&k| !self.keys[k].revoked).collect();
        if live.len() < 3 {
            if let Some(made) = self.call("CreateKey", standard("KEY_TYPE_AES_256"), false).await {
                self.made(&made);
            }
            return;
        }
        let k = live[self.random.below(live.len())];
        let id = self.keys[k].id.clone();
        match self.random.below(100) {
            0..=3 => {
                let made = self.call("CreateKey", standard("KEY_TYPE_AES_256"), false).await;
                made.iter().for_each(|made| self.made(made));
            }
            4..=8 => match self.call("RotateKey", json!({"key_id": id}), false).await {
                Some(rotated) => self.keys[k].version = rotated["new_version"].as_i64().unwrap(),
                None => self.keys[k].unsure = true,
            },
            9..=35 => {
                let text = format!("{:032x}", self.random.next());
                let plaintext = data_encoding::BASE64.encode(text.as_bytes());
                let body = json!({"key_id": id, "plaintext": plaintext});
                if let Some(sealed) = self.call("Encrypt", body, false).await {
                    let kept = (k, sealed["ciphertext"].clone(), plaintext);
                    if self.sealed.len() < SEALED {
                        self.sealed.push(kept);
                    } else {
                        let at = self.random.below(SEALED);
                        self.sealed[at] = kept;
                    }
                }
            }
            36..=60 => self.decrypt().await,
            61..=72 => {
                let key = self.signs.clone();
                self.call("Sign", json!({"key_id": key, "message": "AAAA"}), false).await;
            }
            73..=82 => {
                let Some(key) = self.in_token.clone() else { return };
                self.call("Sign", json!({"key_id": key, "message": "AAAA"}), true).await;
            }
            83..=87 => {
                self.call("ListKeys", json!({"page_size": 20}), false).await;
            }
            88..=89 => {
                let body = json!({"key_id": id, "immediate": true});
                let revoked = self.call("RevokeKey", body, false).await;
                self.keys[k].revoked = true;
                self.keys[k].unsure |= revoked.is_none();
            }
            90..=91 => {
                let items = vec![standard("KEY_TYPE_AES_256"); 3];
                let body = json!({"keys": items, "atomic": true});
                if let Some(answer) = self.call("BatchCreateKeys", body, false).await {
                    for result in answer["results"].as_array().unwrap() {
                        self.made(&result["success"]);
                    }
                }
            }
            92..=94 => {
                let operations = json!([
                    {"encrypt": {"key_id": id, "plaintext": "AAAA"}},
                    {"sign": {"key_id": self.signs, "message": "AAAA"}},
                    {"generate_random": {"length": 32}},
                ]);
                self.call("BatchCrypto", json!({"operations": operations}), false).await;
            }
            95..=96 => {
                let message = json!({"request": standard("KEY_TYPE_AES_256")});
                let messages = Value::Array(vec![message; 2]);
                if let Some(answers) = self.call("StreamCreateKeys", messages, false).await {
                    for answer in answers.as_array().unwrap() {
                        self.made(&answer["success"]);
                    }
                }
            }
            _ => {
                self.call("Authenticate", json!({}), false).await;
            }
        }
    }

    async fn decrypt(&mut self) {
        if self.sealed.is_empty() {
            return;
        }
        let at = self.random.below(self.sealed.len());
        let (k, ciphertext, plaintext) = self.sealed[at].clone();
        if self.keys[k].revoked {
            return;
        }
        let body = json!({"key_id": self.keys[k].id, "ciphertext": ciphertext});
        if let Some(opened) = self.call("Decrypt", body, false).await {
            assert_eq!(opened["plaintext"], plaintext, "another plaintext");
        }
    }

    /// Every acknowledged key opens, or is revoked; every ciphertext opens. How many of each.
    pub(super) async fn verify(&mut self) -> (usize, usize) {
        self.client = self.client.at(&self.place.address.read());
        self.client.login().await.unwrap();
        for part in self.keys.chunks(200) {
            let items: Vec<_> = part.iter().map(|key| json!({"key_id": key.id})).collect();
            let body = json!({"keys": items, "continue_on_error": true});
            let answer = patiently(&self.client, "BatchGetKeys", body).await;
            for (key, result) in part.iter().zip(answer["results"].as_array().unwrap()) {
                let Held { id, version, revoked, unsure } = key;
                let found = &result["success"];
                if *revoked {
                    let gone = result["error_code"] == json!(Code::FailedPrecondition as i32);
                    assert!(gone || *unsure && found.is_object(), "{id} serves again: {result}");
                    continue;
                }
                assert!(found["key_material"].is_object(), "{id} is lost: {result}");
                let there = found["metadata"]["version"].as_i64().unwrap();
                let right = there == *version || *unsure && there >= *version;
                assert!(right, "{id} has version {there}, not {version}");
            }
        }
        let mut opened = 0;
        for (k, ciphertext, plaintext) in &self.sealed {
            let key = &self.keys[*k];
            if key.revoked {
                continue;
            }
            let body = json!({"key_id": key.id, "ciphertext": ciphertext});
            let answer = patiently(&self.client, "Decrypt", body).await;
            assert_eq!(answer["plaintext"], json!(plaintext), "{}", key.id);
            opened += 1;
        }
        (self.keys.len(), opened)
    }
}
