//! Every field of every request out of range, found by walking the descriptors: INVALID_ARGUMENT, and the field named.

use std::time::Duration;

use prost_reflect::{
    DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, MethodDescriptor,
    ReflectMessage, Value as Field,
};
use serde_json::{Value, json};
use tonic::Code;

use crate::common::Server;
use crate::common::client::{Client, Fail, message, pool};

const SERVICES: [&str; 4] = [
    "polykey.v2.PolykeyService",
    "polykey.v2.KeyLifecycleService",
    "polykey.v2.CryptoService",
    "polykey.v2.AdminService",
];

/// What is out of range for a field.
enum Bad {
    /// This value.
    Is(Field),
    /// This value, with these other fields (JSON, beside it).
    With(Value, Field),
    /// Nothing is, and why.
    Nothing(#[expect(dead_code, reason = "for readers")] &'static str),
}

/// A message without a field that could be wrong.
const FREE: &str = "a flag, and both of its values mean something";
const REVISION: &str = "any number is a revision; one that is not the record's is ABORTED";
const OPAQUE: &str = "looked up or verified as it stands, in one text for all that is wrong";
const FILTER: &str = "any position is one to begin at";

fn long(n: usize) -> Field {
    Field::String("x".repeat(n))
}

fn words(words: &[&str]) -> Field {
    Field::List(words.iter().map(|w| Field::String((*w).to_owned())).collect())
}

fn map(key: &str, value: &str) -> Field {
    let value = Field::String(value.to_owned());
    Field::Map([(MapKey::String(key.to_owned()), value)].into())
}

fn bytes(n: usize) -> Field {
    Field::Bytes(vec![7; n].into())
}

fn no_time(field: &FieldDescriptor) -> Field {
    let Kind::Message(descriptor) = field.kind() else { panic!("not a time") };
    let mut stamp = DynamicMessage::new(descriptor);
    stamp.set_field_by_name("seconds", Field::I64(1_000_000_000_000));
    Field::Message(stamp)
}

fn is_time(field: &FieldDescriptor) -> bool {
    matches!(field.kind(), Kind::Message(m) if m.full_name() == "google.protobuf.Timestamp")
}

/// What is out of range for a field: every field of every request must be found here.
fn bad(field: &FieldDescriptor) -> Option<Bad> {
    use Bad::{Is, Nothing, With};
    let (parent, name) = (field.parent_message().name().to_owned(), field.name().to_owned());
    if is_time(field) {
        return Some(Is(no_time(field)));
    }
    if let Kind::Enum(_) = field.kind() {
        let value = Field::EnumNumber(99);
        return Some(Is(if field.is_list() { Field::List(vec![value]) } else { value }));
    }
    if let Kind::Bool = field.kind() {
        return Some(match name.as_str() {
            "atomic" => With(json!({"continue_on_error": true}), Field::Bool(true)),
            "immediate" => Nothing(
                "with effective_at it is that field which is refused; limits and go_06 test it",
            ),
            "clear_expires_at" => {
                With(json!({"expires_at": "2999-01-01T00:00:00Z"}), Field::Bool(true))
            }
            _ => Nothing(FREE),
        });
    }
    let bad = match (parent.as_str(), name.as_str()) {
        // Work with keys.
        ("EncryptStreamRequest" | "DecryptStreamRequest", "plaintext" | "ciphertext") => {
            Nothing("the first message of the stream must be its header")
        }
        (_, "destination_key_id" | "target_key_id") => Is(Field::String("not a key".into())),
        (_, "destination_version" | "target_version") => Is(Field::I32(-1)),
        (_, "plaintext" | "message") => Is(bytes(4 * 1024 * 1024 + 1)),
        (_, "context" | "destination_context") => Is(map("k", &"x".repeat(9000))),
        (_, "additional_data" | "destination_additional_data") => Is(bytes(65_537)),
        ("DecryptRequest" | "RewrapRequest", "ciphertext") => Is(bytes(3)),
        (_, "ciphertext" | "peer_public_key" | "wrapped_key") => Is(bytes(0)),
        (_, "bits") => Is(Field::I32(100)),
        (_, "digest") => Is(bytes(5)),
        (_, "signature" | "mac") => Is(bytes(8193)),
        (_, "salt") => Is(bytes(1025)),
        ("AgreeRequest", "info") => Is(bytes(5)),
        ("GenerateRandomRequest", "length") => Is(Field::I32(65_537)),
        (_, "length") => Is(Field::I32(15)),
        (_, "key_material") => Is(bytes(4097)),
        (_, "import_token") => {
            With(json!({"wrapping": "IMPORT_WRAPPING_HPKE"}), Field::String("x".into()))
        }
        (_, "material") => Is(bytes(16_385)),
        (_, "reference") => Is(long(257)),
        (_, "chunk_size") => Is(Field::I32(5)),
        (_, "rotate_after_uses" | "max_uses") => Is(Field::I64(-1)),
        ("AuthenticateRequest", "grant_type") => Is(long(8)),
        ("AuthenticateRequest", _)
        | ("RefreshTokenRequest", _)
        | ("RevokeTokenRequest", "access_token") => Nothing(OPAQUE),
        ("RequesterContext", "client_identity") => Is(Field::String("not a client".into())),
        ("RequesterContext", "certificate_fingerprint") => Is(Field::String("12:34".into())),
        ("RequesterContext", "application_id") => Is(long(257)),
        ("RequesterContext", "correlation_id") => Is(long(129)),
        (
            "AccessAttributes",
            "environment" | "network_zone" | "geographic_region" | "time_window",
        ) => Is(long(257)),
        ("AccessAttributes", "roles" | "permissions") => Is(words(&["", &"x".repeat(300)])),
        ("AccessAttributes", "custom_attributes") => Is(map("k", &"x".repeat(257))),
        (_, "expected_revision" | "expected_generation") => Nothing(REVISION),
        (_, "from_index" | "max_leaves") => Nothing(FILTER),
        ("DeleteAliasRequest" | "CreateAliasRequest" | "UpdateAliasRequest", "alias") => {
            Is(Field::String("a b".into()))
        }
        (_, "key_id" | "expected_key_id") => Is(Field::String("not a key".into())),
        (_, "alias") => Is(Field::String("a b".into())),
        (_, "version") => Is(Field::I32(-1)),
        (_, "page_size") => Is(Field::I32(1001)),
        (_, "page_token") => Is(Field::String("x".into())),
        (_, "description") => Is(long(1025)),
        (_, "tags" | "tags_to_add" | "tag_filters") => Is(map("1", "x")),
        (_, "tags_to_remove") => Is(words(&["1"])),
        (_, "initial_authorized_contexts" | "contexts_to_add" | "contexts_to_remove") => {
            Is(words(&["a b"]))
        }
        (_, "access_policies" | "policies_to_update") => Is(map("p", "permit (")),
        (_, "policies_to_remove") => Is(words(&[&"x".repeat(300)])),
        (_, "data_classification") => Is(Field::String("Secret".into())),
        (_, "generation_params") => Is(map("no_such", "1")),
        (_, "value") if field.kind() == Kind::Bytes => {
            With(json!({"key_type": "KEY_TYPE_API_KEY"}), bytes(4097))
        }
        (_, "recipient_public_key") => {
            With(json!({"export": "EXPORT_MODE_HPKE", "mode": "EXPORT_MODE_HPKE"}), bytes(31))
        }
        (_, "rotation_period_seconds") => Is(Field::I64(3599)),
        (_, "grace_period_seconds") => Is(Field::I32(-1)),
        (_, "revocation_reason") => Is(long(1025)),
        (_, "window_days") => Is(Field::I32(6)),
        (_, "min_decryption_version" | "min_encryption_version" | "min_available_version") => {
            Is(Field::I32(-1))
        }
        // Administration.
        ("CertificateIdentity", "value") => With(
            json!({"kind": "CERTIFICATE_IDENTITY_KIND_SPIFFE_URI"}),
            Field::String("spiffe://Not A Domain".into()),
        ),
        ("PutRoleRequest" | "DeleteRoleRequest", "name") => Is(Field::String("No Role".into())),
        (_, "name") => Is(long(257)),
        (_, "environment") => Is(long(129)),
        (_, "roles" | "roles_to_add" | "roles_to_remove") => Is(words(&["No Role"])),
        (_, "permissions" | "permissions_to_add" | "permissions_to_remove") => {
            Is(words(&["no:such"]))
        }
        (_, "role") => Is(Field::String("No Role".into())),
        ("AuditFilter", "client_id") => Is(long(257)),
        (_, "client_id") => Is(Field::String("not a client".into())),
        (_, "overlap_seconds") => Is(Field::I32(2_592_001)),
        (_, "csr_pem") => Is(Field::String("no request".into())),
        (_, "validity_seconds") => Is(Field::I64(59)),
        (_, "expected_root_id") => {
            Nothing("any text is compared; another than the root's is ABORTED")
        }
        (_, "slot_id") => Nothing("any text is looked up; one that names no slot is NOT_FOUND"),
        ("AddSlotRequest", "wrapper") => {
            With(json!({"label": "x"}), Field::String("no-such-wrapper".into()))
        }
        (_, "recovery_public_key") => Is(Field::String("no key".into())),
        (_, "source") => Is(Field::String("nowhere".into())),
        (_, "kind") => Is(Field::String("no-such-kind".into())),
        (_, "label") => Is(long(300)),
        ("ValidatePolicyRequest", "text") => Is(long(1024 * 1024 + 1)),
        ("AuditFilter", "value_hash") => Is(long(257)),
        ("AuditArchive", "first_index" | "end_index") => {
            Nothing("compared with the log, once the rest is in order")
        }
        ("AuditArchive", "file") => Is(long(4097)),
        ("AuditArchive", "host") => Is(long(256)),
        ("AuditArchive", "sha256" | "root_hash") => Is(bytes(31)),
        ("AuditFilter", "action") => Is(Field::String("a*b".into())),
        (_, "action") => Is(Field::String("no such action".into())),
        _ => return None,
    };
    Some(bad)
}

/// A request that is in order, about this key and token; other things that it names do not exist.
fn base(method: &MethodDescriptor, id: &str, token: &str) -> Value {
    let item = |short: &str| match short {
        s if s.contains("CreateKey") => json!({"key_type": "KEY_TYPE_AES_256"}),
        _ => json!({"key_id": id}),
    };
    let identity = json!({"kind": "CERTIFICATE_IDENTITY_KIND_SPIFFE_URI", "value": "spiffe://polykey.local/client/x"});
    match method.name() {
        "Authenticate" => json!({"client_id": "nobody", "api_key": "none"}),
        "RefreshToken" | "HealthCheck" | "ListKeys" | "DeleteAlias" => json!({}),
        "RevokeToken" => json!({"access_token": token}),
        "BatchCrypto" => json!({"operations": [{}], "continue_on_error": true}),
        "StreamCrypto" => json!({}),
        "Sign" | "Verify" => json!({"key_id": id, "message": "eA=="}),
        "ImportKey" => {
            json!({"key": {"key_type": "KEY_TYPE_AES_256"}, "wrapping": "IMPORT_WRAPPING_PLAIN", "material": "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="})
        }
        "EncryptStream" | "DecryptStream" => json!({"header": {}}),
        name if name.starts_with("Batch") => {
            json!({"keys": [item(name)], "continue_on_error": true})
        }
        "StreamGetKeys" => item(""),
        name if name.starts_with("Stream") => json!({"request": item(name)}),
        "CreateKey" => item("CreateKey"),
        "ExportKey" => json!({"key_id": id, "mode": "EXPORT_MODE_PLAIN"}),
        "CreateAlias" | "UpdateAlias" => json!({"alias": "none", "key_id": id}),
        "CreateClient" => {
            json!({"client_id": "fields", "name": "fields", "identities": [identity]})
        }
        "UpdateClient" => json!({"client_id": "nobody", "name": "n"}),
        "IssueCertificate" => json!({"client_id": "admin"}),
        "PutRole" => json!({"name": "fields", "permissions": ["keys:read"]}),
        "DeleteRole" => json!({"name": "fields"}),
        "ValidatePolicy" => json!({"text": ""}),
        "ExplainAuthorization" => json!({"client_id": "nobody", "action": "keys:read"}),
        name if name.ends_with("Client")
            || name.starts_with("RotateClient")
            || name == "RevokeClientTokens"
            || name == "IssueCertificate" =>
        {
            json!({"client_id": "nobody"})
        }
        _ if method.input().get_field_by_name("key_id").is_some()
            && method.name() != "ListJobs" =>
        {
            item("")
        }
        _ => json!({}),
    }
}

/// The fields of a message that hold values, each with the messages on the way to it.
fn leaves(
    message: &MessageDescriptor,
    way: &[FieldDescriptor],
    found: &mut Vec<Vec<FieldDescriptor>>,
) {
    for field in message.fields() {
        let mut here = way.to_vec();
        here.push(field.clone());
        match field.kind() {
            Kind::Message(inner) if !is_time(&field) && !field.is_map() => {
                leaves(&inner, &here, found)
            }
            _ => found.push(here),
        }
    }
}

fn put(target: &mut DynamicMessage, way: &[FieldDescriptor], beside: &Value, value: Field) {
    let (field, rest) = way.split_first().unwrap();
    if rest.is_empty() {
        for (name, value) in beside.as_object().into_iter().flatten() {
            let Some(other) = target.descriptor().get_field_by_name(name) else { continue };
            let whole = message(target.descriptor(), &json!({name: value}));
            target.set_field(&other, whole.get_field(&other).into_owned());
        }
        target.set_field(field, value);
        return;
    }
    if field.is_list() {
        let Kind::Message(inner) = field.kind() else { panic!("not messages") };
        let Some(list) = target.get_field_mut(field).as_list_mut() else { panic!("not a list") };
        if list.is_empty() {
            list.push(Field::Message(DynamicMessage::new(inner)));
        }
        put(list[0].as_message_mut().unwrap(), rest, beside, value);
    } else {
        put(target.get_field_mut(field).as_message_mut().unwrap(), rest, beside, value);
    }
}

/// `keys[0].tags` for a way.
fn name(way: &[FieldDescriptor]) -> String {
    let parts: Vec<String> = way
        .iter()
        .enumerate()
        .map(|(i, f)| {
            let element = f.is_list() && i + 1 < way.len();
            format!("{}{}", f.name(), if element { "[0]" } else { "" })
        })
        .collect();
    parts.join(".")
}

fn names(field: &str, wanted: &str) -> bool {
    let rest =
        |w: &str| field.strip_prefix(w).is_some_and(|r| r.is_empty() || r.starts_with(['[', '.']));
    rest(wanted) || wanted.strip_prefix("request.").is_some_and(rest)
}

/// Whether an answer refuses the field: as a status with a violation, or as the first item's error.
fn verdict(result: Result<Value, Fail>, wanted: &str) -> Result<(), String> {
    match result {
        Err(fail) if fail.code == Code::InvalidArgument => {
            if fail.violations.iter().any(|(field, _)| names(field, wanted)) {
                Ok(())
            } else {
                Err(format!("INVALID_ARGUMENT names {:?}", fail.violations))
            }
        }
        Err(fail) => Err(format!("{:?} {}", fail.code, fail.text)),
        Ok(body) => {
            let first = body.get("results").unwrap_or(&body).get(0).cloned().unwrap_or_default();
            let short = wanted.trim_start_matches("request.").to_owned();
            let of = &first["error"];
            let error = of.as_str().or(of["message"].as_str()).unwrap_or_default();
            let refused = first["error_code"] == 3 || of["code"] == 3;
            if refused && error.contains(&short) {
                Ok(())
            } else {
                Err(format!("accepted: {}", body.to_string().chars().take(300).collect::<String>()))
            }
        }
    }
}

async fn walk(client: &Client, methods: Vec<MethodDescriptor>) -> (usize, Vec<String>) {
    let (mut tried, mut problems) = (0, Vec::new());
    let id = client.create(json!({})).await;
    let mut other = client.clone();
    other.login().await.unwrap();
    for method in methods {
        let mut found = Vec::new();
        leaves(&method.input(), &[], &mut found);
        for way in found {
            let wanted = name(&way);
            let (beside, value) = match bad(way.last().unwrap()) {
                None => {
                    problems.push(format!("{} {wanted}: has no case here", method.name()));
                    continue;
                }
                Some(Bad::Nothing(_)) => continue,
                Some(Bad::Is(value)) => (Value::Null, value),
                Some(Bad::With(beside, value)) => (beside, value),
            };
            let mut request = message(method.input(), &base(&method, &id, &other.token));
            put(&mut request, &way, &beside, value);
            tried += 1;
            let call = client.send(&method, vec![request], &[]);
            // What follows for ever has not refused.
            let result = match tokio::time::timeout(Duration::from_secs(20), call).await {
                Ok(result) => result.map(|reply| reply.body),
                Err(_) => Ok(json!("no answer")),
            };
            if let Err(problem) = verdict(result, &wanted) {
                problems.push(format!("{} {wanted}: {problem}", method.name()));
            }
        }
    }
    (tried, problems)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_out_of_range_is_refused_by_name() {
    let server = Server::dev();
    let admin = server.admin().await;
    let methods = SERVICES
        .iter()
        .flat_map(|name| pool().get_service_by_name(name).unwrap().methods().collect::<Vec<_>>())
        .collect();
    let (tried, problems) = walk(&admin, methods).await;
    assert!(problems.is_empty(), "{} of {tried}:\n{}", problems.len(), problems.join("\n"));
    assert!(tried > 250, "{tried} fields were tried");
}
