//! `polykey key`: keys from creation to destruction.

use std::path::PathBuf;
use std::sync::LazyLock;

use clap::builder::PossibleValue;
use clap::{Args, Subcommand, ValueEnum};
use polykey_hsm::Algorithm;
use polykey_proto::polykey::v2 as pb;

use super::error::CliError;
use super::key_export::{ExportArgs, KeygenArgs, OpenExportArgs};
use super::key_versions::{AliasCommand, BoundsArgs, TrimArgs};
use super::value::{self, When};
use crate::rpc::convert;

/// Types of keys, by the names of the table of algorithms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyType(pub Algorithm);

/// Types of key pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairType(pub Algorithm);

/// What keys are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purpose(pub polykey_hsm::Purpose);

impl ValueEnum for KeyType {
    fn value_variants<'a>() -> &'a [Self] {
        static ALL: LazyLock<Vec<KeyType>> =
            LazyLock::new(|| Algorithm::ALL.iter().map(|a| KeyType(*a)).collect());
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name()).help(self.0.about()))
    }
}

impl ValueEnum for PairType {
    fn value_variants<'a>() -> &'a [Self] {
        static ALL: LazyLock<Vec<PairType>> = LazyLock::new(|| {
            let pairs = Algorithm::ALL.iter().filter(|a| a.is_asymmetric());
            pairs.map(|a| PairType(*a)).collect()
        });
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name()).help(self.0.about()))
    }
}

impl ValueEnum for Purpose {
    fn value_variants<'a>() -> &'a [Self] {
        static ALL: LazyLock<Vec<Purpose>> =
            LazyLock::new(|| polykey_hsm::Purpose::ALL.iter().map(|p| Purpose(*p)).collect());
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.name()))
    }
}

impl From<KeyType> for pb::KeyType {
    fn from(key_type: KeyType) -> Self {
        convert::key_type(key_type.0)
    }
}

impl From<PairType> for pb::KeyType {
    fn from(key_type: PairType) -> Self {
        convert::key_type(key_type.0)
    }
}

impl From<Purpose> for pb::KeyPurpose {
    fn from(purpose: Purpose) -> Self {
        convert::purpose(purpose.0)
    }
}

/// Coarse states, as filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Status {
    /// Enabled.
    Active,
    /// A version is staged.
    Rotating,
    /// Opens old data only.
    Deprecated,
    /// Revoked, disabled, expired, waiting for destruction or destroyed.
    Revoked,
}

/// How a new version comes into place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// Primary at once.
    Hot,
    /// Beside the primary until `--at`, or until the next staged rotation.
    Staged,
    /// By itself, each time `--period` has passed.
    Scheduled,
}

/// What the material of a key lies under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Storage {
    /// The root key of the node.
    Standard,
    /// The node's hardware or cloud wrapper too.
    Hardened,
    /// Nothing: it is made in the PKCS#11 token of the node's [hardened] and never leaves it; each use
    /// is a call of the token. ECDSA P-256 and P-384 and RSA keys.
    Token,
}

impl From<Storage> for pb::StorageProfile {
    fn from(storage: Storage) -> Self {
        match storage {
            Storage::Standard => Self::Standard,
            Storage::Hardened | Storage::Token => Self::Hardened,
        }
    }
}

/// How confidential what a key protects is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Classification {
    /// Not stated.
    None,
    /// Public.
    Public,
    /// Internal.
    Internal,
    /// Confidential.
    Confidential,
    /// Secret.
    Secret,
}

impl Classification {
    /// As on the wire.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Public => "public",
            Self::Internal => "internal",
            Self::Confidential => "confidential",
            Self::Secret => "secret",
        }
    }
}

/// Names one key.
#[derive(Args, Debug)]
pub struct KeyArg {
    /// The key: its id, or alias/NAME.
    #[arg(value_name = "KEY", value_parser = value::key_name)]
    pub key: String,
}

/// Names one key whose state is to change.
#[derive(Args, Debug)]
pub struct ChangeArgs {
    /// The key.
    #[command(flatten)]
    pub key: KeyArg,
    /// Do nothing unless the key has this revision.
    #[arg(long, value_name = "N")]
    pub expected_revision: Option<u64>,
}

