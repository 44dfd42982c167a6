//! The one table of everything a caller can do: action, the permission that grants it, what it acts on and its class.

use std::fmt;

/// What an action acts on: the kind of [`Resource`](super::Resource) it must be asked with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Target {
    /// One key.
    Key,
    /// The node as a whole.
    Node,
    /// One client of the node.
    Client,
    /// One role definition.
    Role,
}

impl Target {
    /// The Cedar entity type.
    pub const fn entity(self) -> &'static str {
        match self {
            Self::Key => "Key",
            Self::Node => "Node",
            Self::Client => "Client",
            Self::Role => "Role",
        }
    }
}

/// How far an action reaches. Classes are Cedar action groups, so policies can name them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Class {
    /// Bring a key into being.
    Create,
    /// See a key and its wrapped material: creators and authorized contexts may.
    Read,
    /// Work with a key without learning it: creators and authorized contexts may.
    Use,
    /// Decide who else may use a key and see who did: its creator may.
    Govern,
    /// Change a key or take its material out: takes the permission, on one's own key or with `keys:all`.
    Manage,
    /// Change a key where its own policies may forbid but never grant.
    Maintain,
    /// Look at the node, its clients, roles and records.
    Inspect,
    /// Change the node.
    Operate,
    /// Change who may do what: never beyond one's own permissions.
    Administer,
}

impl Class {
    /// Every class, in the order of the schema.
    pub const ALL: [Self; 9] = [
        Self::Create,
        Self::Read,
        Self::Use,
        Self::Govern,
        Self::Manage,
        Self::Maintain,
        Self::Inspect,
        Self::Operate,
        Self::Administer,
    ];

    /// The Cedar action group.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Read => "read",
            Self::Use => "use",
            Self::Govern => "govern",
            Self::Manage => "manage",
            Self::Maintain => "maintain",
            Self::Inspect => "inspect",
            Self::Operate => "operate",
            Self::Administer => "administer",
        }
    }

    /// What a key's own policies count for in this class.
    pub const fn key_policies(self) -> KeyPolicyReach {
        match self {
            Self::Read | Self::Use => KeyPolicyReach::Grant,
            Self::Manage => KeyPolicyReach::GrantWithPermission,
            Self::Maintain => KeyPolicyReach::Restrict,
            // Whoever may change a key's policies can always repair one that locks everyone out.
            Self::Govern => KeyPolicyReach::None,
            Self::Create | Self::Inspect | Self::Operate | Self::Administer => KeyPolicyReach::None,
        }
    }
}

/// What a key's own policies may do about an action.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyPolicyReach {
    /// They permit and forbid.
    Grant,
    /// They forbid, and permit only to a client that holds the action's permission:
    /// such a permit stands in for being the creator, not for the permission.
    GrantWithPermission,
    /// They only forbid.
    Restrict,
    /// They are not consulted.
    None,
}

