//! An index over a gzip layer, which stays what it is and where it is ("reference mode").
//!
//! ```text
//! layer, untouched     tar, gzip: the blob of the image, by its own digest
//! meta blob            where its chunks lie, and contexts to inflate them from; see the blob's chunk table
//! bootstrap            the tree, with digests of chunks; also inside the meta blob if asked for
//! ```
//!
//! The layer is read once, from front to back. One thread inflates it and cuts the tar into chunks, which is what takes time,
//! another takes their digests, a third the digest of the tar if that is wanted. A chunk belongs to the last checkpoint before
//! it; a checkpoint becomes a context that reaches as far as its last chunk, or nothing if it has none. Memory is 32 KiB for
//! every 2 MiB of the tar, besides names, what is known of chunks, and those on their way: [`IN_FLIGHT`] bytes, or two chunks
//! if that is more. Sparse files end the build: their holes are nowhere in the layer.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::Path;
use std::thread;

use sha2::{Digest as _, Sha256};
use shoal_proto::{Algorithm, BlobId, ObjectId};

use super::bootstrap::{self, Contents};
use super::in_place;
use super::lending::{Borrower, Lender, lend};
use super::output::{BlobFile, Output};
use super::parts::{self, OpenBlob};
use super::tree::{ChunkPlace, Draft, InodeIndex, Tree};
use super::{BuildError, BuildOptions, BuildReport, Builder, Encryption, LayerNotes, Notes, Progress, parcel, tar};
use crate::archive::Archive;
use crate::blob::{ChunkInfo, Contexts, EncodedTable, InBatch, ZRAN_FEATURES};
use crate::codec::{self, Compressor};
use crate::layout::{self, BLOCK, BlobEntry, ChunkRecord, chunk_flags};
use crate::zran::{Checkpoint, Indexer, InflateContext, MAX_SPAN, Position};

/// Largest length that an entry of the chunk table can state; for a gzip layer it is a hint.
const MAX_HINT: u64 = 0xFF_FFFF;
/// Bytes between two threads, in buffers of a chunk of the tar, or of this part of it.
const IN_FLIGHT: usize = 8 << 20;
const MOST_BUFFERS: usize = 16;

impl Builder {
    /// Builds an index over a tar in gzip, read from `stream`; `name` stands in errors. Writes the bootstrap to `bootstrap`
    /// and the meta blob, named by its sha256, into `blob_dir`. The layer itself is not written: whoever reads the image
    /// needs it there too, under its own sha256.
    ///
    /// Of the options, chunk size, limits and the parts of a blob count: such images have digests by sha256, and nothing is
    /// compressed. Nor are chunks of earlier images looked for, as nothing would be saved; the prefetch list is taken.
    pub fn build_reference(
        &self,
        stream: impl Read,
        name: &Path,
        bootstrap: &Path,
        blob_dir: &Path,
    ) -> Result<BuildReport, BuildError> {
        self.build_reference_to(stream, name, Output::files(bootstrap, blob_dir))
    }

    /// Like [`build_reference`](Self::build_reference), to wherever `output` says: its blob is the meta blob.
    pub fn build_reference_to(
        &self,
        stream: impl Read,
        name: &Path,
        output: Output<'_>,
    ) -> Result<BuildReport, BuildError> {
        self.reference((stream, None), name, output, None)
    }

    /// Like [`build_reference`](Self::build_reference), from the archive of a layer, which may say things of lower layers:
    /// they are for [`merge_with`](crate::merge_with). Also gives the sha256 of the tar. That of the archive is `layer`: the caller
    /// sees to it, and takes nothing of what comes out if that is not so.
    pub fn build_reference_layer(
        &self,
        stream: impl Read,
        layer: BlobId,
        name: &Path,
        bootstrap: &Path,
        blob_dir: &Path,
    ) -> Result<(BuildReport, LayerNotes, ObjectId), BuildError> {
        let (mut notes, mut tar) = (LayerNotes::default(), Sha256::new());
        let output = Output::files(bootstrap, blob_dir);
        let report = self.reference((stream, Some(layer)), name, output, Some((&mut notes, &mut tar)))?;
        Ok((report, notes, ObjectId::new(tar.finalize().into())))
    }

