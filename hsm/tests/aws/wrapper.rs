//! The wrapper against moto: the conformance suite, and each way to name a key.

use aws_config::BehaviorVersion;
use polykey_hsm::aws::{AwsConnection, AwsKms, AwsWrapper};
use polykey_hsm::conformance::{self, Subject};
use polykey_hsm::{KeyMaterial, KeyWrapper, SlotKind, WrapContext, WrapError, WrappedKey};

use super::fake::Fake;
use super::moto::Moto;
use super::support::{CONTEXT, REGION, alone, bytes, material, open, settings, soon};

const SECRET: &[u8] = b"what is wrapped";

async fn wrap(wrapper: &AwsWrapper) -> WrappedKey {
    wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await.unwrap()
}

async fn unwrap(wrapper: &AwsWrapper, wrapped: &WrappedKey) -> Result<Vec<u8>, WrapError> {
    wrapper.unwrap_key(wrapped, &CONTEXT, soon()).await.map(bytes)
}

#[test]
fn it_conforms_against_moto() {
    alone("wrapper::it_conforms_against_moto", &[], async || {
        let moto = Moto::start();
        let (one, two) = (moto.key().await, moto.key().await);
        let [wrapper, reopened] = [open(&moto.url, &one).await, open(&moto.url, &one).await];
        let other = open(&moto.url, &two).await;
        assert_eq!(wrapper.kind(), SlotKind::Aws);
        let subject = Subject {
            wrapper: &wrapper,
            reopened: &reopened,
            other: &other,
            max_key: KeyMaterial::MAX_LEN,
            tamper_every: 1,
        };
        conformance::run(&subject).await;
    });
}

/// An alias may move on and keys are named in several ways; what was wrapped opens all the same.
#[test]
fn arn_id_and_alias_name_the_same_key() {
    alone("wrapper::arn_id_and_alias_name_the_same_key", &[], async || {
        let moto = Moto::start();
        let (arn, next) = (moto.key().await, moto.key().await);
        let id = arn.rsplit('/').next().unwrap();
        let kms = moto.kms(REGION).await;
        kms.create_alias().alias_name("alias/root").target_key_id(id).send().await.unwrap();
        let alias_arn = arn.replace(&format!("key/{id}"), "alias/root");
        let by_arn = open(&moto.url, &arn).await;
        let by_id = open(&moto.url, id).await;
        let by_alias = open(&moto.url, "alias/root").await;
        let by_alias_arn = open(&moto.url, &alias_arn).await;
        assert_eq!(by_arn.id(), by_id.id());
        assert_eq!(by_alias.id(), by_alias_arn.id());

        let first = wrap(&by_alias).await;
        for wrapper in [&by_arn, &by_id, &by_alias, &by_alias_arn] {
            assert_eq!(unwrap(wrapper, &first).await.unwrap(), SECRET);
        }
        for wrapper in [&by_arn, &by_id] {
            let wrapped = wrap(wrapper).await;
            assert_eq!(unwrap(&by_arn, &wrapped).await.unwrap(), SECRET);
            assert_eq!(unwrap(&by_id, &wrapped).await.unwrap(), SECRET);
            // An alias opens what went through it, not whatever its account holds.
            assert_eq!(unwrap(&by_alias, &wrapped).await, Err(WrapError::NotMine));
        }

        kms.update_alias().alias_name("alias/root").target_key_id(&next).send().await.unwrap();
        assert_eq!(unwrap(&by_alias, &first).await.unwrap(), SECRET, "the alias moved on");
        let second = wrap(&by_alias).await;
        assert_eq!(unwrap(&open(&moto.url, &next).await, &second).await.unwrap(), SECRET);
        assert_eq!(unwrap(&by_arn, &second).await, Err(WrapError::NotMine));
    });
}

/// Against the fake: moto cuts the id of a multi-Region key off in its ciphertext, and then does not
/// know the key.
#[test]
fn a_replica_of_a_multi_region_key_opens_what_another_region_wrapped() {
    let test = "wrapper::a_replica_of_a_multi_region_key_opens_what_another_region_wrapped";
    alone(test, &[], async || {
        let fake = Fake::start().await;
        let arn = |region: &str| {
            format!("arn:aws:kms:{region}:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab")
        };
        // The Region is that of the ARN, with none set.
        let connection =
            AwsConnection { endpoint_url: Some(fake.url.clone()), ..AwsConnection::default() };
        let of = async |key: String| {
            let settings = AwsKms { key, connection: connection.clone() };
            AwsWrapper::open(&settings, soon()).await.unwrap()
        };
        let (here, there) = (of(arn(REGION)).await, of(arn("eu-north-1")).await);
        assert_eq!(here.id(), there.id());
        for (from, to) in [(&here, &there), (&there, &here)] {
            assert_eq!(unwrap(to, &wrap(from).await).await.unwrap(), SECRET);
        }
    });
}

#[test]
fn settings_that_contradict_one_another_are_refused() {
    alone("wrapper::settings_that_contradict_one_another_are_refused", &[], async || {
        let arn = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
        let refused = async |settings: AwsKms| match AwsWrapper::open(&settings, soon()).await {
            Err(WrapError::Config(words)) => words,
            other => panic!("{other:?}"),
        };
        let words = refused(settings("http://127.0.0.1:1", arn)).await;
        assert!(words.contains("is not in the Region eu-west-1: remove `region`"), "{words}");
        let words = refused(settings("http://127.0.0.1:1", "my key")).await;
        assert!(words.contains("`my key` names no AWS KMS key"), "{words}");
        let nowhere = AwsKms { key: "alias/a".into(), connection: AwsConnection::default() };
        let words = refused(nowhere).await;
        assert!(words.contains("no AWS Region"), "{words}");
        let mut role = settings("http://127.0.0.1:1", "alias/a");
        role.connection.role_arn = Some("admin".into());
        let words = refused(role).await;
        assert!(words.contains("`admin` is not the ARN of a role"), "{words}");
    });
}

