//! Every method there is, and what it takes: a method that is not in this table is not served, and a
//! test compares the table with the contract.

use crate::authz::Action;

/// What a caller must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// This right (and, where the request asks for more, others besides).
    Right(Action),
    /// A valid token and no right, for this reason.
    Token(&'static str),
    /// A certificate and no token, for this reason.
    Certificate(&'static str),
}

/// One method.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// `/service/Method`.
    pub path: &'static str,
    /// Whether its calls may last: their messages have authority and time of their own.
    pub lasts: bool,
    /// What it takes.
    pub needs: Needs,
}

macro_rules! methods {
    ($($service:literal { $($method:literal $($lasts:ident)? : $kind:ident($needs:expr);)* })*) => {
        /// Every method, by service, in the order of the contract.
        pub const METHODS: &[Method] = &[$($(Method {
            path: concat!("/", $service, "/", $method),
            lasts: methods!(@lasts $($lasts)?),
            needs: methods!(@needs $kind($needs)),
        }),*),*];

        /// The method of a path.
        #[must_use]
        pub fn find(path: &str) -> Option<Method> {
            // A match, so that two entries of one path do not compile silently.
            #[deny(unreachable_patterns)]
            match path {
                $($(concat!("/", $service, "/", $method) => Some(Method {
                    path: concat!("/", $service, "/", $method),
                    lasts: methods!(@lasts $($lasts)?),
                    needs: methods!(@needs $kind($needs)),
                }),)*)*
                _ => None,
            }
        }
    };
    (@lasts lasts) => { true };
    (@lasts) => { false };
    (@needs right($action:expr)) => { Needs::Right($action) };
    (@needs token($reason:expr)) => { Needs::Token($reason) };
    (@needs certificate($reason:expr)) => { Needs::Certificate($reason) };
}

