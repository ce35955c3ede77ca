//! `shoal mount`: a lazy mount in the foreground, with no daemon.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use shoal_rafs::{BlobDir, BlobDirReader, ChunkSource, Mount as Session, MountOptions, oci::Reference};

use super::{Failure, bad_usage, image, runtime, stop_signal};
use crate::{config::Config, daemon};

/// Stays in the foreground and unmounts on SIGTERM or SIGINT, or ends when it is unmounted from outside.
#[derive(Debug, clap::Args)]
#[command(override_usage = "shoal mount [OPTIONS] <REF | --bootstrap FILE [--blob-dir DIR]> <MOUNTPOINT>")]
pub(super) struct Mount {
    /// [REF] MOUNTPOINT, where REF is `host[:port]/repo[:tag][@sha256:..]` or `oci:DIR[:tag]`.
    #[arg(required = true, num_args = 1..=2, value_names = ["REF", "MOUNTPOINT"])]
    operands: Vec<String>,
    /// Bootstrap file of an image whose blobs lie in a directory, or a blob with the bootstrap inside.
    #[arg(long, value_name = "FILE")]
    bootstrap: Option<PathBuf>,
    /// Directory with the image's blobs, named by their sha256.
    #[arg(long, value_name = "DIR", requires = "bootstrap")]
    blob_dir: Option<PathBuf>,
    /// Keep what is fetched in this directory, for the next time. Without it, it goes with the mount.
    #[arg(long, value_name = "DIR", conflicts_with = "bootstrap")]
    data_dir: Option<PathBuf>,
    /// Sets an option of the daemon's configuration, for instance `--set 'registry.authfile="FILE"'`.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "bootstrap")]
    overrides: Vec<String>,
}

impl Mount {
    pub(super) fn run(mut self) -> Result<ExitCode, Failure> {
        let mountpoint = PathBuf::from(self.operands.pop().unwrap_or_default());
        match (self.operands.pop(), self.bootstrap.take(), self.blob_dir.take()) {
            (None, Some(bootstrap), blob_dir) => {
                from_files(&bootstrap, blob_dir.as_deref(), &mountpoint)
            }
            (Some(reference), None, None) => self.mount_reference(&reference, &mountpoint),
            _ => {
                let message = "give either REF and MOUNTPOINT, or --bootstrap, --blob-dir and MOUNTPOINT";
                bad_usage(clap::error::ErrorKind::ArgumentConflict, message)
            }
        }
    }

    fn mount_reference(self, reference: &str, mountpoint: &std::path::Path) -> Result<ExitCode, Failure> {
        let reference: Reference = reference.parse()?;
        let mut config = Config::load(None, &self.overrides)?;
        let scratch = tempfile::tempdir()?;
        config.data_dir = self.data_dir.unwrap_or_else(|| scratch.path().to_owned());
        runtime()?.block_on(async {
            let alone = daemon::Alone::start(config).await?;
            let session = alone.mount(&reference, mountpoint).await?;
            until_stopped(session).await?;
            alone.stop().await;
            Ok(ExitCode::SUCCESS)
        })
    }
}

fn from_files(
    bootstrap: &std::path::Path,
    blob_dir: Option<&std::path::Path>,
    mountpoint: &std::path::Path,
) -> Result<ExitCode, Failure> {
    let (file, image) = image::open(bootstrap, blob_dir)?;
    let reader = BlobDirReader::at(&image, &file.blob_paths(blob_dir))?;
    let source: Arc<dyn ChunkSource> = Arc::new(BlobDir::new(reader, 0)?);
    runtime()?.block_on(async {
        let session = Session::new(image, source, mountpoint, MountOptions::default())?;
        until_stopped(session).await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Waits for a signal or for an unmount from outside, then unmounts.
async fn until_stopped(session: Session) -> Result<(), Failure> {
    let session = Arc::new(session);
    let ended = tokio::task::spawn_blocking({
        let session = session.clone();
        move || session.wait()
    });
    tokio::select! {
        stop = stop_signal() => {
            stop?;
            session.unmount()?;
        }
        ended = ended => ended?,
    }
    Ok(())
}
