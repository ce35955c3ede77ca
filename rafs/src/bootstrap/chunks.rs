//! The chunk table of the bootstrap: which chunks of which blob the image names.
//!
//! Records stay where they are in the file. What is added is an order: for each blob, its records by chunk index. Where blobs
//! are tars, upstream's builder states no digests, and a table that means nothing; records are then made of what files say of
//! their chunks, without digests.

use bytes::Bytes;
use shoal_proto::Digest;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::error::At;
use super::image::slice;
use super::superblock::Header;
use super::{Blob, BootstrapError, ChunkRef};
use crate::layout::{ChunkRecord, chunk_flags};
use crate::piece::{Chunk, Named};

/// The verified table.
#[derive(Debug)]
pub(super) struct Chunks {
    table: Bytes,
    /// Per blob: positions in the table, by chunk index. Dense when the image names every chunk of the blob.
    orders: Vec<Vec<u32>>,
    /// Whether records have digests.
    digests: bool,
}

/// A chunk as an index of a file describes it, and where that index lies.
pub(super) type Indexed = (At, ChunkRef);

impl Chunks {
    /// Checks every record by itself, and that the chunks of a blob have different indexes and places.
    pub(super) fn read(table: Bytes, header: &Header, blobs: &[Blob]) -> Result<Self, BootstrapError> {
        let mut chunks = Self { table, orders: blobs.iter().map(|_| Vec::new()).collect(), digests: true };
        if header.is_tarfs() && !blobs.is_empty() && !chunks.has_all_digests() {
            return Ok(Self { digests: false, table: Bytes::new(), ..chunks });
        }
        for number in 0..(chunks.table.len() / size_of::<ChunkRecord>()) as u32 {
            let at = chunks.at(header, number);
            let record = chunks.record(number).ok_or_else(|| at.invalid("it lies behind the table"))?;
            let position = record.blob.get() as usize;
            let blob = blobs.get(position);
            let blob = blob.ok_or_else(|| at.invalid(format!("blob {position} of {}", blobs.len())))?;
            check_record(at, record, blob, header)?;
            chunks.orders[position].push(number);
        }
        for (blob, position) in blobs.iter().zip(0..) {
            chunks.sort(header, blob, position)?;
        }
        Ok(chunks)
    }

    /// The part of the file that holds the records.
    pub(super) fn table(bytes: &Bytes, header: &Header) -> Result<Bytes, BootstrapError> {
        let range = &header.chunk_table;
        let place = At::new("chunk table", range.start);
        Ok(bytes.slice_ref(slice(bytes, place, range.end - range.start)?))
    }

    /// Records without digests of what files say of their chunks, which lie in `blobs`.
    pub(super) fn of_files(header: &Header, blobs: &[Blob], found: Vec<Indexed>) -> Result<Self, BootstrapError> {
        let mut records: Vec<ChunkRecord> = Vec::with_capacity(found.len());
        let mut orders: Vec<_> = blobs.iter().map(|_| Vec::new()).collect();
        let mut indexed = found;
        indexed.sort_unstable_by_key(|(at, chunk)| (chunk.id, chunk.decoded_offset, chunk.decoded_len, at.offset));
        // Several files may have it.
        indexed.dedup_by_key(|(_, chunk)| *chunk);
        for ((at, chunk), number) in indexed.into_iter().zip(0u32..) {
            // Whoever found it has looked for its blob.
            let position = chunk.id.blob as usize;
            if let Some(before) = records.last().filter(|before| before.blob.get() == chunk.id.blob) {
                let (index, blob) = (chunk.id.index, blobs[position].id);
                at.require(index > before.index.get(), || {
                    format!("chunk {index} of blob {blob} is described twice")
                })?;
                let end = before.decoded_offset.get() + u64::from(before.decoded_size.get());
                at.require(chunk.decoded_offset >= end, || {
                    format!("the decoded range of chunk {index} overlaps that of an earlier chunk")
                })?;
            }
            let record = ChunkRecord {
                blob: chunk.id.blob.into(),
                encoded_size: chunk.decoded_len.into(),
                decoded_size: chunk.decoded_len.into(),
                encoded_offset: chunk.decoded_offset.into(),
                decoded_offset: chunk.decoded_offset.into(),
                index: chunk.id.index.into(),
                ..ChunkRecord::new_zeroed()
            };
            check_record(at, &record, &blobs[position], header)?;
            records.push(record);
            orders[position].push(number);
        }
        let table = Bytes::copy_from_slice(records.as_slice().as_bytes());
        Ok(Self { table, orders, digests: false })
    }

    /// Whether records have digests.
    pub(super) fn have_digests(&self) -> bool {
        self.digests
    }

    /// Whether the table is one, and not what stands in its place.
    fn has_all_digests(&self) -> bool {
        !self.table.is_empty() && self.records().all(|record| record.digest != [0; 32])
    }