/// Subcommands of `key`.
#[derive(Subcommand, Debug)]
pub enum KeyCommand {
    /// Create a key.
    Create(Box<CreateArgs>),
    /// Read a version of a key, with its wrapped material.
    Get(GetArgs),
    /// List the keys that you may see, oldest first.
    List(ListArgs),
    /// Show everything about a key except its material.
    Describe(DescribeArgs),
    /// Change what is said about a key.
    Update(Box<UpdateArgs>),
    /// Make a new version of a key.
    Rotate(RotateArgs),
    /// Revoke a key for ever, now or at a time.
    Revoke(RevokeArgs),
    /// Enable a disabled key.
    Enable(ChangeArgs),
    /// Disable a key until it is enabled again.
    Disable(ChangeArgs),
    /// Schedule the destruction of a key's material.
    Destroy(DestroyArgs),
    /// Cancel a scheduled destruction; the key is disabled then.
    CancelDestroy(ChangeArgs),
    /// Export the material of an exportable key.
    Export(ExportArgs),
    /// Decrypt what `key export --recipient` wrote.
    OpenExport(OpenExportArgs),
    /// Make a key pair to receive exports with.
    ExportKeygen(KeygenArgs),
    /// Show what happened to a key, newest first.
    History(HistoryArgs),
    /// Names of keys.
    #[command(subcommand)]
    Alias(AliasCommand),
    /// List the versions of a key, oldest first.
    Versions(KeyArg),
    /// Set which versions may open and seal.
    Bounds(BoundsArgs),
    /// Erase old versions for ever.
    Trim(TrimArgs),
}

/// Arguments of `key create`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// What the key will be.
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    pub key_type: KeyType,
    /// What it is for; the first purpose of its type if not given. It cannot be changed later.
    #[arg(long, value_name = "PURPOSE", value_enum)]
    pub purpose: Option<Purpose>,
    /// Encrypt deterministically: equal plaintexts with equal contexts give equal ciphertexts, which
    /// shows that they are equal. Only for symmetric keys that encrypt; it cannot be changed later.
    #[arg(long)]
    pub convergent: bool,
    /// Rotate the key by itself once a version has sealed so many times.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub rotate_after_uses: Option<i64>,
    /// Let a version seal so many times and no more.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub max_uses: Option<i64>,
    /// A name for it, with or without alias/ in front.
    #[arg(long, value_name = "NAME")]
    pub alias: Option<String>,
    /// A label; may be repeated.
    #[arg(long = "tag", value_name = "NAME=VALUE", value_parser = value::pair)]
    pub tags: Vec<(String, String)>,
    /// A text for people.
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// When it expires: a time (RFC 3339) or a duration from now, such as 90d.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub expires: Option<When>,
    /// Whether the material may ever leave the server; it cannot be changed later. By default true
    /// for api-key, else false.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub exportable: Option<bool>,
    /// Keep the credential in this file (- for standard input) instead of a generated one; api-key
    /// only. One line end at the end is not part of it.
    #[arg(long, value_name = "FILE")]
    pub value_file: Option<PathBuf>,
    /// Let the key open data after it has expired; it cannot be changed later.
    #[arg(long)]
    pub read_after_expiry: bool,
    /// Another client that may use the key; may be repeated.
    #[arg(long = "context", value_name = "CLIENT")]
    pub contexts: Vec<String>,
    /// An access policy; may be repeated.
    #[arg(long = "policy", value_name = "NAME=FILE", value_parser = value::named_file)]
    pub policies: Vec<(String, PathBuf)>,
    /// How confidential what it protects is.
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub classification: Option<Classification>,
    /// Rotate the key by itself each time so long has passed, such as 90d.
    #[arg(long, value_name = "DURATION", value_parser = value::seconds)]
    pub rotation_period: Option<i64>,
    /// What its material lies under; what the node gives to clients of one's tier if not given. It
    /// cannot be changed later.
    #[arg(long, value_enum, value_name = "PROFILE")]
    pub storage: Option<Storage>,
}

/// Arguments of `key get`.
#[derive(Args, Debug)]
pub struct GetArgs {
    /// The key.
    #[command(flatten)]
    pub key: KeyArg,
    /// The version; the primary one if not given.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(i32).range(0..))]
    pub version: i32,
    /// Print only the public key, PEM.
    #[arg(long)]
    pub public_key: bool,
}

