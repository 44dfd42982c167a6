//! Secrets from Parameter Store, against moto; beside files, variables and credentials.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use aws_sdk_ssm::types::ParameterType;
use polykey_hsm::bootstrap::{Problem, resolve};
use polykey_hsm::{Deadline, SecretSource};

use super::fake::{Fake, Fault};
use super::moto::Moto;
use super::support::{REGION, alone, connection, soon};

fn ssm(name: &str) -> SecretSource {
    SecretSource::Ssm(name.to_owned())
}

fn texts(problems: &[Problem]) -> Vec<(usize, &str)> {
    problems.iter().map(|p| (p.index, p.text.as_str())).collect()
}

#[test]
fn every_kind_of_reference_resolves_in_its_order() {
    let test = "ssm::every_kind_of_reference_resolves_in_its_order";
    alone(test, &[("POLYKEY_PIN", "1234")], async || {
        let moto = Moto::start();
        let client = aws_sdk_ssm::Client::new(&moto.config(REGION).await);
        // More than two calls' worth.
        for n in 0..23 {
            let put = client.put_parameter().name(format!("/polykey/n{n}"));
            let put = put.value(format!("secret {n}")).r#type(ParameterType::SecureString);
            put.send().await.unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("chain.pem");
        std::fs::write(&file, "x".repeat(20_000)).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();

        let mut sources: Vec<_> = (0..23).map(|n| ssm(&format!("/polykey/n{n}"))).collect();
        sources.insert(3, SecretSource::Env("POLYKEY_PIN".into()));
        sources.push(SecretSource::File(file));
        sources.push(ssm("/polykey/n7"));
        sources.push(ssm("/polykey/n7:1"));
        let found = resolve(&sources, &connection(&moto.url), soon()).await.unwrap();
        let mut expected: Vec<_> = (0..23).map(|n| format!("secret {n}").into_bytes()).collect();
        expected.insert(3, b"1234".to_vec());
        expected.push("x".repeat(20_000).into_bytes());
        expected.extend([b"secret 7".to_vec(), b"secret 7".to_vec()]);
        assert_eq!(found.iter().map(|v| v.to_vec()).collect::<Vec<_>>(), expected);
    });
}

#[test]
fn everything_that_is_wrong_is_named_at_once_and_no_value_is() {
    alone("ssm::everything_that_is_wrong_is_named_at_once_and_no_value_is", &[], async || {
        let moto = Moto::start();
        let client = aws_sdk_ssm::Client::new(&moto.config(REGION).await);
        for (name, kind) in
            [("/p/good", ParameterType::SecureString), ("/p/clear", ParameterType::String)]
        {
            let put = client.put_parameter().name(name).value("hunter2").r#type(kind);
            put.send().await.unwrap();
        }
        let sources = [
            ssm("/p/none"),
            ssm("/p/good"),
            ssm("/p/clear"),
            ssm("bad name"),
            SecretSource::Env("POLYKEY_NONE".into()),
            SecretSource::File("/nonexistent/file".into()),
            SecretSource::Credential("pin".into()),
        ];
        let problems = resolve(&sources, &connection(&moto.url), soon()).await.unwrap_err();
        let texts = texts(&problems);
        let expected = [
            (0, "SSM parameter /p/none: there is no such parameter in eu-west-1"),
            (2, "SSM parameter /p/clear: it is not a SecureString"),
            (3, "SSM parameter bad name is not the name of a parameter"),
            (4, "environment variable POLYKEY_NONE cannot be read: not set"),
            (5, "file /nonexistent/file cannot be read: No such file"),
            (6, "credential pin cannot be read: CREDENTIALS_DIRECTORY is not set"),
        ];
        assert_eq!(texts.len(), expected.len(), "{texts:?}");
        for ((index, text), (at, start)) in texts.iter().zip(expected) {
            assert!(*index == at && text.starts_with(start), "{index} {text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
    });
}

#[test]
fn a_silent_or_failing_service_is_named_within_the_deadline() {
    alone("ssm::a_silent_or_failing_service_is_named_within_the_deadline", &[], async || {
        let fake = Fake::start().await;
        fake.always(Fault::Silent);
        let started = Instant::now();
        let sources = [ssm("/a"), ssm("/b")];
        let deadline = Deadline::after(Duration::from_millis(400));
        let problems = resolve(&sources, &connection(&fake.url), deadline).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        let words = "AWS did not answer within the deadline";
        assert_eq!(
            texts(&problems),
            [
                (0, format!("SSM parameter /a: {words}").as_str()),
                (1, format!("SSM parameter /b: {words}").as_str())
            ]
        );

        fake.always(Fault::Error(400, "AccessDeniedException", "User x is not authorized"));
        let problems = resolve(&sources, &connection(&fake.url), soon()).await.unwrap_err();
        let text = &problems[1].text;
        let start = "SSM parameter /b: AWS denies ssm:GetParameters on it: allow it in";
        assert!(text.starts_with(start), "{text}");

        fake.always(Fault::Error(500, "InternalServerError", ""));
        let before = fake.calls();
        let problems = resolve(&sources, &connection(&fake.url), soon()).await.unwrap_err();
        assert_eq!(fake.calls() - before, 3);
        assert!(problems[0].text.contains("AWS gave no answer"), "{problems:?}");
    });
}
