//! Makes an image with batches out of one without, byte by byte as the format note has it and with nothing of the crate's
//! own layout code.

#![allow(dead_code, unreachable_pub, missing_docs)] // each test program uses its part

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};
use shoal_rafs::{BlobDirReader, Bootstrap, ChunkId};

const RECORD: usize = 80;

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// One chunk of the new blob: entry of the chunk table, and what the bootstrap says of its place.
struct Placed {
    entry: [u64; 3],
    encoded: (u64, u32),
    compressed: bool,
}

struct Blob<'a> {
    compress: &'a dyn Fn(&[u8]) -> Vec<u8>,
    bytes: Vec<u8>,
    placed: Vec<Placed>,
    contexts: Vec<[u8; 40]>,
    /// The batch that is being filled, and its chunks' places in the decoded address space.
    pending: Vec<u8>,
    members: Vec<(u64, u64, u64)>,
}

impl Blob<'_> {
    fn store(&mut self, bytes: &[u8]) -> (u64, u32, bool) {
        let packed = (self.compress)(bytes);
        let compressed = packed.len() < bytes.len();
        let stored = if compressed { &packed } else { bytes };
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(stored);
        (offset, stored.len() as u32, compressed)
    }

    fn flush(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        if pending.is_empty() {
            return;
        }
        let batch = self.contexts.len() as u64;
        let (offset, len, _) = self.store(&pending);
        let mut context = [0; 40];
        put(&mut context, 0, &len.to_le_bytes());
        put(&mut context, 4, &(pending.len() as u32).to_le_bytes());
        self.contexts.push(context);
        for (block, len, at) in std::mem::take(&mut self.members) {
            let entry = [5 << 56 | (len - 1) << 32 | block, offset, batch << 32 | at];
            self.placed.push(Placed { entry, encoded: (0, 0), compressed: false });
        }
    }

    fn add(&mut self, bytes: &[u8], decoded_offset: u64, batch_size: usize) {
        let (block, len) = (decoded_offset >> 12, bytes.len() as u64);
        if bytes.len() < batch_size / 2 {
            if self.pending.len() + bytes.len() >= batch_size {
                self.flush();
            }
            self.members.push((block, len, self.pending.len() as u64));
            self.pending.extend_from_slice(bytes);
            return;
        }
        self.flush();
        let (offset, encoded_len, compressed) = self.store(bytes);
        let entry = [u64::from(compressed) << 56 | (len - 1) << 32 | block, u64::from(encoded_len) << 40 | offset, 0];
        self.placed.push(Placed { entry, encoded: (offset, encoded_len), compressed });
    }
}

/// Rewrites a bootstrap and its only blob (its name changes): chunks below half of `batch_size` go into batches. Returns
/// the number of batches.
pub fn rebatch(boot: &Path, blobs: &Path, batch_size: usize, compress: &dyn Fn(&[u8]) -> Vec<u8>) -> usize {
    let image = Bootstrap::open(boot).unwrap();
    let reader = BlobDirReader::open(&image, blobs).unwrap();
    let (pending, members, contexts) = (Vec::new(), Vec::new(), Vec::new());
    let mut blob = Blob { compress, bytes: Vec::new(), placed: Vec::new(), contexts, pending, members };
    for chunk in image.chunks(0) {
        let bytes = reader.read(ChunkId { blob: 0, index: chunk.index }).unwrap();
        blob.add(&bytes, chunk.decoded_offset, batch_size);
    }
    blob.flush();
    let batches = blob.contexts.len();
    let old = blobs.join(image.blobs()[0].id.to_string());

    let mut bootstrap = fs::read(boot).unwrap();
    let records = u64_at(&bootstrap, 1152 + 24) as usize;
    let record_count = u64_at(&bootstrap, 1152 + 32) as usize / RECORD;
    for record in (0..record_count).map(|number| records + number * RECORD) {
        let index = u32::from_le_bytes(bootstrap[record + 72..record + 76].try_into().unwrap());
        let placed = &blob.placed[index as usize];
        let flags = 0x10 | u32::from(placed.compressed);
        put(&mut bootstrap, record + 36, &flags.to_le_bytes());
        put(&mut bootstrap, record + 40, &placed.encoded.1.to_le_bytes());
        put(&mut bootstrap, record + 48, &placed.encoded.0.to_le_bytes());
    }
    let table_offset = blob.bytes.len() as u64;
    let mut table: Vec<u8> = blob.placed.iter().flat_map(|placed| placed.entry).flat_map(u64::to_le_bytes).collect();
    let context_offset = table.len() as u64;
    table.extend(blob.contexts.iter().flatten());
    let entry = u64_at(&bootstrap, 1152 + 8) as usize;
    let features = 0x4000_0085u32;
    put(&mut bootstrap, entry + 84, &features.to_le_bytes());
    put(&mut bootstrap, entry + 108, &[0; 4]);
    for (at, value) in [(112, table_offset), (120, table.len() as u64), (128, table.len() as u64)] {
        put(&mut bootstrap, entry + at, &value.to_le_bytes());
    }
    let mut header = vec![0; 4096];
    for at in [0, 4092] {
        put(&mut header, at, &0xB10B_B10Bu32.to_le_bytes());
    }
    put(&mut header, 4, &features.to_le_bytes());
    put(&mut header, 12, &(blob.placed.len() as u32).to_le_bytes());
    let sizes = [table_offset, table.len() as u64, table.len() as u64, context_offset, batches as u64 * 40];
    for (number, value) in sizes.iter().enumerate() {
        put(&mut header, 16 + 8 * number, &value.to_le_bytes());
    }
    put(&mut header, 56, &(batches as u32).to_le_bytes());
    blob.bytes.extend_from_slice(&table);
    blob.bytes.extend_from_slice(&header);

    let id: String = Sha256::digest(&blob.bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    put(&mut bootstrap, 1408, id.as_bytes());
    put(&mut bootstrap, entry, id.as_bytes());
    put(&mut bootstrap, entry + 88, &(blob.bytes.len() as u64).to_le_bytes());
    fs::remove_file(old).unwrap();
    fs::write(blobs.join(id), blob.bytes).unwrap();
    fs::write(boot, bootstrap).unwrap();
    batches
}
