//! JSON that programs read, held to files: names and forms may be added to, never changed.

use std::path::Path;

use polykey_proto::common::v2::ClientTier;
use polykey_proto::polykey::v2 as pb;
use prost_types::Timestamp;
use serde::Serialize;

use super::admin_view::{
    ClientView, ClientsView, JobView, JobsView, RoleView, RolesView, RootView, StoreView, WhoView,
    WorkView,
};
use super::audit_view::{CheckpointView, EventsView, events};
use super::health::{HealthView, MetricsView};
use super::node::VerifiedView;
use super::view::{
    AliasView, AliasesView, DoneView, KeyView, KeysView, RotatedView, VersionsView, WrappedView,
};

fn at(seconds: i64) -> Option<Timestamp> {
    Some(Timestamp { seconds: 1_800_000_000 + seconds, nanos: 123_456_789 })
}

const ID: &str = "018f4e3c-7c4a-7c0a-8f5e-0123456789ab";

fn metadata() -> pb::KeyMetadata {
    pb::KeyMetadata {
        key_id: ID.into(),
        key_type: pb::KeyType::EcdsaP384.into(),
        status: pb::KeyStatus::Active.into(),
        version: 2,
        created_at: at(0),
        updated_at: at(1),
        expires_at: at(2),
        last_accessed_at: at(3),
        creator_identity: "admin".into(),
        authorized_contexts: vec!["bob".into()],
        access_policies: [("night".to_owned(), "forbid …".to_owned())].into(),
        description: "orders".into(),
        tags: [("team".to_owned(), "a".to_owned())].into(),
        data_classification: "secret".into(),
        metadata_checksum: "00ff".into(),
        access_count: 7,
        storage_type: pb::StorageProfile::Standard.into(),
        in_token: false,
        key_state: pb::KeyState::PendingDestruction.into(),
        revision: 9,
        exportable: true,
        aliases: vec!["orders".into()],
        primary_version: 2,
        latest_version: 3,
        destroy_at: at(4),
        revocation_reason: "gone".into(),
        revoke_at: at(5),
        version_expires_at: at(6),
        min_decryption_version: 1,
        min_encryption_version: 0,
        rotation_period_seconds: 86_400,
        next_rotation_at: at(7),
        read_after_expiry: true,
        public_key_der: vec![0x30; 60].into(),
        origin: pb::KeyOrigin::Generated.into(),
        version_state: pb::KeyVersionState::Primary.into(),
        min_available_version: 1,
        staged_version: 3,
        staged_effective_at: at(8),
        version_created_at: at(9),
        revoked_at: at(10),
        purpose: pb::KeyPurpose::Sign.into(),
        convergent: false,
        rotate_after_uses: 1000,
        max_uses: 2000,
    }
}

fn event() -> pb::AuditEvent {
    pb::AuditEvent {
        index: 5,
        time: at(0),
        request_id: "r".into(),
        client_id: "bob".into(),
        certificate_sha256: "ab".into(),
        peer_address: "127.0.0.1".into(),
        action: "keys:rotate".into(),
        outcome: pb::AuditOutcome::Denied.into(),
        code: 7,
        key_id: ID.into(),
        version: 1,
        decision_id: "d".into(),
        details: [("grace_seconds".to_owned(), "60".to_owned())].into(),
        correlation_id: "c".into(),
        count: 3,
        position: 1,
    }
}

fn client() -> pb::ClientRecord {
    pb::ClientRecord {
        client_id: "bob".into(),
        name: "Bob".into(),
        description: "d".into(),
        environment: "prod".into(),
        tier: ClientTier::Pro.into(),
        roles: vec!["user".into()],
        permissions: vec!["keys:read".into()],
        identities: vec![pb::CertificateIdentity {
            kind: pb::CertificateIdentityKind::SpiffeUri.into(),
            value: "spiffe://a/b".into(),
        }],
        state: pb::ClientState::Enabled.into(),
        created_at: at(0),
        updated_at: at(1),
        last_used_at: None,
        api_keys: vec![pb::ApiKeyInfo {
            key_prefix: "pk_1".into(),
            created_at: at(0),
            expires_at: at(1),
            last_used_at: None,
        }],
        revision: 4,
        created_by: "admin".into(),
    }
}

fn check(name: &str, view: &impl Serialize) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cli-json").join(name);
    let text = serde_json::to_string_pretty(view).unwrap() + "\n";
    if std::env::var_os("POLYKEY_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text, golden,
        "{name}: POLYKEY_WRITE_GOLDEN=1 writes it anew, if that is what is meant"
    );
}

#[test]
fn keys() {
    check("key.json", &KeyView::from(metadata()));
    check("key-empty.json", &KeyView::of(None));
    let keys = vec![KeyView::from(metadata())];
    check("key-list.json", &KeysView { keys, total_count: 10, filtered_count: 1 });
    let material = pb::KeyMaterial {
        encrypted_key_data: vec![1, 2, 3].into(),
        encryption_algorithm: "AES-256-GCM-SIV".into(),
        key_checksum: "ff".into(),
        ..Default::default()
    };
    check(
        "key-get.json",
        &WrappedView::from(pb::GetKeyResponse {
            key_material: Some(material),
            metadata: Some(metadata()),
            authorization_decision_id: "d".into(),
            ..Default::default()
        }),
    );
    check(
        "key-rotate.json",
        &RotatedView::from(pb::RotateKeyResponse {
            key_id: ID.into(),
            new_version: 2,
            previous_version: 1,
            metadata: Some(metadata()),
            rotation_timestamp: at(0),
            old_version_expires_at: at(1),
            audit_index: 8,
            new_key_material: None,
        }),
    );
    check(
        "key-versions.json",
        &VersionsView::from(vec![pb::KeyVersion {
            version: 1,
            state: pb::KeyVersionState::Deprecated.into(),
            status: pb::KeyStatus::Deprecated.into(),
            created_at: at(0),
            expires_at: at(1),
            origin: pb::KeyOrigin::Imported.into(),
            key_checksum: "ff".into(),
            ..Default::default()
        }]),
    );
    let alias = pb::KeyAlias {
        alias: "orders".into(),
        key_id: ID.into(),
        created_at: at(0),
        updated_at: at(1),
    };
    check("key-alias.json", &AliasView::from(alias.clone()));
    check("key-alias-list.json", &AliasesView { aliases: vec![alias.into()] });
    check("done.json", &DoneView::new("not shown", Some(3)));
}

