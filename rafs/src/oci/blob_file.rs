//! Blobs as files, in a layout folder or in any other.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    path::Path,
};

use shoal_proto::ObjectId;

use super::{
    BlobStream, RegistryError,
    layout::{copy_hashed, write_atomically},
};

/// The size of a file, or `None` when it is not there.
pub(super) fn size(path: &Path) -> Result<Option<u64>, RegistryError> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RegistryError::Io { what: format!("cannot look at {}", path.display()), source }),
    }
}

/// A whole file, verified at the end, or a range of it.
pub(super) async fn open(path: &Path, id: ObjectId, range: Option<Range<u64>>) -> Result<BlobStream, RegistryError> {
    let what = path.display().to_string();
    let size = size(path)?.ok_or_else(|| RegistryError::NotFound { what: what.clone() })?;
    match range {
        None => Ok(BlobStream::from_file(path, 0..size).await?.verified(id)),
        Some(range) if range.is_empty() => Ok(BlobStream::empty(what)),
        Some(range) if range.end <= size => BlobStream::from_file(path, range).await,
        Some(asked) => Err(RegistryError::WrongRange { what, asked, found: format!("a file of {size} bytes") }),
    }
}

/// Writes a copy of a file, which must have this digest, to a folder that is there.
pub(super) fn put(path: &Path, id: ObjectId, file: &Path) -> Result<(), RegistryError> {
    let mut found = None;
    let copied = File::open(file).and_then(|mut from| {
        write_atomically(path, |to| {
            let copied = copy_hashed(&mut from, to)?;
            found = Some(copied);
            if copied == id { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
        })
    });
    match (copied, found) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some(found)) if found != id => {
            let what = file.display().to_string();
            Err(RegistryError::WrongDigest { what, expected: id, found: format!("sha256:{found}") })
        }
        (Err(source), _) => {
            let what = format!("cannot copy {} to {}", file.display(), path.display());
            Err(RegistryError::Io { what, source })
        }
    }
}
