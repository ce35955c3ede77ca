//! Mount records: what a restarted daemon mounts again.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use shoal_proto::ObjectId;

use super::StoreError;
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
    /// Whatever else the owner needs to mount it again: opaque here.
    #[serde(default)]
    pub settings: serde_json::Value,
}

pub(super) fn put(records: &dyn Records, record: &MountRecord) -> Result<(), StoreError> {
    let value = serde_json::to_vec(record)
        .map_err(|source| StoreError::MountRecord { mountpoint: record.mountpoint.clone(), source })?;
    Ok(records.commit(&[Change::Mount(key(&record.mountpoint), value)], Survives::PowerCut)?)
}

pub(super) fn remove(records: &dyn Records, mountpoint: &Path) -> Result<(), StoreError> {
    Ok(records.commit(&[Change::DropMount(key(mountpoint))], Survives::PowerCut)?)
}

pub(super) fn list(records: &dyn Records) -> Result<Vec<MountRecord>, StoreError> {
    let stored = records.mounts()?.into_iter();
    Ok(stored.filter_map(|(key, value)| parse(OsString::from_vec(key).into(), &value)).collect())
}

fn key(mountpoint: &Path) -> Vec<u8> {
    mountpoint.as_os_str().as_bytes().to_vec()
}

fn parse(mountpoint: PathBuf, value: &[u8]) -> Option<MountRecord> {
    match serde_json::from_slice(value) {
        Ok(record) => Some(MountRecord { mountpoint, ..record }),
        Err(error) => {
            tracing::warn!(mountpoint = %mountpoint.display(), %error, "a mount record cannot be read");
            None
        }
    }
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
