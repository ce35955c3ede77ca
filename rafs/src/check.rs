//! Checks an image: every structure of the bootstrap and, with the blobs, every chunk.
//!
//! What [`Bootstrap::parse`](crate::Bootstrap::parse) refuses is one problem and the end. What it lets pass because
//! reading does not depend on it is looked at here: counts and link counts, bytes with two owners or none, padding, the
//! order of tables; and with the blob files their size and sha256, the copy of the chunk table at their end, what a
//! table of contents lists, digest and checksum of each chunk. It reads everything and changes nothing.
//!
//! A chunk counts as verified when it has the digest that the bootstrap states. Where the bootstrap states none, which happens in
//! tarfs mode alone, the chunks of a tar count that has the sha256 that it is named by.

use std::path::Path;
use std::thread;

use bytes::Bytes;
use serde::Serialize;

use crate::bootstrap::{Bootstrap, BootstrapError};
use crate::codec::Compressor;
use crate::error_chain::chain;
use crate::image_file::ImageFile;

mod blobs;
mod contents;
mod layout;
mod ordered;
mod reader;
mod segment;
mod tree;

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
    /// Chunks that the chunk table names and no file uses. Nothing is wrong with them.
    pub unused_chunks: u64,
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

/// Checks a bootstrap and, if `blob_dir` is given, the blobs in it, on all processors.
pub fn check(bootstrap: Bytes, blob_dir: Option<&Path>) -> CheckReport {
    check_file(&bootstrap.into(), blob_dir)
}

/// Like [`check`], for a file of either kind: a blob that has the bootstrap inside is checked with it.
pub fn check_file(image: &ImageFile, blob_dir: Option<&Path>) -> CheckReport {
    let mut report = CheckReport { bootstrap_bytes: image.bootstrap().len() as u64, ..CheckReport::default() };
    match image.parse() {
        Ok(bootstrap) => {
            let mut blobs = CheckReport::default();
            // The one takes long for many files, the other for large ones.
            thread::scope(|scope| {
                scope.spawn(|| blobs::check(&bootstrap, &image.blob_paths(blob_dir), 0, &mut blobs));
                if let Err(error) = structures(&bootstrap, &mut report) {
                    report.problem("tree", chain(&error));
                }
            });
            report.blobs = blobs.blobs;
            blobs.problems.into_iter().for_each(|Problem { place, problem }| report.problem(place, problem));
            report.problems_left_out += blobs.problems_left_out;
        }
        Err(BootstrapError::Invalid { structure, offset, problem }) => {
            report.problem(format!("{structure} at byte {offset}"), problem);
        }
        Err(error) => report.problem("bootstrap", chain(&error)),
    }
    report.ok = report.problems.is_empty();
    report
}

fn structures(image: &Bootstrap, report: &mut CheckReport) -> Result<(), BootstrapError> {
    tree::check(image, report)?;
    layout::check(image, report)
}
