//! Mount records: what a restarted daemon mounts again; pins: what it goes on to keep; and what bootstrap layers unpack to,
//! so that this is done once.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shoal_proto::ObjectId;

use super::{Footprint, StoreError};
use crate::index::{Change, Records, Survives};

/// A mount that shall be there again after a restart. One per mountpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MountRecord {
    /// The reference that the user gave.
    pub reference: String,
    /// Where it is mounted. It is the record's key, since JSON could not hold every path.
    #[serde(skip)]
    pub mountpoint: PathBuf,
    /// The manifest that the reference meant when it was mounted.
    #[serde(with = "object_id")]
    pub manifest: ObjectId,
    /// What it needs of the store, so that this is kept while the image is not loaded yet.
    #[serde(default)]
    pub needs: Footprint,
    /// Whatever else the owner needs to mount it again: opaque here.
    #[serde(default)]
    pub settings: serde_json::Value,
}

/// An image that shall be kept whether it is mounted or not. One per reference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinRecord {
    /// The reference that the user gave. It is the record's key.
    #[serde(skip)]
    pub reference: String,
    /// The manifest that the reference meant when it was pinned.
    #[serde(with = "object_id")]
    pub manifest: ObjectId,
    /// What is kept.
    pub needs: Footprint,
    /// When the pin ends, in seconds since 1970; none for never.
    #[serde(default)]
    pub until: Option<u64>,
}

/// What is in a bootstrap layer that was unpacked and verified, as objects of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The sha256 of its tar.
    #[serde(with = "object_id")]
    pub diff_id: ObjectId,
    /// The bootstrap, of which everything was verified.
    #[serde(with = "object_id")]
    pub bootstrap: ObjectId,
    /// Its BLAKE3, in hexadecimal.
    pub bootstrap_hash: String,
    /// Bytes of the bootstrap.
    pub bootstrap_bytes: u64,
    /// The chunk tables that it has copies of and that are needed: id of the blob, object.
    pub chunk_tables: Vec<(String, String)>,
    /// Where it says that its blobs are, if not in the registry.
    pub backend: Option<String>,
}

pub(super) fn put_layer(records: &dyn Records, layer: ObjectId, record: &LayerRecord) -> Result<(), StoreError> {
    let value = to_json(record, || format!("layer {layer}"))?;
    Ok(records.commit(&[Change::Layer(layer, value)], Survives::Kill)?)
}

pub(super) fn layer(records: &dyn Records, layer: ObjectId) -> Result<Option<LayerRecord>, StoreError> {
    Ok(records.layer(layer)?.and_then(|value| from_json(&value, || format!("layer {layer}"))))
}

pub(super) fn put(records: &dyn Records, record: &MountRecord) -> Result<(), StoreError> {
    let value = to_json(record, || format!("the mount at {}", record.mountpoint.display()))?;
    Ok(records.commit(&[Change::Mount(key(&record.mountpoint), value)], Survives::PowerCut)?)
}

pub(super) fn remove(records: &dyn Records, mountpoint: &Path) -> Result<(), StoreError> {
    Ok(records.commit(&[Change::DropMount(key(mountpoint))], Survives::PowerCut)?)
}

pub(super) fn list(records: &dyn Records) -> Result<Vec<MountRecord>, StoreError> {
    let stored = records.mounts()?.into_iter();
    let read = |(key, value): (Vec<u8>, Vec<u8>)| {
        let mountpoint = PathBuf::from(OsString::from_vec(key));
        let record: MountRecord = from_json(&value, || format!("the mount at {}", mountpoint.display()))?;
        Some(MountRecord { mountpoint, ..record })
    };
    Ok(stored.filter_map(read).collect())
}

pub(super) fn put_pin(records: &dyn Records, record: &PinRecord) -> Result<(), StoreError> {
    let value = to_json(record, || format!("the pin of {}", record.reference))?;
    Ok(records.commit(&[Change::Pin(record.reference.clone().into_bytes(), value)], Survives::PowerCut)?)
}

pub(super) fn remove_pin(records: &dyn Records, reference: &str) -> Result<(), StoreError> {
    Ok(records.commit(&[Change::DropPin(reference.as_bytes().to_vec())], Survives::PowerCut)?)
}

pub(super) fn list_pins(records: &dyn Records) -> Result<Vec<PinRecord>, StoreError> {
    let stored = records.pins()?.into_iter();
    let read = |(key, value): (Vec<u8>, Vec<u8>)| {
        let reference = String::from_utf8_lossy(&key).into_owned();
        let record: PinRecord = from_json(&value, || format!("the pin of {reference}"))?;
        Some(PinRecord { reference, ..record })
    };
    Ok(stored.filter_map(read).collect())
}

fn key(mountpoint: &Path) -> Vec<u8> {
    mountpoint.as_os_str().as_bytes().to_vec()
}

fn to_json(record: &impl Serialize, what: impl Fn() -> String) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|source| StoreError::Record { what: what(), source })
}

/// A record that a program of another version wrote may be unreadable: it is left out, and logged.
fn from_json<T: DeserializeOwned>(value: &[u8], what: impl Fn() -> String) -> Option<T> {
    serde_json::from_slice(value)
        .inspect_err(|error| tracing::warn!("the record of {} cannot be read: {error}", what()))
        .ok()
}

mod object_id {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use shoal_proto::ObjectId;

    pub(super) fn serialize<S: Serializer>(id: &ObjectId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
