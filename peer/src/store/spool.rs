//! Bytes on their way: what is not verified yet, and therefore not in the store, but takes up its room.
//!
//! The file has no name, so nothing can find what is in it, and nothing of it outlives the process. What has been taken out of
//! it gives its room back at once: a blob that moves from here into the store does not need twice the room.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use rustix::fs::FallocateFlags;
use shoal_proto::BlobId;

use super::{StoreError, blobs::Blobs, holdings::Holding};
use crate::index::BlobKey;

/// See the module. It takes up the room that it was opened with until what is in it was taken out, or it is dropped.
pub struct Spool {
    file: File,
    blobs: Arc<Blobs>,
    reserved: u64,
}

impl std::fmt::Debug for Spool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spool").field("reserved", &self.reserved).finish_non_exhaustive()
    }
}

impl Spool {
    pub(super) fn open(blobs: Arc<Blobs>, data_dir: &Path, len: u64) -> Result<Self, StoreError> {
        let opening = |source| StoreError::io("making a file for what is on its way", source);
        let file = tempfile::tempfile_in(data_dir).map_err(opening)?;
        // It is for nothing that is kept already.
        let nothing = Holding::Blob(BlobKey { blob: BlobId::new([0; 32]), variant: u32::MAX });
        let reserved = blobs.make_room(len, nothing)?.hand_over();
        Ok(Self { file, blobs, reserved })
    }

    /// The file, to be written to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Reads a range; it stays.
    pub fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes.into())
    }

    /// Gives the room of a range back that has been read for the last time.
    pub fn release(&mut self, range: Range<u64>) {
        let length = (range.end - range.start).min(self.reserved);
        let holes = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A file system without holes has the room back when the file goes.
        if rustix::fs::fallocate(&self.file, holes, range.start, range.end - range.start).is_ok() {
            self.reserved -= length;
            self.blobs.reserved.fetch_sub(length, Ordering::SeqCst);
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.blobs.reserved.fetch_sub(self.reserved, Ordering::SeqCst);
    }
}
