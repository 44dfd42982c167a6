//! Answers that say no, and answers that are wrong: one try, told apart in words, never believed.

use std::fs;
use std::path::PathBuf;

use polykey_hsm::aws::AwsWrapper;
use polykey_hsm::{KeyWrapper, WrapError};

use super::fake::{Fake, Fault};
use super::support::{CONTEXT, alone, bytes, material, open, settings, soon};

const SECRET: &[u8] = b"what is wrapped";

#[test]
fn each_refusal_says_what_to_do_after_one_try() {
    alone("refusals::each_refusal_says_what_to_do_after_one_try", &[], async || {
        let fake = Fake::start().await;
        let wrapper = open(&fake.url, &fake.key).await;
        let wrapped = wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await.unwrap();
        let pending = "arn:aws:kms:eu-west-1:111122223333:key/x is pending deletion.";
        let denied = "User: arn:aws:iam::111122223333:user/x is not authorized";
        let signed = "The Canonical String should have been 'x-amz-security-token:TOKEN'";
        for (code, message, words) in [
            ("DisabledException", "", "is disabled: `aws kms enable-key` enables it"),
            ("KMSInvalidStateException", pending, "is pending deletion."),
            ("KMSInvalidStateException", pending, "`aws kms cancel-key-deletion`"),
            ("NotFoundException", "", "was not found in eu-west-1"),
            ("IncorrectKeyException", "", "wrong key"),
            ("AccessDeniedException", denied, "AWS denies kms:Decrypt on arn:aws:kms:"),
            ("AccessDeniedException", denied, denied),
            ("ExpiredTokenException", "", "the AWS credentials have expired"),
            ("UnrecognizedClientException", "", "does not know the credentials"),
            ("InvalidSignatureException", signed, "the clock of this machine"),
            ("ValidationException", "x\ny", "AWS refuses kms:Decrypt on arn:aws:kms:"),
            ("SomethingNewException", "", "SomethingNewException"),
        ] {
            fake.always(Fault::Error(400, code, message));
            let before = fake.calls();
            match wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await {
                Err(WrapError::Refused(text)) => {
                    assert!(text.contains(words), "{code}: {text}");
                    assert!(!text.contains("TOKEN") && !text.contains('\n'), "{text}");
                }
                other => panic!("{code}: {other:?}"),
            }
            let tries = fake.calls() - before;
            assert_eq!(tries, 1, "{code}");
        }
        fake.always(Fault::Error(400, "InvalidKeyUsageException", ""));
        match wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await {
            Err(WrapError::Config(text)) => assert!(text.contains("not a symmetric key"), "{text}"),
            other => panic!("{other:?}"),
        }
        fake.always(Fault::Error(400, "InvalidCiphertextException", ""));
        let opened = wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await;
        assert!(matches!(opened, Err(WrapError::Broken)), "{opened:?}");
        for (status, words) in [(403, "check the credentials"), (404, "check `endpoint_url`")] {
            fake.always(Fault::Garbage(status, "<html>no</html>"));
            match wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await {
                Err(WrapError::Refused(text)) => assert!(text.contains(words), "{text}"),
                other => panic!("{status}: {other:?}"),
            }
        }
        fake.always(None);
        let opened = wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await.unwrap();
        assert_eq!(bytes(opened), SECRET);
    });
}

#[test]
fn an_answer_of_another_key_or_with_other_bytes_is_an_error() {
    alone("refusals::an_answer_of_another_key_or_with_other_bytes_is_an_error", &[], async || {
        let fake = Fake::start().await;
        let wrapper = open(&fake.url, &fake.key).await;
        let wrapped = wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await.unwrap();
        for fault in [Fault::WrongKeyId, Fault::NoKeyId] {
            fake.always(fault);
            for result in [
                wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await.map(|_| ()),
                wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await.map(|_| ()),
            ] {
                match result {
                    Err(WrapError::Refused(text)) => {
                        assert!(text.starts_with("wrong key: "), "{text}");
                        assert!(text.contains("nothing of the answer was taken"), "{text}");
                    }
                    other => panic!("{fault:?}: {other:?}"),
                }
            }
        }
        for fault in [Fault::WrongBytes, Fault::FewBytes, Fault::NoBytes] {
            fake.always(fault);
            let opened = wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await;
            assert!(matches!(opened, Err(WrapError::Broken)), "{fault:?}: {opened:?}");
        }
        // A ciphertext that is not one shows when it is opened, before anything depends on it.
        fake.always(Fault::NoBytes);
        let none = wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await;
        assert_eq!(none, Err(WrapError::Unavailable { retryable: true }));
        fake.always(Fault::WrongBytes);
        let bad = wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await.unwrap();
        fake.always(None);
        let opened = wrapper.unwrap_key(&bad, &CONTEXT, soon()).await;
        assert!(matches!(opened, Err(WrapError::Broken)), "{opened:?}");
    });
}

