//! References to secrets, in every build; what needs AWS is in tests/aws.
#![allow(clippy::unwrap_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use futures::executor::block_on;
use polykey_hsm::aws::AwsConnection;
use polykey_hsm::bootstrap::{is_parameter_name, resolve};
use polykey_hsm::{
    Deadline, KeyWrapper, LocalError, LocalWrapper, MasterKeySource, PassphraseParams,
    SecretSource, generate_master_key,
};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

#[test]
fn a_master_key_that_was_resolved_is_the_one_that_is_opened_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    fs::write(&path, generate_master_key().unwrap().as_bytes()).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let source = SecretSource::File(path.clone());
    let values =
        block_on(resolve(std::slice::from_ref(&source), &AwsConnection::default(), soon()))
            .unwrap();
    let resolved = LocalWrapper::of_master_key(&source, &values[0]).unwrap();
    let opened = LocalWrapper::open(&MasterKeySource::File(path)).unwrap();
    assert_eq!(resolved.id(), opened.id());

    let origin = SecretSource::Ssm("/polykey/master".into());
    let refused = LocalWrapper::of_master_key(&origin, b"hunter2").unwrap_err().to_string();
    assert!(refused.starts_with("SSM parameter /polykey/master holds no master key"), "{refused}");
    assert!(!refused.contains("hunter2"));
    let cheap = PassphraseParams { passes: 1, ..PassphraseParams::MIN };
    let refused = LocalWrapper::of_passphrase(&origin, b"correct horse", cheap).unwrap_err();
    assert_eq!(refused, LocalError::Cost);
    LocalWrapper::of_passphrase(&origin, b"correct horse", PassphraseParams::MIN).unwrap();
}

#[test]
fn an_empty_secret_is_a_problem_and_a_good_one_does_not_help() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        SecretSource::File(path)
    };
    let sources = [file("good", "a"), file("empty", "")];
    let problems = block_on(resolve(&sources, &AwsConnection::default(), soon())).unwrap_err();
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].index, 1);
    assert!(problems[0].text.ends_with("/empty is empty"), "{}", problems[0]);
}

#[test]
fn parameters_are_named_as_aws_names_them() {
    for good in ["a", "/a", "/polykey/edge-1/tls_key.pem", "/a/b:3", "/a:stable"] {
        assert!(is_parameter_name(good), "{good}");
    }
    for bad in ["", "/a b", "/a:", "/a:1:2", "/a%2f", "/a\n", "/ä", &"x".repeat(1012)] {
        assert!(!is_parameter_name(bad), "{bad:?}");
    }
}

#[cfg(not(feature = "aws"))]
#[test]
fn without_the_feature_a_parameter_is_a_problem_that_names_it() {
    let sources = [SecretSource::Ssm("/polykey/pin".into())];
    let problems = block_on(resolve(&sources, &AwsConnection::default(), soon())).unwrap_err();
    let text =
        "SSM parameter /polykey/pin: this build reads none; build it with the cargo feature `aws`";
    assert_eq!(problems[0].text, text);
}
