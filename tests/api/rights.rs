//! Every method of the contract: refused without a token, and allowed to exactly the roles in the golden matrix.

use std::collections::BTreeMap;

use prost_reflect::MethodDescriptor;
use serde_json::{Value, json};
use tonic::Code;

use crate::common::Server;
use crate::common::client::{message, path, pool};

/// The methods that answer without a token, and nothing else may.
const WITHOUT_TOKEN: [&str; 5] = [
    "/polykey.v2.PolykeyService/HealthCheck",
    "/polykey.v2.PolykeyService/Authenticate",
    "/polykey.v2.PolykeyService/RefreshToken",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
];

/// Per method: admin, operator, user, auditor, a client without roles, each against a key of the
/// administrator's (or the node): `+` allowed, `-` PERMISSION_DENIED, `?` NOT_FOUND.
const MATRIX: &str = "
GetKey                  + + ? - ?
GetKeyMetadata          + + ? + ?
RotateKey               + + ? - ?
RevokeKey               + + ? - ?
UpdateKeyMetadata       + + ? - ?
CreateKey               + + + - -
ListKeys                + + + + -
BatchGetKeys            + + ? - ?
BatchCreateKeys         + + + - -
BatchRotateKeys         + + ? - ?
BatchRevokeKeys         + + ? - ?
BatchUpdateKeyMetadata  + + ? - ?
BatchGetKeyMetadata     + + ? + ?
StreamGetKeys           + + ? - ?
StreamCreateKeys        + + + - -
StreamRotateKeys        + + ? - ?
StreamRevokeKeys        + + ? - ?
StreamUpdateKeyMetadata + + ? - ?
StreamGetKeyMetadata    + + ? + ?
RevokeToken             + + + + +
EnableKey               + + ? - ?
DisableKey              + + ? - ?
ScheduleKeyDestruction  + + ? - ?
CancelKeyDestruction    + + ? - ?
ExportKey               + - ? - ?
CreateAlias             + + ? - ?
UpdateAlias             + + ? - ?
DeleteAlias             + + ? - ?
ListAliases             + + ? + ?
ListKeyVersions         + + ? + ?
UpdateKeyVersionBounds  + + ? - ?
TrimKeyVersions         + + ? - ?
GetKeyHistory           + - ? + ?
Encrypt                 + - ? - ?
Decrypt                 + - ? - ?
Rewrap                  + - ? - ?
GenerateDataKey         + - ? - ?
Sign                    + - ? - ?
Verify                  + - ? - ?
GenerateMac             + - ? - ?
VerifyMac               + - ? - ?
DeriveKey               + - ? - ?
Agree                   + - ? - ?
Encapsulate             + - ? - ?
Decapsulate             + - ? - ?
WrapKey                 + - ? - ?
UnwrapKey               + - ? - ?
BatchCrypto             + - ? - ?
StreamCrypto            + - ? - ?
EncryptStream           + - ? - ?
DecryptStream           + - ? - ?
GenerateRandom          + - + - -
GetPublicKey            + + ? + ?
GetImportParameters     + + + - -
ImportKey               + - - - -
WhoAmI                  + + + + +
CreateClient            + - - - -
GetClient               + + - - -
ListClients             + + - - -
UpdateClient            + - - - -
DisableClient           + - - - -
EnableClient            + - - - -
RemoveClient            + - - - -
RotateClientApiKey      + - - - -
RevokeClientTokens      + + - - -
ListRoles               + + - + -
PutRole                 + - - - -
DeleteRole              + - - - -
IssueCertificate        + - - - -
GetRootStatus           + + - - -
RotateRoot              + - - - -
RewrapSlot              + - - - -
AddSlot                 + - - - -
RemoveSlot              + - - - -
TestSlot                + - - - -
ListPolicies            + + - + -
ValidatePolicy          + + - + -
ExplainAuthorization    + + - + -
ListAuditEvents         + - - + -
FollowAudit             + - - + -
GetAuditCheckpoint      + - - + -
ExportAuditLog          + - - + -
ArchiveAuditLog         + - - - -
HashAuditValue          + - - + -
GetStoreStatus          + + - - -
VerifyStore             + - - - -
CreateBackup            + - - - -
ListJobs                + + - - -
ConfirmClock            + - - - -
GetNodeStatus           + + - - -
ReloadConfiguration     + - - - -
GetConfiguration        + + - - -
";