#[test]
fn clients_and_roles() {
    check("client.json", &ClientView::from(client()));
    check("client-list.json", &ClientsView { clients: vec![client().into()] });
    let role = pb::RoleRecord {
        name: "ops".into(),
        permissions: vec!["keys:read".into()],
        description: "d".into(),
        created_at: at(0),
        updated_at: at(1),
        revision: 2,
        built_in: false,
    };
    check("role.json", &RoleView::from(role.clone()));
    check("role-list.json", &RolesView { roles: vec![role.into()] });
    check(
        "whoami.json",
        &WhoView::from(pb::WhoAmIResponse {
            client_id: "bob".into(),
            name: "Bob".into(),
            tier: ClientTier::Free.into(),
            roles: vec!["user".into()],
            permissions: vec!["keys:read".into()],
            environment: "prod".into(),
            certificate_sha256: "ab".into(),
            certificate_expires_at: at(0),
            token_expires_at: at(1),
            identity: client().identities.pop(),
            node_id: "0011".into(),
        }),
    );
}

#[test]
fn the_node() {
    check(
        "root-status.json",
        &RootView::from(pb::GetRootStatusResponse {
            root_id: "00".into(),
            slots: vec![pb::RootSlot {
                slot_id: "11".into(),
                label: "main".into(),
                kind: "local-file".into(),
                source: "file:/k".into(),
                created_at: at(0),
                in_use: true,
            }],
            epochs: vec![pb::StorageEpoch {
                epoch: 1,
                primary: true,
                created_at: at(0),
                records_remaining: 0,
            }],
            canary_ok: true,
            rotated_at: at(1),
            generation: 1,
            ..Default::default()
        }),
    );
    check(
        "store-status.json",
        &StoreView::from(pb::GetStoreStatusResponse {
            backend: "redb".into(),
            revision: 5,
            size_bytes: 4096,
            writable: true,
            records: [("keys".to_owned(), 2)].into(),
            free_bytes: 9,
            last_verified_at: at(0),
            last_verification_ok: true,
            damaged_records: 0,
            audit_tree_size: 3,
            format: 1,
            node_id: "0011".into(),
            read_only_reason: String::new(),
            anchor: "/a".into(),
            anchored_revision: 4,
            anchored_at: at(1),
            anchor_trouble: String::new(),
            replication: Some(pb::ReplicationStatus {
                target: "postgres://p@h/d (schema s)".into(),
                mode: "sync".into(),
                when_away: "refuse".into(),
                state: "away".into(),
                detail: "gone".into(),
                synchronous: false,
                shipped_revision: 4,
                lag_revisions: 1,
                lag_seconds: 0.5,
            }),
        }),
    );
    check(
        "store-verify.json",
        &VerifiedView::from(pb::VerifyStoreResult {
            ok: false,
            records_checked: 9,
            records_failed: 1,
            problems: vec![pb::StoreProblem {
                space: "keys".into(),
                row: "00".into(),
                problem: "does not open".into(),
            }],
            revision: 5,
            set_hash_ok: true,
            audit_ok: true,
            problems_found: 1,
        }),
    );
    let job = pb::JobRecord {
        kind: pb::JobKind::EndGrace.into(),
        due_at: at(0),
        key_id: ID.into(),
        version: 1,
        attempts: 2,
        last_error: "e".into(),
        damaged: false,
        ..Default::default()
    };
    let work = pb::BackgroundWork {
        name: "rotate".into(),
        queued: 1,
        running: 2,
        workers: 4,
        done: 3,
        failed: 1,
        last_run_at: at(0),
        last_seconds: 0.5,
        last_error: "e".into(),
        next_due_at: at(0),
        behind_seconds: 1.5,
    };
    let (jobs, work) = (vec![JobView::from(job)], vec![WorkView::from(work)]);
    check("jobs.json", &JobsView { jobs, clock_suspended: false, work });
    let metrics = MetricsView::from(pb::HealthCheckResponse {
        status: pb::HealthStatus::Healthy.into(),
        service_version: "0.1.0".into(),
        ..Default::default()
    });
    let health = HealthView { status: "serving".into(), serving: true, metrics: Some(metrics) };
    check("health.json", &health);
}

#[test]
fn audit() {
    check("audit-list.json", &EventsView { events: events(vec![event()]), archives: Vec::new() });
    check(
        "audit-checkpoint.json",
        &CheckpointView::from(pb::AuditCheckpoint {
            tree_size: 3,
            root_hash: vec![1; 32].into(),
            time: at(0),
            note: "note\n".into(),
            public_key: vec![2; 32].into(),
            origin: "polykey/00".into(),
            ..Default::default()
        }),
    );
}

#[test]
fn no_word_of_the_protobuf_leaks() {
    for key_type in [0, 1, 2, 3, 4] {
        let word = super::view::key_type(key_type);
        assert!(!word.contains("KEY_TYPE") && !word.contains('_'), "{word}");
    }
    assert_eq!(super::view::key_type(77), "77");
}
