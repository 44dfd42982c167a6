//! Anchors: what a node is known to have served, kept outside its store, so that an older copy of the store
//! is told from the store.
//!
//! An anchor is never ahead of its store. It stops what its place is out of reach of: beside the store it
//! stops a mistake, on another medium it stops whoever can put back the store alone.

pub(crate) mod file;
mod keeper;
mod medium;
mod target;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

use data_encoding::HEXLOWER;
use polykey_hsm::{MacPurpose, Ring};

use crate::error::Error;
use crate::time::Time;
use crate::vault::tree::Frontier;
use crate::vault::{Mark, Vault};
pub use keeper::{Keeper, Status};
pub use medium::Medium;
pub use target::{Open, Target};

/// The first line of every anchor.
const FORMAT: &str = "polykey anchor 1";

/// What an anchor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anchored {
    /// The node.
    pub node_id: [u8; 16],
    /// When it was written.
    pub at: Time,
    /// Where the store stood then.
    pub mark: Mark,
}

/// Why a store is not served by its anchor.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Unanchored {
    /// There is none.
    #[error(
        "there is no anchor at {0}: it was never made, or its medium is away, or somebody has removed it to \
         put back an older store"
    )]
    Missing(Box<str>),
    /// It cannot be read, or not be written where that is needed.
    #[error("the anchor {medium} cannot be {what}: {error}")]
    Unusable {
        /// Where it is.
        medium: Box<str>,
        /// "read" or "written".
        what: &'static str,
        /// What the system said.
        error: String,
        /// Whether another start may find it.
        away: bool,
    },
    /// It is not what the node has written.
    #[error("the anchor {medium} is damaged, or was not written by this node: {what}")]
    Damaged {
        /// Where it is.
        medium: Box<str>,
        /// What shows it.
        what: String,
    },
    /// It is of another node.
    #[error("the anchor {medium} is of node {anchored}; the store is of node {found}")]
    OtherNode {
        /// Where it is.
        medium: Box<str>,
        /// Its node.
        anchored: String,
        /// That of the store.
        found: String,
    },
    /// There is an anchor, and no store.
    #[error("the anchor {medium} is of node {anchored}, and there is no store")]
    NoStore {
        /// Where it is.
        medium: Box<str>,
        /// Its node.
        anchored: String,
    },
    /// The store is older than what has been served.
    #[error(
        "this store is older than what node {node} has served: it stands at {found}, and the anchor {medium} \
         at {anchored}"
    )]
    Older {
        /// Where the anchor is.
        medium: Box<str>,
        /// The node.
        node: Box<str>,
        /// Where the anchor stands.
        anchored: Place,
        /// Where the store stands.
        found: Place,
    },
    /// The store has another history than what has been served.
    #[error(
        "this store has another history than what node {node} has served: it stands at {found}, and what it \
         has of the audit log is not what the anchor {medium} has at {anchored}: an older copy was served \
         elsewhere"
    )]
    Forked {
        /// Where the anchor is.
        medium: Box<str>,
        /// The node.
        node: Box<str>,
        /// Where the anchor stands.
        anchored: Place,
        /// Where the store stands.
        found: Place,
    },
}

impl Unanchored {
    /// That the anchor there cannot be read or written.
    fn unusable(medium: &Medium, what: &'static str, error: &std::io::Error) -> Self {
        let away = error.kind() == std::io::ErrorKind::NotConnected;
        Self::Unusable { medium: medium.to_string().into(), what, error: error.to_string(), away }
    }

    /// That the anchor there cannot be read.
    #[must_use]
    pub fn unreadable(medium: &Medium, error: &std::io::Error) -> Self {
        Self::unusable(medium, "read", error)
    }

    /// That the anchor there cannot be written.
    #[must_use]
    pub fn unwritable(medium: &Medium, error: &std::io::Error) -> Self {
        Self::unusable(medium, "written", error)
    }

    /// A word for it, for the audit log.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Missing(_) => "missing",
            Self::Unusable { .. } => "unreadable",
            Self::Damaged { .. } => "damaged",
            Self::OtherNode { .. } => "other-node",
            Self::NoStore { .. } => "no-store",
            Self::Older { .. } => "older",
            Self::Forked { .. } => "forked",
        }
    }

    /// Names a store that was made of a backup by the revision of the backup.
    #[must_use]
    pub fn as_of(mut self, revision: u64) -> Self {
        if let Self::Older { anchored, found, .. } | Self::Forked { anchored, found, .. } =
            &mut self
        {
            (anchored.store, found.store) = (None, None);
            found.revision = revision;
        }
        self
    }

    /// Where anchor and store stand, where that is known.
    #[must_use]
    pub fn places(&self) -> Option<(&Place, &Place)> {
        match self {
            Self::Older { anchored, found, .. } | Self::Forked { anchored, found, .. } => {
                Some((anchored, found))
            }
            _ => None,
        }
    }
}

/// A moment of a store in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The revision.
    pub revision: u64,
    /// Leaves of the audit log.
    pub leaves: u64,
    // Where revisions count anew, they are told apart by the store.
    store: Option<Box<str>>,
}

impl Place {
    fn of(mark: &Mark, other: &Mark) -> Self {
        let store =
            (mark.store_id != other.store_id).then(|| HEXLOWER.encode(&mark.store_id).into());
        Self { revision: mark.revision.0, leaves: mark.log.size(), store }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "revision {}", self.revision)?;
        if let Some(store) = &self.store {
            write!(f, " of store {store}")?;
        }
        write!(f, " ({} leaves in the audit log)", self.leaves)
    }
}

impl Anchored {
    /// What there is to say of a vault now.
    #[must_use]
    pub fn now(vault: &Vault) -> Self {
        Self { node_id: vault.node_id(), at: vault.clock().now(), mark: vault.mark() }
    }

