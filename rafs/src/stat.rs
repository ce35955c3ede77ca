//! What images have in common: chunks with the same digest, of the same algorithm and length, wherever they lie.
//!
//! Told from bootstraps alone. Chunks without digests, which only images in tarfs mode may have, are not counted: nobody knows
//! what they are. A chunk in a batch has no stored bytes of its own, so it counts with none, and is counted apart.

use std::collections::HashMap;

use serde::Serialize;
use shoal_proto::{Algorithm, BlobId};

use crate::bootstrap::Bootstrap;

/// Distinct chunks, and what they take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ChunkCount {
    /// Distinct chunks.
    pub chunks: u64,
    /// Their bytes as files have them.
    pub decoded_bytes: u64,
    /// Their stored bytes, those of chunks in batches left out. Images may store a chunk in different ways; what the
    /// first of them has counts.
    pub encoded_bytes: u64,
    /// Chunks in batches, among `chunks`.
    pub batched_chunks: u64,
}

impl ChunkCount {
    fn add(&mut self, chunk: &ChunkKey, holder: &Holder) {
        self.chunks += 1;
        self.decoded_bytes += u64::from(chunk.decoded_len);
        self.encoded_bytes += u64::from(holder.encoded_len);
        self.batched_chunks += u64::from(holder.encoded_len == 0);
    }
}

/// Chunks that several images have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct SharedChunks {
    /// All of them.
    #[serde(flatten)]
    pub count: ChunkCount,
    /// Those that every one of the images reads from the same blob, and thus stores and fetches once.
    pub in_same_blob: u64,
}

/// What two images share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SharedPair {
    /// Position of the first.
    pub first: usize,
    /// Position of the second.
    pub second: usize,
    /// What both have.
    #[serde(flatten)]
    pub shared: SharedChunks,
}

/// Chunks of several images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SharingReport {
    /// What each image names, in the order given.
    pub images: Vec<ChunkCount>,
    /// What each two of them share.
    pub pairs: Vec<SharedPair>,
    /// What all of them share.
    pub shared_by_all: SharedChunks,
    /// What they name together.
    pub together: ChunkCount,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ChunkKey {
    algorithm: Algorithm,
    digest: [u8; 32],
    decoded_len: u32,
}

/// An image that has a chunk.
#[derive(Debug, Clone, Copy)]
struct Holder {
    image: usize,
    blob: BlobId,
    /// 0 in a batch.
    encoded_len: u32,
}

/// Compares the chunks of images. Time and memory go with their number, time also with the square of the number of images
/// that have a chunk.
pub fn sharing(images: &[Bootstrap]) -> SharingReport {
    let mut report = SharingReport {
        images: vec![ChunkCount::default(); images.len()],
        pairs: Vec::new(),
        shared_by_all: SharedChunks::default(),
        together: ChunkCount::default(),
    };
    let mut pairs = vec![SharedChunks::default(); images.len() * images.len()];
    for (chunk, holders) in &holders(images) {
        report.together.add(chunk, &holders[0]);
        for (position, first) in holders.iter().enumerate() {
            report.images[first.image].add(chunk, first);
            for second in &holders[position + 1..] {
                pairs[first.image * images.len() + second.image].add(chunk, &[*first, *second]);
            }
        }
        if holders.len() == images.len() {
            report.shared_by_all.add(chunk, holders);
        }
    }
    let positions = (0..images.len()).flat_map(|first| (first + 1..images.len()).map(move |second| (first, second)));
    let pair = |(first, second)| SharedPair { first, second, shared: pairs[first * images.len() + second] };
    report.pairs = positions.map(pair).collect();
    report
}

impl SharedChunks {
    fn add(&mut self, chunk: &ChunkKey, holders: &[Holder]) {
        self.count.add(chunk, &holders[0]);
        self.in_same_blob += u64::from(holders.iter().all(|holder| holder.blob == holders[0].blob));
    }
}

/// The images that have each chunk, in order, each once.
fn holders(images: &[Bootstrap]) -> HashMap<ChunkKey, Vec<Holder>> {
    let mut holders: HashMap<_, Vec<Holder>> = HashMap::new();
    for (number, image) in images.iter().enumerate().filter(|(_, image)| image.has_digests()) {
        for (position, blob) in (0..).zip(image.blobs()) {
            for named in image.named(position) {
                let digest = named.chunk.digest;
                let key = ChunkKey {
                    algorithm: digest.algorithm,
                    digest: digest.bytes,
                    decoded_len: named.chunk.decoded_len,
                };
                let of_chunk = holders.entry(key).or_default();
                if of_chunk.last().is_none_or(|last| last.image != number) {
                    of_chunk.push(Holder { image: number, blob: blob.id, encoded_len: named.encoded_len });
                }
            }
        }
    }
    holders
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::builder::{BuildOptions, Builder};
    use crate::codec::Compressor;

    fn image(dir: &Path, name: &str, files: &[u8], dictionary: &[Bootstrap], options: BuildOptions) -> Bootstrap {
        let source = dir.join(name);
        fs::create_dir(&source).unwrap();
        for byte in files {
            fs::write(source.join(byte.to_string()), [*byte; 0x600]).unwrap();
        }
        let boot = dir.join(format!("{name}.boot"));
        let builder = Builder::new(options).chunk_dictionary(dictionary.to_vec());
        builder.build(&source, &boot, &dir.join("blobs")).unwrap();
        Bootstrap::open(&boot).unwrap()
    }

    #[test]
    fn what_images_share_is_counted_once_for_each_chunk() {
        let dir = tempfile::tempdir().unwrap();
        let plain = BuildOptions { chunk_size: 0x1000, compressor: Compressor::None, ..BuildOptions::default() };
        let batched = BuildOptions { batch_size: Some(0x1000), ..plain };
        let first = image(dir.path(), "first", &[1, 2, 3], &[], plain);
        let second = image(dir.path(), "second", &[2, 3, 4], &[], BuildOptions { chunk_size: 0x2000, ..plain });
        let third = image(dir.path(), "third", &[3, 5], std::slice::from_ref(&first), batched);
        let report = sharing(&[first, second, third]);
        let count = |chunks, batched_chunks| ChunkCount {
            chunks,
            decoded_bytes: 0x600 * chunks,
            encoded_bytes: 0x600 * (chunks - batched_chunks),
            batched_chunks,
        };
        assert_eq!(report.images, [count(3, 0), count(3, 0), count(2, 1)]);
        let pairs =
            report.pairs.iter().map(|pair| (pair.first, pair.second, pair.shared.count, pair.shared.in_same_blob));
        let pairs: Vec<_> = pairs.collect();
        assert_eq!(pairs, [(0, 1, count(2, 0), 0), (0, 2, count(1, 0), 1), (1, 2, count(1, 0), 0)]);
        assert_eq!((report.shared_by_all.count, report.shared_by_all.in_same_blob), (count(1, 0), 0));
        assert_eq!(report.together, count(5, 1));
        assert_eq!(sharing(&[]).together, count(0, 0));
    }
}
