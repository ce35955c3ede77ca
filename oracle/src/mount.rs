//! Mounts an image over FUSE with the file system of `nydus-rafs` behind the server of `fuse-backend-rs`, wired as their own
//! daemon does it. No more than what reads need: one image, no upgrade, no failover.
//!
//! What that daemon does unless told otherwise is done here (their `service/src/fusedev.rs` and `src/bin/nydusd/main.rs`): 4
//! threads, the options of its virtual file system, files and directories opened without asking. What is in the configuration is
//! whoever runs this to say; what is left out there has the defaults of `nydus-api`, among them reads from the backend made
//! up to 1 MiB, and nothing fetched before it is read.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use clap::{Args, Subcommand};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::api::{BackFileSystem, Vfs, VfsOptions};
use fuse_backend_rs::transport::{FuseChannel, FuseSession};
use nydus_api::ConfigV2;
use nydus_rafs::fs::Rafs;
use nydus_utils::metrics::export_backend_metrics;

/// What is used of the command line of `nydusd`; the names of flags are its own.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve an image until it is unmounted.
    Fuse(Fuse),
}

impl Command {
    /// Does it.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Fuse(fuse) => fuse.run(),
        }
    }
}

/// Serves an image over FUSE.
#[derive(Debug, Args)]
pub struct Fuse {
    /// Backend, cache, and how to read.
    #[arg(long)]
    config: PathBuf,
    /// The image.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Where it is mounted.
    #[arg(long)]
    mountpoint: PathBuf,
    /// Who take requests from the kernel.
    #[arg(long, default_value_t = 4)]
    fuse_threads: usize,
    /// How many files may be open; 0 leaves the limit as it is, and nothing else is done here. The original wants a million unless
    /// told otherwise.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=0))]
    rlimit_nofile: u64,
    /// A Unix socket to be asked for figures at.
    #[arg(long)]
    apisock: Option<PathBuf>,
}

impl Fuse {
    fn run(self) -> Result<()> {
        let config = std::fs::read_to_string(&self.config).with_context(|| self.config.display().to_string())?;
        let config = Arc::new(ConfigV2::from_str(&config).context("the configuration")?);
        let id = self.mountpoint.display().to_string();
        let (mut rafs, reader) = Rafs::new(&config, &id, &self.bootstrap).context("open")?;
        rafs.import(reader, None).context("import")?;
        let vfs = Vfs::new(VfsOptions { no_open: true, ..VfsOptions::default() });
        let fs: BackFileSystem = Box::new(rafs);
        vfs.mount(fs, "/").map_err(|error| anyhow!("{error:?}"))?;
        let server = Arc::new(Server::new(Arc::new(vfs)));
        if let Some(path) = &self.apisock {
            answer(path).context("the socket")?;
        }
        let failed = |error| anyhow!("{error}");
        let mut session = FuseSession::new(&self.mountpoint, "rafs", "", true).map_err(failed)?;
        session.mount().map_err(failed)?;
        let serve = |_| {
            let (server, channel) = (Arc::clone(&server), session.new_channel().map_err(failed)?);
            Ok(thread::spawn(move || serve(&server, channel)))
        };
        let threads = (0..self.fuse_threads.max(1)).map(serve).collect::<Result<Vec<_>>>()?;
        threads.into_iter().for_each(|thread| drop(thread.join()));
        Ok(())
    }
}

/// Answers the kernel until it has unmounted.
fn serve(server: &Server<Arc<Vfs>>, mut channel: FuseChannel) {
    while let Ok(Some((reader, writer))) = channel.get_request() {
        if let Err(fuse_backend_rs::Error::EncodeMessage(_)) =
            server.handle_message(reader, writer.into(), None, None)
        {
            return;
        }
    }
}

/// Tells whoever asks what was read from the backend so far, as `GET /api/v1/metrics/backend` does.
fn answer(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    // It ends with the process.
    thread::spawn(move || listener.incoming().flatten().for_each(|client| drop(tell(&client))));
    Ok(())
}

fn tell(mut client: &UnixStream) -> Result<()> {
    for line in BufReader::new(client).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let figures = export_backend_metrics(&None).map_err(|error| anyhow!("{error:?}"))?;
    let length = figures.len();
    write!(client, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{figures}")?;
    Ok(())
}