methods! {
    "polykey.v2.PolykeyService" {
        "HealthCheck": certificate("probes have no account");
        "GetKey": right(Action::GetKey);
        "ListKeys": right(Action::ListKeys);
        "CreateKey": right(Action::CreateKey);
        "RotateKey": right(Action::RotateKey);
        "RevokeKey": right(Action::RevokeKey);
        "UpdateKeyMetadata": right(Action::UpdateKeyMetadata);
        "GetKeyMetadata": right(Action::GetKeyMetadata);
        "BatchGetKeys": right(Action::GetKey);
        "BatchCreateKeys": right(Action::CreateKey);
        "BatchRotateKeys": right(Action::RotateKey);
        "BatchRevokeKeys": right(Action::RevokeKey);
        "BatchUpdateKeyMetadata": right(Action::UpdateKeyMetadata);
        "BatchGetKeyMetadata": right(Action::GetKeyMetadata);
        "StreamGetKeys" lasts: right(Action::GetKey);
        "StreamCreateKeys" lasts: right(Action::CreateKey);
        "StreamRotateKeys" lasts: right(Action::RotateKey);
        "StreamRevokeKeys" lasts: right(Action::RevokeKey);
        "StreamUpdateKeyMetadata" lasts: right(Action::UpdateKeyMetadata);
        "StreamGetKeyMetadata" lasts: right(Action::GetKeyMetadata);
        "Authenticate": certificate("it gives the token");
        "RefreshToken": certificate("it takes a refresh token");
        "RevokeToken": right(Action::RevokeToken);
    }
    "polykey.v2.KeyLifecycleService" {
        "EnableKey": right(Action::EnableKey);
        "DisableKey": right(Action::DisableKey);
        "ScheduleKeyDestruction": right(Action::ScheduleKeyDestruction);
        "CancelKeyDestruction": right(Action::CancelKeyDestruction);
        "ExportKey": right(Action::ExportKey);
        "CreateAlias": right(Action::SetAlias);
        "UpdateAlias": right(Action::SetAlias);
        "DeleteAlias": right(Action::DeleteAlias);
        "ListAliases": right(Action::GetKeyMetadata);
        "ListKeyVersions": right(Action::GetKeyMetadata);
        "UpdateKeyVersionBounds": right(Action::SetVersionBounds);
        "TrimKeyVersions": right(Action::TrimVersions);
        "GetKeyHistory": right(Action::ReadKeyHistory);
    }
    "polykey.v2.CryptoService" {
        "Encrypt": right(Action::Encrypt);
        "Decrypt": right(Action::Decrypt);
        "Rewrap": right(Action::Rewrap);
        "GenerateDataKey": right(Action::GenerateDataKey);
        "Sign": right(Action::Sign);
        "Verify": right(Action::Verify);
        "GenerateMac": right(Action::GenerateMac);
        "VerifyMac": right(Action::VerifyMac);
        "DeriveKey": right(Action::DeriveKey);
        "Agree": right(Action::Agree);
        "Encapsulate": right(Action::Encapsulate);
        "Decapsulate": right(Action::Decapsulate);
        "WrapKey": right(Action::WrapKey);
        "UnwrapKey": right(Action::UnwrapKey);
        "GenerateRandom": right(Action::GenerateRandom);
        "GetPublicKey": right(Action::GetKeyMetadata);
        "GetImportParameters": right(Action::GetImportParameters);
        "ImportKey": right(Action::ImportKey);
        "BatchCrypto": token("each operation takes the right of the call of its name");
        "StreamCrypto" lasts: token("each operation takes the right of the call of its name");
        "EncryptStream" lasts: right(Action::Encrypt);
        "DecryptStream" lasts: right(Action::Decrypt);
    }
    "polykey.v2.AdminService" {
        "WhoAmI": token("everybody may know who they are");
        "CreateClient": right(Action::CreateClient);
        "GetClient": right(Action::ReadClient);
        "ListClients": right(Action::ListClients);
        "UpdateClient": right(Action::UpdateClient);
        "DisableClient": right(Action::DisableClient);
        "EnableClient": right(Action::EnableClient);
        "RemoveClient": right(Action::RemoveClient);
        "RotateClientApiKey": right(Action::RotateApiKey);
        "RevokeClientTokens": right(Action::RevokeToken);
        "ListRoles": right(Action::ReadPolicies);
        "PutRole": right(Action::DefineRole);
        "DeleteRole": right(Action::DeleteRole);
        "IssueCertificate": right(Action::IssueCertificate);
        "GetRootStatus": right(Action::ReadNode);
        "RotateRoot": right(Action::RotateRoot);
        "RewrapSlot": right(Action::RewrapRoot);
        "AddSlot": right(Action::RewrapRoot);
        "RemoveSlot": right(Action::RewrapRoot);
        "TestSlot": right(Action::RewrapRoot);
        "ListPolicies": right(Action::ReadPolicies);
        "ValidatePolicy": right(Action::ReadPolicies);
        "ExplainAuthorization": right(Action::ExplainDecision);
        "ListAuditEvents": right(Action::ReadAudit);
        "FollowAudit" lasts: right(Action::ReadAudit);
        "GetAuditCheckpoint": right(Action::ReadAudit);
        "ExportAuditLog" lasts: right(Action::ReadAudit);
        "ArchiveAuditLog": right(Action::ArchiveAudit);
        "HashAuditValue": right(Action::HashAuditValue);
        "GetStoreStatus": right(Action::ReadNode);
        "VerifyStore" lasts: right(Action::VerifyStore);
        "CreateBackup" lasts: right(Action::BackupStore);
        "ListJobs": right(Action::ReadNode);
        "ConfirmClock": right(Action::ConfirmClock);
        "GetNodeStatus": right(Action::ReadNode);
        "ReloadConfiguration": right(Action::ReloadConfiguration);
        "GetConfiguration": right(Action::ReadNode);
    }
    "grpc.health.v1.Health" {
        "Check": certificate("probes have no account");
        "Watch" lasts: certificate("probes have no account");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Write as _;

    use prost::Message;

    use super::*;
    use crate::authn::layer::WITHOUT_TOKEN;

    /// Path → whether either side streams, from the contract itself.
    fn contract() -> BTreeMap<String, bool> {
        let set = polykey_proto::FILE_DESCRIPTOR_SET;
        let set = prost_types::FileDescriptorSet::decode(set).unwrap();
        let mut found = BTreeMap::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    found.insert(path, method.client_streaming() || method.server_streaming());
                }
            }
        }
        found
    }

    #[test]
    fn the_table_is_the_contract() {
        let table: BTreeMap<String, bool> =
            METHODS.iter().map(|m| (m.path.to_owned(), m.lasts)).collect();
        assert_eq!(table.len(), METHODS.len(), "a method stands in the table twice");
        assert_eq!(table, contract());
    }

    #[test]
    fn the_methods_without_a_token_are_those_of_the_layer() {
        let open = METHODS.iter().filter(|m| matches!(m.needs, Needs::Certificate(_)));
        let open: Vec<&str> = open.map(|m| m.path).collect();
        assert_eq!(open, WITHOUT_TOKEN);
        let no_right: Vec<&str> =
            METHODS.iter().filter(|m| matches!(m.needs, Needs::Token(_))).map(|m| m.path).collect();
        assert_eq!(
            no_right,
            [
                "/polykey.v2.CryptoService/BatchCrypto",
                "/polykey.v2.CryptoService/StreamCrypto",
                "/polykey.v2.AdminService/WhoAmI"
            ]
        );
    }

    #[test]
    fn what_each_method_takes_is_written_down() {
        let mut text = String::from(
            "# What each method takes: action and permission, or why it takes none.\n\
             # Generated: POLYKEY_REGENERATE=1 cargo test methods.\n",
        );
        for Method { path, needs, .. } in METHODS {
            match needs {
                Needs::Right(action) => {
                    writeln!(text, "{path} {action} {}", action.permission()).unwrap();
                }
                Needs::Token(reason) => writeln!(text, "{path} - token: {reason}").unwrap(),
                Needs::Certificate(reason) => {
                    writeln!(text, "{path} - certificate: {reason}").unwrap();
                }
            }
        }
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/methods.txt");
        if std::env::var_os("POLYKEY_REGENERATE").is_some() {
            std::fs::write(file, &text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(file).unwrap_or_default());
    }

    #[test]
    fn what_is_not_in_the_table_is_not_found() {
        assert_eq!(find("/polykey.v2.AdminService/FollowAudit").map(|m| m.lasts), Some(true));
        assert_eq!(find("/polykey.v2.PolykeyService/GetKey").map(|m| m.lasts), Some(false));
        for path in ["", "/", "/polykey.v2.PolykeyService/getkey", "/x.Y/Z"] {
            assert!(find(path).is_none(), "{path}");
        }
    }
}