    fn reference(
        &self,
        (stream, known): (impl Read, Option<BlobId>),
        name: &Path,
        output: Output<'_>,
        layer: Option<(&mut LayerNotes, &mut Sha256)>,
    ) -> Result<BuildReport, BuildError> {
        self.options.check()?;
        if self.options.encryption != Encryption::None {
            return Err(BuildError::EncryptedLayer);
        }
        let file = BlobFile::new(output.blob)?;
        let mut notes = Notes::default();
        let mut indexer = Indexer::new(stream, known);
        let (layer, tar) = layer.unzip();
        let (tree, index) = thread::scope(|scope| {
            let (cuts, queue) = lend((IN_FLIGHT / self.options.chunk_size as usize).clamp(2, MOST_BUFFERS));
            let index = Index::new(self, name);
            let indexing = scope.spawn(move || index.run(queue));
            let mut hashed = Hashed { stream: &mut indexer, hashing: None };
            let hashing = tar.map(|tar| {
                let (bytes, queue) = lend(MOST_BUFFERS);
                hashed.hashing = Some((Vec::new(), bytes));
                scope.spawn(move || hash(tar, queue))
            });
            let cut = self.cut((&mut hashed, name), cuts, &mut notes, layer).and_then(|cut| Ok((cut, hashed.end()?)));
            drop(hashed);
            // What stopped another thread, if anything, also stopped the cutting.
            let gone = hashing.is_some_and(|hashing| hashing.join().is_err());
            let indexed = indexing.join().map_err(|_| BuildError::Worker)?;
            match (cut, indexed) {
                _ if gone => Err(BuildError::Worker),
                (Ok(((mut draft, chunks), ())), Ok((index, places))) => {
                    for (inode, chunks) in draft.inodes.iter_mut().zip(chunks) {
                        inode.chunks = chunks.into_iter().map(|number: usize| places[number]).collect();
                    }
                    Ok((draft.finish(), index))
                }
                (Err(BuildError::Worker) | Ok(_), Err(error)) | (Err(error), _) => Err(error),
            }
        })?;
        let prefetch = self.find_prefetched(&tree, &mut notes).inodes(&tree);
        let report = index.finish(indexer.finish(), &tree, prefetch, (file, output.bootstrap))?;
        Ok(BuildReport { notes: notes.lines, ..report })
    }

    /// Reads the tar and hands on its chunks; gives its tree, and the numbers of the chunks of each inode.
    fn cut<R: Read>(
        &self,
        (stream, name): (&mut Hashed<&mut Indexer<R>>, &Path),
        cuts: Lender<Cuts>,
        notes: &mut Notes,
        layer: Option<&mut LayerNotes>,
    ) -> Result<(Draft, Vec<Vec<usize>>), BuildError> {
        let position = stream.stream.position();
        let mut cuts = Cutter { lender: cuts, open: Cuts::default() };
        let (mut chunk, mut count, mut chunks) = (Vec::new(), 0, Vec::new());
        let mut archive = Archive::new(stream, self.options.limits);
        let draft = tar::read(&mut archive, name, self.options.limits, notes, layer, |archive, member, inode| {
            if member.has_holes() {
                let place = archive.place();
                let what = format!("{place} is a sparse file, which cannot be read from the layer as it is");
                return Err(BuildError::Unsupported { path: name.to_owned(), what });
            }
            let add = |chunk: &mut Vec<u8>, before, file_offset| {
                let cut = Cut { len: chunk.len(), before, after: position.get(), file_offset };
                cuts.add(chunk, cut)?;
                count += 1;
                Ok(count - 1)
            };
            let source = (name, self.options.chunk_size);
            let numbers = in_place::read_chunks(archive, member, source, &position, &mut chunk, add)?;
            in_place::note(&mut chunks, inode, numbers);
            Ok(())
        })?;
        cuts.lender.hand_over(cuts.open)?;
        Ok((draft, chunks))
    }
}

