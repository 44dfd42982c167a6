//! `Debug` for the messages that hold a secret: it shows whether there is one, never what it is.
use std::fmt;

use crate::polykey::v2 as pb;

/// A secret's stand-in in `Debug`: its length.
struct Redacted(usize);

impl fmt::Debug for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} bytes]", self.0)
    }
}

/// Implements `Debug` with the fields after `secret` replaced by their lengths. The pattern names
/// every field, so that a new one does not compile until it is put on one side or the other.
macro_rules! redact {
    ($($message:ident { $($shown:ident),* ; secret $($secret:ident),+ })+) => {$(
        impl fmt::Debug for pb::$message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let Self { $($shown,)* $($secret),+ } = self;
                f.debug_struct(stringify!($message))
                    $(.field(stringify!($shown), $shown))*
                    $(.field(stringify!($secret), &Redacted($secret.len())))+
                    .finish()
            }
        }
    )+};
}

redact! {
    AuthenticateRequest { client_id, grant_type; secret api_key }
    AuthenticateResponse {
        token_type, expires_in, permissions, issued_at, client_tier, refresh_expires_in;
        secret access_token, refresh_token
    }
    RefreshTokenRequest { ; secret refresh_token }
    RefreshTokenResponse {
        token_type, expires_in, issued_at, refresh_expires_in; secret access_token, refresh_token
    }
    RevokeTokenRequest { client_id; secret access_token }
    KeyMaterial {
        encrypted_key_data, encryption_algorithm, key_derivation_params, key_checksum, hpke_enc,
        wrapping, recipient_key_sha256;
        secret plaintext
    }
    CreateKeyRequest {
        key_type, requester_context, description, tags, expires_at, initial_authorized_contexts,
        access_policies, data_classification, generation_params, exportable, alias,
        read_after_expiry, rotation_period_seconds, storage_profile, purpose, convergent,
        rotate_after_uses, max_uses, in_token;
        secret value
    }
    CreateKeyItem {
        key_type, description, tags, expires_at, initial_authorized_contexts, access_policies,
        data_classification, generation_params, exportable, alias, read_after_expiry,
        rotation_period_seconds, storage_profile, purpose, convergent, rotate_after_uses,
        max_uses, in_token;
        secret value
    }
    RotateKeyRequest {
        key_id, requester_context, strategy, grace_period_seconds, generation_params,
        preserve_access_policies, expected_revision, clear_access_policies, effective_at;
        secret value
    }
    RotateKeyItem {
        key_id, strategy, grace_period_seconds, generation_params, preserve_access_policies,
        expected_revision, clear_access_policies, effective_at;
        secret value
    }
    CreateClientResponse { client, audit_index; secret api_key }
    RotateClientApiKeyResponse { info, old_keys_expire_at, audit_index; secret api_key }
    IssueCertificateResponse {
        certificate_chain_pem, not_after, certificate_sha256, authority_pem, audit_index;
        secret private_key_pem
    }
    EncryptRequest { key_id, version, context, format; secret plaintext, additional_data }
    DecryptRequest { key_id, ciphertext, context, format, version; secret additional_data }
    DecryptResponse { key_id, version, algorithm; secret plaintext }
    GenerateDataKeyResponse {
        ciphertext, key_id, version, public_key_der, audit_index; secret plaintext
    }
    GenerateMacRequest { key_id, version; secret message }
    VerifyMacRequest { key_id, version, mac; secret message }
    DeriveKeyResponse { key_id, version, audit_index; secret derived_key }
    AgreeResponse { key_id, version, audit_index; secret shared_secret }
    EncapsulateResponse { ciphertext, key_id, version, audit_index; secret shared_secret }
    DecapsulateResponse { key_id, version, audit_index; secret shared_secret }
    UnwrapKeyResponse { key_id, version, audit_index; secret key_material }
    GenerateRandomResponse { ; secret random }
    ImportKeyRequest { key, wrapping; secret import_token, material }
    GetImportParametersResponse { public_key, expires_at, hpke_info; secret import_token }
    DecryptStreamResponse { key_id, version; secret plaintext }
    HashAuditValueRequest { ; secret value }
}

/// The same for messages whose secret stands in a oneof.
macro_rules! redact_oneof {
    ($($message:ident { $($shown:ident),* ; $oneof:ident :
        $module:ident::$Type:ident { $($Secret:ident)* ; $($Shown:ident)* } })+) => {$(
        impl fmt::Debug for pb::$message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let Self { $($shown,)* $oneof } = self;
                f.debug_struct(stringify!($message))
                    $(.field(stringify!($shown), $shown))*
                    .field(stringify!($oneof), $oneof)
                    .finish()
            }
        }
        impl fmt::Debug for pb::$module::$Type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$Secret(bytes) => {
                        f.debug_tuple(stringify!($Secret)).field(&Redacted(bytes.len())).finish()
                    })*
                    $(Self::$Shown(value) => {
                        f.debug_tuple(stringify!($Shown)).field(value).finish()
                    })*
                }
            }
        }
    )+};
}

redact_oneof! {
    SignRequest { key_id, version, scheme; input: sign_request::Input { Message Digest; } }
    VerifyRequest {
        key_id, version, signature, scheme; input: verify_request::Input { Message Digest; }
    }
    WrapKeyRequest {
        key_id, version, target_version;
        target: wrap_key_request::Target { KeyMaterial; TargetKeyId }
    }
    EncryptStreamRequest { ; part: encrypt_stream_request::Part { Plaintext; Header } }
}

impl fmt::Debug for crate::polykey::record::v1::ImportRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportRecord")
            .field("wrapping", &self.wrapping)
            .field("client_id", &self.client_id)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for crate::polykey::record::v1::SigningKeyRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKeyRecord")
            .field("id", &self.id)
            .field("purpose", &self.purpose)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        const CANARY: &str = "canary-4f1d";
        let shown = format!(
            "{:?} {:?} {:?}",
            pb::AuthenticateRequest { api_key: CANARY.into(), ..Default::default() },
            pb::GetKeyResponse {
                key_material: Some(pb::KeyMaterial {
                    plaintext: CANARY.into(),
                    key_checksum: "shown".into(),
                    ..Default::default()
                }),
                ..Default::default()
            },
            pb::StreamCreateKeysRequest {
                request: Some(pb::CreateKeyRequest { value: CANARY.into(), ..Default::default() })
            },
        );
        let operation = pb::crypto_operation::Operation::WrapKey(pb::WrapKeyRequest {
            target: Some(pb::wrap_key_request::Target::KeyMaterial(CANARY.into())),
            ..Default::default()
        });
        let batch = pb::BatchCryptoRequest {
            operations: vec![pb::CryptoOperation {
                operation: Some(operation),
                ..Default::default()
            }],
            ..Default::default()
        };
        let shown = format!("{shown} {batch:?}");
        assert!(!shown.contains(CANARY), "{shown}");
        assert!(shown.contains("shown") && shown.contains("[11 bytes]"), "{shown}");
    }
}
