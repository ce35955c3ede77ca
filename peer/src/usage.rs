//! What people are told of a store: of a running daemon's, and of one that nobody runs on.

use shoal_proto::control::{BlobUsage, PinStatus, StoreStatus, StoreUsageReply};

use crate::store::{PinRecord, Store, StoreError};

/// How full a store is.
///
/// # Errors
/// The index fails.
pub(crate) fn status(store: &Store) -> Result<StoreStatus, StoreError> {
    let usage = store.usage()?;
    Ok(StoreStatus {
        blobs: usage.blobs,
        pieces: usage.pieces,
        bytes: usage.bytes,
        objects: usage.objects,
        disk_bytes: usage.disk_bytes,
        limit_bytes: store.limits().max_bytes,
    })
}

/// How full a store is, and with what.
///
/// # Errors
/// The index fails.
pub(crate) fn report(store: &Store) -> Result<StoreUsageReply, StoreError> {
    let mut blobs = store.kept_blobs();
    blobs.sort_by_key(|kept| std::cmp::Reverse(kept.last_use));
    let blobs = blobs.into_iter().map(|kept| BlobUsage {
        blob: format!("sha256:{}", kept.key.blob),
        variant: kept.key.variant,
        disk_bytes: kept.disk_bytes,
        last_use: kept.last_use,
        held: kept.held,
    });
    let pins = store.pins()?.into_iter().map(|pin: PinRecord| PinStatus {
        reference: pin.reference,
        manifest: format!("sha256:{}", pin.manifest),
        until: pin.until.unwrap_or(0),
    });
    Ok(StoreUsageReply { store: Some(status(store)?), blobs: blobs.collect(), pins: pins.collect() })
}
