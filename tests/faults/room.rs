//! A disk that fills up: changes are refused before it is full, use and reading go on as long as they can be recorded,
//! health says so, and everything comes back by itself.

use std::time::{Duration, Instant};

use polykey_proto::polykey::v2 as pb;
use serde_json::json;
use tonic::Code;

use crate::common::client::{Client, refused};
use crate::common::{Options, Server, skip};
use crate::log_mutations::export;
use crate::sinks::Disk;
use crate::support::{Wire, deadline, no_panic};

const SHOWS: Duration = Duration::from_secs(1);

async fn shows(wire: &Wire, status: pb::HealthStatus) {
    let since = Instant::now();
    loop {
        let now = wire.keys().health_check(()).await.unwrap().into_inner().status();
        if now == status {
            return;
        }
        assert!(since.elapsed() < deadline(SHOWS), "{now:?} instead of {status:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Refused for want of room, in words and for programs.
async fn no_room(admin: &Client, method: &str, body: serde_json::Value) {
    let fail = refused(admin.call(method, body).await, Code::ResourceExhausted);
    assert_eq!(fail.reason, "DISK_FULL", "{fail:?}");
    assert!(fail.text.contains("the disk of this node is full") && fail.retry, "{fail:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_stops_changes_first_and_nothing_for_good() {
    let place = tempfile::tempdir().unwrap();
    let disk = Disk::new(place.path().join("disk"));
    if !disk.mounted {
        skip(
            "a_disk_that_fills_up_stops_changes_first_and_nothing_for_good",
            "no tmpfs can be mounted",
        );
        return;
    }
    let state = disk.path.join("state");
    drop(Server::dev_in(&state, &Options::default(), None).stop());
    let path = state.join("polykey.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace("[storage]\n", "[storage]\nreserve_mib = 16\n");
    std::fs::write(&path, text).unwrap();
    let server = Server::dev_in(&state, &Options::default(), None);
    let admin = server.admin().await;
    let wire = Wire::of(&admin);
    let key = admin.create(json!({})).await;
    let doomed = admin.create(json!({})).await;
    let sealed = admin
        .call("Encrypt", json!({"key_id": key, "plaintext": data_encoding::BASE64.encode(b"x")}))
        .await
        .unwrap();
    let about = || json!({"key_id": key});
    let open = || json!({"key_id": key, "ciphertext": sealed["ciphertext"]});
    shows(&wire, pb::HealthStatus::Healthy).await;
    for _ in 0..3 {
        // Less than the reserve, and more than the quarter of it that is never used.
        disk.resize(Some(10 * 1024));
        shows(&wire, pb::HealthStatus::Degraded).await;
        assert!(server.output().contains("reserve_mib"), "the log has the reason");
        no_room(&admin, "CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await;
        no_room(&admin, "RotateKey", about()).await;
        no_room(&admin, "UpdateKeyMetadata", json!({"key_id": key, "description": "more"})).await;
        no_room(
            &admin,
            "CreateClient",
            json!({
                "client_id": "c",
                "name": "c",
                "identities": [{
                    "kind": "CERTIFICATE_IDENTITY_KIND_SPIFFE_URI",
                    "value": polykey::pki::client_identity("c").unwrap().to_string(),
                }],
            }),
        )
        .await;
        admin.call("GetKey", about()).await.unwrap();
        admin.call("Decrypt", open()).await.unwrap();
        let mut again =
            Client::new(&server.address, admin.files.clone(), &admin.id, &admin.api_key);
        again.login().await.unwrap();
        // What takes away is what such an hour may need.
        admin.call("DisableKey", json!({"key_id": doomed})).await.unwrap();

        disk.resize(Some(2 * 1024));
        shows(&wire, pb::HealthStatus::Unhealthy).await;
        for (method, body) in [
            ("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})),
            ("GetKey", about()),
            ("Decrypt", open()),
            ("EnableKey", json!({"key_id": doomed})),
        ] {
            no_room(&admin, method, body).await;
        }

        disk.resize(None);
        shows(&wire, pb::HealthStatus::Healthy).await;
        admin.call("EnableKey", json!({"key_id": doomed})).await.unwrap();
        admin.call("RotateKey", about()).await.unwrap();
        admin.call("Decrypt", open()).await.unwrap();
    }
    let leaves = export(&server, &place.path().join("export")).0;
    assert!(leaves.len() > 20, "{}", leaves.len());
    for command in [["store", "verify"], ["audit", "verify"]] {
        let (code, out, err) = tokio::task::block_in_place(|| server.cli(&command));
        assert_eq!(code, 0, "{command:?}: {out}{err}");
    }
    no_panic(&server.output());
    drop(tokio::task::block_in_place(|| server.stop()));
}
