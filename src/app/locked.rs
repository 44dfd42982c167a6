//! A node that is locked: nothing of its keys is in memory, nothing listens but its local socket.

use std::sync::Arc;

use polykey_hsm::recovery::{self, RecoveryKey, RecoveryWrapper, Share, ShareError};
use polykey_hsm::{KeyWrapper, LocalWrapper, PassphraseParams, SecretSource};
use zeroize::Zeroizing;

use super::door::With;
use super::{App, AppError, RecoveryFailure, Running, event};
use crate::config::Config;
use crate::custody::NamedWrapper;
use crate::hardening;
use crate::time::Clock;

/// Why the node is locked still, for whoever tried; no secrets.
#[derive(Debug)]
pub enum StillLocked {
    /// What was given is good, and more is needed.
    More(String),
    /// It is no good, or something else is in the way.
    No(String),
}

/// The state of a locked node.
pub struct Locked {
    config: Config,
    why: String,
    away: bool,
    shares: Vec<Share>,
}

impl std::fmt::Debug for Locked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Locked").field("shares", &self.shares.len()).finish_non_exhaustive()
    }
}

impl Locked {
    /// One that is locked for this reason.
    #[must_use]
    pub fn new(config: Config, why: impl Into<String>) -> Self {
        Self { config, why: why.into(), away: false, shares: Vec::new() }
    }

    /// One that a start has found locked.
    #[must_use]
    pub fn found(config: Config, error: &AppError) -> Self {
        Self { config, why: error.to_string(), away: error.is_away(), shares: Vec::new() }
    }

    /// Forgets the shares that were given.
    pub fn forget(&mut self) {
        self.shares.clear();
    }

    /// Whether it waits for something that does not answer, and not because somebody has locked it.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.away
    }

    /// What there is to know.
    #[must_use]
    pub fn status(&self) -> String {
        let mut text = format!("locked: {}", self.why);
        if let Some(share) = self.shares.first() {
            let (have, need) = (self.shares.len(), share.threshold());
            text.push_str(&format!("\n{have} of {need} shares have been given"));
        }
        text
    }

    /// Tries to unlock, and serves then.
    ///
    /// # Errors
    /// [`StillLocked`]: what was given opens nothing, or is not all yet, or something else is wrong.
    pub async fn unlock(&mut self, with: With, uid: u32) -> Result<Running, StillLocked> {
        let how = with.name();
        // It may have been mended since the start.
        if let Ok(now) = Config::load(&self.config.file) {
            if !hardening::fits(&self.config, &now) {
                return Err(StillLocked::No(format!("{}: restart it", AppError::NeedsRestart)));
            }
            let before = std::mem::replace(&mut self.config, now);
            self.config.listen.address = before.listen.address;
            if let (Some(now), Some(before)) = (&mut self.config.anchor, before.anchor) {
                now.tolerate = before.tolerate;
            }
        }
        let (given, recovery) = self.given(with).await?;
        let opened = App::open_given(self.config.clone(), Clock::System, given).await;
        let app = match opened {
            Ok(app) => app,
            // What the slots want instead is not the question.
            Err(error) if error.is_locked() && recovery.is_some() => {
                let public = recovery.unwrap_or_default();
                return Err(StillLocked::No(RecoveryFailure::OfNoSlot(public).to_string()));
            }
            Err(error) => {
                self.why = error.to_string();
                return Err(StillLocked::No(self.why.clone()));
            }
        };
        let mut event = event("UnlockNode", app.clock.now());
        event.details.insert("with".into(), how.into());
        event.details.insert("uid".into(), uid.to_string());
        let serving = match app.trail.record(event).await {
            Ok(_) => Box::pin(app.spawn()).await,
            Err(error) => {
                drop(app.close().await);
                Err(AppError::from(error))
            }
        };
        match serving {
            Ok(running) => Ok(running),
            Err(error) => {
                self.why = error.to_string();
                Err(StillLocked::No(self.why.clone()))
            }
        }
    }

    /// What was given, as a wrapper; the public half, if it is a recovery key.
    async fn given(
        &mut self,
        with: With,
    ) -> Result<(Vec<NamedWrapper>, Option<String>), StillLocked> {
        let mut public = None;
        let mut recovery = |wrapper: RecoveryWrapper| {
            public = Some(wrapper.public().to_string());
            Arc::new(wrapper)
        };
        let wrapper: Arc<dyn KeyWrapper> = match with {
            With::Configured => return Ok((Vec::new(), None)),
            With::Passphrase(words) => {
                let origin = SecretSource::Env("what was given".into());
                let params = PassphraseParams::default();
                let opened = LocalWrapper::of_passphrase(&origin, &words, params);
                Arc::new(opened.map_err(|_| {
                    StillLocked::No("a passphrase has at least 8 characters, in UTF-8".into())
                })?)
            }
            With::RecoveryKey(text) => {
                let key = RecoveryKey::parse(&utf8(&text)?);
                recovery(of(key.map_err(|error| StillLocked::No(error.to_string()))?)?)
            }
            With::Share(text) => {
                let share = Share::parse(&utf8(&text)?);
                let share = share.map_err(|error| StillLocked::No(error.to_string()))?;
                recovery(of(self.share(share)?)?)
            }
        };
        Ok((vec![NamedWrapper::given(wrapper)], public))
    }

    /// Keeps a share until there are enough.
    fn share(&mut self, share: Share) -> Result<RecoveryKey, StillLocked> {
        self.shares.push(share);
        match recovery::combine(&self.shares) {
            Ok(key) => {
                // Whatever becomes of it: they are the key, and not to be kept.
                self.shares.clear();
                Ok(key)
            }
            Err(ShareError::TooFew { needed, found }) => {
                // One given twice counts once.
                let mut numbers = Vec::new();
                self.shares.retain(|share| {
                    let new = !numbers.contains(&share.number());
                    numbers.push(share.number());
                    new
                });
                Err(StillLocked::More(format!("{found} of {needed} shares have been given")))
            }
            Err(error) => {
                // One of them is wrong, and nobody can tell which.
                self.shares.clear();
                Err(StillLocked::No(format!("{error}; all shares are needed again")))
            }
        }
    }
}

fn of(key: RecoveryKey) -> Result<RecoveryWrapper, StillLocked> {
    RecoveryWrapper::with(key).map_err(|error| StillLocked::No(error.to_string()))
}

fn utf8(bytes: &[u8]) -> Result<Zeroizing<String>, StillLocked> {
    let text =
        std::str::from_utf8(bytes).map_err(|_| StillLocked::No("not text in UTF-8".into()))?;
    Ok(Zeroizing::new(text.trim().to_owned()))
}
