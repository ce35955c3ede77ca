//! Checks an image: every structure of the bootstrap and, with the blobs, every chunk.
//!
//! What [`Bootstrap::parse`] refuses is one problem and the end. What it lets pass because reading does not depend on it
//! is looked at here: counts and link counts; and with the blob files their size and sha256, the copy of the chunk table
//! at their end, digest and checksum of each chunk. It reads everything and changes nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use shoal_proto::BlobId;

use crate::blob::ChunkTable;
use crate::blob_dir::{BlobDirError, BlobFile};
use crate::bootstrap::{Blob, Bootstrap, BootstrapError, Inode, Kind, Nid};
use crate::codec::Compressor;
use crate::error_chain::chain;
use crate::layout::chunk_flags;
use crate::piece::agreement;
use crate::source::ChunkId;

/// Most problems that a report lists; further ones are counted.
const MAX_PROBLEMS: usize = 1000;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Structure and place.
    pub place: String,
    /// What is wrong there.
    pub problem: String,
}

/// Inodes by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct KindCounts {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Character and block devices.
    pub devices: u64,
    /// Named pipes.
    pub fifos: u64,
    /// Unix sockets.
    pub sockets: u64,
}

/// One blob of a checked image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckedBlob {
    /// Its id in hexadecimal.
    pub id: String,
    /// How its chunks are compressed.
    pub compressor: Compressor,
    /// How its chunks are digested.
    pub digester: String,
    /// Size of the stored file.
    pub encoded_size: u64,
    /// Size of its decoded address space.
    pub decoded_size: u64,
    /// Chunks of the whole blob.
    pub chunks: u32,
    /// Chunks that the image names.
    pub named_chunks: u64,
    /// Of those, how many have been read and are right. 0 without blob files.
    pub verified_chunks: u64,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Whether nothing is wrong.
    pub ok: bool,
    /// Size of the bootstrap.
    pub bootstrap_bytes: u64,
    /// Chunk size.
    pub chunk_size: u32,
    /// Names in the tree, the root included.
    pub names: u64,
    /// Inodes by kind.
    pub inodes: KindCounts,
    /// Extended attributes.
    pub xattrs: u64,
    /// Bytes of all files.
    pub decoded_bytes: u64,
    /// The blobs.
    pub blobs: Vec<CheckedBlob>,
    /// What is wrong, at most 1000 problems.
    pub problems: Vec<Problem>,
    /// Further problems that are not listed.
    pub problems_left_out: u64,
}

impl CheckReport {
    fn problem(&mut self, place: impl Into<String>, problem: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem { place: place.into(), problem: problem.into() });
        } else {
            self.problems_left_out += 1;
        }
    }
}

/// Checks a bootstrap and, if `blob_dir` is given, the blobs in it.
pub fn check(bootstrap: Bytes, blob_dir: Option<&Path>) -> CheckReport {
    let mut report = CheckReport { bootstrap_bytes: bootstrap.len() as u64, ..CheckReport::default() };
    match Bootstrap::parse(bootstrap) {
        Ok(image) => {
            if let Err(error) = tree(&image, &mut report) {
                report.problem("tree", chain(&error));
            }
            blobs(&image, blob_dir, &mut report);
        }
        Err(BootstrapError::Invalid { structure, offset, problem }) => {
            report.problem(format!("{structure} at byte {offset}"), problem);
        }
        Err(error) => report.problem("bootstrap", chain(&error)),
    }
    report.ok = report.problems.is_empty();
    report
}

/// Counts the tree and compares the counts with what inodes and super block state.
fn tree(image: &Bootstrap, report: &mut CheckReport) -> Result<(), BootstrapError> {
    report.chunk_size = image.chunk_size();
    report.names = image.name_count();
    if image.declared_names() != report.names {
        let stated = image.declared_names();
        report.problem("super block at byte 1024", format!("it counts {stated} names, there are {}", report.names));
    }
    let mut links: HashMap<Nid, u32> = HashMap::new();
    let mut directories = vec![image.inode(image.root())?];
    count(&directories[0], report);
    while let Some(directory) = directories.pop() {
        let mut expected = 2;
        for entry in directory.entries() {
            let entry = entry?;
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let inode = image.inode(entry.nid)?;
            let names = links.entry(entry.nid).or_default();
            *names += 1;
            if *names == 1 {
                count(&inode, report);
            }
            if entry.kind == Kind::Directory {
                expected += 1;
                directories.push(inode);
            }
        }
        check_links(&directory, expected, report);
    }
    for (nid, names) in links {
        let inode = image.inode(nid)?;
        if inode.kind() != Kind::Directory {
            check_links(&inode, names, report);
        }
    }
    Ok(())
}

fn check_links(inode: &Inode<'_>, expected: u32, report: &mut CheckReport) {
    if inode.nlink() != expected {
        report.problem(format!("inode {}", inode.nid()), format!("{} links, counted {expected}", inode.nlink()));
    }
}

