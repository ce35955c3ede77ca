//! Device table, blob table and prefetch table.

use std::collections::BTreeSet;

use shoal_proto::{Algorithm, BlobId};

use super::error::At;
use super::image::Source;
use super::superblock::Header;
use super::{Blob, BootstrapError, ChunkTableRange, MetaBlob, Nid, Origin, OwnBlob, TocRange};
use crate::blob;
use crate::cipher::Cipher;
use crate::codec::Compressor;
use crate::layout::{self, BlobEntry, DeviceSlot, features};

/// All blobs in the order of the table.
pub(super) fn blobs(source: &Source, header: &Header, origin: Origin) -> Result<Vec<Blob>, BootstrapError> {
    let count = (header.device_table.end - header.device_table.start) / 128;
    let mut ids = BTreeSet::new();
    let mut blobs = Vec::new();
    for index in 0..count {
        let device_at = At::new("device slot", header.device_table.start + 128 * index);
        let device: &DeviceSlot = source.view(device_at)?;
        let at = At::new("blob entry", header.blob_table.start + 256 * index);
        let entry: &BlobEntry = source.view(at)?;
        let blob = blob_of(at, entry, device, header.chunk_size, origin)?;
        at.require(u64::from(entry.index.get()) == index, || format!("index {} at position {index}", entry.index))?;
        at.require(ids.insert(blob.id), || format!("blob {} is listed twice", blob.id))?;
        device_at.require(device.blob_id == entry.blob_id, || "another blob id than in the blob table".into())?;
        at.require(blob.is_tar() == header.is_tarfs(), || {
            format!("feature bits {:#x} in an image with blocks of {} bytes", blob.features, header.block)
        })?;
        let blocks = u64::from(device.blocks.get());
        // Of a tar that ends within a block, upstream's builder counts whole ones.
        let fits = blocks == blob.decoded_size.div_ceil(header.block)
            || blob.is_tar() && blocks == blob.decoded_size / header.block;
        device_at
            .require(blocks != 0 && fits, || format!("{blocks} blocks for {} decoded bytes", blob.decoded_size))?;
        blobs.push(blob);
    }
    Ok(blobs)
}

fn blob_of(
    at: At,
    entry: &BlobEntry,
    device: &DeviceSlot,
    chunk_size: u32,
    origin: Origin,
) -> Result<Blob, BootstrapError> {
    let OwnBlob { id, encoded_size: stored_size, toc } = stored_file(at, entry, origin)?;
    check_features(at, entry, origin)?;
    at.require(entry.chunk_size.get() == chunk_size, || {
        format!("chunk size {:#x}, in the super block {chunk_size:#x}", entry.chunk_size)
    })?;
    let (encoded_size, decoded_size) = (entry.encoded_size.get(), entry.decoded_size.get());
    at.require(entry.chunk_count.get() <= layout::MAX_CHUNKS + 1, || format!("{} chunks", entry.chunk_count))?;
    at.require(encoded_size <= stored_size, || format!("{encoded_size} bytes of a blob that has {stored_size}"))?;
    at.require(stored_size <= layout::MAX_ENCODED, || format!("stored size {stored_size}"))?;
    at.require(decoded_size <= layout::MAX_DECODED, || format!("decoded size {decoded_size}"))?;
    let compressor =
        |code: u32| Compressor::from_code(code).ok_or_else(|| at.invalid(format!("unknown compressor {code}")));
    let algorithm = match entry.digester.get() {
        0 => Algorithm::Blake3,
        1 => Algorithm::Sha256,
        other => return Err(at.invalid(format!("unknown digest algorithm {other}"))),
    };
    let chunk_table = ChunkTableRange {
        offset: entry.ci_offset.get(),
        encoded_size: entry.ci_encoded_size.get(),
        decoded_size: entry.ci_decoded_size.get(),
        compressor: compressor(entry.ci_compressor.get())?,
    };
    let bits = entry.features.get();
    let tar = bits & features::TARFS != 0;
    at.require(!tar || entry.compressor.get() == 0 && encoded_size == decoded_size, || {
        format!("a tar of {encoded_size} bytes, {decoded_size} decoded, with compressor {}", entry.compressor)
    })?;
    if origin != Origin::V5 && !tar {
        check_chunk_table(at, &chunk_table, entry)?;
    }
    let tar_header = if bits & features::HAS_TAR_HEADER != 0 { 512 } else { 0 };
    let own_table = bits & features::CAP_TAR_TOC != 0 && bits & features::SEPARATE == 0 && !tar;
    let data_end = if own_table && entry.chunk_count.get() > 0 {
        chunk_table.offset.checked_sub(tar_header)
    } else {
        Some(encoded_size)
    };
    Ok(Blob {
        id,
        encoded_size: stored_size,
        decoded_size,
        chunk_count: entry.chunk_count.get(),
        compressor: compressor(entry.compressor.get())?,
        algorithm,
        data_end: data_end.ok_or_else(|| at.invalid("its chunk table starts inside the first tar header"))?,
        chunk_table,
        features: bits,
        mapped_block: device.mapped_block.get(),
        toc,
        meta: (bits & features::SEPARATE != 0 && entry.meta_digest != [0; 32])
            .then(|| MetaBlob { id: BlobId::new(entry.meta_digest), size: entry.meta_size.get() }),
        cipher: cipher(at, entry)?,
    })
}

