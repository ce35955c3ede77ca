//! `shoal image`: what is done to images with no daemon.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use shoal_rafs::{
    BlobDirReader, Bootstrap, ImageFile,
    oci::{Authfile, PushOptions, Reference, Registry, RegistryOptions, push},
};

use super::{Failure, human_bytes, print_json, runtime};

mod build;
mod check;
mod export;
mod inspect;
mod merge;
mod optimize;
mod prefetch;
mod stat;
mod unpack;

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
    /// Verify every structure of a bootstrap and, with the blobs, every chunk. Exits 1 when something is wrong.
    Check(check::Check),
    /// Show what an image says of itself: super blocks, blobs, an inode by its path, the chunks of a file.
    Inspect(inspect::Inspect),
    /// Write the tree of an image as a tar.
    Unpack(unpack::Unpack),
    /// Write an image in a form that is mounted without Shoal.
    Export(export::Export),
    /// Push an image to a registry or into an OCI layout.
    Push(Push),
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
        }
    }
}

/// The image in a file: a bootstrap, or a blob with the bootstrap inside.
fn open(path: &Path) -> Result<(ImageFile, Bootstrap), Failure> {
    let file = ImageFile::open(path)?;
    let bootstrap = file.parse().map_err(|e| format!("{}: {}", path.display(), crate::chain(&e)))?;
    Ok((file, bootstrap))
}

/// The same where the content of files will be read as well.
pub(super) fn open_with_blobs(path: &Path, blob_dir: Option<&Path>) -> Result<(ImageFile, Bootstrap), Failure> {
    let (file, bootstrap) = open(path)?;
    if file.own_blob().is_none() && blob_dir.is_none() {
        let message = format!("{} has no blob inside: give --blob-dir", path.display());
        super::bad_usage(clap::error::ErrorKind::MissingRequiredArgument, &message);
    }
    Ok((file, bootstrap))
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

#[derive(Debug, clap::Args)]
pub(super) struct Push {
    /// Bootstrap file.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory with the image's blobs; those that the registry has already may be missing.
    #[arg(long)]
    blob_dir: PathBuf,
    /// `host[:port]/repo:tag`, or `oci:DIR:tag` for an OCI layout directory.
    reference: Reference,
    /// Speak plain HTTP to the registry. Loopback hosts are always spoken to so.
    #[arg(long)]
    plain_http: bool,
    /// A docker config.json with credentials.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// A PEM file with certificate authorities to trust besides the built-in ones.
    #[arg(long, value_name = "FILE")]
    ca_file: Vec<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Push {
    fn run(self) -> Result<ExitCode, Failure> {
        let registry = Registry::new(RegistryOptions {
            plain_http: if self.plain_http {
                vec![self.reference.source().registry().to_owned()]
            } else {
                Vec::new()
            },
            ca_files: self.ca_file,
            auth: self.authfile.as_deref().map(Authfile::load).transpose()?.unwrap_or_default(),
            ..RegistryOptions::default()
        })?;
        let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {bytes} {msg}")?);
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        let report = runtime()?.block_on(push(
            &registry,
            &self.bootstrap,
            &self.blob_dir,
            &self.reference,
            PushOptions::default(),
            |layer| {
                bar.inc(layer.size);
                bar.set_message(format!("sha256:{}", layer.id));
            },
        ))?;
        bar.finish_and_clear();
        if self.json {
            print_json(&report)?;
        } else {
            println!("{}", report.reference);
            println!(
                "{}, {} of it was there already",
                human_bytes(report.encoded_bytes),
                human_bytes(report.existing_bytes)
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}