macro_rules! permissions {
    ($($variant:ident $name:literal $doc:literal)*) => {
        /// A permission that a role or a client record names. `*` stands for all of them.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum Permission { $(#[doc = $doc] $variant),* }

        impl Permission {
            /// Every permission, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name on the wire and in records, for instance `keys:read`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// What it is for, in one sentence.
            pub const fn about(self) -> &'static str {
                match self { $(Self::$variant => $doc),* }
            }

            /// The permission of exactly this name; names are case-sensitive and nothing is trimmed.
            pub fn parse(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

permissions! {
    KeysAll          "keys:all"           "Widens the other key permissions from one's own keys to every key, and makes every key visible."
    KeysCreate       "keys:create"        "Create keys from fresh randomness."
    KeysImport       "keys:import"        "Create keys from a supplied value."
    KeysList         "keys:list"          "List the keys one may see."
    KeysDescribe     "keys:describe"      "Read metadata; implied by `keys:read`."
    KeysRead         "keys:read"          "Read metadata and the wrapped material."
    KeysUpdate       "keys:update"        "Change description, tags, expiry, classification."
    KeysShare        "keys:share"         "Change authorized contexts and access policies."
    KeysRotate       "keys:rotate"        "Make new versions."
    KeysRevoke       "keys:revoke"        "Revoke, for ever."
    KeysExport       "keys:export"        "Take the material of an exportable key out."
    KeysEnable       "keys:enable"        "Disable and enable."
    KeysDestroy      "keys:destroy"       "Schedule destruction and cancel it."
    KeysAlias        "keys:alias"         "Set and delete aliases."
    KeysVersions     "keys:versions"      "Set version bounds, trim versions."
    KeysImportPlain  "keys:import-plain" "Create keys from material that comes in the clear."
    KeysHarden       "keys:harden"        "Have the keys one creates lie under the node's hardware or cloud wrapper, whatever one's tier."
    CryptoEncrypt    "crypto:encrypt"    "Encrypt, and make data keys whose plaintext is not shown."
    CryptoDecrypt    "crypto:decrypt"    "Decrypt."
    CryptoRewrap     "crypto:rewrap"     "Encrypt ciphertexts anew without seeing their plaintexts; under another key or binding that takes crypto:decrypt too."
    CryptoDataKey    "crypto:data-key"   "Make data keys and see them."
    CryptoSign       "crypto:sign"       "Sign."
    CryptoMac        "crypto:mac"        "Make message authentication codes."
    CryptoVerify     "crypto:verify"     "Verify signatures and message authentication codes; implied by `crypto:sign` and `crypto:mac`."
    CryptoDerive     "crypto:derive"     "Derive keys."
    CryptoAgree      "crypto:agree"      "Agree on shared secrets."
    CryptoEncapsulate "crypto:encapsulate" "Make shared secrets for a key."
    CryptoDecapsulate "crypto:decapsulate" "Get shared secrets from their ciphertexts."
    CryptoWrap       "crypto:wrap"       "Wrap key material."
    CryptoUnwrap     "crypto:unwrap"     "Unwrap key material."
    CryptoRandom     "crypto:random"     "Get random bytes from the node."
    TokensRevoke     "tokens:revoke"      "Revoke the tokens of other clients."
    ClientsRead      "clients:read"       "See clients; implied by `clients:admin`."
    ClientsAdmin     "clients:admin"      "Add, change, disable and remove clients with no more permissions than one's own."
    RolesAdmin       "roles:admin"        "Define and assign roles and permissions that one holds oneself."
    CertificatesIssue "certificates:issue" "Issue certificates for clients with no more permissions than one's own."
    PoliciesRead     "policies:read"      "Read policies and roles, and explain decisions."
    AuditRead        "audit:read"         "Read the audit trail."
    NodeRead         "node:read"          "See configuration, root, store and jobs; implied by `node:admin`."
    NodeAdmin        "node:admin"         "Operate the root key, the store, jobs and configuration."
}

impl Permission {
    /// The weaker permission that this one contains.
    const fn implied(self) -> Option<Self> {
        match self {
            Self::KeysRead => Some(Self::KeysDescribe),
            Self::CryptoSign | Self::CryptoMac => Some(Self::CryptoVerify),
            Self::ClientsAdmin => Some(Self::ClientsRead),
            Self::NodeAdmin => Some(Self::NodeRead),
            _ => None,
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Expanded permissions as a set of bits; implied ones are always in it. `Default` is empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PermissionSet(u64);

const _: () = assert!(Permission::ALL.len() <= 64 && Action::ALL.len() <= 128);

impl PermissionSet {
    /// No permission.
    pub const EMPTY: Self = Self(0);

    /// What `*` stands for.
    pub const fn all() -> Self {
        Self((1 << Permission::ALL.len()) - 1)
    }

    /// From the names in a client's or role's record.
    ///
    /// # Errors
    /// The first name that is neither a permission nor `*`.
    pub fn parse<'n>(names: impl IntoIterator<Item = &'n str>) -> Result<Self, UnknownPermission> {
        let mut set = Self::EMPTY;
        for name in names {
            if name == "*" {
                set = Self::all();
            } else {
                let permission =
                    Permission::parse(name).ok_or_else(|| UnknownPermission(name.to_owned()))?;
                set = set.with(permission);
            }
        }
        Ok(set)
    }

    /// This set and one more, with what it implies.
    #[must_use]
    pub const fn with(self, permission: Permission) -> Self {
        let bits = self.0 | 1 << permission as u8;
        match permission.implied() {
            Some(implied) => Self(bits | 1 << implied as u8),
            None => Self(bits),
        }
    }

    /// The set of a list, for tables.
    pub const fn of(permissions: &[Permission]) -> Self {
        let mut set = Self::EMPTY;
        let mut rest = permissions;
        while let [first, tail @ ..] = rest {
            set = set.with(*first);
            rest = tail;
        }
        set
    }

    /// Both sets together.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the permission is in it.
    pub const fn contains(self, permission: Permission) -> bool {
        self.0 & 1 << permission as u8 != 0
    }

    /// Whether every permission of `other` is in it.
    pub const fn contains_all(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// The permissions in it, in the order of the table.
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.iter().copied().filter(move |p| self.contains(*p))
    }
}

impl fmt::Debug for PermissionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(Permission::name)).finish()
    }
}

/// A permission name that does not exist.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("there is no permission {0:?}")]
pub struct UnknownPermission(pub String);

macro_rules! actions {
    ($($variant:ident $class:ident $target:ident $permission:ident $doc:literal)*) => {
        /// Everything a caller can do. The name of the variant is the Cedar action id and never changes.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum Action { $(#[doc = $doc] $variant),* }

        impl Action {
            /// Every action, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The Cedar action id, for instance `RotateKey`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant)),* }
            }

            /// The permission that grants it.
            pub const fn permission(self) -> Permission {
                match self { $(Self::$variant => Permission::$permission),* }
            }

            /// What it acts on.
            pub const fn target(self) -> Target {
                match self { $(Self::$variant => Target::$target),* }
            }

            /// How far it reaches.
            pub const fn class(self) -> Class {
                match self { $(Self::$variant => Class::$class),* }
            }

            /// What it is, in one sentence.
            pub const fn about(self) -> &'static str {
                match self { $(Self::$variant => $doc),* }
            }

            /// The action of exactly this name.
            pub fn parse(name: &str) -> Option<Self> {
                match name { $(stringify!($variant) => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

impl Action {
    /// Whether it makes something or changes it to more than it was: refused when the disk is nearly full.
    /// Reading, use, and what takes away (revoking, disabling, destroying, deleting) are not.
    #[must_use]
    pub const fn adds(self) -> bool {
        match self {
            Self::CreateKey
            | Self::ImportKey
            | Self::ImportPlaintext
            | Self::HardenKey
            | Self::GetImportParameters
            | Self::ShareKey
            | Self::RotateKey
            | Self::UpdateKeyMetadata
            | Self::EnableKey
            | Self::CancelKeyDestruction
            | Self::SetAlias
            | Self::SetVersionBounds
            | Self::RotateRoot
            | Self::RewrapRoot
            | Self::RotateTokenKey
            | Self::CreateClient
            | Self::UpdateClient
            | Self::EnableClient
            | Self::RotateApiKey
            | Self::AssignRoles
            | Self::IssueCertificate
            | Self::DefineRole => true,
            Self::Encrypt
            | Self::Decrypt
            | Self::Rewrap
            | Self::GenerateDataKey
            | Self::GenerateWrappedDataKey
            | Self::Sign
            | Self::Verify
            | Self::GenerateMac
            | Self::VerifyMac
            | Self::DeriveKey
            | Self::Agree
            | Self::Encapsulate
            | Self::Decapsulate
            | Self::WrapKey
            | Self::UnwrapKey
            | Self::GetKey
            | Self::GetKeyMetadata
            | Self::ReadKeyHistory
            | Self::ReadKeyPolicies
            | Self::ExportKey
            | Self::RevokeKey
            | Self::DisableKey
            | Self::ScheduleKeyDestruction
            | Self::DeleteAlias
            | Self::TrimVersions
            | Self::ListKeys
            | Self::GenerateRandom
            | Self::ReadAudit
            | Self::HashAuditValue
            | Self::ReadPolicies
            | Self::ExplainDecision
            | Self::ReadNode
            | Self::ListClients
            | Self::ReloadConfiguration
            | Self::VerifyStore
            | Self::BackupStore
            | Self::ArchiveAudit
            | Self::ManageJobs
            | Self::ConfirmClock
            | Self::ReadClient
            | Self::RevokeToken
            | Self::DisableClient
            | Self::RemoveClient
            | Self::DeleteRole => false,
        }
    }
}

actions! {
    CreateKey            Create     Key    KeysCreate   "Create a key."
    ImportKey            Create     Key    KeysImport   "Create a key from a supplied value."
    ImportPlaintext      Create     Key    KeysImportPlain "Create a key from material that comes in the clear."
    HardenKey            Create     Key    KeysHarden   "Create a key that lies under the node's hardware or cloud wrapper."
    Encrypt              Use        Key    CryptoEncrypt "Encrypt under a key."
    Decrypt              Use        Key    CryptoDecrypt "Decrypt under a key."
    Rewrap               Use        Key    CryptoRewrap "Encrypt a ciphertext of a key anew."
    GenerateDataKey      Use        Key    CryptoDataKey "Make a data key under a key and see it."
    GenerateWrappedDataKey Use      Key    CryptoEncrypt "Make a data key under a key without seeing it."
    Sign                 Use        Key    CryptoSign   "Sign with a key."
    Verify               Use        Key    CryptoVerify "Verify signatures of a key."
    GenerateMac          Use        Key    CryptoMac    "Make message authentication codes with a key."
    VerifyMac            Use        Key    CryptoVerify "Verify message authentication codes of a key."
    DeriveKey            Use        Key    CryptoDerive "Derive keys from a key."
    Agree                Use        Key    CryptoAgree  "Agree on shared secrets with a key."
    Encapsulate          Use        Key    CryptoEncapsulate "Make shared secrets for a key."
    Decapsulate          Use        Key    CryptoDecapsulate "Get the shared secrets that were made for a key."
    WrapKey              Use        Key    CryptoWrap   "Wrap key material with a key."
    UnwrapKey            Use        Key    CryptoUnwrap "Unwrap key material with a key."
    GetKey               Read       Key    KeysRead     "Get a key's wrapped material and metadata."
    GetKeyMetadata       Read       Key    KeysDescribe "Get a key's metadata, versions, public part."
    ReadKeyHistory       Govern     Key    AuditRead    "Read who used a key, and when."
    ReadKeyPolicies      Govern     Key    PoliciesRead "Read every policy that can apply to a key."
    ShareKey             Govern     Key    KeysShare    "Change a key's authorized contexts or access policies."
    ExportKey            Manage     Key    KeysExport   "Take an exportable key's material out, plain or to a public key."
    RotateKey            Manage     Key    KeysRotate   "Make or promote a new version of a key."
    UpdateKeyMetadata    Manage     Key    KeysUpdate   "Change a key's description, tags, expiry or classification."
    RevokeKey            Manage     Key    KeysRevoke   "Revoke a key, now or later."
    EnableKey            Maintain   Key    KeysEnable   "Enable a disabled key."
    DisableKey           Maintain   Key    KeysEnable   "Disable a key."
    ScheduleKeyDestruction Maintain Key    KeysDestroy  "Schedule the destruction of a key."
    CancelKeyDestruction Maintain   Key    KeysDestroy  "Cancel a scheduled destruction."
    SetAlias             Maintain   Key    KeysAlias    "Point an alias at a key."
    DeleteAlias          Maintain   Key    KeysAlias    "Delete an alias of a key."
    SetVersionBounds     Maintain   Key    KeysVersions "Set a key's minimum versions."
    TrimVersions         Maintain   Key    KeysVersions "Delete a key's oldest versions, for ever."
    ListKeys             Inspect    Node   KeysList     "List the keys that one may see."
    GenerateRandom       Inspect    Node   CryptoRandom "Get random bytes."
    GetImportParameters  Inspect    Node   KeysImport   "Get a one-time public key for an import."
    ReadAudit            Inspect    Node   AuditRead    "Read and follow the audit trail."
    HashAuditValue       Inspect    Node   AuditRead    "Ask for the hash that stands in the audit trail for a value."
    ReadPolicies         Inspect    Node   PoliciesRead "Read policies and role definitions."
    ExplainDecision      Inspect    Node   PoliciesRead "Ask what another client may do, and why."
    ReadNode             Inspect    Node   NodeRead     "See configuration, root slots, store and jobs."
    ListClients          Inspect    Node   ClientsRead  "List clients."
    RotateRoot           Operate    Node   NodeAdmin    "Make a new root key and storage-key epoch."
    RewrapRoot           Operate    Node   NodeAdmin    "Wrap the root key again; add, remove and test slots."
    RotateTokenKey       Operate    Node   NodeAdmin    "Roll the token signing key over."
    ReloadConfiguration  Operate    Node   NodeAdmin    "Read certificates, policies and configuration again."
    VerifyStore          Operate    Node   NodeAdmin    "Verify the whole store."
    BackupStore          Operate    Node   NodeAdmin    "Take a backup."
    ArchiveAudit         Operate    Node   NodeAdmin    "Take archived leaves of the audit log out of the store."
    ManageJobs           Operate    Node   NodeAdmin    "Run, pause and cancel scheduled work."
    ConfirmClock         Operate    Node   NodeAdmin    "Confirm the clock after a jump."
    ReadClient           Inspect    Client ClientsRead  "See a client's record."
    RevokeToken          Operate    Client TokensRevoke "Revoke a client's tokens; one's own always."
    CreateClient         Administer Client ClientsAdmin "Add a client."
    UpdateClient         Administer Client ClientsAdmin "Change a client's name, tier, limits or certificate identities."
    DisableClient        Administer Client ClientsAdmin "Disable a client."
    EnableClient         Administer Client ClientsAdmin "Enable a client."
    RotateApiKey         Administer Client ClientsAdmin "Issue and retire a client's API keys."
    RemoveClient         Administer Client ClientsAdmin "Remove a client, for ever."
    AssignRoles          Administer Client RolesAdmin   "Change a client's roles or permissions."
    IssueCertificate     Administer Client CertificatesIssue "Issue a certificate for a client."
    DefineRole           Administer Role   RolesAdmin   "Add or change a role."
    DeleteRole           Administer Role   RolesAdmin   "Delete a role."
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of actions as bits. `Default` is empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ActionSet(u128);

impl ActionSet {
    /// No action.
    pub const EMPTY: Self = Self(0);

    /// Every action.
    pub const fn all() -> Self {
        Self((1 << Action::ALL.len()) - 1)
    }

    /// This set and one more.
    #[must_use]
    pub const fn with(self, action: Action) -> Self {
        Self(self.0 | 1 << action as u8)
    }

    /// Both sets together.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the action is in it.
    pub const fn contains(self, action: Action) -> bool {
        self.0 & 1 << action as u8 != 0
    }

    /// Whether there is none in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The actions in it, in the order of the table.
    pub fn iter(self) -> impl Iterator<Item = Action> {
        Action::ALL.iter().copied().filter(move |a| self.contains(*a))
    }
}

impl FromIterator<Action> for ActionSet {
    fn from_iter<I: IntoIterator<Item = Action>>(actions: I) -> Self {
        actions.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl fmt::Debug for ActionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// The actions part of the Cedar schema: a group per class and per permission, then every action.
pub fn schema_actions() -> String {
    use fmt::Write as _;
    let mut out = String::new();
    let mut line = |text: fmt::Arguments<'_>| {
        // Writing to a String cannot fail.
        let _ = out.write_fmt(text);
        out.push('\n');
    };
    for class in Class::ALL {
        line(format_args!("action \"{}\";", class.name()));
    }
    for permission in Permission::ALL {
        if Action::ALL.iter().any(|a| a.permission() == *permission) {
            line(format_args!("action \"{permission}\";"));
        }
    }
    for action in Action::ALL {
        line(format_args!(
            "// {}\naction {action} in [\"{}\", \"{}\"] appliesTo {{ principal: Client, resource: {}, context: Context }};",
            action.about(),
            action.class().name(),
            action.permission(),
            action.target().entity(),
        ));
    }
    out
}
