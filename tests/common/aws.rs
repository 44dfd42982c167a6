//! AWS as moto plays it, as a process: tests/python/aws_peer.py. It ends with the value that stands for it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::Options;

pub(crate) const REGION: &str = "eu-west-1";

/// A service that answers like KMS and SSM.
pub(crate) struct Moto {
    child: Child,
    address: String,
}

impl Moto {
    pub(crate) fn start() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = std::env::var_os("POLYKEY_PYTHON")
            .map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
        let remedy = "`make deps` makes it; or set POLYKEY_PYTHON to a Python with moto[server]";
        assert!(python.exists(), "{} is missing: {remedy}", python.display());
        let mut child = Command::new(python)
            .arg("-B")
            .arg(root.join("tests/python/aws_peer.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port: u16 = line.trim().parse().unwrap_or_else(|_| panic!("no moto: {remedy}"));
        Self { child, address: format!("127.0.0.1:{port}") }
    }

    /// Where it is.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it for something; `target` as in `TrentService.CreateKey`.
    pub(crate) fn ask(&self, target: &str, body: &Value) -> Value {
        let service = if target.starts_with("Trent") { "kms" } else { "ssm" };
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(
            stream,
            "POST / HTTP/1.1\r\nHost: {}\r\nX-Amz-Target: {target}\r\nContent-Length: {}\r\n\
             Content-Type: application/x-amz-json-1.1\r\nConnection: close\r\nAuthorization: \
             AWS4-HMAC-SHA256 Credential=x/20260101/{REGION}/{service}/aws4_request, \
             SignedHeaders=host, Signature=0\r\n\r\n{body}",
            self.address,
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{target}: {answer}");
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap_or_default()
    }

    /// The ARN of a new key.
    pub(crate) fn key(&self) -> String {
        let made = self.ask("TrentService.CreateKey", &json!({}));
        made["KeyMetadata"]["Arn"].as_str().unwrap().to_owned()
    }

    /// Puts a SecureString.
    pub(crate) fn put(&self, name: &str, value: &str) {
        let body = json!({"Name": name, "Value": value, "Type": "SecureString", "Overwrite": true});
        self.ask("AmazonSSM.PutParameter", &body);
    }

    /// What a node needs in its environment; nothing of this machine's AWS settings gets in.
    pub(crate) fn options(home: &Path) -> Options {
        let home = home.display().to_string();
        let pairs = [
            ("HOME", home.as_str()),
            ("AWS_ACCESS_KEY_ID", "AKIAPOLYKEYTESTS0000"),
            ("AWS_SECRET_ACCESS_KEY", "a-secret-access-key-of-the-tests"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_PROFILE", ""),
            ("NO_PROXY", "127.0.0.1"),
        ];
        let env = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Options { env, ..Options::default() }
    }

    /// The section of a wrapper by this key.
    pub(crate) fn section(&self, name: &str, key: &str) -> String {
        format!(
            "\n[{name}]\nkind = \"aws\"\nkey = \"{key}\"\nregion = \"{REGION}\"\n\
             endpoint_url = \"{}\"\nattempt_timeout = \"1s\"\n",
            self.url()
        )
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
