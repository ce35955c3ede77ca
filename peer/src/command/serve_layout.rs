//! `shoal serve-layout`: a read-only registry over an OCI layout directory.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, process::ExitCode};

use super::{Failure, runtime, stop_signal};
use crate::layout_server::{LayoutServer, RegistryFigures};

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
    /// Print the bytes sent to each client address as well: `"clients":{"ADDRESS":N}`.
    #[arg(long)]
    by_client: bool,
}

impl ServeLayout {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        runtime()?.block_on(async {
            let server = LayoutServer::start(&self.dir, self.listen).await?;
            println!("listening on {}", server.addr());
            stop_signal().await?;
            let (clients, stats) = server.stop_and_count().await;
            let clients = if self.by_client { clients } else { BTreeMap::new() };
            let figures = RegistryFigures { requests: stats.requests, bytes_sent: stats.sent_bytes, clients };
            println!("{}", serde_json::to_string(&figures)?);
            Ok(ExitCode::SUCCESS)
        })
    }
}
