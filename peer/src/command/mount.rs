//! `shoal mount`: a lazy mount in the foreground, with no daemon.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use shoal_rafs::{
    BlobDir, BlobDirReader, ChunkSource, ImageFile, Mount as Session, MountOptions, MountStats, Trace, oci::Reference,
};

use super::{Failure, bad_usage, human_bytes, image, runtime, stop_signal};
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
    /// A PEM file with a private key that opens the bootstrap layer of an encrypted image; may be given several times.
    #[arg(long, value_name = "FILE", conflicts_with = "bootstrap")]
    decryption_key: Vec<PathBuf>,
    /// Write which chunks of which files were read, in the order of their first access, when the mount ends.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print what was read, how long reads waited, and how much was fetched for it, when the mount ends.
    #[arg(long)]
    stats: bool,
    /// Sets an option of the daemon's configuration, for instance `--set 'registry.authfile="FILE"'`.
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "bootstrap")]
    overrides: Vec<String>,
}

impl Mount {
    pub(super) fn run(mut self) -> Result<ExitCode, Failure> {
        let mountpoint = PathBuf::from(self.operands.pop().unwrap_or_default());
        match (self.operands.pop(), self.bootstrap.take(), self.blob_dir.take()) {
            (None, Some(bootstrap), blob_dir) => {
                from_files(&bootstrap, blob_dir.as_deref(), &mountpoint, self.trace.as_deref(), self.stats)
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
        config.registry.decryption_keys.extend(self.decryption_key);
        let scratch = tempfile::tempdir()?;
        config.data_dir = self.data_dir.unwrap_or_else(|| scratch.path().to_owned());
        runtime()?.block_on(async {
            let alone = daemon::Alone::start(config).await?;
            let mounted = alone.mount(&reference, mountpoint, self.trace.is_some()).await?;
            let stats = until_stopped(mounted.session).await?;
            if self.stats {
                print_stats(stats, alone.received());
            }
            alone.stop().await;
            write_trace(mounted.trace.as_deref(), self.trace.as_deref())?;
            Ok(ExitCode::SUCCESS)
        })
    }
}

fn from_files(
    bootstrap: &std::path::Path,
    blob_dir: Option<&std::path::Path>,
    mountpoint: &std::path::Path,
    trace_file: Option<&std::path::Path>,
    with_stats: bool,
) -> Result<ExitCode, Failure> {
    let (image, paths) = ImageFile::open_in_place(bootstrap, blob_dir)?;
    if image.blobs().iter().any(|blob| paths.path(blob.id).is_none()) {
        image::no_blob_dir(bootstrap);
    }
    let reader = BlobDirReader::lazily(&image, &paths)?;
    let blobs = Arc::new(BlobDir::new(reader, 0)?);
    let source: Arc<dyn ChunkSource> = blobs.clone();
    let trace = trace_file.map(|_| Arc::new(Trace::new(image.clone())));
    runtime()?.block_on(async {
        let fs_name = bootstrap.display().to_string();
        let options = MountOptions { fs_name, trace: trace.clone(), ..MountOptions::default() };
        let session = Session::new(image, source, mountpoint, options)?;
        let stats = until_stopped(session).await?;
        if with_stats {
            print_stats(stats, blobs.bytes_read());
        }
        write_trace(trace.as_deref(), trace_file)?;
        Ok(ExitCode::SUCCESS)
    })
}

fn write_trace(trace: Option<&Trace>, path: Option<&std::path::Path>) -> Result<(), Failure> {
    if let (Some(trace), Some(path)) = (trace, path) {
        let file = std::fs::File::create(path).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        trace.write(std::io::BufWriter::new(file))?;
    }
    Ok(())
}

/// `fetched`: encoded bytes that came over the network, or from files of blobs.
fn print_stats(MountStats { reads, bytes, errors, times }: MountStats, fetched: u64) {
    println!("{reads} reads of {}, {errors} failed", human_bytes(bytes));
    let time = |percent| humantime::format_duration(times.percentile(percent));
    println!("half took at most {}, 99 of 100 at most {}", time(50), time(99));
    println!("{} fetched, {:.2} for each byte read", human_bytes(fetched), fetched as f64 / bytes.max(1) as f64);
}

/// Waits for a signal or for an unmount from outside, then unmounts. Gives what was done until then.
async fn until_stopped(session: Session) -> Result<MountStats, Failure> {
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
    Ok(session.stats())
}
