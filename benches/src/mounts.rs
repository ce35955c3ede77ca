//! How fast an image is read in each way of mounting it, next to what the same kernel makes of the same files: in one run, one
//! way after the other in each round.
//!
//! ```text
//! fuse     a daemon with an empty store, over FUSE; what is missing comes from a registry on this machine
//! native   the same daemon; the image is fetched and decoded whole, and mounted by the kernel
//! erofs    the same kernel driver with files that were made by hand: no daemon was ever there
//! ext4     the tree that the image was made of, on the disk of the temporary folder
//! peer     upstream's daemon over FUSE, if there is one: PEER_DAEMON; it reads the same blobs from the disk of the temporary folder
//! ```
//!
//! Two images: a tree of many files, and one file of a gigabyte. *Cold* is an empty store and an empty page cache; *local* is
//! everything on this machine's disk and an empty page cache; *hot* is everything in the page cache. `erofs` and `ext4` are
//! never cold.

mod peer;
pub(crate) mod reads;
mod report;
mod way;

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use shoal::{command::Failure, processes::RegistryProcess};
use shoal_rafs::{BlobDirReader, Bootstrap, expand_blob};

pub use self::report::Report;
use self::{
    peer::Peer,
    way::{Daemon, Files, Way},
};
use crate::half_compressible;

/// Bounds of the tree of many files: what is taken of a folder of this machine.
const TREE_FILES: usize = 5500;
const TREE_BYTES: u64 = 220 << 20;
const MAX_FILE: u64 = 4 << 20;
/// Bytes of the large file.
const LARGE: usize = 1 << 30;

/// What is measured.
struct Images {
    many: Image,
    large: Image,
}

/// An image, in the registry and as files.
struct Image {
    tag: &'static str,
    source: PathBuf,
    /// What the kernel's driver mounts.
    files: Files,
    /// Names relative to the root, sorted.
    names: Vec<PathBuf>,
}

/// Measures `rounds` rounds with the `shoal` binary given, files of the folder `source`, and upstream's daemon if it is given.
///
/// # Errors
/// Needs root, FUSE and EROFS; or a command failed.
pub async fn run(shoal: &Path, source: &Path, peer: Option<&Path>, rounds: usize) -> Result<Report, Failure> {
    let folder = tempfile::Builder::new().prefix("shoal-mounts-").tempdir()?;
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("many"))?;
    fs::create_dir_all(at("large"))?;
    eprintln!("mounts: copying files of {}", source.display());
    copy_some(source, &at("many"))?;
    fs::write(at("large/file"), half_compressible(LARGE))?;
    let layout = at("layout");
    let images = Images {
        many: Image::make(shoal, "many", &at("many"), folder.path(), &layout)?,
        large: Image::make(shoal, "large", &at("large"), folder.path(), &layout)?,
    };
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let registry = RegistryProcess::start(Command::new(shoal), &layout, listen, folder.path())?;
    let daemon = Daemon::start(shoal, folder.path(), registry.address()).await?;
    let peer = peer.map(|program| Peer::new(program, folder.path()));
    let mut report = Report::new(images.many.names.len(), images.many.bytes()?);
    for round in 1..=rounds {
        let ways = [Way::Fuse(&daemon), Way::Native(&daemon), Way::Erofs(folder.path()), Way::Ext4];
        for way in ways.into_iter().chain(peer.iter().map(Way::Peer)) {
            let figures = way.measure(&images.many, &images.large, round as u64).await?;
            eprintln!("mounts: round {round} of {rounds}: {} {}", way.name(), figures.in_one_line());
            report.add(way.name(), figures);
        }
    }
    Ok(report)
}

impl Image {
    /// Builds an image, and publishes it as `tag`.
    fn make(shoal: &Path, tag: &'static str, source: &Path, folder: &Path, layout: &Path) -> Result<Self, Failure> {
        eprintln!("mounts: building {tag}");
        let at = |name: &str| folder.join(format!("{tag}-{name}"));
        let (bootstrap, blobs) = (at("bootstrap"), at("blobs"));
        let mut build = Command::new(shoal);
        build.args(["image", "build", "--compressor", "zstd", "--source"]).arg(source);
        finish(build.arg("--bootstrap").arg(&bootstrap).arg("--blob-dir").arg(&blobs))?;
        let mut push = Command::new(shoal);
        push.args(["image", "push", "--bootstrap"]).arg(&bootstrap).arg("--blob-dir").arg(&blobs);
        finish(push.arg(format!("oci:{}:{tag}", layout.display())))?;
        let image = Bootstrap::open(&bootstrap)?;
        let reader = BlobDirReader::open(&image, &blobs)?;
        let mut expanded = Vec::new();
        for number in 0..image.blobs().len() as u32 {
            let path = at(&format!("expanded-{number}"));
            let file = fs::File::create(&path)?;
            expand_blob(&image, &reader, number, &file)?;
            file.sync_all()?;
            expanded.push(path);
        }
        let names = reads::files(source)?;
        Ok(Self { tag, source: source.to_owned(), files: Files { bootstrap, blobs: expanded, stored: blobs }, names })
    }

    fn bytes(&self) -> Result<u64, Failure> {
        let sizes = self.names.iter().map(|name| Ok::<_, Failure>(self.source.join(name).metadata()?.len()));
        sizes.sum()
    }
}

/// Copies files below `source`, by name, until it is enough.
fn copy_some(source: &Path, target: &Path) -> Result<(), Failure> {
    let (mut files, mut bytes) = (0, 0);
    for name in reads::files(source)? {
        let len = source.join(&name).metadata().map_or(u64::MAX, |metadata| metadata.len());
        if len > MAX_FILE || bytes + len > TREE_BYTES {
            continue;
        }
        let copy = target.join(&name);
        fs::create_dir_all(copy.parent().unwrap_or(target))?;
        fs::copy(source.join(&name), copy)?;
        (files, bytes) = (files + 1, bytes + len);
        if files == TREE_FILES {
            break;
        }
    }
    if files == 0 { Err(format!("{} has no files", source.display()).into()) } else { Ok(()) }
}

fn finish(command: &mut Command) -> Result<(), Failure> {
    let output = command.output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()).into()),
    }
}