    /// As it is written: lines of text, the last of which authenticates those before it.
    #[must_use]
    pub fn encode(&self, ring: &Ring) -> String {
        let Self { node_id, at, mark } = self;
        let mut text = format!(
            "{FORMAT}\nnode {}\nstore {}\nat {}\nrevision {}\ncounter {}\nleaves {}\ntree",
            HEXLOWER.encode(node_id),
            HEXLOWER.encode(&mark.store_id),
            at.micros(),
            mark.revision.0,
            mark.counter,
            mark.log.size(),
        );
        for root in mark.log.roots() {
            // Writing into a string does not fail.
            let _ = write!(text, " {}", HEXLOWER.encode(root));
        }
        text.push('\n');
        let mac = ring.mac(MacPurpose::Anchor, &[text.as_bytes()]);
        let _ = writeln!(text, "mac {}", HEXLOWER.encode(&mac));
        text
    }

    /// What is written there, authentic or not; and what authenticates it. `None` if it is no anchor.
    fn parse(text: &str) -> Option<(Self, Vec<u8>)> {
        let (signed, mac) = signed(text)?;
        let mac = HEXLOWER.decode(mac.as_bytes()).ok()?;
        let mut lines = signed.lines();
        if lines.next()? != FORMAT {
            return None;
        }
        let mut field = |name: &str| {
            let line = lines.next()?;
            line.strip_prefix(name).filter(|rest| rest.is_empty() || rest.starts_with(' '))
        };
        let id = |text: &str| HEXLOWER.decode(text.trim_start().as_bytes()).ok()?.try_into().ok();
        let number = |text: &str| text.trim_start().parse::<u64>().ok();
        let node_id = id(field("node")?)?;
        let store_id = id(field("store")?)?;
        let at = Time::from_micros(field("at")?.trim_start().parse().ok()?);
        let revision = polykey_storage::Revision(number(field("revision")?)?);
        let counter = number(field("counter")?)?;
        let leaves = number(field("leaves")?)?;
        let roots = field("tree")?.split_whitespace().map(|root| {
            let root = HEXLOWER.decode(root.as_bytes()).ok()?;
            root.try_into().ok()
        });
        let log = Frontier::from_parts(leaves, roots.collect::<Option<_>>()?)?;
        lines.next().is_none().then_some(())?;
        Some((Self { node_id, at, mark: Mark { store_id, revision, counter, log } }, mac))
    }

    /// What an anchor claims, for whoever has no key to authenticate it. `None` if it is no anchor.
    #[must_use]
    pub fn claimed(text: &str) -> Option<Self> {
        Self::parse(text).map(|(anchored, _)| anchored)
    }

    /// An anchor, if this node has written it.
    fn authentic(medium: &str, text: &str, ring: &Ring) -> Result<Self, Unanchored> {
        let damaged =
            |what: &str| Unanchored::Damaged { medium: medium.into(), what: what.to_owned() };
        let other = text.lines().next().filter(|line| line.starts_with("polykey anchor "));
        let Some((anchored, mac)) = Self::parse(text) else {
            return Err(match other {
                Some(line) if line != FORMAT => {
                    damaged(&format!("its format `{line}` is not known to this version"))
                }
                _ => damaged("it is malformed"),
            });
        };
        if anchored.node_id != ring.node_id() {
            return Err(Unanchored::OtherNode {
                medium: medium.into(),
                anchored: HEXLOWER.encode(&anchored.node_id),
                found: HEXLOWER.encode(&ring.node_id()),
            });
        }
        let signed = signed(text).map(|(signed, _)| signed).unwrap_or_default();
        if !ring.verify_mac(MacPurpose::Anchor, &[signed.as_bytes()], &mac) {
            return Err(damaged("it does not authenticate under the node's key"));
        }
        Ok(anchored)
    }
}

/// The lines that are authenticated, and by what.
fn signed(text: &str) -> Option<(&str, &str)> {
    let at = text.rfind("\nmac ")? + 1;
    let (signed, last) = text.split_at_checked(at)?;
    Some((signed, last.strip_prefix("mac ")?.strip_suffix('\n')?))
}

/// Compares a store that has just been opened, and not written to yet, with the anchor of a medium.
///
/// # Errors
/// The outer one if the store cannot be read; the inner one if the anchor does not vouch for it.
pub async fn compare(
    medium: &Medium,
    vault: &Vault,
) -> Result<Result<Anchored, Unanchored>, Error> {
    let at: Box<str> = medium.to_string().into();
    let text = match medium.read() {
        Ok(Some(text)) => text,
        Ok(None) => return Ok(Err(Unanchored::Missing(at))),
        Err(error) => return Ok(Err(Unanchored::unreadable(medium, &error))),
    };
    let anchored = match Anchored::authentic(&at, &text, &vault.ring()) {
        Ok(anchored) => anchored,
        Err(refused) => return Ok(Err(refused)),
    };
    let found = vault.mark();
    let mut older = found.log.size() < anchored.mark.log.size();
    if !older {
        // What was served must be how the log of the store begins.
        let mut log = anchored.mark.log.clone();
        vault.grow(&mut log, found.log.size()).await?;
        // Changes without an event are told by the counter alone.
        older = log == found.log && found.precedes(&anchored.mark);
        if log == found.log && !older {
            return Ok(Ok(anchored));
        }
    }
    let node = HEXLOWER.encode(&anchored.node_id).into();
    let places = (Place::of(&anchored.mark, &found), Place::of(&found, &anchored.mark));
    let (medium, (anchored, found)) = (at, places);
    Ok(Err(match older {
        true => Unanchored::Older { medium, node, anchored, found },
        false => Unanchored::Forked { medium, node, anchored, found },
    }))
}