/// What is known of the stored file. The bootstrap says it of every blob but the one that it lies in.
fn stored_file(at: At, entry: &BlobEntry, origin: Origin) -> Result<OwnBlob, BootstrapError> {
    if entry.blob_id == layout::OWN_BLOB {
        return match origin {
            Origin::Blob(own) => Ok(own),
            Origin::Extracted(id) => Ok(OwnBlob { id, encoded_size: entry.encoded_size.get(), toc: None }),
            Origin::File | Origin::V5 => {
                Err(at.invalid("it names the blob that the bootstrap lies in, but it was not read from a blob"))
            }
        };
    }
    let toc = TocRange { size: entry.toc_size.get(), sha256: entry.toc_digest };
    Ok(OwnBlob {
        id: blob_id(at, &entry.blob_id)?,
        encoded_size: entry.encoded_size.get(),
        toc: (toc.size > 0).then_some(toc),
    })
}

fn blob_id(at: At, text: &[u8; 64]) -> Result<BlobId, BootstrapError> {
    let parsed = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| at.invalid(format!("blob id {:?}", String::from_utf8_lossy(text))))
}

/// What a blob is encrypted with. Its feature bits and its cipher must say the same of it.
fn cipher(at: At, entry: &BlobEntry) -> Result<Option<Cipher>, BootstrapError> {
    let (bits, cipher) = (entry.features.get(), entry.cipher.get());
    let encrypted = bits & features::ENCRYPTED != 0;
    at.require(cipher == if encrypted { layout::AES_128_XTS } else { 0 }, || {
        format!("cipher {cipher} with feature bits {bits:#x}")
    })?;
    let key = encrypted.then(|| entry.cipher_key()).transpose();
    Ok(key.map_err(|weak| at.invalid(weak.to_string()))?.map(Cipher::new))
}

fn check_features(at: At, entry: &BlobEntry, origin: Origin) -> Result<(), BootstrapError> {
    let bits = entry.features.get();
    at.require(bits & 0xFFFF & !features::KNOWN_INCOMPAT == 0, || format!("unknown feature bits in {bits:#x}"))?;
    at.require(bits & features::INTERNAL == 0 || origin == Origin::V5, || {
        format!("feature bits {bits:#x} have an internal one set")
    })?;
    if bits & features::EXTERNAL != 0 {
        return Err(at.unsupported("an external backend"));
    }
    let zran = bits & features::ZRAN != 0;
    if bits & features::SEPARATE != 0 && !zran {
        return Err(at.unsupported("chunks of an uncompressed layer"));
    }
    at.require(
        !zran || bits & features::SEPARATE != 0 && bits & (features::BATCH | features::ENCRYPTED) == 0,
        || format!("feature bits {bits:#x}: a gzip layer whose chunk table is in it, or with batches, or encrypted"),
    )?;
    if bits & features::TARFS != 0 {
        let only = features::TARFS | features::CAP_TAR_TOC;
        return at.require(bits == only, || format!("feature bits {bits:#x} of a tar, which has {only:#x}"));
    }
    at.require(bits & features::ALIGNED != 0, || "its chunks are not aligned".into())
}

fn check_chunk_table(at: At, table: &ChunkTableRange, entry: &BlobEntry) -> Result<(), BootstrapError> {
    let (chunks, bits) = (entry.chunk_count.get(), entry.features.get());
    let marked = bits & (features::BATCH | features::ZRAN | features::ENCRYPTED) != 0;
    at.require(!marked || bits & features::CHUNK_INFO_V2 != 0, || {
        format!("feature bits {bits:#x}: batches or encryption without the chunk table that can say so")
    })?;
    at.require(blob::size_fits(table.decoded_size, chunks, bits), || {
        format!("a chunk table of {} bytes for {chunks} chunks, feature bits {bits:#x}", table.decoded_size)
    })?;
    at.require(table.encoded_size <= table.decoded_size, || {
        format!("a chunk table of {} bytes that decodes to {}", table.encoded_size, table.decoded_size)
    })?;
    let end = table.offset.checked_add(table.encoded_size + layout::CI_HEADER);
    let size = match bits & features::SEPARATE {
        0 => entry.encoded_size.get(),
        // Unknown for what lies in one file with the bootstrap.
        _ if entry.meta_size.get() == 0 => layout::MAX_ENCODED,
        _ => entry.meta_size.get(),
    };
    at.require(chunks == 0 || end.is_some_and(|end| end <= size), || {
        format!("its chunk table at {} ends behind the file of {size} bytes", table.offset)
    })
}

/// The prefetch table, in order; each must be in the tree.
pub(super) fn prefetch(
    source: &Source,
    header: &Header,
    reached: impl Fn(Nid) -> bool,
) -> Result<Vec<Nid>, BootstrapError> {
    let at = At::new("prefetch table", header.prefetch_table.start);
    let table = source.slice(at, header.prefetch_table.end - header.prefetch_table.start)?;
    let nids = table.chunks_exact(4).map(|nid| {
        let nid = Nid(u64::from(u32::from_le_bytes([nid[0], nid[1], nid[2], nid[3]])));
        at.require(reached(nid), || format!("inode {nid} is not in the tree")).map(|()| nid)
    });
    nids.collect()
}