/// The standard chain: Region, endpoint and credentials from a profile, then a role over them.
#[test]
fn profile_and_role_are_found_as_every_aws_tool_finds_them() {
    let test = "wrapper::profile_and_role_are_found_as_every_aws_tool_finds_them";
    let files = tempfile::tempdir().unwrap();
    let config = files.path().join("config");
    let path = config.to_str().unwrap();
    // Empty variables count as unset, so the profile's keys are the only ones.
    let variables = [
        ("AWS_CONFIG_FILE", path),
        ("AWS_SHARED_CREDENTIALS_FILE", path),
        ("AWS_ACCESS_KEY_ID", ""),
        ("AWS_SECRET_ACCESS_KEY", ""),
    ];
    alone(test, &variables, async || {
        let moto = Moto::start();
        let path = std::env::var("AWS_CONFIG_FILE").unwrap();
        let text = format!(
            "[profile edge]\nregion = {REGION}\nendpoint_url = {}\naws_access_key_id = AKIAPROFILE\n\
             aws_secret_access_key = x\n[edge]\naws_access_key_id = AKIAPROFILE\n\
             aws_secret_access_key = x\n",
            moto.url
        );
        std::fs::write(path, text).unwrap();
        let with = async |profile: Option<&str>, role: Option<&str>| {
            let connection = AwsConnection {
                profile: profile.map(str::to_owned),
                role_arn: role.map(str::to_owned),
                region: Some(REGION.to_owned()),
                endpoint_url: profile.is_none().then(|| moto.url.clone()),
                ..AwsConnection::default()
            };
            let settings = AwsKms { key: "alias/edge".to_owned(), connection };
            AwsWrapper::open(&settings, soon()).await.unwrap()
        };
        let none = with(None, None).await;
        match none.wrap_key(&material(SECRET), &CONTEXT, soon()).await {
            Err(WrapError::Refused(words)) => {
                assert!(words.contains("no AWS credentials"), "{words}")
            }
            other => panic!("{other:?}"),
        }
        let sdk = aws_config::defaults(BehaviorVersion::latest()).profile_name("edge").load().await;
        let kms = aws_sdk_kms::Client::new(&sdk);
        let made = kms.create_key().send().await.unwrap().key_metadata.unwrap();
        kms.create_alias()
            .alias_name("alias/edge")
            .target_key_id(&made.key_id)
            .send()
            .await
            .unwrap();
        let plain = with(Some("edge"), None).await;
        assert_eq!(unwrap(&plain, &wrap(&plain).await).await.unwrap(), SECRET);

        // moto keeps an account apart by the role's ARN: another account has no such key, so that
        // the answer shows whose credentials were used.
        let role = |account: &str| format!("arn:aws:iam::{account}:role/polykey");
        let own = with(Some("edge"), Some(&role("123456789012"))).await;
        assert_eq!(unwrap(&own, &wrap(&own).await).await.unwrap(), SECRET);
        let foreign = with(Some("edge"), Some(&role("999999999999"))).await;
        match foreign.wrap_key(&material(SECRET), &CONTEXT, soon()).await {
            Err(WrapError::Refused(words)) => assert!(words.contains("was not found"), "{words}"),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn moto_refuses_another_key_an_unknown_key_and_unknown_credentials() {
    let test = "wrapper::moto_refuses_another_key_an_unknown_key_and_unknown_credentials";
    alone(test, &[], async || {
        let moto = Moto::start();
        let wrapper = open(&moto.url, &moto.key().await).await;
        let wrapped = wrap(&wrapper).await;
        let elsewhere = WrapContext { purpose: "other", ..CONTEXT };
        let opened = wrapper.unwrap_key(&wrapped, &elsewhere, soon()).await;
        assert!(matches!(opened, Err(WrapError::Broken)), "{opened:?}");

        // Its memory is gone, and with it the key.
        drop(moto);
        let moto = Moto::start();
        let gone = AwsKms {
            key: wrapper_key(&wrapped),
            connection: super::support::connection(&moto.url),
        };
        let gone = AwsWrapper::open(&gone, soon()).await.unwrap();
        match unwrap(&gone, &wrapped).await {
            Err(WrapError::Refused(words)) => assert!(words.contains("was not found"), "{words}"),
            other => panic!("{other:?}"),
        }
        // Where nothing listens any more there is no answer, which is something else.
        assert_eq!(
            unwrap(&wrapper, &wrapped).await,
            Err(WrapError::Unavailable { retryable: true })
        );

        let strict = Moto::start_with(&[("INITIAL_NO_AUTH_ACTION_COUNT", "0")]);
        let unknown = open(&strict.url, "alias/a").await;
        match unknown.wrap_key(&material(SECRET), &CONTEXT, soon()).await {
            Err(WrapError::Refused(words)) => assert!(words.contains("credentials"), "{words}"),
            other => panic!("{other:?}"),
        }
    });
}

/// The ARN that is recorded in a wrapped key.
fn wrapper_key(wrapped: &WrappedKey) -> String {
    let text = String::from_utf8_lossy(&wrapped.encode()).into_owned();
    let at = text.find("arn:aws:kms:").unwrap();
    let end = text[at..].find("key/").unwrap() + 4 + 36;
    text[at..at + end].to_owned()
}
