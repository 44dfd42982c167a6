//! Records to sealed values and back.

use polykey_hsm::{RecordBinding, Sealer};
use polykey_storage::Space;

use super::space::{Record, clear_prefix};
use crate::error::Error;

fn binding<R: Record>(key: &[u8]) -> RecordBinding<'_> {
    RecordBinding { space: R::SPACE.0, kind: R::KIND, row_key: key }
}

/// The value of a row, bound to where it stands and to a counter of its own.
pub(crate) fn seal<R: Record>(
    sealer: &Sealer,
    record: &R,
    key: &[u8],
    counter: u64,
) -> Result<Vec<u8>, Error> {
    let plaintext = zeroize::Zeroizing::new(record.encode_to_vec());
    sealer
        .seal_record(&binding::<R>(key), counter, &plaintext)
        .map_err(|e| Error::internal(format!("sealing a {}: {e}", R::NAME)))
}

/// What was sealed, and its counter.
pub(crate) fn open<R: Record>(
    sealer: &Sealer,
    key: &[u8],
    value: &[u8],
) -> Result<(R, u64), Error> {
    let sealed = value.get(clear_prefix(R::SPACE)..).unwrap_or_default();
    let opened = sealer
        .open_record(&binding::<R>(key), sealed)
        .map_err(|e| Error::data_loss(format!("a {} failed to open: {e}", R::NAME)))?;
    let record = R::decode(opened.plaintext.as_slice())
        .map_err(|e| Error::data_loss(format!("a {} failed to decode: {e}", R::NAME)))?;
    Ok((record, opened.counter))
}

/// The counter in the header of a sealed value, without opening it.
pub(crate) fn counter_of(space: Space, value: &[u8]) -> Result<u64, String> {
    let sealed = value.get(clear_prefix(space)..).unwrap_or_default();
    polykey_hsm::header(sealed)
        .map(|header| header.counter)
        .map_err(|e| format!("a row of space {} has no valid header: {e}", space.0))
}

/// The epoch in the header of a sealed value, without opening it.
pub(crate) fn epoch_of(space: Space, value: &[u8]) -> Result<u32, Error> {
    let sealed = value.get(clear_prefix(space)..).unwrap_or_default();
    polykey_hsm::header(sealed).map(|header| header.epoch).map_err(|e| {
        Error::data_loss(format!("a row of space {} has no valid header: {e}", space.0))
    })
}

/// Whether the sealer holds the epoch of a sealed value. What has no header is known to be broken.
pub(crate) fn known(sealer: &Sealer, space: Space, value: &[u8]) -> bool {
    epoch_of(space, value).map_or(true, |epoch| sealer.holds(epoch))
}
