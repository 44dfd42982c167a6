//! The disk under the store: changes are refused before it is full, and what must be recorded before a
//! commit would fail in the middle.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::App;
use crate::health::State;
use crate::vault::{Room, Vault};

/// How often the disk is asked.
const LOOK: Duration = Duration::from_millis(250);
/// The part of the reserve that is never used: what a commit takes for a moment.
const LAST: u64 = 4;

/// What health says of it.
pub(super) fn state(vault: &Vault) -> State {
    match vault.room() {
        Room::Enough => State::Serving,
        Room::Short => State::Degraded(
            "the disk of the store has less room than [storage] reserve_mib: changes are refused, \
             but for what revokes, disables or deletes"
                .into(),
        ),
        Room::None => State::NotServing(
            "the disk of the store is full: nothing that must be recorded is done",
        ),
    }
}

/// How much room there is with so many bytes free. Once it was short it takes an eighth more than the reserve to
/// be enough, so that it does not swing.
fn room(free: u64, reserve: u64, before: Room) -> Room {
    let enough = match before {
        Room::Enough => reserve,
        Room::Short | Room::None => reserve.saturating_add(reserve / 8),
    };
    if free >= enough {
        Room::Enough
    } else if free >= reserve / LAST {
        Room::Short
    } else {
        Room::None
    }
}

fn free(directory: &Path) -> std::io::Result<u64> {
    let there = rustix::fs::statvfs(directory)?;
    Ok(there.f_bavail.saturating_mul(there.f_frsize))
}

/// Looks at the disk for ever. A store in a database has none here.
pub(super) async fn watch(app: Arc<App>) {
    let storage = &app.config.storage;
    let reserve = storage.reserve_mib.saturating_mul(1024 * 1024);
    if storage.database.is_some() || reserve == 0 {
        return std::future::pending().await;
    }
    let directory = storage.path.parent().filter(|path| !path.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new(".")).to_owned();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let asked = directory.clone();
        let Ok(Ok(free)) = tokio::task::spawn_blocking(move || free(&asked)).await else {
            // What cannot be asked says so when it is written to.
            continue;
        };
        let before = app.vault.room();
        let now = room(free, reserve, before);
        if now != before {
            app.vault.set_room(now);
            app.health.refresh();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_gets_short_at_the_reserve_and_enough_again_beyond_it() {
        use Room::{Enough, None, Short};
        for (free, before, now) in [
            (1_000, Enough, Enough),
            (999, Enough, Short),
            (1_124, Short, Short),
            (1_125, Short, Enough),
            (250, Short, Short),
            (249, Short, None),
            (0, Enough, None),
            (250, None, Short),
            (1_125, None, Enough),
        ] {
            assert_eq!(room(free, 1_000, before), now, "{free} after {before:?}");
        }
    }
}
