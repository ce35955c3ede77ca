//! Archives of layouts (`oci-archive:FILE`), as BuildKit, skopeo and podman write and read them.
//!
//! A reader of images jumps about, and a pipe cannot; so an archive is unpacked into a folder that goes away with the
//! command, and a new one is made of such a folder when all is in it. Of an archive only what a layout has is unpacked,
//! each blob under the digest that its bytes have; anything else in it is passed over.

use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    str::FromStr,
};

use shoal_proto::ObjectId;
use tar::EntryType;
use tempfile::{NamedTempFile, TempDir};

use super::{
    Layout, Reference, ReferenceError, RegistryError, Source,
    bootstrap_layer::header,
    layout::{MAX_INDEX, copy_hashed, write_atomically},
    reference::{parse_tag, split_layout_tag},
};
use crate::{
    ArchiveError, ArchiveLimits, Kind,
    archive::{Archive, Member, MemberKind, decompress},
};

/// In front of the path of an archive.
const ARCHIVE: &str = "oci-archive:";
/// Limits of an archive of images: names, and bytes of all blobs.
const LIMITS: ArchiveLimits = ArchiveLimits { names: 1 << 20, bytes: 1 << 40 };

/// What a command names: an image in a registry or a layout folder, or an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// In a registry or a layout folder.
    Reference(Reference),
    /// `oci-archive:FILE[:tag]`.
    Archive {
        /// The file; `-` is standard input or output.
        file: PathBuf,
        /// The tag in its index.
        tag: Option<String>,
    },
}

impl Location {
    /// Whether it is standard input, or output.
    pub fn is_standard(&self) -> bool {
        matches!(self, Self::Archive { file, .. } if file.as_os_str() == "-")
    }
}

impl FromStr for Location {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let Some(rest) = text.strip_prefix(ARCHIVE) else { return text.parse().map(Self::Reference) };
        let (file, tag) = split_layout_tag(rest);
        if file.is_empty() {
            let (part, rule) = ("archive", "must name a file, or be - for standard input or output");
            return Err(ReferenceError::Grammar { part, found: String::new(), rule });
        }
        Ok(Self::Archive { file: PathBuf::from(file), tag: tag.map(parse_tag).transpose()? })
    }
}

