//! How fast an image is read in each way of mounting it, next to what the same kernel makes of the same files: in one run, one
//! way after the other in each round.
//!
//! ```text
//! fuse       a daemon with an empty store, over FUSE; what is missing comes from a registry on this machine
//! native     the same daemon; the image is fetched and decoded whole, and mounted by the kernel
//! erofs      the same kernel driver with files that were made by hand: no daemon was ever there
//! ext4       the tree that the image was made of, on the disk of the temporary folder
//! bare_fuse  files of the same sizes in memory, by the same FUSE library
//! peer       upstream's daemon over FUSE, if there is one; it reads the same blobs from the same registry
//! ```
//!
//! Two images: a tree of many files, and one large file. *Cold* is an empty store and an empty page cache; *local* is
//! everything on this machine's disk and an empty page cache; *hot* is everything in the page cache. `erofs` and `ext4` are
//! never cold, `bare_fuse` is always hot.
//!
//! What was fetched for the opens is what the daemon received from the registry, the bootstrap included; of upstream's daemon what it
//! has read from its backend by its own count, without the bootstrap, which it has as a file.

mod bare;
mod bars;
mod fio;
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
    way::{Daemon, Files, Tools, Way},
};
use crate::{half_compressible, machine::finish};

/// Bounds of the tree of many files: what is taken of a folder of this machine.
const TREE_FILES: usize = 5500;
const TREE_BYTES: u64 = 220 << 20;
const MAX_FILE: u64 = 4 << 20;

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

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// The `shoal` binary.
    pub shoal: &'a Path,
    /// The folder whose files are copied into the image.
    pub source: &'a Path,
    /// Upstream's daemon, if there is one.
    pub peer: Option<&'a Path>,
    /// Bytes of the large file.
    pub large: usize,
    /// How often everything is done.
    pub rounds: usize,
}

/// Measures all ways, one after the other in each round.
///
/// # Errors
/// Needs root, FUSE and EROFS; or a command failed.
pub async fn run(options: Options<'_>) -> Result<Report, Failure> {
    let Options { shoal, source, rounds, .. } = options;
    let folder = tempfile::Builder::new().prefix("shoal-mounts-").tempdir()?;
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("many"))?;
    fs::create_dir_all(at("large"))?;
    eprintln!("mounts: copying files of {}", source.display());
    copy_some(source, &at("many"))?;
    fs::write(at("large/file"), half_compressible(options.large))?;
    let layout = at("layout");
    let images = Images {
        many: Image::make(shoal, "many", &at("many"), folder.path(), &layout)?,
        large: Image::make(shoal, "large", &at("large"), folder.path(), &layout)?,
    };
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let registry = RegistryProcess::start(Command::new(shoal), &layout, listen, folder.path())?;
    let daemon = Daemon::start(shoal, folder.path(), registry.address()).await?;
    let peer = options.peer.map(|program| Peer::new(program, folder.path(), registry.address()));
    let fio = fio::version();
    let tools = Tools { fio: fio.is_some() };
    let reader = fio.unwrap_or_else(|| "shoal-mounts".to_owned());
    let mut report = Report::new(images.many.names.len(), images.many.bytes()?, reader, options.peer);
    for round in 1..=rounds {
        let folder = folder.path();
        let ways = [Way::Fuse(&daemon), Way::Native(&daemon), Way::Erofs(folder), Way::Ext4, Way::Bare(folder)];
        for way in ways.into_iter().chain(peer.iter().map(Way::Peer)) {
            let figures = way.measure(&images.many, &images.large, tools, round as u64).await?;
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
        Ok(Self { tag, source: source.to_owned(), files: Files { bootstrap, blobs: expanded }, names })
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
