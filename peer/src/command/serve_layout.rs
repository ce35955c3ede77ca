//! `shoal serve-layout`: a read-only registry over an OCI layout directory.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use serde::{Deserialize, Serialize};

use super::{Failure, runtime, stop_signal};
use crate::layout_server::LayoutServer;

/// What a registry sent, headers and all: the last line of `shoal serve-layout`, and a part of the demo's report.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct RegistryFigures {
    pub requests: u64,
    pub bytes_sent: u64,
}

/// Prints `listening on ADDRESS` on standard output once it serves; stops on SIGTERM or SIGINT, and then prints
/// `{"requests":N,"bytes_sent":N}`.
#[derive(Debug, clap::Args)]
pub(super) struct ServeLayout {
    /// OCI layout directory, as `shoal image push oci:DIR:tag` writes it.
    dir: PathBuf,
    /// Address to listen on; port 0 takes any free one. There is no authentication: keep it on loopback or a trusted
    /// network.
    #[arg(long, default_value = "127.0.0.1:5000")]
    listen: SocketAddr,
}

impl ServeLayout {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        runtime()?.block_on(async {
            let server = LayoutServer::start(&self.dir, self.listen).await?;
            println!("listening on {}", server.addr());
            stop_signal().await?;
            let stats = server.stop().await;
            let figures = RegistryFigures { requests: stats.requests, bytes_sent: stats.sent_bytes };
            println!("{}", serde_json::to_string(&figures)?);
            Ok(ExitCode::SUCCESS)
        })
    }
}