/// Why an archive could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LayoutArchiveError {
    /// A file could not be read or written.
    #[error("{what}")]
    Io {
        /// What was done to which file.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// It is no tar.
    #[error("cannot read {name}")]
    Tar {
        /// The archive.
        name: String,
        /// What is wrong.
        source: ArchiveError,
    },
    /// It is no archive of a layout.
    #[error("{name}: {problem}")]
    Content {
        /// The archive.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The folder that it is unpacked into failed.
    #[error(transparent)]
    Layout(#[from] RegistryError),
}

impl From<ReferenceError> for LayoutArchiveError {
    fn from(error: ReferenceError) -> Self {
        Self::Layout(error.into())
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> LayoutArchiveError {
    let what = what.into();
    move |source| LayoutArchiveError::Io { what, source }
}

/// A location with a reference to use, for as long as this lives.
#[derive(Debug)]
pub struct OpenLocation {
    reference: Reference,
    /// Of an archive: the folder, and for a new one the file that it will be.
    folder: Option<(TempDir, Option<PathBuf>)>,
    /// What people call an archive.
    archive: Option<String>,
}

impl OpenLocation {
    /// An image that is to be read. Reads an archive to its end and verifies its blobs.
    pub fn source(location: &Location) -> Result<Self, LayoutArchiveError> {
        let (file, tag) = match location {
            Location::Reference(reference) => return Ok(Self::unopened(reference)),
            Location::Archive { file, tag } => (file, tag),
        };
        let folder = folder()?;
        if location.is_standard() {
            unpack(io::stdin().lock(), "standard input", folder.path())?;
        } else {
            let name = file.display().to_string();
            let opened = File::open(file).map_err(io_error(format!("cannot open {name}")))?;
            unpack(opened, &name, folder.path())?;
        }
        let reference = Reference::new(Source::layout(folder.path())?, tag.as_deref(), None)?;
        Ok(Self { reference, folder: Some((folder, None)), archive: Some(archive_name(file, tag.as_deref())) })
    }

    /// An image that is to be written.
    pub fn target(location: &Location) -> Result<Self, LayoutArchiveError> {
        let (file, tag) = match location {
            Location::Reference(reference) => return Ok(Self::unopened(reference)),
            Location::Archive { file, tag } => (file, tag),
        };
        let folder = folder()?;
        let reference = Reference::new(Source::layout(folder.path())?, tag.as_deref(), None)?;
        let archive = Some(archive_name(file, tag.as_deref()));
        Ok(Self { reference, folder: Some((folder, Some(file.clone()))), archive })
    }

    fn unopened(reference: &Reference) -> Self {
        Self { reference: reference.clone(), folder: None, archive: None }
    }

    /// What to tell people where a report says `reported`: an archive has a name, and not the folder that stood for it.
    pub fn told(&self, reported: &str) -> String {
        match (&self.archive, reported.rsplit_once('@')) {
            (None, _) => reported.to_owned(),
            (Some(archive), None) => archive.clone(),
            (Some(archive), Some((_, digest))) => format!("{archive}@{digest}"),
        }
    }

    /// What to read or write through a [`Registry`](super::Registry).
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// Writes the archive, whole or not at all, if this is a new one.
    pub fn finish(self) -> Result<(), LayoutArchiveError> {
        let Some((folder, Some(file))) = self.folder else { return Ok(()) };
        let layout = Layout::new(folder.path());
        if file.as_os_str() == "-" {
            return pack(&layout, io::stdout().lock()).map_err(io_error("cannot write to standard output"));
        }
        let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let write = || {
            let mut temporary = NamedTempFile::with_prefix_in(".shoal-", dir)?;
            pack(&layout, temporary.as_file_mut())?;
            temporary.as_file().sync_all()?;
            Ok::<_, io::Error>(temporary.persist(&file).map(drop)?)
        };
        write().map_err(io_error(format!("cannot write {}", file.display())))
    }
}

fn archive_name(file: &Path, tag: Option<&str>) -> String {
    let tag = tag.map(|tag| format!(":{tag}")).unwrap_or_default();
    format!("oci-archive:{}{tag}", file.display())
}

fn folder() -> Result<TempDir, LayoutArchiveError> {
    TempDir::with_prefix("shoal-archive-").map_err(io_error("cannot make a folder for the archive"))
}

/// Unpacks an archive, which may be compressed, into a layout folder.
fn unpack(stream: impl Read, name: &str, dir: &Path) -> Result<(), LayoutArchiveError> {
    let broken = |source| LayoutArchiveError::Tar { name: name.to_owned(), source };
    let content = |problem: &str| LayoutArchiveError::Content { name: name.to_owned(), problem: problem.to_owned() };
    let stream = decompress(BufReader::with_capacity(1 << 20, stream));
    let mut archive = Archive::new(stream.map_err(io_error(format!("cannot read {name}")))?, LIMITS);
    let layout = Layout::new(dir);
    layout.create()?;
    let (mut index, mut names) = (None, 0);
    while let Some(member) = archive.next().map_err(broken)? {
        names += 1;
        if names > LIMITS.names {
            return Err(broken(archive.too_large("names", LIMITS.names)));
        }
        match part(&member) {
            Part::Other => {}
            Part::Index if member.size > MAX_INDEX => return Err(content("its index.json is too large")),
            Part::Index => {
                let mut bytes = Vec::new();
                let read = archive.content(&member).read_to_end(&mut bytes);
                read.map_err(|source| broken(Archive::<&[u8]>::read_error("index.json", source)))?;
                index = Some(bytes);
            }
            Part::Blob(id) => {
                let mut file = layout.incoming()?;
                let copied = copy_hashed(&mut archive.content(&member), file.as_file_mut());
                let place = format!("blob {id}");
                let found = copied.map_err(|source| broken(Archive::<&[u8]>::read_error(&place, source)))?;
                if found != id {
                    return Err(content(&format!("blob sha256:{id} has the digest sha256:{found}")));
                }
                layout.keep(file, id)?;
            }
        }
    }
    let index = index.ok_or_else(|| content("no index.json in it: it is no OCI archive"))?;
    let path = dir.join("index.json");
    write_atomically(&path, |file| file.write_all(&index)).map_err(io_error("cannot write index.json"))
}

enum Part {
    Index,
    Blob(ObjectId),
    Other,
}

fn part(member: &Member) -> Part {
    let path = member.path.strip_prefix(b"./").unwrap_or(&member.path);
    match (member.kind, std::str::from_utf8(path)) {
        (MemberKind::Node(Kind::File), Ok("index.json")) => Part::Index,
        (MemberKind::Node(Kind::File), Ok(path)) => {
            let id = path.strip_prefix("blobs/sha256/").and_then(|hex| hex.parse().ok());
            id.map_or(Part::Other, Part::Blob)
        }
        _ => Part::Other,
    }
}

/// Writes a layout folder as an archive: the same folder gives the same bytes.
fn pack(layout: &Layout, out: impl Write) -> io::Result<()> {
    let mut tar = tar::Builder::new(BufWriter::with_capacity(1 << 20, out));
    for dir in ["blobs/", "blobs/sha256/"] {
        tar.append(&header(dir, EntryType::Directory, 0o755, 0)?, io::empty())?;
    }
    let blobs = layout.dir().join("blobs/sha256");
    let names = fs::read_dir(&blobs)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<io::Result<Vec<String>>>()?;
    names.sort_unstable();
    let blobs = names.iter().map(|name| format!("blobs/sha256/{name}"));
    for path in blobs.chain(["index.json".to_owned(), "oci-layout".to_owned()]) {
        let file = File::open(layout.dir().join(&path))?;
        let size = file.metadata()?.len();
        tar.append(&header(&path, EntryType::Regular, 0o644, size)?, file)?;
    }
    tar.into_inner()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout_with(blobs: &[&[u8]]) -> (TempDir, Layout) {
        let dir = TempDir::new().unwrap();
        let layout = Layout::new(dir.path().join("layout"));
        for blob in blobs {
            layout.put_blob(blob).unwrap();
        }
        layout.put_manifest(Some("v1"), "a/b", b"manifest").unwrap();
        (dir, layout)
    }

    #[test]
    fn locations_are_told_apart() {
        let archive =
            |file: &str, tag: Option<&str>| Ok(Location::Archive { file: file.into(), tag: tag.map(str::to_owned) });
        assert_eq!("oci-archive:image.tar:v1".parse(), archive("image.tar", Some("v1")));
        assert_eq!("oci-archive:/a/b.tar".parse(), archive("/a/b.tar", None));
        assert_eq!("oci-archive:-".parse(), archive("-", None));
        assert!("oci-archive:-".parse::<Location>().unwrap().is_standard());
        assert!(matches!("oci:/a:v1".parse(), Ok(Location::Reference(_))));
        assert!("oci-archive:".parse::<Location>().is_err());
        assert!("alpine".parse::<Location>().is_err());
    }

    #[test]
    fn what_is_packed_is_unpacked_and_always_the_same() {
        let (dir, layout) = layout_with(&[b"one", b"two"]);
        let packed = || {
            let mut bytes = Vec::new();
            pack(&layout, &mut bytes).unwrap();
            bytes
        };
        assert_eq!(packed(), packed());
        let file = dir.path().join("image.tar");
        fs::write(&file, packed()).unwrap();
        let location: Location = format!("oci-archive:{}:v1", file.display()).parse().unwrap();
        let open = OpenLocation::source(&location).unwrap();
        let unpacked = Layout::new(open.reference().source().layout_dir().unwrap());
        assert_eq!(unpacked.entries().unwrap(), layout.entries().unwrap());
        assert_eq!(unpacked.resolve(open.reference()).unwrap(), layout.resolve(open.reference()).unwrap());
    }

    #[test]
    fn damage_is_named_and_strangers_are_passed_over() {
        let (dir, layout) = layout_with(&[b"one"]);
        let mut good = Vec::new();
        pack(&layout, &mut good).unwrap();
        let unpacked = |bytes: &[u8]| unpack(bytes, "image.tar", &dir.path().join("out"));
        let mut wrong = good.clone();
        let at = wrong.windows(3).position(|bytes| bytes == b"one").unwrap();
        wrong[at] = b'x';
        let error = unpacked(&wrong).unwrap_err().to_string();
        assert!(error.contains("has the digest"), "{error}");
        let error = unpacked(&good[..good.len() / 2]).unwrap_err();
        assert!(matches!(error, LayoutArchiveError::Tar { .. }), "{error}");
        let mut other = tar::Builder::new(Vec::new());
        for name in ["manifest.json", "etc/passwd"] {
            other.append(&header(name, EntryType::Regular, 0o644, 2).unwrap(), &b"{}"[..]).unwrap();
        }
        let error = unpacked(&other.into_inner().unwrap()).unwrap_err().to_string();
        assert!(error.contains("no index.json"), "{error}");
        assert!(!dir.path().join("out/etc").exists());
    }
}
