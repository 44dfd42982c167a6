//! A store that is opened, and what its anchor says of it.

use std::sync::Arc;

use polykey_proto::polykey::record::v1::AuditEvent;

use super::{AppError, event};
use crate::anchor::{self, Anchored, Keeper, Unanchored};
use crate::config::{Anchor, Config, Tolerate};
use crate::time::Clock;
use crate::vault::Vault;

/// Refuses to make a store where the node that is anchored has lost its own.
pub(super) fn founding(config: &Config) -> Result<(), AppError> {
    let Some(Anchor { file, tolerate }) = &config.anchor else { return Ok(()) };
    if *tolerate == Tolerate::Rollback {
        return Ok(());
    }
    let unreadable = |error: std::io::Error| {
        AppError::from(Unanchored::Unreadable { path: file.clone(), error: error.to_string() })
    };
    let Some(text) = anchor::read(file).map_err(unreadable)? else { return Ok(()) };
    let anchored = Anchored::claimed(&text).map(|it| data_encoding::HEXLOWER.encode(&it.node_id));
    let anchored = anchored.unwrap_or_else(|| "unknown".to_owned());
    Err(Unanchored::NoStore { path: file.clone(), anchored }.into())
}

/// Refuses a store for which its anchor does not vouch; what is accepted becomes an event.
async fn vouched(
    Anchor { file, tolerate }: &Anchor,
    vault: &Vault,
    clock: &Clock,
    backup: Option<u64>,
) -> Result<Option<AuditEvent>, AppError> {
    let Err(refused) = anchor::compare(file, vault).await? else { return Ok(None) };
    let refused = match backup {
        Some(revision) => refused.as_of(revision),
        None => refused,
    };
    match (tolerate, &refused) {
        (Tolerate::Rollback, _) | (Tolerate::Missing, Unanchored::Missing(_)) => {}
        _ => return Err(refused.into()),
    }
    tracing::warn!(%refused, "accepted, as asked");
    let mut event = event("AcceptRollback", clock.now());
    let mut detail = |name: &str, text: String| {
        event.details.insert(name.into(), text);
    };
    detail("why", refused.word().to_owned());
    if let Some((anchored, found)) = refused.places() {
        detail("anchored", anchored.to_string());
        detail("found", found.to_string());
    }
    Ok(Some(event))
}

/// Compares a store with its anchor before anything is written to it, and keeps the anchor from then on.
pub(super) async fn admit(
    config: &Config,
    vault: &Arc<Vault>,
    clock: &Clock,
    founded: bool,
) -> Result<Option<Arc<Keeper>>, AppError> {
    let Some(told) = &config.anchor else { return Ok(None) };
    let mut afresh = founded;
    if founded && anchor::read(&told.file).is_ok_and(|text| text.is_some()) {
        let mut event = event("AcceptRollback", clock.now());
        event.details.insert("why".into(), "no-store".into());
        vault.record([event]).await?;
    }
    if !founded && let Some(accepted) = vouched(told, vault, clock, None).await? {
        vault.record([accepted]).await?;
        afresh = true;
    }
    let keeper = Keeper::start(&told.file, vault).map_err(AppError::Process)?;
    let settled = keeper.settle().await;
    if afresh {
        // What was accepted once would have to be accepted at every start.
        settled?;
    }
    Ok(Some(keeper))
}

/// Refuses a backup of this revision that is older than the anchor of the configuration, or of another history. Where there
/// is no anchor, nothing is known, and one is made. What is accepted becomes an event.
pub(super) async fn restoring(
    config: &Config,
    vault: &Vault,
    clock: &Clock,
    revision: u64,
) -> Result<Option<AuditEvent>, AppError> {
    let Some(anchor) = &config.anchor else { return Ok(None) };
    match vouched(anchor, vault, clock, Some(revision)).await {
        Err(AppError::Anchor(refused)) if matches!(*refused, Unanchored::Missing(_)) => Ok(None),
        accepted => accepted,
    }
}

/// The anchor of a vault as it is, to be put in force when its store is.
pub(super) fn anew(
    config: &Config,
    vault: &Vault,
) -> Option<impl FnOnce() -> Result<(), AppError> + use<>> {
    let file = config.anchor.as_ref()?.file.clone();
    let text = Anchored::now(vault).encode(&vault.ring());
    Some(move || {
        anchor::replace(&file, &text).map_err(|source| AppError::Unwritable { path: file, source })
    })
}

/// For `polykey check`: what a start would find of the anchor, without the key that authenticates it.
pub(super) fn look(config: &Config) -> Result<String, AppError> {
    let Some(Anchor { file, .. }) = &config.anchor else {
        return Ok("none: an older copy of the store would be served".to_owned());
    };
    let unreadable = |error: std::io::Error| {
        AppError::from(Unanchored::Unreadable { path: file.clone(), error: error.to_string() })
    };
    let text = anchor::read(file).map_err(unreadable)?;
    // Of a database, only a start knows whether there is a store in it.
    let store = config.storage.database.is_none() && config.storage.path.exists();
    let said = match text {
        None if store => return Err(Unanchored::Missing(file.clone()).into()),
        None => format!("{} is made by `polykey init` or `polykey restore`", file.display()),
        Some(text) => {
            let Some(claimed) = Anchored::claimed(&text) else {
                let what = "it is malformed".to_owned();
                return Err(Unanchored::Damaged { path: file.clone(), what }.into());
            };
            let (at, revision) = (claimed.at, claimed.mark.revision);
            format!("{} stands at revision {revision}, written {at}", file.display())
        }
    };
    let parent = |path: &std::path::Path| {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        parent.unwrap_or(std::path::Path::new(".")).to_owned()
    };
    let directory = parent(file);
    rustix::fs::access(&directory, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
        .map_err(|error| AppError::Unwritable { path: file.clone(), source: error.into() })?;
    let device = |path: &std::path::Path| rustix::fs::stat(path).ok().map(|found| found.st_dev);
    let same =
        device(&directory).is_some_and(|it| device(&parent(&config.storage.path)) == Some(it));
    Ok(match same {
        true => format!(
            "{said}; on the file system of the store, so that whoever puts back all of it puts back both"
        ),
        false => said,
    })
}