/// Arguments of `key list`.
#[derive(Args, Debug)]
pub struct ListArgs {
    /// Only keys of this type; may be repeated.
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    pub key_types: Vec<KeyType>,
    /// Only keys of this status; may be repeated.
    #[arg(long = "status", value_name = "STATUS", value_enum)]
    pub statuses: Vec<Status>,
    /// Only keys with this label; NAME= is any value. May be repeated: all must fit.
    #[arg(long = "tag", value_name = "NAME=VALUE", value_parser = value::pair)]
    pub tags: Vec<(String, String)>,
    /// Only keys created at this time or later: RFC 3339, or a duration ago.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub created_after: Option<When>,
    /// Only keys created before this time: RFC 3339, or a duration ago.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub created_before: Option<When>,
    /// At most so many keys.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

/// Arguments of `key describe`.
#[derive(Args, Debug)]
pub struct DescribeArgs {
    /// The key.
    #[command(flatten)]
    pub key: KeyArg,
    /// The version; the primary one if not given.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(i32).range(0..))]
    pub version: i32,
    /// Add the last uses of the key.
    #[arg(long)]
    pub uses: bool,
    /// Add the policies that can apply to the key.
    #[arg(long)]
    pub policies: bool,
}

/// Arguments of `key update`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("expiry").args(["expires", "no_expiry"]))]
pub struct UpdateArgs {
    /// The key and its expected revision.
    #[command(flatten)]
    pub change: ChangeArgs,
    /// The new text for people; "" removes it.
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// Set a label; may be repeated.
    #[arg(long = "tag", value_name = "NAME=VALUE", value_parser = value::pair)]
    pub tags: Vec<(String, String)>,
    /// Remove a label; may be repeated.
    #[arg(long = "remove-tag", value_name = "NAME")]
    pub remove_tags: Vec<String>,
    /// Let another client use the key; may be repeated.
    #[arg(long = "context", value_name = "CLIENT")]
    pub contexts: Vec<String>,
    /// Let a client use the key no more; may be repeated.
    #[arg(long = "remove-context", value_name = "CLIENT")]
    pub remove_contexts: Vec<String>,
    /// Set an access policy; may be repeated.
    #[arg(long = "policy", value_name = "NAME=FILE", value_parser = value::named_file)]
    pub policies: Vec<(String, PathBuf)>,
    /// Remove an access policy; may be repeated.
    #[arg(long = "remove-policy", value_name = "NAME")]
    pub remove_policies: Vec<String>,
    /// When it expires: a time (RFC 3339) or a duration from now, such as 90d.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub expires: Option<When>,
    /// Let the key never expire.
    #[arg(long)]
    pub no_expiry: bool,
    /// How confidential what it protects is.
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub classification: Option<Classification>,
    /// Rotate the key by itself each time so long has passed; 0s ends it.
    #[arg(long, value_name = "DURATION", value_parser = value::seconds)]
    pub rotation_period: Option<i64>,
}

/// Arguments of `key rotate`.
#[derive(Args, Debug)]
pub struct RotateArgs {
    /// The key and its expected revision.
    #[command(flatten)]
    pub change: ChangeArgs,
    /// How the new version comes into place.
    #[arg(long, value_enum, default_value_t = Strategy::Hot)]
    pub strategy: Strategy,
    /// How long the old version still opens data, such as 30d; without it, without limit.
    #[arg(long, value_name = "DURATION", value_parser = value::seconds)]
    pub grace: Option<i64>,
    /// With staged: when the new version becomes primary.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub at: Option<When>,
    /// With scheduled: the time between rotations, such as 90d.
    #[arg(long, value_name = "DURATION", value_parser = value::seconds, required_if_eq("strategy", "scheduled"))]
    pub period: Option<i64>,
    /// The new credential is in this file (- for standard input); api-key only. One line end at the
    /// end is not part of it.
    #[arg(long, value_name = "FILE")]
    pub value_file: Option<PathBuf>,
    /// Remove every access policy of the key.
    #[arg(long)]
    pub clear_policies: bool,
}

/// Arguments of `key revoke`.
#[derive(Args, Debug)]
pub struct RevokeArgs {
    /// The key and its expected revision.
    #[command(flatten)]
    pub change: ChangeArgs,
    /// Why; kept with the key.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub reason: String,
    /// When, instead of now: a time (RFC 3339) or a duration from now.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub at: Option<When>,
    /// Tell the webhooks of the node when it is in force.
    #[arg(long)]
    pub notify: bool,
}

/// Arguments of `key destroy`.
#[derive(Args, Debug)]
pub struct DestroyArgs {
    /// The key and its expected revision.
    #[command(flatten)]
    pub change: ChangeArgs,
    /// How many days it can still be cancelled, 7 to 30.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(i32).range(7..=30))]
    pub days: i32,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

/// Arguments of `key history`.
#[derive(Args, Debug)]
pub struct HistoryArgs {
    /// The key.
    #[command(flatten)]
    pub key: KeyArg,
    /// Only events at this time or later: RFC 3339, or a duration ago.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub since: Option<When>,
    /// Only events before this time: RFC 3339, or a duration ago.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub until: Option<When>,
    /// At most so many events.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
}

/// Largest credential, in bytes; the server's limit is lower or equal.
const MAX_VALUE: u64 = 64 * 1024;

/// The credential in a file, without one line end at its end.
pub(super) fn credential(path: Option<&PathBuf>) -> Result<zeroize::Zeroizing<Vec<u8>>, CliError> {
    let Some(path) = path else { return Ok(zeroize::Zeroizing::default()) };
    let mut value = crate::client::file::read(path, MAX_VALUE + 2)
        .map_err(|error| CliError::file(path, &error))?;
    if value.ends_with(b"\n") {
        value.pop();
        if value.ends_with(b"\r") {
            value.pop();
        }
    }
    if value.is_empty() {
        return Err(CliError::usage(format!("{}: holds no credential", path.display())));
    }
    Ok(value)
}
