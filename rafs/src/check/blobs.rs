//! The blob files: size, sha256, both copies of the chunk table, digest and checksum of every chunk, on all processors.
//!
//! One file after the other. It is hashed by one thread while the others read and decode pieces of it, and the kernel reads ahead
//! of the first of them; so the disk is read once, as long as the page cache holds what lies between them.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use rustix::fs::{Advice, fadvise};
use sha2::{Digest as _, Sha256};
use shoal_proto::BlobId;

use super::{CheckReport, CheckedBlob, MAX_PROBLEMS, Problem, contents};
use crate::blob::ChunkTable;
use crate::blob_dir::{BlobDirError, BlobFile, BlobPaths};
use crate::bootstrap::{Blob, Bootstrap};
use crate::error_chain::chain;
use crate::image_file;
use crate::layout::chunk_flags;
use crate::piece::agreement;
use crate::source::ChunkId;

/// Bytes that are asked of the disk before they are hashed.
const AHEAD: u64 = 8 << 20;

/// Checks the blobs that `paths` lead to; of the others, what the bootstrap says of them. `threads` of 0 is one per
/// processor.
pub(super) fn check(image: &Bootstrap, paths: &BlobPaths, threads: usize, report: &mut CheckReport) {
    let mut work = Work { files: Vec::new(), tasks: Vec::new(), checksums: image.checksums() };
    for (blob, index) in image.blobs().iter().zip(0..) {
        report.blobs.push(CheckedBlob {
            id: blob.id.to_string(),
            compressor: blob.compressor,
            digester: blob.algorithm.to_string(),
            encoded_size: blob.encoded_size,
            decoded_size: blob.decoded_size,
            chunks: blob.chunk_count,
            named_chunks: image.chunks(index).count() as u64,
            verified_chunks: 0,
        });
        match paths.path(blob.id) {
            Some(path) => work.file(path, paths.chunk_table(blob), image, index, report),
            // Where batches lie, and what the chunks of a tar are, only the file tells.
            None if blob.needs_chunk_table() || !image.has_digests() => {}
            None => {
                if let Err(error) = image.piece_table(index, None) {
                    report.problem(format!("blob {}", blob.id), chain(&error));
                }
            }
        }
    }
    work.run(threads, report);
}

struct Work<'a> {
    files: Vec<Opened<'a>>,
    /// In the order in which they are begun, so that what one file needs is close together.
    tasks: Vec<Task>,
    checksums: HashMap<ChunkId, u32>,
}

#[derive(Clone, Copy)]
enum Task {
    /// The file at this position is to be hashed.
    Hash(u32),
    /// Of the file at this position the piece with this number is to be decoded.
    Piece(u32, u32),
}

struct Opened<'a> {
    index: u32,
    blob: &'a Blob,
    path: PathBuf,
    pieces: Option<BlobFile>,
}

/// What one thread found.
#[derive(Default)]
struct Found {
    /// By task, to be told in one order whatever the threads did.
    problems: Vec<(usize, Problem)>,
    left_out: u64,
    /// Chunks that are right, by file.
    verified: HashMap<u32, u64>,
}

impl Found {
    fn problem(&mut self, task: usize, place: String, problem: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push((task, Problem { place, problem: problem.into() }));
        } else {
            self.left_out += 1;
        }
    }
}

impl<'a> Work<'a> {
    /// `table` is the file with the chunk table, if anybody has said.
    fn file(
        &mut self,
        path: PathBuf,
        table: Option<PathBuf>,
        image: &'a Bootstrap,
        index: u32,
        report: &mut CheckReport,
    ) {
        let blob = &image.blobs()[index as usize];
        if let Err(error) = File::open(&path) {
            return report.problem(format!("blob {}", blob.id), format!("cannot read {}: {error}", path.display()));
        }
        let Some(table) = table else {
            return report.problem(format!("chunk table of blob {}", blob.id), "nobody has said where it is");
        };
        if blob.has_chunk_table() {
            meta_blob(&table, blob, report);
            chunk_table(&table, image, index, &self.checksums, report);
            contents::check(&table, image, index, report);
        }
        let pieces = match BlobFile::open(image, index, &path, &table) {
            Ok(pieces) => Some(pieces),
            Err(BlobDirError::Pieces { source, .. }) => {
                report.problem(format!("blob {}", blob.id), chain(&source));
                None
            }
            // That its chunk table cannot be read has been said. That a tar is not the one that it is named by is found again.
            Err(_) => None,
        };
        let file = self.files.len() as u32;
        let numbers = pieces.iter().flat_map(|pieces| pieces.table.pieces());
        self.tasks.push(Task::Hash(file));
        self.tasks.extend(numbers.map(|(number, _)| Task::Piece(file, number)));
        self.files.push(Opened { index, blob, path, pieces });
    }

