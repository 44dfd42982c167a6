//! Hardened keys of the real binary, under a KMS key that moto plays, over a wire that breaks.

use std::path::Path;
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tonic::Code;

use crate::common::aws::{Moto, REGION};
use crate::common::client::{Client, Fail, refused};
use crate::common::softhsm::SoftHsm;
use crate::common::steps::{says, until};
use crate::common::wire::Wire;
use crate::common::{Options, PATIENCE, Server};

const HARDENED: &str = "STORAGE_PROFILE_HARDENED";
const STANDARD: &str = "STORAGE_PROFILE_STANDARD";

fn options() -> Options {
    // A home without settings of AWS.
    Moto::options(Path::new("/nonexistent"))
}

/// Stops the service without ending its connections, or lets it go on.
fn signal(moto: &Moto, signal: Signal) {
    let pid = Pid::from_raw(moto.pid().try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// A node whose hardened keys lie under a key of moto's.
fn node(moto: &Moto, wire: &Wire, cache: &str) -> Server {
    let (status, output, directory) = Server::dev().stop();
    assert!(status.success(), "{status}: {output}");
    let directory = directory.unwrap();
    let state = directory.path().join("state");
    let path = state.join("polykey.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let (key, url) = (moto.key(), wire.url());
    let more = format!(
        "\n[wrappers.cloud]\nkind = \"aws\"\nkey = \"{key}\"\nregion = \"{REGION}\"\n\
         endpoint_url = \"{url}\"\n\n[hardened]\nwrapper = \"cloud\"\ncache = \"{cache}\"\n"
    );
    std::fs::write(&path, text + &more).unwrap();
    Server::dev_in(&state, &options(), Some(directory))
}

async fn client(server: &Server, admin: &Client, id: &str, tier: &str) -> Client {
    let fields = json!({"roles": ["user"], "tier": tier});
    let mut client = server.stranger(admin, id, fields).await;
    client.login().await.unwrap();
    client
}

async fn create(client: &Client, fields: Value) -> Result<(String, String), Fail> {
    let mut body = json!({"key_type": "KEY_TYPE_AES_256"});
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    let made = client.call("CreateKey", body).await?;
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    Ok((text(&made["key_id"]), text(&made["metadata"]["storage_type"])))
}

async fn hardened(client: &Client) -> String {
    let (key, profile) = create(client, json!({})).await.unwrap();
    assert_eq!(profile, HARDENED);
    key
}

async fn seal(client: &Client, key: &str) -> Result<String, Fail> {
    let body = json!({"key_id": key, "plaintext": BASE64.encode(b"plain")});
    Ok(client.call("Encrypt", body).await?["ciphertext"].as_str().unwrap().to_owned())
}

async fn open(client: &Client, ciphertext: &str) -> Result<(), Fail> {
    let opened = client.call("Decrypt", json!({"ciphertext": ciphertext})).await?;
    assert_eq!(opened["plaintext"], BASE64.encode(b"plain"));
    Ok(())
}

#[track_caller]
fn unavailable<T: std::fmt::Debug>(result: Result<T, Fail>) {
    let fail = refused(result, Code::Unavailable);
    assert!(fail.retry, "a hint when to come back: {fail:?}");
    assert!(!fail.text.contains("127.0.0.1") && !fail.text.contains("arn:"), "{fail:?}");
}

/// How long it takes until a use that was refused succeeds.
async fn recovery(client: &Client, ciphertext: &str) -> Duration {
    let begun = Instant::now();
    while let Err(fail) = open(client, ciphertext).await {
        assert_eq!(fail.code, Code::Unavailable, "{fail:?}");
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn tiers_decide_and_keys_live_through_rotation_restart_and_root_rotation() {
    let moto = Moto::start();
    let wire = Wire::to(&moto.url());
    let server = node(&moto, &wire, "5m");
    let admin = server.admin().await;
    let pro = client(&server, &admin, "pro", "CLIENT_TIER_PRO").await;
    let free = client(&server, &admin, "free", "CLIENT_TIER_FREE").await;

    let (_, profile) = create(&free, json!({})).await.unwrap();
    assert_eq!(profile, STANDARD);
    let asked = json!({"storage_profile": HARDENED});
    refused(create(&free, asked.clone()).await, Code::PermissionDenied);
    // What it writes of its tier is not believed.
    let mut claimed = asked.clone();
    claimed["requester_context"] = json!({"client_tier": "CLIENT_TIER_ENTERPRISE"});
    refused(create(&free, claimed).await, Code::PermissionDenied);
    let (_, profile) = create(&pro, json!({"storage_profile": STANDARD})).await.unwrap();
    assert_eq!(profile, STANDARD);
    assert_eq!(create(&pro, asked).await.unwrap().1, HARDENED);
    let batch =
        json!({"keys": [{"key_type": "KEY_TYPE_ECDSA_P384"}, {"key_type": "KEY_TYPE_API_KEY"}]});
    let made = pro.call("BatchCreateKeys", batch).await.unwrap();
    for result in made["results"].as_array().unwrap() {
        assert_eq!(result["success"]["metadata"]["storage_type"], HARDENED, "{result}");
    }

    let key = hardened(&pro).await;
    let first = seal(&pro, &key).await.unwrap();
    open(&pro, &first).await.unwrap();
    let got = pro.call("GetKey", json!({"key_id": key})).await.unwrap();
    pro.call("RotateKey", json!({"key_id": key, "strategy": "ROTATION_STRATEGY_HOT"}))
        .await
        .unwrap();
    let second = seal(&pro, &key).await.unwrap();

    let server = server.restart(true, &options());
    let pro = pro.at(&server.address);
    for ciphertext in [&first, &second] {
        open(&pro, ciphertext).await.unwrap();
    }
    let again = pro.call("GetKey", json!({"key_id": key, "version": 1})).await.unwrap();
    assert_eq!(got["key_material"], again["key_material"], "a version has one blob");

    let (code, out, err) = server.cli(&["root", "rotate"]);
    assert_eq!(code, 0, "{out}{err}");
    for ciphertext in [&first, &second] {
        open(&pro, ciphertext).await.unwrap();
    }
    let (code, out, err) = server.cli(&["store", "verify"]);
    assert_eq!(code, 0, "{out}{err}");
    pro.call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    let fail = refused(open(&pro, &first).await, Code::FailedPrecondition);
    assert_eq!(fail.reason, "KEY_REVOKED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_is_away_or_hangs_stops_only_what_needs_it_and_is_found_again() {
    let moto = Moto::start();
    let mut wire = Wire::to(&moto.url());
    let server = node(&moto, &wire, "5m");
    let admin = server.admin().await;
    let pro = client(&server, &admin, "pro", "CLIENT_TIER_PRO").await;
    let (warm, cold) = (hardened(&pro).await, hardened(&pro).await);
    let sealed_cold = seal(&pro, &cold).await.unwrap();
    // A restart forgets what was open.
    let mut server = server.restart(true, &options());
    let mut pro = pro.at(&server.address);
    let sealed_warm = seal(&pro, &warm).await.unwrap();
    until(&pro, "HEALTH_STATUS_HEALTHY").await;
    let standard = json!({"storage_profile": STANDARD});

    for cut in [true, false] {
        if cut {
            wire.cut();
        } else {
            signal(&moto, Signal::STOP);
        }
        // The first calls find it out; the caller's deadline bounds its own wait.
        let body = json!({"ciphertext": sealed_cold});
        let soon = pro.call_with("Decrypt", body, &[("grpc-timeout", b"50m")]).await;
        let fail = soon.unwrap_err();
        // The client counts too, and its own clock may be first.
        let codes = [Code::DeadlineExceeded, Code::Unavailable, Code::Cancelled];
        assert!(codes.contains(&fail.code), "{fail:?}");
        let (key, _) = create(&pro, standard.clone()).await.unwrap();
        let theirs = seal(&pro, &key).await.unwrap();
        for _ in 0..3 {
            unavailable(open(&pro, &sealed_cold).await);
            open(&pro, &sealed_warm).await.unwrap();
            open(&pro, &theirs).await.unwrap();
        }
        until(&pro, "HEALTH_STATUS_DEGRADED").await;
        says(&server, "[wrappers.cloud] does not answer").await;
        let count = |listed: Value| listed["keys"].as_array().unwrap().len();
        let before = count(pro.call("ListKeys", json!({})).await.unwrap());
        unavailable(create(&pro, json!({})).await);
        assert_eq!(count(pro.call("ListKeys", json!({})).await.unwrap()), before);
        // Open: refused at once.
        let begun = Instant::now();
        unavailable(open(&pro, &sealed_cold).await);
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());

        if cut {
            wire.mend();
        } else {
            signal(&moto, Signal::CONT);
        }
        let took = recovery(&pro, &sealed_cold).await;
        println!("back after {took:?} (cut: {cut})");
        assert!(took < Duration::from_secs(10), "2 s are promised; found again after {took:?}");
        until(&pro, "HEALTH_STATUS_HEALTHY").await;
        hardened(&pro).await;
        server = server.restart(true, &options());
        pro = pro.at(&server.address);
        open(&pro, &sealed_warm).await.unwrap();
    }

    // A start without it.
    wire.cut();
    let server = server.restart(true, &options());
    let pro = pro.at(&server.address);
    until(&pro, "HEALTH_STATUS_DEGRADED").await;
    let (key, _) = create(&pro, standard).await.unwrap();
    open(&pro, &seal(&pro, &key).await.unwrap()).await.unwrap();
    pro.call("GetKey", json!({"key_id": cold})).await.unwrap();
    unavailable(open(&pro, &sealed_cold).await);
    wire.mend();
    recovery(&pro, &sealed_cold).await;
    // And gone for good: what is open goes on for its time.
    drop(moto);
    open(&pro, &sealed_cold).await.unwrap();
    until(&pro, "HEALTH_STATUS_HEALTHY").await;
    unavailable(open(&pro, &sealed_warm).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_cache_of_zero_nothing_goes_on_without_the_backend() {
    let moto = Moto::start();
    let mut wire = Wire::to(&moto.url());
    let server = node(&moto, &wire, "0s");
    let admin = server.admin().await;
    let pro = client(&server, &admin, "pro", "CLIENT_TIER_ENTERPRISE").await;
    let key = hardened(&pro).await;
    let sealed = seal(&pro, &key).await.unwrap();
    open(&pro, &sealed).await.unwrap();
    wire.cut();
    unavailable(open(&pro, &sealed).await);
}

/// The p99 of encryptions one after the other, while eight others ask for what they do not get.
async fn p99(client: &Client, key: &str, refused: &str) -> Duration {
    let askers: Vec<_> = (0..8)
        .map(|_| {
            let (client, key) = (client.clone(), refused.to_owned());
            tokio::spawn(async move {
                loop {
                    seal(&client, &key).await.unwrap_err();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
        })
        .collect();
    let count = 3000;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        seal(client, key).await.unwrap();
        times.push(begun.elapsed());
    }
    askers.iter().for_each(tokio::task::JoinHandle::abort);
    times.sort_unstable();
    times[count * 99 / 100]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures: p99 of STANDARD keys while the backend hangs and is asked for all the time"]
async fn standard_keys_are_not_slowed() {
    let moto = Moto::start();
    let wire = Wire::to(&moto.url());
    let server = node(&moto, &wire, "0s");
    let admin = server.admin().await;
    let pro = client(&server, &admin, "pro", "CLIENT_TIER_PRO").await;
    let (standard, _) = create(&pro, json!({"storage_profile": STANDARD})).await.unwrap();
    let (revoked, _) = create(&pro, json!({"storage_profile": STANDARD})).await.unwrap();
    let cold = hardened(&pro).await;
    pro.call("RevokeKey", json!({"key_id": revoked, "immediate": true})).await.unwrap();
    // As much is refused before, for a reason that needs no backend.
    p99(&pro, &standard, &revoked).await;
    let before = p99(&pro, &standard, &revoked).await;
    signal(&moto, Signal::STOP);
    let during = p99(&pro, &standard, &cold).await;
    signal(&moto, Signal::CONT);
    println!("p99 {before:?} before, {during:?} while the backend hangs");
    assert!(during <= before * 3 / 2, "{before:?} before, {during:?} during");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kms_key_that_is_not_there_degrades_health_and_stops_nobody_from_asking() {
    let moto = Moto::start();
    let wire = Wire::to(&moto.url());
    let directory = node(&moto, &wire, "0s").stop().2.unwrap();
    let state = directory.path().join("state");
    let path = state.join("polykey.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let none = text.find("arn:aws:kms").and_then(|at| text[at..].split('"').next()).unwrap();
    let other =
        format!("{}/11111111-2222-3333-4444-555555555555", none.rsplit_once('/').unwrap().0);
    std::fs::write(&path, text.replace(none, &other)).unwrap();
    let server = Server::dev_in(&state, &options(), Some(directory));
    let admin = server.admin().await;
    // Found at the start, before anybody asks.
    until(&admin, "HEALTH_STATUS_DEGRADED").await;
    says(&server, "[wrappers.cloud] refuses").await;
    for _ in 0..5 {
        let fail = create(&admin, json!({"storage_profile": HARDENED})).await.unwrap_err();
        let told = (fail.code, fail.reason.as_str());
        assert_eq!(told, (Code::FailedPrecondition, "BACKEND_REFUSED"));
    }
    assert!(!server.output().contains("does not answer"), "the breaker has opened");
}

#[tokio::test(flavor = "multi_thread")]
async fn hardened_keys_lie_under_a_token_too() {
    let token = SoftHsm::new();
    let server = Server::dev_configured(|text| {
        let more = "\n[hardened]\nwrapper = \"hsm\"\ncache = \"0s\"\n";
        format!("{text}{}{more}", token.section("wrappers.hsm"))
    });
    let admin = server.admin().await;
    // The token has no key yet, and nothing makes one.
    let fail = create(&admin, json!({"storage_profile": HARDENED})).await.unwrap_err();
    assert_eq!((fail.code, fail.reason.as_str()), (Code::FailedPrecondition, "BACKEND_REFUSED"));
    // It answers, and says no: somebody should look.
    until(&admin, "HEALTH_STATUS_DEGRADED").await;
    says(&server, "[wrappers.hsm] refuses").await;
    token.create_kek(&server.state.join("polykey.toml"), "hsm");
    let key = hardened(&admin).await;
    until(&admin, "HEALTH_STATUS_HEALTHY").await;
    let sealed = seal(&admin, &key).await.unwrap();
    open(&admin, &sealed).await.unwrap();
    // Nothing is remembered, so that pulling the token out is felt at once, by hardened keys alone.
    let (standard, _) = create(&admin, json!({"storage_profile": STANDARD})).await.unwrap();
    token.pull();
    let fail = open(&admin, &sealed).await.unwrap_err();
    assert!(fail.code == Code::Unavailable && fail.retry, "{fail:?}");
    let other = seal(&admin, &standard).await.unwrap();
    open(&admin, &other).await.unwrap();
    token.insert();
    let until = Instant::now() + PATIENCE;
    while let Err(fail) = open(&admin, &sealed).await {
        assert_eq!(fail.code, Code::Unavailable, "{fail:?}");
        assert!(Instant::now() < until, "not back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let server = server.restart(true, &Options::default());
    open(&server.admin().await, &sealed).await.unwrap();
}