fn methods() -> Vec<MethodDescriptor> {
    pool()
        .services()
        .filter(|s| !s.full_name().starts_with("google."))
        .flat_map(|s| s.methods().collect::<Vec<_>>())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_but_five_needs_a_token() {
    let server = Server::dev();
    let admin = server.admin().await;
    let anonymous = admin.with_token("");
    let mut wrong = Vec::new();
    let all = methods();
    assert!(all.len() > 60);
    for method in all {
        if method.name() == "Watch" {
            continue; // Answers without end; that it answers is tested beside Check.
        }
        let empty = message(method.input(), &json!({}));
        let result = anonymous.send(&method, vec![empty], &[]).await;
        let refused = matches!(&result, Err(fail) if fail.code == Code::Unauthenticated);
        let open = WITHOUT_TOKEN.contains(&path(&method).as_str());
        // An empty login is a failed login: it gets its answer from the method itself.
        let login = matches!(method.name(), "Authenticate" | "RefreshToken");
        if !login && refused == open {
            wrong.push(format!("{}: {result:?}", path(&method)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let body = json!({"client_id": admin.id, "api_key": admin.api_key});
    let login = anonymous.call("Authenticate", body).await.unwrap();
    let refresh = json!({"refresh_token": login["refresh_token"]});
    anonymous.call("RefreshToken", refresh).await.unwrap();
}

/// A ciphertext that names a key and is none of it: what the header says decides whose right is looked at.
fn ciphertext(magic: &[u8], key: &str, length: usize) -> String {
    let mut blob = magic.to_vec();
    blob.push(1);
    blob.extend_from_slice(uuid::Uuid::parse_str(key).unwrap().as_bytes());
    blob.extend_from_slice(&[0, 0, 0, 1, 0, 1, 16]);
    blob.resize(length, 7);
    data_encoding::BASE64.encode(&blob)
}

/// The public half of a recovery key, as text.
fn recovery_key() -> String {
    let key = polykey_hsm::recovery::RecoveryKey::generate().unwrap();
    key.public().unwrap().to_string()
}

/// A request in order for a method, about `key`, `alias` and `client`, which are there for this call alone.
fn request(method: &str, key: &str, alias: &str, client: &str, token: &str, n: usize) -> Value {
    let create = json!({"key_type": "KEY_TYPE_AES_256"});
    let with = |fields: Value| {
        let mut request = fields;
        request["key_id"] = key.into();
        request
    };
    let item = match method {
        m if m.contains("CreateKey") => create,
        m if m.contains("UpdateKeyMetadata") => with(json!({"description": "x"})),
        _ => with(json!({})),
    };
    let identity =
        json!([{"kind": "CERTIFICATE_IDENTITY_KIND_DNS", "value": format!("c{n}.example.org")}]);
    match method {
        "BatchCrypto" => json!({"operations": [{"encrypt": item}]}),
        "StreamCrypto" => json!({"encrypt": item}),
        "Encrypt" | "GenerateDataKey" | "Encapsulate" | "GenerateMac" | "VerifyMac"
        | "GetPublicKey" => item,
        "Decrypt" | "Rewrap" => json!({"ciphertext": ciphertext(b"PKC", key, 120)}),
        "Sign" | "Verify" => with(json!({"message": "eA=="})),
        "DeriveKey" => with(json!({"context": {"for": "x"}})),
        "Agree" => with(json!({"peer_public_key": "eA=="})),
        "Decapsulate" => with(json!({"ciphertext": "eA=="})),
        "WrapKey" => with(json!({"key_material": "eA=="})),
        "UnwrapKey" => with(json!({"wrapped_key": "eA=="})),
        "EncryptStream" => json!({"header": item}),
        "DecryptStream" => json!({"header": {}}),
        "GenerateRandom" => json!({"length": 8}),
        "GetImportParameters" => json!({"wrapping": "IMPORT_WRAPPING_HPKE"}),
        "ImportKey" => {
            json!({"key": {"key_type": "KEY_TYPE_AES_256"}, "wrapping": "IMPORT_WRAPPING_PLAIN", "material": data_encoding::BASE64.encode(&[7; 32])})
        }
        m if m.starts_with("Batch") => json!({"keys": [item]}),
        "StreamGetKeys" => item,
        m if m.starts_with("Stream") => json!({"request": item}),
        "CreateKey" | "GetKey" | "RotateKey" | "RevokeKey" | "UpdateKeyMetadata"
        | "GetKeyMetadata" => item,
        "RevokeToken" => json!({"access_token": token}),
        "ExportKey" => with(json!({"mode": "EXPORT_MODE_PLAIN"})),
        "CreateAlias" => with(json!({"alias": format!("new-{n}")})),
        "UpdateAlias" => with(json!({"alias": alias})),
        "DeleteAlias" => json!({"alias": alias}),
        "UpdateKeyVersionBounds" => with(json!({"min_decryption_version": 1})),
        "TrimKeyVersions" => with(json!({"min_available_version": 1})),
        "CreateClient" => {
            json!({"client_id": format!("new-{n}"), "name": "n", "identities": identity})
        }
        "UpdateClient" => json!({"client_id": client, "name": "renamed"}),
        "GetClient" | "DisableClient" | "EnableClient" | "RemoveClient" | "RotateClientApiKey"
        | "RevokeClientTokens" | "IssueCertificate" => json!({"client_id": client}),
        "PutRole" => json!({"name": format!("role-{n}"), "permissions": ["keys:read"]}),
        "DeleteRole" => json!({"name": format!("none-{n}")}),
        "ValidatePolicy" => json!({"text": "permit (principal, action, resource);"}),
        "ExplainAuthorization" => {
            json!({"client_id": client, "action": "keys:read", "key_id": key})
        }
        "ExportAuditLog" => json!({"max_leaves": 1}),
        "HashAuditValue" => json!({"value": "AAAA"}),
        "AddSlot" => json!({"label": format!("slot-{n}"), "recovery_public_key": recovery_key()}),
        "RemoveSlot" => json!({"slot_id": "none"}),
        "TestSlot" => json!({"slot_id": "main"}),
        _ if crate::common::client::method(method)
            .input()
            .get_field_by_name("key_id")
            .is_some()
            && method != "ListJobs" =>
        {
            item
        }
        _ => json!({}),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_is_in_the_golden_matrix_and_obeys_it() {
    let matrix: BTreeMap<&str, Vec<&str>> = MATRIX
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.collect()))
        })
        .collect();
    let server = Server::dev();
    let admin = server.admin().await;
    let roles = ["admin", "operator", "user", "auditor", "none"];
    let mut clients = vec![admin.clone()];
    for role in &roles[1..] {
        let own: &[&str] = if *role == "none" { &[] } else { std::slice::from_ref(role) };
        clients.push(server.client(&admin, role, own).await);
    }
    let (mut wrong, mut n) = (Vec::new(), 0);
    for method in methods() {
        let name = method.name().to_owned();
        if WITHOUT_TOKEN.contains(&path(&method).as_str()) {
            continue;
        }
        let Some(row) = matrix.get(name.as_str()) else {
            wrong.push(format!("{name} is not in the matrix"));
            continue;
        };
        for (role, (client, expected)) in roles.iter().zip(clients.iter().zip(row)) {
            n += 1;
            let (alias, id) = (format!("alias-{n}"), format!("client-{n}"));
            let fields = json!({"key_type": "KEY_TYPE_API_KEY", "alias": alias});
            let key = admin.create(fields).await;
            match name.as_str() {
                "EnableKey" => {
                    drop(admin.call("DisableKey", json!({"key_id": key})).await.unwrap())
                }
                "CancelKeyDestruction" => drop(
                    admin.call("ScheduleKeyDestruction", json!({"key_id": key})).await.unwrap(),
                ),
                "GetClient"
                | "UpdateClient"
                | "DisableClient"
                | "EnableClient"
                | "RemoveClient"
                | "RotateClientApiKey"
                | "RevokeClientTokens"
                | "IssueCertificate"
                | "ExplainAuthorization" => {
                    let identity = json!([{"kind": "CERTIFICATE_IDENTITY_KIND_DNS", "value": format!("x{n}.example.org")}]);
                    let add = json!({"client_id": id, "name": "n", "identities": identity, "roles": ["user"]});
                    admin.call("CreateClient", add).await.unwrap();
                    if name == "EnableClient" {
                        admin.call("DisableClient", json!({"client_id": id})).await.unwrap();
                    }
                }
                _ => {}
            }
            let works = method.parent_service().name() == "CryptoService";
            let mut own = client.clone();
            if name == "RevokeToken" {
                own.login().await.unwrap();
            }
            let body = request(&name, &key, &alias, &id, &own.token, n);
            let mut requests = vec![message(method.input(), &body)];
            if name == "DecryptStream" {
                let header = json!({"ciphertext": ciphertext(b"PKS", &key, 91)});
                requests.push(message(method.input(), &header));
            }
            let call = own.send(&method, requests, &[]);
            // What follows for ever is allowed when it does not refuse.
            let result = if name == "FollowAudit" {
                match tokio::time::timeout(std::time::Duration::from_secs(2), call).await {
                    Err(_) => Ok(json!({})),
                    Ok(result) => result.map(|r| r.body),
                }
            } else {
                call.await.map(|r| r.body)
            };
            let code = match &result {
                Err(fail) => fail.code,
                Ok(body) => {
                    let first = body.get("results").unwrap_or(body).get(0);
                    let of = |f: &Value| f["error_code"].as_i64().or(f["error"]["code"].as_i64());
                    let code = first.and_then(of).unwrap_or(0);
                    Code::from(i32::try_from(code).unwrap())
                }
            };
            let got = match code {
                Code::PermissionDenied => "-",
                // The administrator of a role that is not there.
                Code::NotFound if matches!(name.as_str(), "DeleteRole" | "RemoveSlot") => "+",
                Code::NotFound => "?",
                Code::Ok | Code::FailedPrecondition => "+",
                // The right is looked at before what the key was made for.
                Code::InvalidArgument if works => "+",
                // And before it is compared with the log what a file is said to hold.
                Code::InvalidArgument if name == "ArchiveAuditLog" => "+",
                _ => "!",
            };
            if got != *expected {
                wrong.push(format!(
                    "{name} by {role}: {got}, not {expected}: {code:?} {:?}",
                    result.err().map(|f| f.text)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(matrix.len() + WITHOUT_TOKEN.len(), methods().len());
}
