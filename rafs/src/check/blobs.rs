//! The blob files: size, sha256, both copies of the chunk table, digest and checksum of every chunk, on all processors.
//!
//! One file after the other, in [segments](segment). A thread reads one, has it hashed when those before it were, and decodes the
//! pieces in it. There is one thread more than processors, as one or the other waits for the disk. Memory for each of them: a
//! segment of about 1 MiB, or the largest chunk, and a piece once decoded.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::{io, thread};

use super::ordered::{Hashed, OrderedDigest};
use super::reader::SegmentReader;
use super::segment::{Segment, Segments};
use super::{CheckReport, CheckedBlob, MAX_PROBLEMS, Problem, contents};
use crate::blob::ChunkTable;
use crate::blob_dir::{BlobDirError, BlobFile, BlobPaths};
use crate::bootstrap::{Blob, Bootstrap};
use crate::error_chain::chain;
use crate::image_file;
use crate::layout::chunk_flags;
use crate::piece::{DecodedPiece, agreement};
use crate::source::{ChunkError, ChunkId};

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
    /// Of the file at this position this segment is to be read.
    Segment(u32, usize),
    /// Of the file at this position the piece with this number, which is in no segment.
    Piece(u32, u32),
}

struct Opened<'a> {
    index: u32,
    blob: &'a Blob,
    path: PathBuf,
    pieces: Option<BlobFile>,
    reader: SegmentReader,
    segments: Segments,
    digest: OrderedDigest,
    /// What the table of contents says of the chunk data.
    stated: Option<[u8; 32]>,
}

/// Order in which problems are told: by file, and in one those of the whole file before those of its pieces.
type Place = (u32, Option<u32>);

/// What one thread found.
#[derive(Default)]
struct Found {
    /// To be told in one order whatever the threads did.
    problems: Vec<(Place, Problem)>,
    left_out: u64,
    /// Chunks that are right, by file.
    verified: HashMap<u32, u64>,
}

impl Found {
    fn problem(&mut self, order: Place, place: String, problem: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push((order, Problem { place, problem: problem.into() }));
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
        let reader = match SegmentReader::open(&path) {
            Ok(reader) => reader,
            Err(error) => return report.problem(format!("blob {}", blob.id), unreadable(&path, &error)),
        };
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
        let ranges = pieces.iter().flat_map(|pieces| pieces.table.pieces());
        let segments = Segments::new(reader.len, ranges.map(|(number, piece)| (number, piece.encoded())));
        self.tasks.extend((0..segments.segments.len()).map(|segment| Task::Segment(file, segment)));
        self.tasks.extend(segments.others.iter().map(|number| Task::Piece(file, *number)));
        let (prefix, stated) = contents::data_digest(&path).filter(|_| !blob.is_tar()).unzip();
        let digest = OrderedDigest::new(reader.len, prefix.unwrap_or(0));
        self.files.push(Opened { index, blob, path, pieces, reader, segments, digest, stated });
    }

    fn run(&self, threads: usize, report: &mut CheckReport) {
        let next = AtomicUsize::new(0);
        let threads = if threads == 0 { thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let mut found = thread::scope(|scope| {
            let others: Vec<_> = (0..threads.min(self.tasks.len()))
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
        problems.sort_by_key(|(order, _)| *order);
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
        let (mut found, mut buffer) = (Found::default(), Vec::new());
        loop {
            match self.tasks.get(next.fetch_add(1, Relaxed)) {
                Some(Task::Segment(file, segment)) => self.segment(*file, *segment, &mut buffer, &mut found),
                Some(Task::Piece(file, number)) => {
                    let Some(pieces) = &self.files[*file as usize].pieces else { continue };
                    self.piece(*file, (pieces, *number), pieces.read(*number), &mut found);
                }
                None => return found,
            }
        }
    }

    fn segment(&self, file: u32, segment: usize, buffer: &mut Vec<u8>, found: &mut Found) {
        let opened = &self.files[file as usize];
        let Segments { segments, pieces, .. } = &opened.segments;
        let Segment { own, read, pieces: numbers } = &segments[segment];
        let bytes = opened.reader.read(read, buffer);
        let own_bytes = match &bytes {
            Ok(bytes) => Ok(&bytes[(own.start - read.start) as usize..]),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        if let Some(hashed) = opened.digest.add(own, own_bytes) {
            self.whole(file, hashed, found);
        }
        let Some(table) = &opened.pieces else { return };
        for (number, range) in &pieces[numbers.clone()] {
            let decoded = match &bytes {
                Ok(bytes) => {
                    let start = (range.start - read.start) as usize;
                    table.decode(*number, &bytes[start..start + (range.end - range.start) as usize])
                }
                // Perhaps only its neighbours cannot be read.
                Err(_) => table.read(*number),
            };
            self.piece(file, (table, *number), decoded, found);
        }
    }

    /// A file of which all bytes were read.
    fn whole(&self, file: u32, hashed: io::Result<Hashed>, found: &mut Found) {
        let Opened { blob, path, reader, stated, .. } = &self.files[file as usize];
        let (order, place) = ((file, None), format!("blob {}", blob.id));
        let hashed = match hashed {
            Ok(hashed) => hashed,
            Err(error) => return found.problem(order, place, unreadable(path, &error)),
        };
        let (size, expected) = (reader.len, blob.encoded_size);
        // A bootstrap that was taken out of the blob and merged without the blob at hand: it knows what came before it.
        let before_bootstrap = || blob.toc.is_none() && contents::bootstrap_start(path) == Some(expected);
        if size != expected && !before_bootstrap() {
            found.problem(order, place.clone(), format!("{size} bytes, {expected} in the blob table"));
        }
        if hashed.id != blob.id {
            found.problem(order, place, format!("its bytes have sha256 {}", hashed.id));
        }
        if let Some(sha256) = stated.filter(|sha256| hashed.prefix != Some(*sha256)) {
            let listed: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
            let place = format!("image.blob in the contents of blob {}", blob.id);
            found.problem(order, place, format!("its sha256 is not {listed}, which is listed"));
        }
    }

    fn piece(
        &self,
        file: u32,
        (pieces, number): (&BlobFile, u32),
        decoded: Result<DecodedPiece, ChunkError>,
        found: &mut Found,
    ) {
        let blob = self.files[file as usize].index;
        let (order, place) =
            ((file, Some(number)), |index: u32| format!("chunk {index} of blob {}", pieces.table.blob()));
        match decoded {
            Ok(decoded) => {
                for (index, bytes) in decoded.chunks() {
                    match checksum(bytes, self.checksums.get(&ChunkId { blob, index }).copied()) {
                        Ok(()) => *found.verified.entry(file).or_default() += 1,
                        Err(problem) => found.problem(order, place(index), problem),
                    }
                }
            }
            // With a batch all its chunks are lost, also where the first one is to blame.
            Err(error) => {
                for chunk in pieces.table.piece(number).map_or(&[][..], |piece| piece.chunks()) {
                    found.problem(order, place(chunk.index), &*error.reason);
                }
            }
        }
    }
}

fn unreadable(path: &Path, error: &io::Error) -> String {
    format!("cannot read {}: {error}", path.display())
}

fn checksum(bytes: &[u8], stated: Option<u32>) -> Result<(), String> {
    // Without one there is nothing to compute.
    let Some(stated) = stated else { return Ok(()) };
    let found = crc32c::crc32c(bytes);
    if found == stated { Ok(()) } else { Err(format!("CRC-32C {stated:#010x}, its bytes have {found:#010x}")) }
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
        Err(error) => report.problem(place, unreadable(path, &error)),
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
