//! What lies behind the chunk data in a blob made for registries: table of contents, digests, the order of the parts.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::CheckReport;
use crate::blob::{self, Member, ReadAt, TAR_HEADER, Toc, TocEntry};
use crate::bootstrap::{Blob, Bootstrap};
use crate::codec;
use crate::error_chain::chain;
use crate::layout::{CI_HEADER, features};

/// Most bytes of a part that is decoded in memory.
const MAX_PART: u64 = 1 << 30;

/// Where the digest of the chunk data ends, for blobs whose table of contents states one.
pub(super) fn data_digest(path: &Path) -> Option<(u64, [u8; 32])> {
    let file = File::open(path).ok()?;
    let members = blob::members(&file, file.metadata().ok()?.len()).ok()?;
    let toc = Toc::find(&file, &members).ok()??;
    let entry = toc.entry("image.blob")?;
    (entry.range.start == 0).then_some((entry.range.end + TAR_HEADER, entry.sha256))
}

/// Where a bootstrap starts in the blob at `path`, if there is one.
pub(super) fn bootstrap_start(path: &Path) -> Option<u64> {
    let file = File::open(path).ok()?;
    let members = blob::members(&file, file.metadata().ok()?.len()).ok()?;
    members.iter().find(|member| member.name == blob::BOOTSTRAP_NAME).map(|member| member.range.start)
}

/// Checks the parts of the blob at `path`. That the file cannot be read has been said.
pub(super) fn check(path: &Path, image: &Bootstrap, index: u32, report: &mut CheckReport) {
    let blob = &image.blobs()[index as usize];
    let place = format!("contents of blob {}", blob.id);
    let opened = File::open(path).and_then(|file| {
        let size = file.metadata()?.len();
        Ok((blob::members(&file, size)?, file))
    });
    let Ok((members, file)) = opened else { return };
    let toc = match Toc::find(&file, &members) {
        Ok(toc) => toc,
        Err(error) => return report.problem(place, chain(&error)),
    };
    if blob.features & features::HAS_TOC != 0 && toc.is_none() {
        report.problem(&place, "its table of contents is missing");
    }
    let mut contents = Contents { file, members, blob, place, report };
    contents.stated_toc();
    for entry in toc.iter().flat_map(|toc| &toc.entries) {
        if let Err(problem) = contents.entry(entry) {
            contents.report.problem(format!("{} in the {}", entry.name, contents.place), problem);
        }
    }
    contents.digests(image, index);
}

struct Contents<'a> {
    file: File,
    members: Vec<Member>,
    blob: &'a Blob,
    place: String,
    report: &'a mut CheckReport,
}

impl Contents<'_> {
    fn member(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.name == name)
    }

    /// Where the part with this name in the table of contents lies. Table and header of chunks are one member and two parts.
    fn part(&self, name: &str) -> Option<Range<u64>> {
        let table = || {
            let range = &self.member("blob.meta")?.range;
            Some((range.clone(), range.end.checked_sub(CI_HEADER)?))
        };
        match name {
            "blob.meta" => table().map(|(range, header)| range.start..header),
            "blob.meta.header" => table().map(|(range, header)| header..range.end),
            name => Some(self.member(name)?.range.clone()),
        }
    }

    fn read(&self, range: &Range<u64>) -> io::Result<Vec<u8>> {
        let len = range.end.checked_sub(range.start).filter(|len| *len <= MAX_PART);
        let mut bytes =
            vec![0; len.ok_or_else(|| io::Error::other(format!("it has over {MAX_PART} bytes")))? as usize];
        ReadAt::read_exact_at(&self.file, &mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Size and digest of the table of contents, where the blob table has them.
    fn stated_toc(&mut self) {
        let Some(stated) = self.blob.toc else { return };
        let Some(member) = self.member(blob::TOC_NAME) else { return };
        let range = member.range.start..member.range.end + TAR_HEADER;
        let right = u64::from(stated.size) == range.end - range.start
            && self.read(&range).is_ok_and(|bytes| Sha256::digest(bytes)[..] == stated.sha256[..]);
        if !right {
            self.report.problem(&self.place, "its table of contents is not the one that the bootstrap names");
        }
    }

    fn entry(&self, entry: &TocEntry) -> Result<(), String> {
        let found = self.part(&entry.name);
        if found.as_ref() != Some(&entry.range) {
            return Err(format!("listed at {:?}, it lies at {found:?}", entry.range));
        }
        // Of the chunk data the digest is taken together with that of the whole file.
        if entry.name == "image.blob" {
            return Ok(());
        }
        if entry.decoded_size > MAX_PART {
            return Err(format!("{} bytes once decoded", entry.decoded_size));
        }
        let stored = self.read(&entry.range).map_err(|error| error.to_string())?;
        // Digests and bootstrap lie there as they are.
        let encrypted = [blob::TABLE_NAME, blob::TABLE_HEADER_NAME].contains(&entry.name.as_str());
        let cipher = self.blob.cipher.as_ref().filter(|_| encrypted);
        let decoded = codec::open(cipher, entry.compressor, &stored, entry.decoded_size as usize);
        let decoded = decoded.map_err(|error| error.to_string())?;
        match Sha256::digest(decoded)[..] == entry.sha256[..] {
            true => Ok(()),
            false => Err("its sha256 is not the one that is listed".into()),
        }
    }

    /// The digests of all chunks, against those that the bootstrap has.
    fn digests(&mut self, image: &Bootstrap, index: u32) {
        if self.blob.features & features::INLINED_DIGESTS == 0 {
            return;
        }
        let place = format!("digests in the {}", self.place);
        let range = self.member("blob.digest").map(|member| member.range.clone());
        let bytes = range.and_then(|range| self.read(&range).ok());
        let expected = self.blob.chunk_count as usize * 32;
        let Some(bytes) = bytes.filter(|bytes| bytes.len() == expected) else {
            return self.report.problem(place, format!("there must be {expected} bytes of them"));
        };
        for chunk in image.chunks(index) {
            if bytes.get(chunk.index as usize * 32..).is_none_or(|rest| !rest.starts_with(&chunk.digest.bytes)) {
                self.report.problem(&place, format!("that of chunk {} is not the bootstrap's", chunk.index));
            }
        }
    }
}