    fn sort(&mut self, header: &Header, blob: &Blob, position: usize) -> Result<(), BootstrapError> {
        let mut order = std::mem::take(&mut self.orders[position]);
        order.sort_unstable_by_key(|number| self.record(*number).map(|record| record.index.get()));
        order.shrink_to_fit();
        let (mut index, mut decoded) = (0, 0);
        for &number in &order {
            let at = self.at(header, number);
            let Some(record) = self.record(number) else { continue };
            let chunk = named(record, blob).chunk;
            at.require(chunk.index >= index, || {
                format!("chunk {} of blob {} is described twice", chunk.index, blob.id)
            })?;
            at.require(chunk.decoded_offset >= decoded, || {
                format!("the decoded range of chunk {} overlaps that of an earlier chunk", chunk.index)
            })?;
            index = chunk.index + 1;
            decoded = chunk.decoded_offset + u64::from(chunk.decoded_len);
        }
        self.orders[position] = order;
        Ok(())
    }

    /// The chunks of a blob by index. `position` is that of the blob.
    pub(super) fn of<'a>(&'a self, position: usize, blob: &'a Blob) -> impl Iterator<Item = Named> + 'a {
        let order = self.orders.get(position).map_or(&[][..], Vec::as_slice);
        order.iter().filter_map(|number| self.record(*number)).map(|record| named(record, blob))
    }

    /// The chunk with this index.
    pub(super) fn find(&self, position: usize, blob: &Blob, index: u32) -> Option<Named> {
        let order = self.orders.get(position)?;
        let at = |number: &u32| self.record(*number).map(|record| record.index.get());
        let place = if order.len() == blob.chunk_count as usize {
            index as usize
        } else {
            order.binary_search_by_key(&Some(index), at).ok()?
        };
        Some(named(self.record(*order.get(place)?)?, blob))
    }

    /// All records, as they lie in the file.
    pub(super) fn records(&self) -> impl Iterator<Item = &ChunkRecord> {
        self.table.chunks_exact(size_of::<ChunkRecord>()).filter_map(|bytes| ChunkRecord::ref_from_bytes(bytes).ok())
    }

    fn record(&self, number: u32) -> Option<&ChunkRecord> {
        let start = number as usize * size_of::<ChunkRecord>();
        ChunkRecord::ref_from_bytes(self.table.get(start..start + size_of::<ChunkRecord>())?).ok()
    }

    fn at(&self, header: &Header, number: u32) -> At {
        At::new("chunk record", header.chunk_table.start + size_of::<ChunkRecord>() as u64 * u64::from(number))
    }
}

fn named(record: &ChunkRecord, blob: &Blob) -> Named {
    let chunk = Chunk {
        index: record.index.get(),
        digest: Digest { algorithm: blob.algorithm, bytes: record.digest },
        decoded_offset: record.decoded_offset.get(),
        decoded_len: record.decoded_size.get(),
        compressed: record.flags.get() & chunk_flags::COMPRESSED != 0,
    };
    Named { chunk, encoded_offset: record.encoded_offset.get(), encoded_len: record.encoded_size.get() }
}

fn check_record(at: At, record: &ChunkRecord, blob: &Blob, header: &Header) -> Result<(), BootstrapError> {
    let chunk_size = header.chunk_size;
    let bits = record.flags.get();
    let expected = if blob.cipher.is_some() { chunk_flags::ENCRYPTED } else { 0 };
    at.require(bits & chunk_flags::ENCRYPTED == expected, || {
        format!("flags {bits:#x}: it is encrypted and its blob is not, or the other way round")
    })?;
    let batches = if blob.has_batches() { chunk_flags::BATCH } else { 0 };
    let known = chunk_flags::COMPRESSED | chunk_flags::HAS_CRC | batches | expected;
    at.require(bits & !known == 0, || format!("flags {bits:#x}"))?;
    let index = record.index.get();
    at.require(index < blob.chunk_count, || format!("chunk {index} of a blob of {} chunks", blob.chunk_count))?;
    let (decoded_offset, decoded_len) = (record.decoded_offset.get(), record.decoded_size.get());
    let (encoded_offset, encoded_len) = (record.encoded_offset.get(), record.encoded_size.get());
    at.require((1..=chunk_size).contains(&decoded_len), || {
        format!("{decoded_len} bytes, the chunk size is {chunk_size}")
    })?;
    at.require(decoded_offset.is_multiple_of(header.block), || format!("decoded offset {decoded_offset}"))?;
    let within = |offset: u64, len: u32, end| offset.checked_add(len.into()).is_some_and(|stop| stop <= end);
    at.require(within(decoded_offset, decoded_len, blob.decoded_size), || {
        format!("{decoded_len} bytes at {decoded_offset} end behind the decoded {}", blob.decoded_size)
    })?;
    let in_place = (encoded_offset, encoded_len) == (decoded_offset, decoded_len);
    at.require(!blob.is_tar() || in_place, || {
        format!("a chunk of a tar that is stored at {encoded_offset} and decoded at {decoded_offset}")
    })?;
    // A chunk in a batch has no stored bytes of its own.
    at.require(encoded_len > 0 || blob.needs_chunk_table(), || "it has no stored bytes".into())?;
    at.require(within(encoded_offset, encoded_len, blob.data_end), || {
        format!("{encoded_len} bytes at {encoded_offset} end behind the chunk data of {}", blob.data_end)
    })
}
