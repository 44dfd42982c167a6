//! What can be asked of the keyring, parsed: every face of the server enters here.

use std::collections::BTreeMap;

use polykey_hsm::{Algorithm, Purpose};
use zeroize::Zeroizing;

use crate::authz::{Action, ActionSet, Command};
use crate::error::Error;
use crate::key::KeyName;
use crate::time::Time;

pub mod crypto;

/// What wraps a key's material.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// The node's root key.
    #[default]
    Standard,
    /// A hardware backend.
    Hardened,
}

/// A secret that a request carries; `Debug` shows its length.
pub struct Value(pub Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} bytes]", self.0.len())
    }
}

/// Make a key.
#[derive(Debug)]
pub struct CreateKey {
    /// What it is.
    pub algorithm: Algorithm,
    /// What it is for.
    pub purpose: Purpose,
    /// Whether it encrypts deterministically.
    pub convergent: bool,
    /// Uses of a version after which it rotates; 0 = never.
    pub rotate_after_uses: u64,
    /// Uses after which a version refuses to seal; 0 = none.
    pub max_uses: u64,
    /// Material from outside, other than the value of a credential.
    pub import: Option<crypto::Import>,
    /// For people.
    pub description: String,
    /// Labels.
    pub tags: BTreeMap<String, String>,
    /// From when on it seals nothing.
    pub expires_at: Option<Time>,
    /// Clients that may use it.
    pub contexts: Vec<String>,
    /// Cedar texts by name.
    pub policies: BTreeMap<String, String>,
    /// How secret what it protects is.
    pub classification: String,
    /// Whether its material may leave; none = by its type.
    pub exportable: Option<bool>,
    /// The material, if it exists already.
    pub value: Option<Value>,
    /// A name.
    pub alias: Option<String>,
    /// Whether it opens after `expires_at`.
    pub read_after_expiry: bool,
    /// Seconds between rotations.
    pub rotation_period: Option<i64>,
    /// What wraps it; none = what the client's tier gives.
    pub profile: Option<Profile>,
    /// Whether it is made in a token and never leaves it.
    pub in_token: bool,
    /// The prefix of a generated API key.
    pub prefix: Option<String>,
}

impl CreateKey {
    /// Whether its material exists already.
    #[must_use]
    pub fn comes_from_outside(&self) -> bool {
        self.value.is_some() || self.import.is_some()
    }

    /// The right that asking for a hardened key takes.
    fn harden(&self) -> ActionSet {
        let set = ActionSet::EMPTY;
        let asked = self.in_token || self.profile == Some(Profile::Hardened);
        if asked { set.with(Action::HardenKey) } else { set }
    }
}

/// How a new version takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// At once.
    Hot,
    /// On a second call, or at a time.
    Staged {
        /// That time.
        at: Option<Time>,
    },
    /// By itself, every so many seconds.
    Scheduled {
        /// So many.
        period: i64,
    },
}

/// Make or promote a version.
#[derive(Debug)]
pub struct RotateKey {
    /// Which key.
    pub key: KeyName,
    /// How.
    pub strategy: Strategy,
    /// Seconds for which the replaced version still opens; 0 = no limit.
    pub grace: i64,
    /// The revision it must have.
    pub expected: Option<u64>,
    /// Remove its access policies too.
    pub clear_policies: bool,
    /// The new credential.
    pub value: Option<Value>,
}

/// Revoke a key for ever.
#[derive(Debug)]
pub struct RevokeKey {
    /// Which key.
    pub key: KeyName,
    /// Why.
    pub reason: String,
    /// When; none = now.
    pub at: Option<Time>,
    /// Whether the operator's systems are told.
    pub notify: bool,
    /// The revision it must have.
    pub expected: Option<u64>,
}

/// Change what is said about a key.
#[derive(Debug, Default)]
pub struct UpdateKey {
    /// Which key.
    pub key: Option<KeyName>,
    /// New description.
    pub description: Option<String>,
    /// Tags to set.
    pub tags_set: BTreeMap<String, String>,
    /// Tags to remove.
    pub tags_removed: Vec<String>,
    /// Contexts to add.
    pub contexts_added: Vec<String>,
    /// Contexts to remove.
    pub contexts_removed: Vec<String>,
    /// Policies to set.
    pub policies_set: BTreeMap<String, String>,
    /// Policies to remove.
    pub policies_removed: Vec<String>,
    /// New expiry; `Some(None)` = never.
    pub expires_at: Option<Expiry>,
    /// New classification.
    pub classification: Option<String>,
    /// New rotation period; 0 ends it.
    pub rotation_period: Option<i64>,
    /// The revision it must have.
    pub expected: Option<u64>,
}

