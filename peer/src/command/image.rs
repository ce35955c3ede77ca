//! `shoal image`: what is done to images with no daemon.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Subcommand;
use shoal_rafs::{BlobDirReader, Bootstrap, ImageFile};

use super::{Failure, human_bytes, print_json, runtime};

mod authfiles;
mod build;
mod check;
mod convert;
mod copy;
mod export;
mod inspect;
mod merge;
mod optimize;
mod prefetch;
mod push;
mod registry;
mod stat;
mod unpack;

pub(super) use registry::DecryptionArgs;

pub(super) use build::{
    DigesterName, Job, MAX_ENCRYPTED_CHUNK, SourceKind, encryption, power_of_two, print_report as print_build_report,
};
pub(super) use check::print_check;
pub(super) use inspect::print_image;
pub(super) use unpack::write_tar;

#[derive(Debug, Subcommand)]
pub(super) enum Image {
    /// Build a bootstrap and a data blob from a directory or a tar.
    Build(build::Build),
    /// Merge the bootstraps of layers into that of an image.
    Merge(merge::Merge),
    /// Lay what a start needs out together, as a list or a trace says.
    Optimize(optimize::Optimize),
    /// Compare images: the chunks that they share.
    Stat(stat::Stat),
    /// Verify every structure of a bootstrap and, with the blobs, every chunk; or all of an image in a registry, also
    /// against its source. Exits 1 when something is wrong.
    Check(Box<check::Check>),
    /// Show what an image says of itself: super blocks, blobs, an inode by its path, the chunks of a file.
    Inspect(inspect::Inspect),
    /// Write the tree of an image as a tar.
    Unpack(unpack::Unpack),
    /// Write an image in a form that is mounted without Shoal.
    Export(export::Export),
    /// Push an image to a registry or into an OCI layout.
    Push(push::Push),
    /// Convert an OCI or Docker image to a Nydus image, or back.
    Convert(Box<convert::Convert>),
    /// Copy an image of any kind between registries, OCI layouts and archives.
    #[command(visible_alias = "pull")]
    Copy(copy::Copy),
}

impl Image {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Build(verb) => verb.run(),
            Self::Merge(verb) => verb.run(),
            Self::Optimize(verb) => verb.run(),
            Self::Stat(verb) => verb.run(),
            Self::Check(verb) => verb.run(),
            Self::Inspect(verb) => verb.run(),
            Self::Unpack(verb) => verb.run(),
            Self::Export(verb) => verb.run(),
            Self::Push(verb) => verb.run(),
            Self::Convert(verb) => verb.run(),
            Self::Copy(verb) => verb.run(),
        }
    }
}

/// The image in a file: a bootstrap, or a blob with the bootstrap inside.
pub(super) fn open(path: &Path) -> Result<(ImageFile, Bootstrap), Failure> {
    let file = ImageFile::open(path)?;
    let bootstrap = file.parse().map_err(|e| format!("{}: {}", path.display(), crate::chain(&e)))?;
    Ok((file, bootstrap))
}

/// The same where the content of files will be read as well.
fn open_with_blobs(path: &Path, blob_dir: Option<&Path>) -> Result<(ImageFile, Bootstrap), Failure> {
    let (file, bootstrap) = open(path)?;
    if file.own_blob().is_none() && blob_dir.is_none() {
        no_blob_dir(path);
    }
    Ok((file, bootstrap))
}

/// Ends the process: the blobs of an image are nowhere.
pub(super) fn no_blob_dir(path: &Path) -> ! {
    let message = format!("{} has no blob inside: give --blob-dir", path.display());
    super::bad_usage(clap::error::ErrorKind::MissingRequiredArgument, &message)
}

/// An image in files, whose content is read.
#[derive(Debug, clap::Args)]
struct ImageFiles {
    /// Bootstrap file, or a blob with the bootstrap inside.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory with the image's blobs. Not needed for a blob that has the bootstrap inside.
    #[arg(long)]
    blob_dir: Option<PathBuf>,
}

impl ImageFiles {
    fn open(&self) -> Result<(Bootstrap, BlobDirReader), Failure> {
        let (file, bootstrap) = open_with_blobs(&self.bootstrap, self.blob_dir.as_deref())?;
        let reader = BlobDirReader::at(&bootstrap, &file.blob_paths(self.blob_dir.as_deref()))?;
        Ok((bootstrap, reader))
    }
}
