//! Small archives made entry by entry.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use shoal_rafs::{BlobDirReader, Bootstrap, BuildError, BuildOptions, BuildReport, Builder};
use tar::{EntryType, Header};

use super::Facts;
use super::image::Built;

/// What GNU tar needs to be told so that nothing is lost.
pub const PAX: &[&str] = &["--format=pax", "--xattrs", "--xattrs-include=*"];

/// GNU tar over `source`, with more arguments.
pub fn gnu_tar(source: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(arguments)
        .args(["--numeric-owner", "--sort=name", "-cf", "-", "-C"])
        .arg(source)
        .arg(".")
        .stderr(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success());
    output.stdout
}

/// The facts of a directory without sockets, which no tar holds.
pub fn tar_facts(source: &Path) -> BTreeMap<PathBuf, Facts> {
    let mut facts = super::facts(source);
    facts.retain(|path, _| !fs::symlink_metadata(source.join(path)).unwrap().file_type().is_socket());
    facts
}

/// Builds a bootstrap over a plain tar in `work` and opens it.
pub fn open_tarfs(tar: &[u8], work: &Path, options: BuildOptions) -> Built {
    let (boot, blobs) = (work.join("boot"), work.join("blobs"));
    fs::create_dir_all(&blobs).unwrap();
    let report = Builder::new(options).build_tarfs(tar, Path::new("archive"), &boot, &blobs);
    let report = report.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let image = Bootstrap::open(&boot).unwrap();
    let reader = BlobDirReader::open(&image, &blobs).unwrap();
    Built { report, image, reader, boot, blobs }
}

/// A tar under construction. Names are not looked at.
#[derive(Default)]
pub struct Tar {
    pub bytes: Vec<u8>,
}

impl Tar {
    /// An entry with content.
    pub fn entry(mut self, entry_type: EntryType, path: &[u8], link: &[u8], content: &[u8]) -> Self {
        for (long_type, field) in [(EntryType::GNULongName, path), (EntryType::GNULongLink, link)] {
            if field.len() > 100 {
                let body = [field, b"\0"].concat();
                self = self.raw(long_type, b"././@LongLink", b"", &body, |_| {});
            }
        }
        self.raw(entry_type, path, link, content, |_| {})
    }

    /// An entry whose header `change` has the last word about.
    pub fn raw(
        mut self,
        entry_type: EntryType,
        path: &[u8],
        link: &[u8],
        content: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Self {
        let mut header = Header::new_gnu();
        let old = header.as_old_mut();
        for (field, value) in [(&mut old.name, path), (&mut old.linkname, link)] {
            let len = value.len().min(100);
            field[..len].copy_from_slice(&value[..len]);
        }
        header.set_entry_type(entry_type);
        header.set_mode(if entry_type == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(content.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, path.as_bytes(), b"", content)
    }

    pub fn directory(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path.as_bytes(), b"", b"")
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path.as_bytes(), target.as_bytes(), b"")
    }

    /// PAX records for the next entry.
    pub fn records(self, records: &[(&str, &[u8])]) -> Self {
        let body: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.raw(EntryType::XHeader, b"PaxHeaders/x", b"", &body, |_| {})
    }

    /// The archive with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let len = (rest..).find(|len| *len == rest + len.to_string().len()).unwrap();
    [len.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

/// Builds an image of an archive in `work`.
pub fn build_tar(stream: impl Read, work: &Path, options: BuildOptions) -> Result<BuildReport, BuildError> {
    Builder::new(options).build_tar(stream, Path::new("archive"), &work.join("boot"), &work.join("blobs"))
}

/// Builds an image of an archive and opens it.
pub fn open_tar(stream: impl Read, work: &Path, options: BuildOptions) -> Built {
    fs::create_dir_all(work).unwrap();
    let (boot, blobs) = (work.join("boot"), work.join("blobs"));
    let report = build_tar(stream, work, options).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let image = Bootstrap::open(&boot).unwrap();
    let reader = BlobDirReader::open(&image, &blobs).unwrap();
    Built { report, image, reader, boot, blobs }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