/// Credentials from a process, as IAM Roles Anywhere gives them, and a role over them.
#[test]
fn a_role_that_is_not_to_be_had_says_why() {
    let files = tempfile::tempdir().unwrap();
    let config = files.path().join("config");
    let variables = [
        ("AWS_CONFIG_FILE", config.to_str().unwrap()),
        ("AWS_ACCESS_KEY_ID", ""),
        ("AWS_SECRET_ACCESS_KEY", ""),
    ];
    alone("refusals::a_role_that_is_not_to_be_had_says_why", &variables, async || {
        let config = PathBuf::from(std::env::var_os("AWS_CONFIG_FILE").unwrap());
        let (fake, sts) = (Fake::start().await, Fake::start().await);
        let process = config.with_file_name("credentials.json");
        let keys = r#"{"Version": 1, "AccessKeyId": "AKIAPROCESS", "SecretAccessKey": "x"}"#;
        fs::write(&process, keys).unwrap();
        let text = format!(
            "[profile edge]\ncredential_process = cat {}\nservices = here\n\
             [services here]\nsts =\n  endpoint_url = {}\n",
            process.display(),
            sts.url
        );
        fs::write(config, text).unwrap();
        let mut settings = settings(&fake.url, &fake.key);
        settings.connection.profile = Some("edge".to_owned());
        settings.connection.role_arn = Some("arn:aws:iam::111122223333:role/polykey".to_owned());
        let wrapper = AwsWrapper::open(&settings, soon()).await.unwrap();
        let wrap = async || wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await;
        for (fault, words) in [
            (
                Fault::Error(403, "AccessDenied", "User: x is not authorized"),
                "AWS denies sts:AssumeRole on the configured role",
            ),
            (Fault::Error(403, "ExpiredToken", ""), "the AWS credentials have expired"),
            (Fault::Error(403, "InvalidClientTokenId", ""), "does not know the credentials"),
        ] {
            sts.always(fault);
            match wrap().await {
                Err(WrapError::Refused(text)) => assert!(text.contains(words), "{text}"),
                other => panic!("{fault:?}: {other:?}"),
            }
        }
        for fault in [Fault::Error(500, "InternalFailure", ""), Fault::Reset] {
            sts.always(fault);
            assert_eq!(wrap().await, Err(WrapError::Unavailable { retryable: true }), "{fault:?}");
        }
        assert_eq!(fake.calls(), 0);
        sts.always(None);
        wrap().await.unwrap();
        // A process that fails is no infrastructure of AWS'.
        fs::remove_file(process).unwrap();
        settings.connection.role_arn = None;
        let wrapper = AwsWrapper::open(&settings, soon()).await.unwrap();
        match wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await {
            Err(WrapError::Refused(text)) => assert!(text.contains("no AWS credentials"), "{text}"),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn nothing_goes_to_another_machine_in_the_clear_wherever_its_address_was_found() {
    let test =
        "refusals::nothing_goes_to_another_machine_in_the_clear_wherever_its_address_was_found";
    // 192.0.2.0/24 is nobody's (RFC 5737).
    alone(test, &[("AWS_ENDPOINT_URL_KMS", "http://192.0.2.2:1")], async || {
        let arn = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
        let mut settings = settings("", arn);
        settings.connection.endpoint_url = None;
        let wrapper = AwsWrapper::open(&settings, soon()).await.unwrap();
        let sent = wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await;
        match sent {
            Err(WrapError::Config(text) | WrapError::Refused(text)) => {
                assert!(text.contains("must be https://"), "{text}");
            }
            other => panic!("{other:?}"),
        }
    });
}
