//! The roles every node has: names for sets of permissions. Further roles are records of the node.

use super::action::{Permission, PermissionSet};

/// A role that needs no record. Its name cannot be redefined.
#[derive(Clone, Copy, Debug)]
pub struct BuiltIn {
    /// Its name in client records.
    pub name: &'static str,
    /// What it is for, in one sentence.
    pub about: &'static str,
    /// What it may do.
    pub permissions: PermissionSet,
}

/// The roles every node has.
pub const BUILT_IN: [BuiltIn; 4] = [
    BuiltIn {
        name: "admin",
        about: "Everything, on every key, client and role.",
        permissions: PermissionSet::all(),
    },
    // No export and no sharing: an operator keeps keys alive without being able to learn or hand on one.
    BuiltIn {
        name: "operator",
        about: "The lifecycle of every key without export or sharing; sees clients and node; revokes tokens.",
        permissions: PermissionSet::of(&[
            Permission::KeysAll,
            Permission::KeysCreate,
            Permission::KeysImport,
            Permission::KeysList,
            Permission::KeysRead,
            Permission::KeysUpdate,
            Permission::KeysRotate,
            Permission::KeysRevoke,
            Permission::KeysEnable,
            Permission::KeysDestroy,
            Permission::KeysAlias,
            Permission::KeysVersions,
            Permission::TokensRevoke,
            Permission::ClientsRead,
            Permission::PoliciesRead,
            Permission::NodeRead,
        ]),
    },
    BuiltIn {
        name: "user",
        about: "The whole life of one's own keys; reads and uses keys shared with it.",
        permissions: PermissionSet::of(&[
            Permission::KeysCreate,
            Permission::KeysImport,
            Permission::KeysList,
            Permission::KeysRead,
            Permission::KeysUpdate,
            Permission::KeysShare,
            Permission::KeysRotate,
            Permission::KeysRevoke,
            Permission::KeysExport,
            Permission::KeysEnable,
            Permission::KeysDestroy,
            Permission::KeysAlias,
            Permission::KeysVersions,
            Permission::CryptoRandom,
        ]),
    },
    BuiltIn {
        name: "auditor",
        about: "Reads the metadata and history of every key, the policies and the audit trail; changes nothing.",
        permissions: PermissionSet::of(&[
            Permission::KeysAll,
            Permission::KeysList,
            Permission::KeysDescribe,
            Permission::PoliciesRead,
            Permission::AuditRead,
        ]),
    },
];

/// The built-in role of exactly this name.
pub fn built_in(name: &str) -> Option<&'static BuiltIn> {
    BUILT_IN.iter().find(|role| role.name == name)
}