/// A change of the time at which a key expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// At this time.
    At(Time),
    /// Not at all.
    Never,
}

impl UpdateKey {
    /// Whether it changes who may use the key.
    #[must_use]
    pub fn shares(&self) -> bool {
        !(self.contexts_added.is_empty()
            && self.contexts_removed.is_empty()
            && self.policies_set.is_empty()
            && self.policies_removed.is_empty())
    }

    /// Whether it changes anything else.
    #[must_use]
    pub fn describes(&self) -> bool {
        self.description.is_some()
            || !self.tags_set.is_empty()
            || !self.tags_removed.is_empty()
            || self.expires_at.is_some()
            || self.classification.is_some()
            || self.rotation_period.is_some()
    }
}

/// One of the changes that need nothing but the key's name.
#[derive(Debug)]
pub struct OnKey {
    /// Which key.
    pub key: KeyName,
    /// The revision it must have.
    pub expected: Option<u64>,
}

/// Begin the destruction window.
#[derive(Debug)]
pub struct ScheduleDestruction {
    /// Which key.
    pub key: KeyName,
    /// 7 to 30.
    pub days: u32,
    /// The revision it must have.
    pub expected: Option<u64>,
}

/// Point a name at a key.
#[derive(Debug)]
pub struct SetAlias {
    /// Which key.
    pub key: KeyName,
    /// The name, without `alias/`.
    pub alias: String,
    /// Whether the name exists already and is moved; else it must be free.
    pub moves: bool,
    /// The key it must point at before it is moved.
    pub from: Option<KeyName>,
}

/// Remove a name.
#[derive(Debug)]
pub struct DeleteAlias {
    /// The name, without `alias/`.
    pub alias: String,
}

/// Set the minimum versions.
#[derive(Debug)]
pub struct SetBounds {
    /// Which key.
    pub key: KeyName,
    /// Lowest version that opens; none = unchanged.
    pub decryption: Option<u32>,
    /// Lowest version that seals, 0 = the primary; none = unchanged.
    pub encryption: Option<u32>,
    /// The revision it must have.
    pub expected: Option<u64>,
}

/// Erase the oldest versions for ever.
#[derive(Debug)]
pub struct TrimVersions {
    /// Which key.
    pub key: KeyName,
    /// The lowest version that stays.
    pub min_available: u32,
    /// The revision it must have.
    pub expected: Option<u64>,
}

/// Everything that changes a key.
#[derive(Debug)]
pub enum Mutation {
    /// Make one.
    Create(Box<CreateKey>),
    /// Make or promote a version.
    Rotate(RotateKey),
    /// End its use for ever.
    Revoke(RevokeKey),
    /// Change what is said about it.
    Update(Box<UpdateKey>),
    /// Turn it on.
    Enable(OnKey),
    /// Turn it off.
    Disable(OnKey),
    /// Begin the destruction window.
    Destroy(ScheduleDestruction),
    /// End the destruction window.
    CancelDestroy(OnKey),
    /// Name it.
    SetAlias(SetAlias),
    /// Remove a name.
    DeleteAlias(DeleteAlias),
    /// Set minimum versions.
    SetBounds(SetBounds),
    /// Erase old versions.
    Trim(TrimVersions),
}

impl Mutation {
    /// The key it names, if it names one.
    #[must_use]
    pub fn key(&self) -> Option<KeyName> {
        match self {
            Self::Create(_) => None,
            Self::Rotate(c) => Some(c.key.clone()),
            Self::Revoke(c) => Some(c.key.clone()),
            Self::Update(c) => c.key.clone(),
            Self::Enable(c) | Self::Disable(c) | Self::CancelDestroy(c) => Some(c.key.clone()),
            Self::Destroy(c) => Some(c.key.clone()),
            Self::SetAlias(c) => Some(c.key.clone()),
            Self::DeleteAlias(c) => Some(KeyName::Alias(c.alias.clone())),
            Self::SetBounds(c) => Some(c.key.clone()),
            Self::Trim(c) => Some(c.key.clone()),
        }
    }