/// Has what is read through it hashed, if that is wanted, and holds nothing back: positions are those of the stream.
struct Hashed<R> {
    stream: R,
    hashing: Option<(Vec<u8>, Lender<Vec<u8>>)>,
}

impl<R> Hashed<R> {
    /// Hands over what was read last.
    fn end(&mut self) -> Result<(), BuildError> {
        match &mut self.hashing {
            Some((bytes, hashing)) => hashing.hand_over(std::mem::take(bytes)),
            None => Ok(()),
        }
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.stream.read(buffer)?;
        if let Some((bytes, hashing)) = &mut self.hashing {
            bytes.extend_from_slice(&buffer[..len]);
            if bytes.len() >= IN_FLIGHT / MOST_BUFFERS {
                let next = hashing.spare().map_err(io::Error::other)?;
                hashing.hand_over(std::mem::replace(bytes, next)).map_err(io::Error::other)?;
            }
        }
        Ok(len)
    }
}

fn hash(hasher: &mut Sha256, queue: Borrower<Vec<u8>>) {
    for mut bytes in queue.work {
        hasher.update(&bytes);
        bytes.clear();
        // At the end nobody needs it.
        let _ = queue.free.send(bytes);
    }
}

/// Chunks of the tar, back to back; several where they are [small](parcel).
#[derive(Default)]
struct Cuts {
    bytes: Vec<u8>,
    cuts: Vec<Cut>,
}

/// Length of a chunk, and where the stream stood before and after it.
struct Cut {
    len: usize,
    before: Position,
    after: Position,
    file_offset: u64,
}

/// Hands chunks on.
struct Cutter {
    lender: Lender<Cuts>,
    open: Cuts,
}

impl Cutter {
    /// Adds a chunk; its buffer may be another afterwards.
    fn add(&mut self, chunk: &mut Vec<u8>, cut: Cut) -> Result<(), BuildError> {
        if !parcel::has_room(self.open.cuts.len(), self.open.bytes.len(), cut.len) {
            let next = Cuts { bytes: self.lender.spare()?, cuts: Vec::new() };
            self.lender.hand_over(std::mem::replace(&mut self.open, next))?;
        }
        match self.open.cuts.is_empty() {
            true => std::mem::swap(&mut self.open.bytes, chunk),
            false => self.open.bytes.extend_from_slice(chunk),
        }
        self.open.cuts.push(cut);
        Ok(())
    }
}

/// What is known of the chunks so far.
struct Index<'a> {
    builder: &'a Builder,
    /// Those of the builder, with what all gzip layers have.
    options: BuildOptions,
    name: &'a Path,
    known: HashMap<[u8; 32], ChunkPlace>,
    records: Vec<ChunkRecord>,
    /// By index; the number in `batch` is that of the checkpoint.
    chunks: Vec<ChunkInfo>,
    /// By checkpoint, how far its chunks extend, and where they do in the decoded stream. Sorted by the first.
    reaches: Vec<(usize, Position)>,
    /// Offset in the decoded stream of each chunk.
    offsets: Vec<u64>,
    decoded_size: u64,
    decoded_bytes: u64,
}

impl<'a> Index<'a> {
    fn new(builder: &'a Builder, name: &'a Path) -> Self {
        let (compressor, algorithm) = (Compressor::Gzip, Algorithm::Sha256);
        Self {
            builder,
            options: BuildOptions { compressor, algorithm, ..builder.options },
            name,
            known: HashMap::new(),
            records: Vec::new(),
            chunks: Vec::new(),
            reaches: Vec::new(),
            offsets: Vec::new(),
            decoded_size: 0,
            decoded_bytes: 0,
        }
    }