fn count(inode: &Inode<'_>, report: &mut CheckReport) {
    let counts = &mut report.inodes;
    match inode.kind() {
        Kind::File => {
            counts.files += 1;
            report.decoded_bytes += inode.size();
        }
        Kind::Directory => counts.directories += 1,
        Kind::Symlink => counts.symlinks += 1,
        Kind::CharDevice | Kind::BlockDevice => counts.devices += 1,
        Kind::Fifo => counts.fifos += 1,
        Kind::Socket => counts.sockets += 1,
    }
    report.xattrs += inode.xattrs().count() as u64;
}

fn blobs(image: &Bootstrap, blob_dir: Option<&Path>, report: &mut CheckReport) {
    let checksums = image.checksums();
    for (blob, index) in image.blobs().iter().zip(0..) {
        let mut checked = CheckedBlob {
            id: blob.id.to_string(),
            compressor: blob.compressor,
            digester: blob.algorithm.to_string(),
            encoded_size: blob.encoded_size,
            decoded_size: blob.decoded_size,
            chunks: blob.chunk_count,
            named_chunks: image.chunks(index).count() as u64,
            verified_chunks: 0,
        };
        if let Some(dir) = blob_dir {
            let path = dir.join(blob.id.to_string());
            blob_file(&path, blob, report);
            chunk_table(&path, image, index, report);
            checked.verified_chunks = chunks(dir, image, index, &checksums, report);
        } else if !blob.has_batches()
            && let Err(error) = image.piece_table(index, None)
        {
            report.problem(format!("blob {}", blob.id), chain(&error));
        }
        report.blobs.push(checked);
    }
}

/// Reads every chunk that the image names; how many are right.
fn chunks(
    dir: &Path,
    image: &Bootstrap,
    blob: u32,
    checksums: &HashMap<ChunkId, u32>,
    report: &mut CheckReport,
) -> u64 {
    let file = match BlobFile::open(image, blob, dir) {
        Ok(file) => file,
        // That the file or its chunk table cannot be read has been said.
        Err(BlobDirError::Pieces { source, .. }) => {
            report.problem(format!("blob {}", image.blobs()[blob as usize].id), chain(&source));
            return 0;
        }
        Err(_) => return 0,
    };
    let mut verified = 0;
    for (number, piece) in file.table.pieces() {
        match file.read(number) {
            Ok(decoded) => {
                for (index, bytes) in decoded.chunks() {
                    match checksum(bytes, checksums.get(&ChunkId { blob, index }).copied()) {
                        Ok(()) => verified += 1,
                        Err(problem) => {
                            report.problem(format!("chunk {index} of blob {}", file.table.blob()), problem);
                        }
                    }
                }
            }
            // All its chunks are lost, also where the first one is to blame.
            Err(error) => {
                for chunk in piece.chunks() {
                    let place = format!("chunk {} of blob {}", chunk.index, file.table.blob());
                    report.problem(place, &*error.reason);
                }
            }
        }
    }
    verified
}

fn checksum(bytes: &[u8], stated: Option<u32>) -> Result<(), String> {
    let found = crc32c::crc32c(bytes);
    match stated {
        Some(stated) if stated != found => Err(format!("CRC-32C {stated:#010x}, its bytes have {found:#010x}")),
        _ => Ok(()),
    }
}

/// Size and sha256 of the stored file.
fn blob_file(path: &Path, blob: &Blob, report: &mut CheckReport) {
    let place = format!("blob {}", blob.id);
    match hash(path) {
        Ok((id, size)) => {
            if size != blob.encoded_size {
                report.problem(&place, format!("{size} bytes, {} in the blob table", blob.encoded_size));
            }
            if id != blob.id {
                report.problem(place, format!("its bytes have sha256 {id}"));
            }
        }
        Err(error) => report.problem(place, format!("cannot read {}: {error}", path.display())),
    }
}

fn hash(path: &Path) -> io::Result<(BlobId, u64)> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let len = file.read(&mut buffer)?;
        if len == 0 {
            return Ok((BlobId::new(hasher.finalize().into()), size));
        }
        hasher.update(&buffer[..len]);
        size += len as u64;
    }
}

/// The copy of the chunk table at the end of the blob, and its header, against the bootstrap.
fn chunk_table(path: &Path, image: &Bootstrap, index: u32, report: &mut CheckReport) {
    let blob = &image.blobs()[index as usize];
    if blob.chunk_count == 0 {
        return;
    }
    let place = format!("chunk table of blob {}", blob.id);
    let table = match ChunkTable::read(path) {
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
        let entry = table.chunk(named.chunk.index);
        if let Some(Err(problem)) = entry.map(|entry| agreement(&named, &entry)) {
            report.problem(format!("entry {} of the {place}", named.chunk.index), problem);
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