    /// Whether the times it names are still to come. Parsing has asked that already, except of a
    /// request that may be the repetition of an earlier one.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one is past.
    pub(crate) fn check_times(&self, now: Time) -> Result<(), Error> {
        let (field, at) = match self {
            Self::Create(c) => ("expires_at", c.expires_at),
            Self::Rotate(RotateKey { strategy: Strategy::Staged { at }, .. }) => {
                ("effective_at", *at)
            }
            Self::Revoke(c) => ("effective_at", c.at),
            Self::Update(c) => match c.expires_at {
                Some(Expiry::At(at)) => ("expires_at", Some(at)),
                Some(Expiry::Never) | None => return Ok(()),
            },
            _ => return Ok(()),
        };
        if at.is_some_and(|at| at <= now) {
            return Err(Error::invalid(field, "must be in the future"));
        }
        Ok(())
    }

    /// The right it takes first.
    #[must_use]
    pub fn action(&self) -> Action {
        match self {
            Self::Create(c) if c.comes_from_outside() => Action::ImportKey,
            Self::Create(_) => Action::CreateKey,
            Self::Rotate(_) => Action::RotateKey,
            Self::Revoke(_) => Action::RevokeKey,
            Self::Update(c) if c.shares() && !c.describes() => Action::ShareKey,
            Self::Update(_) => Action::UpdateKeyMetadata,
            Self::Enable(_) => Action::EnableKey,
            Self::Disable(_) => Action::DisableKey,
            Self::Destroy(_) => Action::ScheduleKeyDestruction,
            Self::CancelDestroy(_) => Action::CancelKeyDestruction,
            Self::SetAlias(_) => Action::SetAlias,
            Self::DeleteAlias(_) => Action::DeleteAlias,
            Self::SetBounds(_) => Action::SetVersionBounds,
            Self::Trim(_) => Action::TrimVersions,
        }
    }

    /// The revision the key must have.
    #[must_use]
    pub fn expected(&self) -> Option<u64> {
        match self {
            Self::Create(_) | Self::SetAlias(_) | Self::DeleteAlias(_) => None,
            Self::Rotate(c) => c.expected,
            Self::Revoke(c) => c.expected,
            Self::Update(c) => c.expected,
            Self::Enable(c) | Self::Disable(c) | Self::CancelDestroy(c) => c.expected,
            Self::Destroy(c) => c.expected,
            Self::SetBounds(c) => c.expected,
            Self::Trim(c) => c.expected,
        }
    }
}

/// How material leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Export {
    /// Not at all: wrapped.
    #[default]
    None,
    /// As it is.
    Plain,
    /// Encrypted to this X25519 public key (raw or SubjectPublicKeyInfo).
    Hpke(Vec<u8>),
}

/// Read a key's material and metadata.
#[derive(Clone, Debug)]
pub struct GetKey {
    /// Which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// How the material leaves.
    pub export: Export,
}

/// Read a key's metadata.
#[derive(Clone, Debug)]
pub struct GetMetadata {
    /// Which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// With its last uses.
    pub history: bool,
    /// With the policies that can apply to it.
    pub policies: bool,
}

/// List keys.
#[derive(Clone, Debug, Default)]
pub struct ListKeys {
    /// 1 to 1,000.
    pub page_size: u32,
    /// Where the last page ended.
    pub page_token: String,
    /// Any of these types; empty = all.
    pub algorithms: Vec<Algorithm>,
    /// Any of these; empty = all.
    pub statuses: Vec<ListStatus>,
    /// All of these.
    pub tags: BTreeMap<String, String>,
    /// Created at or after.
    pub created_after: Option<Time>,
    /// Created before.
    pub created_before: Option<Time>,
}

/// The coarse status by which lists are filtered; the wire's KeyStatus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ListStatus {
    /// In use.
    Active,
    /// A staged version waits.
    Rotating,
    /// Opens, but seals nothing any more.
    Deprecated,
    /// Does nothing.
    Revoked,
}