    /// Adds chunks until no more come; gives the place of each, in the order of coming.
    fn run(mut self, queue: Borrower<Cuts>) -> Result<(Self, Vec<ChunkPlace>), BuildError> {
        let mut places = Vec::new();
        for Cuts { bytes, cuts } in queue.work {
            let mut rest = &bytes[..];
            for cut in &cuts {
                let (chunk, others) = rest.split_at(cut.len);
                places.push(self.add(chunk, cut)?);
                rest = others;
            }
            // At the end nobody needs it.
            let _ = queue.free.send(bytes);
        }
        Ok((self, places))
    }

    /// The place of a chunk; new ones are added.
    fn add(&mut self, chunk: &[u8], cut: &Cut) -> Result<ChunkPlace, BuildError> {
        let &Cut { before, after, file_offset, .. } = cut;
        self.decoded_bytes += chunk.len() as u64;
        if let Some(progress) = &self.builder.progress {
            let (decoded_bytes, encoded_bytes) = (self.decoded_bytes, after.encoded);
            progress(Progress { decoded_bytes, total_bytes: None, encoded_bytes });
        }
        let digest = codec::digest(self.options.algorithm, chunk).bytes;
        if let Some(place) = self.known.get(&digest) {
            return Ok(*place);
        }
        let index = self.check_limits(after)?;
        let checkpoint = before.checkpoints.saturating_sub(1);
        let info = ChunkInfo {
            encoded_offset: before.encoded,
            encoded_len: (after.encoded - before.encoded).min(MAX_HINT) as u32,
            decoded_offset: self.decoded_size,
            decoded_len: chunk.len() as u32,
            compressed: true,
            crc32: None,
            batch: Some(InBatch { index: checkpoint as u32, offset: 0 }),
        };
        self.records.push(self.record(&info, (digest, chunk), index, file_offset));
        self.chunks.push(info);
        self.offsets.push(before.decoded);
        match self.reaches.last_mut() {
            Some((last, reach)) if *last == checkpoint => *reach = after,
            _ => self.reaches.push((checkpoint, after)),
        }
        let place = ChunkPlace { blob: 0, index, block: (self.decoded_size / BLOCK) as u32 };
        self.decoded_size += (chunk.len() as u64).next_multiple_of(BLOCK);
        self.known.insert(digest, place);
        Ok(place)
    }

    fn record(
        &self,
        info: &ChunkInfo,
        (digest, chunk): ([u8; 32], &[u8]),
        index: u32,
        file_offset: u64,
    ) -> ChunkRecord {
        ChunkRecord {
            digest,
            blob: 0.into(),
            flags: (chunk_flags::COMPRESSED | chunk_flags::HAS_CRC).into(),
            encoded_size: info.encoded_len.into(),
            decoded_size: info.decoded_len.into(),
            encoded_offset: info.encoded_offset.into(),
            decoded_offset: info.decoded_offset.into(),
            file_offset: file_offset.into(),
            index: index.into(),
            crc32: crc32c::crc32c(chunk).into(),
        }
    }

    /// The index of the next chunk.
    fn check_limits(&self, after: Position) -> Result<u32, BuildError> {
        let too_large = |what, found, limit| Err(BuildError::TooLarge { what, found, limit });
        let decoded = self.decoded_size + u64::from(self.options.chunk_size);
        if after.encoded > layout::MAX_ENCODED {
            return too_large("bytes of a gzip layer", after.encoded, layout::MAX_ENCODED);
        }
        if decoded >= layout::MAX_DECODED {
            return too_large("bytes of distinct chunks", decoded, layout::MAX_DECODED);
        }
        match u32::try_from(self.chunks.len()) {
            Ok(index) if index < layout::MAX_CHUNKS => Ok(index),
            _ => too_large("distinct chunks", self.chunks.len() as u64 + 1, layout::MAX_CHUNKS.into()),
        }
    }

