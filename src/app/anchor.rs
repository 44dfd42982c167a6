//! A store that is opened, and what its anchor says of it.

use std::sync::Arc;

use polykey_proto::polykey::record::v1::AuditEvent;

use super::{AppError, event, replication};
use crate::anchor::{self, Anchored, Keeper, Medium, Unanchored};
use crate::config::{Anchor, AnchorPlace, Config, Tolerate};
use crate::custody::{NamedWrapper, section};
use crate::time::Clock;
use crate::vault::Vault;

/// What the anchor is kept on. The token is that of its wrapper, so that one process speaks to it.
pub(super) async fn medium(
    config: &Config,
    anchor: &Anchor,
    wrappers: &[NamedWrapper],
) -> Result<Medium, AppError> {
    let (wrapper, label) = match &anchor.place {
        AnchorPlace::File(file) => return Ok(Medium::File(file.clone())),
        AnchorPlace::Target => return Ok(Medium::Target(replication::notes(config).await?)),
        AnchorPlace::Token { wrapper, label } => (wrapper, label),
    };
    let named = wrappers.iter().find(|named| named.name == *wrapper);
    let Some(token) = named.and_then(|named| named.token.clone()) else {
        let medium = format!("`{label}` in the token of {}", section(wrapper)).into();
        let error = "the wrapper cannot be opened".to_owned();
        return Err(Unanchored::Unusable { medium, what: "read", error, away: true }.into());
    };
    Ok(Medium::Token { wrapper: wrapper.clone(), label: label.clone(), token })
}

/// Refuses to make a store where the node that is anchored has lost its own.
pub(super) async fn founding(config: &Config, wrappers: &[NamedWrapper]) -> Result<(), AppError> {
    let Some(anchor) = &config.anchor else { return Ok(()) };
    if anchor.tolerate == Tolerate::Rollback {
        return Ok(());
    }
    let medium = medium(config, anchor, wrappers).await?;
    let text = medium.read().map_err(|error| Unanchored::unreadable(&medium, &error))?;
    let Some(text) = text else { return Ok(()) };
    let anchored = Anchored::claimed(&text).map(|it| data_encoding::HEXLOWER.encode(&it.node_id));
    let anchored = anchored.unwrap_or_else(|| "unknown".to_owned());
    Err(Unanchored::NoStore { medium: medium.to_string().into(), anchored }.into())
}

/// Refuses a store for which its anchor does not vouch; what is accepted becomes an event.
async fn vouched(
    (medium, tolerate): (&Medium, Tolerate),
    vault: &Vault,
    clock: &Clock,
    backup: Option<u64>,
) -> Result<Option<AuditEvent>, AppError> {
    let Err(refused) = anchor::compare(medium, vault).await? else { return Ok(None) };
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
    wrappers: &[NamedWrapper],
    vault: &Arc<Vault>,
    clock: &Clock,
    founded: bool,
) -> Result<Option<Arc<Keeper>>, AppError> {
    let Some(told) = &config.anchor else { return Ok(None) };
    let medium = medium(config, told, wrappers).await?;
    let mut afresh = founded;
    if founded && medium.read().is_ok_and(|text| text.is_some()) {
        let mut event = event("AcceptRollback", clock.now());
        event.details.insert("why".into(), "no-store".into());
        vault.record([event]).await?;
    }
    if !founded
        && let Some(accepted) = vouched((&medium, told.tolerate), vault, clock, None).await?
    {
        vault.record([accepted]).await?;
        afresh = true;
    }
    let keeper = Keeper::start(medium, vault).map_err(AppError::Process)?;
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
    wrappers: &[NamedWrapper],
    vault: &Vault,
    clock: &Clock,
    revision: u64,
) -> Result<Option<AuditEvent>, AppError> {
    let Some(anchor) = &config.anchor else { return Ok(None) };
    let told = (&medium(config, anchor, wrappers).await?, anchor.tolerate);
    match vouched(told, vault, clock, Some(revision)).await {
        Err(AppError::Anchor(refused)) if matches!(*refused, Unanchored::Missing(_)) => Ok(None),
        accepted => accepted,
    }
}

/// The anchor of a vault as it is, to be put in force when its store is.
pub(super) async fn anew(
    config: &Config,
    wrappers: &[NamedWrapper],
    vault: &Vault,
) -> Result<Option<impl FnOnce() -> Result<(), AppError> + use<>>, AppError> {
    let Some(anchor) = &config.anchor else { return Ok(None) };
    let medium = medium(config, anchor, wrappers).await?;
    let text = Anchored::now(vault).encode(&vault.ring());
    Ok(Some(move || {
        medium.replace(&text).map_err(|error| Unanchored::unwritable(&medium, &error).into())
    }))
}

/// For `polykey check`: what a start would find of the anchor, without the key that authenticates it.
pub(super) fn look(config: &Config) -> Result<String, AppError> {
    let file = match config.anchor.as_ref().map(|anchor| &anchor.place) {
        None => return Ok("none: an older copy of the store would be served".to_owned()),
        Some(AnchorPlace::Target) => {
            return Ok(
                "beside the replica in the target of [replication], which a start reads".into()
            );
        }
        Some(AnchorPlace::Token { wrapper, label }) => {
            let section = section(wrapper);
            return Ok(format!("`{label}` in the token of {section}, which a start reads"));
        }
        Some(AnchorPlace::File(file)) => file,
    };
    let medium = Medium::File(file.clone());
    let at = || medium.to_string().into();
    let text = medium.read().map_err(|error| Unanchored::unreadable(&medium, &error))?;
    // Of a database, only a start knows whether there is a store in it.
    let store = config.storage.database.is_none() && config.storage.path.exists();
    let said = match text {
        None if store => return Err(Unanchored::Missing(at()).into()),
        None => format!("{} is made by `polykey init` or `polykey restore`", file.display()),
        Some(text) => {
            let Some(claimed) = Anchored::claimed(&text) else {
                let what = "it is malformed".to_owned();
                return Err(Unanchored::Damaged { medium: at(), what }.into());
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