macro_rules! commands {
    ($($command:ty => $action:ident),* $(,)?) => {
        $(impl Command for &$command { const ACTION: Action = Action::$action; })*
    };
}

/// The parts of commands that take a permit of their own.
pub mod part {
    /// Creation from fresh randomness.
    #[derive(Debug)]
    pub struct Generate<'a>(pub &'a super::CreateKey);
    /// Creation from a supplied value.
    #[derive(Debug)]
    pub struct Import<'a>(pub &'a super::CreateKey);
    /// Creation of a key that lies under a hardware or cloud wrapper.
    #[derive(Debug)]
    pub struct Harden<'a>(pub &'a super::CreateKey);
    /// A change of nothing but who may use a key.
    #[derive(Debug)]
    pub struct Share<'a>(pub &'a super::UpdateKey);
    /// Turning on.
    #[derive(Debug)]
    pub struct Enable<'a>(pub &'a super::OnKey);
    /// Turning off.
    #[derive(Debug)]
    pub struct Disable<'a>(pub &'a super::OnKey);
    /// Ending a destruction window.
    #[derive(Debug)]
    pub struct CancelDestruction<'a>(pub &'a super::OnKey);
    /// Taking material out.
    #[derive(Debug)]
    pub struct ExportKey<'a>(pub &'a super::GetKey);
    /// Reading who used a key.
    #[derive(Debug)]
    pub struct ReadHistory<'a>(pub &'a super::KeyName);
    /// Reading the policies of a key.
    #[derive(Debug)]
    pub struct ReadPolicies<'a>(pub &'a super::KeyName);
    /// Taking a name from a key that somebody else made: it decides what that key's users use.
    #[derive(Debug)]
    pub struct TakeAlias<'a>(pub &'a super::SetAlias);
    /// Reading metadata by name alone.
    #[derive(Debug)]
    pub struct Describe<'a>(pub &'a super::KeyName);
}

impl Command for part::Import<'_> {
    const ACTION: Action = Action::ImportKey;

    fn also(&self) -> ActionSet {
        let set = self.0.harden();
        match self.0.import {
            Some(crypto::Import::Plain(_)) => set.with(Action::ImportPlaintext),
            Some(crypto::Import::Wrapped { .. }) | None => set,
        }
    }
}

impl Command for part::Generate<'_> {
    const ACTION: Action = Action::CreateKey;

    fn also(&self) -> ActionSet {
        self.0.harden()
    }
}

impl Command for &RotateKey {
    const ACTION: Action = Action::RotateKey;

    fn also(&self) -> ActionSet {
        let set = ActionSet::EMPTY;
        if self.clear_policies { set.with(Action::ShareKey) } else { set }
    }
}

impl Command for &UpdateKey {
    const ACTION: Action = Action::UpdateKeyMetadata;

    fn also(&self) -> ActionSet {
        let set = ActionSet::EMPTY;
        if self.shares() { set.with(Action::ShareKey) } else { set }
    }
}

impl Command for &GetKey {
    const ACTION: Action = Action::GetKey;

    fn also(&self) -> ActionSet {
        let set = ActionSet::EMPTY;
        if self.export == Export::None { set } else { set.with(Action::ExportKey) }
    }
}

commands! {
    RevokeKey => RevokeKey,
    ScheduleDestruction => ScheduleKeyDestruction,
    SetAlias => SetAlias,
    DeleteAlias => DeleteAlias,
    SetBounds => SetVersionBounds,
    TrimVersions => TrimVersions,
    GetMetadata => GetKeyMetadata,
    ListKeys => ListKeys,
}

macro_rules! parts {
    ($($part:ident => $action:ident),* $(,)?) => {
        $(impl Command for part::$part<'_> { const ACTION: Action = Action::$action; })*
    };
}

parts! {
    Harden => HardenKey,
    Share => ShareKey,
    Enable => EnableKey,
    Disable => DisableKey,
    CancelDestruction => CancelKeyDestruction,
    ExportKey => ExportKey,
    ReadHistory => ReadKeyHistory,
    ReadPolicies => ReadKeyPolicies,
    Describe => GetKeyMetadata,
    TakeAlias => ShareKey,
}
