//! moto as a process: tests/python/aws_peer.py. It ends with the value that stands for it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use aws_config::{BehaviorVersion, Region, SdkConfig};

use super::support::REGION;

pub(crate) struct Moto {
    child: Child,
    pub(crate) url: String,
}

impl Moto {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// With settings of moto's.
    pub(crate) fn start_with(variables: &[(&str, &str)]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let python = std::env::var_os("POLYKEY_PYTHON")
            .map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
        let remedy = "`make deps` makes it; or set POLYKEY_PYTHON to a Python with moto[server]";
        assert!(python.exists(), "{} is missing: {remedy}", python.display());
        let mut child = Command::new(python)
            .arg("-B")
            .arg(root.join("tests/python/aws_peer.py"))
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port: u16 = line.trim().parse().unwrap_or_else(|_| panic!("no moto: {remedy}"));
        Self { child, url: format!("http://127.0.0.1:{port}") }
    }

    pub(crate) async fn config(&self, region: &str) -> SdkConfig {
        aws_config::defaults(BehaviorVersion::latest())
            .region(Region::new(region.to_owned()))
            .endpoint_url(&self.url)
            .load()
            .await
    }

    pub(crate) async fn kms(&self, region: &str) -> aws_sdk_kms::Client {
        aws_sdk_kms::Client::new(&self.config(region).await)
    }

    /// The ARN of a new key.
    pub(crate) async fn key(&self) -> String {
        let made = self.kms(REGION).await.create_key().send().await.unwrap();
        made.key_metadata.unwrap().arn.unwrap()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