    /// The contexts that some chunk needs, and the place of every chunk in them.
    fn contexts(&mut self, checkpoints: &[Checkpoint]) -> Result<Vec<InflateContext>, BuildError> {
        let contexts = self.reaches.iter().map(|(number, reach)| {
            let start = &checkpoints[*number];
            let encoded = reach.encoded - start.encoded_offset;
            let decoded = reach.decoded - start.decoded_offset;
            if encoded.max(decoded) > MAX_SPAN.into() {
                let what =
                    format!("reading must start {decoded} bytes before some chunk, at most {MAX_SPAN} are taken");
                return Err(BuildError::Unsupported { path: self.name.to_owned(), what });
            }
            // One byte more than none where a chunk is in the rest of a byte.
            let encoded_len = encoded.max(1) as u32;
            Ok(InflateContext { encoded_len, decoded_len: decoded as u32, ..start.clone() })
        });
        let contexts = contexts.collect::<Result<Vec<_>, _>>()?;
        let mut number = 0;
        for (chunk, decoded) in self.chunks.iter_mut().zip(&self.offsets) {
            let Some(place) = &mut chunk.batch else { continue };
            while self.reaches[number].0 != place.index as usize {
                number += 1;
            }
            *place = InBatch { index: number as u32, offset: (decoded - contexts[number].decoded_offset) as u32 };
        }
        Ok(contexts)
    }

    /// Writes meta blob and bootstrap. Of the report the notes are missing.
    fn finish(
        mut self,
        (layer, layer_size, checkpoints): (BlobId, u64, Vec<Checkpoint>),
        tree: &Tree,
        prefetch: Vec<InodeIndex>,
        (file, path): (BlobFile, Option<&Path>),
    ) -> Result<BuildReport, BuildError> {
        let contexts = self.contexts(&checkpoints)?;
        drop(checkpoints);
        let mut report = BuildReport {
            chunks: tree.inodes.iter().map(|inode| inode.chunks.len() as u64).sum(),
            unique_chunks: self.records.len() as u64,
            prefetched: prefetch.len() as u64,
            ..BuildReport::of(tree)
        };
        if !self.chunks.is_empty() {
            (report.blob, report.encoded_bytes) = (Some(layer), layer_size);
        }
        let BuildOptions { chunk_size, compressor, algorithm, .. } = self.options;
        let (options, records) = (self.options, std::mem::take(&mut self.records));
        let contents = |entry: Option<BlobEntry>| {
            let (blobs, records, prefetch) = (entry.into_iter().collect(), records.clone(), prefetch.clone());
            Contents { blobs, records, prefetch, chunk_size, compressor, algorithm, tarfs: false }
        };
        let meta = self.meta(file, (layer, layer_size), &contexts, &records)?;
        let inlined = options.inline_meta.then(|| bootstrap::write(tree, contents(meta.inlined_entry())));
        let inlined = inlined.transpose()?;
        let meta = meta.finish(inlined.as_deref())?;
        report.meta = meta.as_ref().map(|meta| meta.id);
        report.bootstrap_bytes = inlined.map_or(0, |inlined| inlined.len() as u64);
        if let Some(path) = path {
            let bytes = bootstrap::write(tree, contents(meta.and_then(|meta| meta.entry)))?;
            super::replace(path, &bytes)?;
            report.bootstrap_bytes = bytes.len() as u64;
        }
        Ok(report)
    }

    /// The file with the chunk table.
    fn meta(
        &self,
        file: BlobFile,
        (layer, layer_size): (BlobId, u64),
        contexts: &[InflateContext],
        records: &[ChunkRecord],
    ) -> Result<OpenBlob, BuildError> {
        if self.chunks.is_empty() {
            return Ok(OpenBlob::without_chunks(file, self.options));
        }
        let bits = ZRAN_FEATURES | self.options.features();
        let contexts = Contexts::of_gzip_layer(contexts);
        let table = EncodedTable::new(self.chunks.iter().copied(), &contexts, bits, 0, (Compressor::Zstd, None));
        let table = table.map_err(BuildError::io("compress the chunk table of a blob in", file.place()))?;
        let entry = BlobEntry {
            blob_id: layout::blob_id(layer),
            encoded_size: layer_size.into(),
            ..parts::entry(&self.options, &table, self.chunks.len(), self.decoded_size)
        };
        OpenBlob::of_meta(file, self.options, (&table, entry), records.to_vec())
    }
}
