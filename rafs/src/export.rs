//! One flat disk image: the bootstrap, then each blob in its decoded form at the block that the device table maps it to.
//! The kernel's EROFS driver mounts it with no daemon and no further device. Of a tar it has the content of files, each where
//! it is in the tar, and no headers; of an encrypted image the plain files, and no key.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::FromBytes;

use crate::blob_dir::BlobDirReader;
use crate::bootstrap::{Blob, Bootstrap};
use crate::expand::{ExpandError, write_blob};
use crate::layout::{BLOCK, BlobEntry, DEVICE_TABLE_OFFSET};

/// Blobs that nobody has mapped are put at multiples of this, as builders do.
const ALIGNMENT: u64 = 0x8_0000;
/// Where the mapped block stands in a device slot, and the size of one.
const MAPPED: u64 = 68;
const SLOT: u64 = 128;

/// Writes the disk image to an empty file, sparse where nothing is. `reader` must be that of the same bootstrap. Returns
/// its size in bytes.
///
/// Where the device table maps blobs over each other or not at all, it is written anew.
pub fn export_block(bootstrap: &Bootstrap, reader: &BlobDirReader, output: &File) -> Result<u64, ExpandError> {
    output.write_all_at(&without_keys(bootstrap)?, 0)?;
    let start = bootstrap.as_bytes().len() as u64;
    let block = bootstrap.block_size();
    let mapped = bootstrap.blobs().iter().map(|blob| u64::from(blob.mapped_block) * block).collect::<Vec<_>>();
    let places = if fits(start, bootstrap.blobs(), &mapped) { mapped } else { remap(start, bootstrap, output)? };
    let mut end = start;
    for (place, (blob, index)) in places.iter().zip(bootstrap.blobs().iter().zip(0..)) {
        write_blob(reader, index, output, *place)?;
        end = end.max(place + blob.decoded_size.next_multiple_of(block));
    }
    // A disk has whole blocks of the usual size.
    let end = end.next_multiple_of(BLOCK);
    output.set_len(end)?;
    Ok(end)
}

/// The bootstrap, saying nothing of encryption: the kernel does not look at it, and a key would open what lies in registries.
fn without_keys(bootstrap: &Bootstrap) -> io::Result<Vec<u8>> {
    let mut bytes = bootstrap.as_bytes().to_vec();
    if bootstrap.is_encrypted() {
        let start = bootstrap.super_blocks().blob_table_offset as usize;
        let unreadable = || io::Error::other("the bootstrap has no blob table");
        let table = bytes.get_mut(start..).ok_or_else(unreadable)?;
        let (entries, _) =
            <[BlobEntry]>::mut_from_prefix_with_elems(table, bootstrap.blobs().len()).map_err(|_| unreadable())?;
        entries.iter_mut().filter(|entry| entry.cipher.get() != 0).for_each(|entry| *entry = entry.plain());
    }
    Ok(bytes)
}

/// Whether every blob has room where it is mapped.
fn fits(start: u64, blobs: &[Blob], places: &[u64]) -> bool {
    let mut ranges: Vec<_> =
        places.iter().zip(blobs).map(|(place, blob)| (*place, place + blob.decoded_size)).collect();
    ranges.sort_unstable();
    ranges.iter().scan(start, |end, (first, last)| Some(*first >= std::mem::replace(end, *last))).all(|fits| fits)
}

fn remap(start: u64, bootstrap: &Bootstrap, output: &File) -> io::Result<Vec<u64>> {
    let (block, mut end) = (bootstrap.block_size(), start);
    let places = bootstrap.blobs().iter().zip(0..).map(|(blob, index)| {
        let place = end.next_multiple_of(ALIGNMENT);
        end = place + blob.decoded_size.next_multiple_of(block);
        let mapped = u32::try_from(place / block)
            .map_err(|_| io::Error::other("the blobs have more blocks than EROFS can count"))?;
        output.write_all_at(&mapped.to_le_bytes(), DEVICE_TABLE_OFFSET + SLOT * index + MAPPED)?;
        Ok(place)
    });
    places.collect()
}
