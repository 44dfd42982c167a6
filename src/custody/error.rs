//! Why a store is not founded, opened or changed, in words for operators. No secrets.

use polykey_hsm::{RootError, WrapError};

use super::slots::SlotSpec;
use crate::error::{Error, Reason};

/// What became of one slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrialOutcome {
    /// No wrapper that is configured made it.
    NotConfigured,
    /// It opens with its recovery key only, which no node has.
    Recovery,
    /// The wrapper that should open it did not.
    Failed(RootError),
    /// Its stored form is not one.
    Damaged(String),
}

/// A slot that was tried in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// The slot.
    pub slot: SlotSpec,
    /// Why it did not open.
    pub outcome: TrialOutcome,
}

impl Trial {
    /// Whether its wrapper did not answer.
    #[must_use]
    pub fn is_away(&self) -> bool {
        matches!(
            self.outcome,
            TrialOutcome::Failed(RootError::Wrap(
                WrapError::Unavailable { .. } | WrapError::DeadlineExceeded
            ))
        )
    }
}

impl std::fmt::Display for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: ", self.slot)?;
        match &self.outcome {
            TrialOutcome::NotConfigured => f.write_str(
                "wrapped by something that is not configured, or by another master key; configure \
                 the wrapper that made it, with the secret it had then",
            ),
            TrialOutcome::Recovery => f.write_str(
                "opens with its recovery key or enough of its shares: `polykey recover`",
            ),
            TrialOutcome::Failed(RootError::Wrap(WrapError::Broken)) => f.write_str(
                "does not open: the secret is wrong, or the slot was changed or is of another \
                 node; check the passphrase, or restore the store from a backup",
            ),
            TrialOutcome::Failed(RootError::Wrap(
                WrapError::Unavailable { .. } | WrapError::DeadlineExceeded,
            )) => f.write_str("its wrapper does not answer; try again when it does"),
            TrialOutcome::Failed(error) => write!(f, "{error}"),
            TrialOutcome::Damaged(what) => {
                write!(f, "damaged ({what}); restore the store from a backup")
            }
        }
    }
}

fn list(trials: &[Trial]) -> String {
    if trials.is_empty() {
        return "\n  there is no slot at all; restore the store from a backup".to_owned();
    }
    trials.iter().map(|trial| format!("\n  {trial}")).collect()
}

fn list_if_any(trials: &[Trial]) -> String {
    if trials.is_empty() { String::new() } else { list(trials) }
}

/// Why a store was not founded. Nothing was written, unless [`Self::Store`] says that the outcome
/// is unknown.
#[derive(Clone, Debug, thiserror::Error)]
pub enum InitError {
    /// There is something in it.
    #[error("the store has been initialised already; nothing was changed")]
    AlreadyInitialised,
    /// See [`ChangeError::BadLabel`].
    #[error("{}", ChangeError::BadLabel)]
    BadLabel,
    /// The root cannot be wrapped.
    #[error("{slot}: {error}")]
    Wrap {
        /// The slot that was to be.
        slot: SlotSpec,
        /// What the wrapper says.
        error: RootError,
    },
    /// The store failed.
    #[error("{}", words(.0))]
    Store(Error),
}

impl From<Error> for InitError {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

impl From<ChangeError> for InitError {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::BadLabel => Self::BadLabel,
            error => Self::Store(error.into()),
        }
    }
}

/// Why a store did not open. Nothing was written.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// It is empty.
    #[error("the store has not been initialised; run `polykey init` first")]
    NotInitialised,
    /// A later release wrote it.
    #[error(
        "the store has format {found}, and this release reads formats up to {supported}; \
         use a newer release"
    )]
    NewerFormat {
        /// The format of the store.
        found: u32,
        /// The newest one this build reads.
        supported: u32,
    },
    /// No wrapper opens any slot.
    #[error("no slot of the store opens:{}", list(.0))]
    NoSlotOpened(Vec<Trial>),
    /// A slot opens, and the table it stands in is not the one that was written.
    #[error(
        "{opened} opens, but the slot table has been changed behind the server's back; \
         restore the store from a backup"
    )]
    SlotsChanged {
        /// The slot that opened.
        opened: SlotSpec,
    },
    /// The slot table is authentic, and not the one in force.
    #[error(
        "the slot table is of generation {found} where generation {expected} is in force: it was \
         put back from another copy of the store; restore the whole store from a backup"
    )]
    Replayed {
        /// Generation of the table.
        found: u64,
        /// Generation that the sealed canary names.
        expected: u64,
    },
    /// Something that must be there or must open is not or does not.
    #[error("the store is damaged: {0}; restore it from a backup")]
    Damaged(String),
    /// The store failed.
    #[error("{}", words(.0))]
    Store(Error),
}

/// Why slots or root did not change.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ChangeError {
    /// There is no slot of this label or id.
    #[error("there is no slot `{0}`; `polykey root status` lists them")]
    NoSuchSlot(String),
    /// There is a slot of this label.
    #[error("there is a slot `{0}` already")]
    LabelTaken(String),
    /// The label is not one.
    #[error("a slot's label is 1 to 64 of a-z A-Z 0-9 . _ - (its source at most 4096 bytes)")]
    BadLabel,
    /// Without this slot the node could not open the store.
    #[error(
        "the last usable slot cannot be removed: no other one opens by itself; add one first{}",
        list_if_any(.0)
    )]
    LastSlot(Vec<Trial>),
    /// There are 32.
    #[error("there are 32 slots, which is the most; remove one first")]
    TooManySlots,
    /// The slot's wrapper is needed and not at hand.
    #[error("{0}")]
    SlotUnavailable(Trial),
    /// The root cannot be wrapped, or the wrapping does not open.
    #[error("{slot}: {error}")]
    Wrap {
        /// The slot.
        slot: SlotSpec,
        /// What the wrapper says.
        error: RootError,
    },
    /// The store failed.
    #[error("{}", words(.0))]
    Store(#[from] Error),
}

impl From<ChangeError> for Error {
    fn from(error: ChangeError) -> Self {
        let text = error.to_string();
        match error {
            ChangeError::NoSuchSlot(_) => Self::NotFound,
            ChangeError::LabelTaken(_) => Self::State(Reason::AlreadyExists),
            ChangeError::LastSlot(_) => {
                // Why the others do not open is for the log.
                tracing::warn!(why = text, "a slot was not removed");
                Self::State(Reason::LastSlot)
            }
            ChangeError::BadLabel => Self::invalid("label", text),
            ChangeError::TooManySlots => Self::invalid("label", text),
            ChangeError::SlotUnavailable(_) | ChangeError::Wrap { .. } => {
                Self::invalid("slot", text)
            }
            ChangeError::Store(error) => error,
        }
    }
}

fn words(error: &Error) -> String {
    error.internal_text().map_or_else(|| error.to_string(), |text| format!("{error} ({text})"))
}
