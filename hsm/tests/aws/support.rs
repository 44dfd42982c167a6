//! What the tests share: processes with an environment of their own, settings, names.

use std::process::Command;
use std::time::Duration;

use polykey_hsm::aws::{AwsConnection, AwsKms, AwsWrapper};
use polykey_hsm::{Deadline, KeyMaterial, WrapContext};

pub(crate) const REGION: &str = "eu-west-1";
pub(crate) const ACCESS_KEY: &str = "AKIAPOLYKEYTESTS0000";
pub(crate) const SECRET_KEY: &str = "a-secret-access-key-of-the-tests";
pub(crate) const CONTEXT: WrapContext = WrapContext::root_slot([1; 16], [2; 16]);

/// Runs a test in a process of its own: the SDK reads the environment, and no process may change
/// its own safely. Nothing of the machine's AWS settings or proxies gets in.
pub(crate) fn alone(test: &str, variables: &[(&str, &str)], body: impl AsyncFnOnce()) {
    const CHILD: &str = "POLYKEY_TEST_CHILD";
    if std::env::var(CHILD).as_deref() == Ok(test) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.unwrap().block_on(body());
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy().to_uppercase();
        if text.starts_with("AWS_") || text.ends_with("_PROXY") {
            command.env_remove(name);
        }
    }
    let output = command
        .args(["--exact", test, "--nocapture", "--include-ignored"])
        .env(CHILD, test)
        .env("HOME", home.path())
        .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

pub(crate) fn connection(url: &str) -> AwsConnection {
    AwsConnection {
        region: Some(REGION.to_owned()),
        endpoint_url: Some(url.to_owned()),
        ..AwsConnection::default()
    }
}

pub(crate) fn settings(url: &str, key: &str) -> AwsKms {
    AwsKms { key: key.to_owned(), connection: connection(url) }
}

pub(crate) async fn open(url: &str, key: &str) -> AwsWrapper {
    AwsWrapper::open(&settings(url, key), soon()).await.unwrap()
}

pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

pub(crate) fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::from_secret(bytes.to_vec()).unwrap()
}

/// The bytes of what came back.
pub(crate) fn bytes(key: KeyMaterial) -> Vec<u8> {
    key.expose_for_export().to_vec()
}