    fn run(&self, threads: usize, report: &mut CheckReport) {
        let next = AtomicUsize::new(0);
        let threads = if threads == 0 { thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let mut found = thread::scope(|scope| {
            let others: Vec<_> = (1..threads.min(self.tasks.len()))
                // What cannot be started is done by the others.
                .filter_map(|_| thread::Builder::new().spawn_scoped(scope, || self.thread(&next)).ok())
                .collect();
            let mut found = vec![self.thread(&next)];
            for other in others {
                found.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            found
        });
        let mut problems: Vec<_> = found.iter_mut().flat_map(|found| std::mem::take(&mut found.problems)).collect();
        problems.sort_by_key(|(task, _)| *task);
        problems.into_iter().for_each(|(_, Problem { place, problem })| report.problem(place, problem));
        for found in found {
            report.problems_left_out += found.left_out;
            for (file, verified) in found.verified {
                let index = self.files[file as usize].index;
                report.blobs[index as usize].verified_chunks += verified;
            }
        }
    }

    fn thread(&self, next: &AtomicUsize) -> Found {
        let mut found = Found::default();
        loop {
            let task = next.fetch_add(1, Relaxed);
            match self.tasks.get(task) {
                Some(Task::Hash(file)) => self.hash(task, &self.files[*file as usize], &mut found),
                Some(Task::Piece(file, number)) => self.piece(task, *file, *number, &mut found),
                None => return found,
            }
        }
    }

    fn hash(&self, task: usize, file: &Opened<'_>, found: &mut Found) {
        let place = format!("blob {}", file.blob.id);
        let stated = contents::data_digest(&file.path).filter(|_| !file.blob.is_tar());
        let hashed = match hash(&file.path, stated.map_or(0, |(end, _)| end)) {
            Ok(hashed) => hashed,
            Err(error) => {
                return found.problem(task, place, format!("cannot read {}: {error}", file.path.display()));
            }
        };
        let expected = file.blob.encoded_size;
        // A bootstrap that was taken out of the blob and merged without the blob at hand: it knows what came before it.
        let before_bootstrap = || file.blob.toc.is_none() && contents::bootstrap_start(&file.path) == Some(expected);
        if hashed.size != expected && !before_bootstrap() {
            found.problem(task, place.clone(), format!("{} bytes, {expected} in the blob table", hashed.size));
        }
        if hashed.id != file.blob.id {
            found.problem(task, place, format!("its bytes have sha256 {}", hashed.id));
        }
        if let Some((_, sha256)) = stated.filter(|(_, sha256)| hashed.prefix != Some(*sha256)) {
            let listed: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
            let place = format!("image.blob in the contents of blob {}", file.blob.id);
            found.problem(task, place, format!("its sha256 is not {listed}, which is listed"));
        }
    }

    fn piece(&self, task: usize, file: u32, number: u32, found: &mut Found) {
        let Opened { index: blob, pieces: Some(pieces), .. } = &self.files[file as usize] else { return };
        let place = |index: u32| format!("chunk {index} of blob {}", pieces.table.blob());
        match pieces.read(number) {
            Ok(decoded) => {
                for (index, bytes) in decoded.chunks() {
                    match checksum(bytes, self.checksums.get(&ChunkId { blob: *blob, index }).copied()) {
                        Ok(()) => *found.verified.entry(file).or_default() += 1,
                        Err(problem) => found.problem(task, place(index), problem),
                    }
                }
            }
            // With a batch all its chunks are lost, also where the first one is to blame.
            Err(error) => {
                for chunk in pieces.table.piece(number).map_or(&[][..], |piece| piece.chunks()) {
                    found.problem(task, place(chunk.index), &*error.reason);
                }
            }
        }
    }
}

fn checksum(bytes: &[u8], stated: Option<u32>) -> Result<(), String> {
    // Without one there is nothing to compute.
    let Some(stated) = stated else { return Ok(()) };
    let found = crc32c::crc32c(bytes);
    if found == stated { Ok(()) } else { Err(format!("CRC-32C {stated:#010x}, its bytes have {found:#010x}")) }
}

struct Hashed {
    id: BlobId,
    size: u64,
    /// The sha256 of the bytes before the offset that was asked about, if the file has as many.
    prefix: Option<[u8; 32]>,
}

fn hash(path: &Path, prefix: u64) -> std::io::Result<Hashed> {
    let file = File::open(path)?;
    // No more than hints, and not for every file system: hashing takes longer than any other thread needs for its part of the
    // file, so it shall not wait for the disk.
    let announce = |from: u64, len: u64| _ = fadvise(&file, from, NonZeroU64::new(len), Advice::WillNeed);
    announce(0, AHEAD);
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let (mut size, mut at_prefix) = (0, None);
    loop {
        let len = (&file).read(&mut buffer)?;
        if len == 0 {
            return Ok(Hashed { id: BlobId::new(hasher.finalize().into()), size, prefix: at_prefix });
        }
        let bytes = &buffer[..len];
        announce(size + AHEAD, len as u64);
        let split = prefix.checked_sub(size).filter(|left| *left <= len as u64 && *left > 0);
        let (first, rest) = bytes.split_at(split.unwrap_or(0) as usize);
        hasher.update(first);
        if split.is_some() {
            at_prefix = Some(hasher.clone().finalize().into());
        }
        hasher.update(rest);
        size += len as u64;
    }
}

/// Size and sha256 of the file beside a gzip layer.
fn meta_blob(path: &Path, blob: &Blob, report: &mut CheckReport) {
    let Some(meta) = blob.meta else { return };
    let place = format!("chunk table of blob {}", blob.id);
    match File::open(path).and_then(image_file::sha256) {
        Ok((id, size)) if (id, size) == (meta.id, meta.size) => {}
        Ok((id, size)) => {
            let problem = format!("its file has {size} bytes and sha256 {id}, {} in the blob table", meta.size);
            report.problem(place, problem);
        }
        Err(error) => report.problem(place, format!("cannot read {}: {error}", path.display())),
    }
}

/// The copy of the chunk table at the end of the blob, and its header, against the bootstrap.
fn chunk_table(
    path: &Path,
    image: &Bootstrap,
    index: u32,
    checksums: &HashMap<ChunkId, u32>,
    report: &mut CheckReport,
) {
    let blob = &image.blobs()[index as usize];
    if blob.chunk_count == 0 {
        return;
    }
    let place = format!("chunk table of blob {}", blob.id);
    let table = match ChunkTable::read_with(path, blob.cipher.as_ref()) {
        Ok(table) => table,
        Err(error) => return report.problem(place, chain(&error)),
    };
    let (stated, found) = (blob.chunk_table, table.range());
    if stated != found {
        report.problem(&place, format!("it is {found:?}, {stated:?} in the blob table"));
    }
    if table.len() != blob.chunk_count {
        let problem = format!("{} chunks, {} in the blob table", table.len(), blob.chunk_count);
        return report.problem(place, problem);
    }
    for named in image.named(index) {
        let id = ChunkId { blob: index, index: named.chunk.index };
        let Some(entry) = table.chunk(id.index) else { continue };
        let place = || format!("entry {} of the {place}", id.index);
        if let Err(problem) = agreement(&named, &entry) {
            report.problem(place(), problem);
        }
        let stated = checksums.get(&id).copied();
        if let Some(found) = entry.crc32.filter(|found| stated.is_some_and(|stated| stated != *found)) {
            report.problem(place(), format!("CRC-32C {found:#010x}, another in the bootstrap"));
        }
    }
}

impl Bootstrap {
    /// Checksums in the chunk table, where it has them.
    fn checksums(&self) -> HashMap<ChunkId, u32> {
        let checked = self.records().filter(|record| record.flags.get() & chunk_flags::HAS_CRC != 0);
        let id = |blob, index| ChunkId { blob, index };
        checked.map(|record| (id(record.blob.get(), record.index.get()), record.crc32.get())).collect()
    }
}
