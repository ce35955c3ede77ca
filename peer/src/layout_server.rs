//! A read-only registry over an OCI layout folder: what `push` wrote to `oci:DIR:tag`, others pull from here.
//!
//! Every repository name leads to the same folder. A tag is looked up among the reference names of the index, first as
//! `repository:tag`, then as the plain tag: an image pushed to `oci:DIR:v1` is pulled as `host:port/any/name:v1`.
//!
//! Requests and every byte written to a socket, headers included, are counted: what a registry would have to send is
//! the figure that this program is about. No writes, no authentication, no TLS, no listing of tags.

mod answer;
mod listener;

use std::{
    collections::BTreeMap,
    future::IntoFuture,
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::Router;
use serde::{Deserialize, Serialize};
use shoal_rafs::oci::Layout;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

use self::listener::CountedListener;

/// How long [`LayoutServer::stop`] lets answers go on before it cuts them.
const GRACE: Duration = Duration::from_secs(5);

/// A running server. Dropping it stops it as [`stop`](Self::stop) does, without waiting.
#[derive(Debug)]
pub struct LayoutServer {
    addr: SocketAddr,
    counters: Arc<Counters>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// What a server has done since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayoutStats {
    /// Requests answered, those for `/metrics` left out.
    pub requests: u64,
    /// Bytes written to sockets, headers and all; those of `/metrics` too.
    pub sent_bytes: u64,
}

/// Clients that are counted one by one. Those that come later count in the sum alone.
const MAX_CLIENTS: usize = 4096;

/// What a registry sent, headers and all: the last line of `shoal serve-layout`, and a part of the demo's report.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RegistryFigures {
    /// Requests answered.
    pub requests: u64,
    /// Bytes written to sockets.
    pub bytes_sent: u64,
    /// The bytes by the address of who asked, if they were asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub clients: BTreeMap<IpAddr, u64>,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    sent_bytes: AtomicU64,
    /// Held while a connection is accepted or the counters are read.
    clients: Mutex<BTreeMap<IpAddr, Arc<AtomicU64>>>,
}

impl Counters {
    fn read(&self) -> LayoutStats {
        LayoutStats {
            requests: self.requests.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
        }
    }

    /// The counter of one client.
    fn client(&self, client: IpAddr) -> Arc<AtomicU64> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if clients.len() >= MAX_CLIENTS && !clients.contains_key(&client) {
            return Arc::default();
        }
        clients.entry(client).or_default().clone()
    }
}

/// What a request is answered from.
#[derive(Debug)]
struct Shared {
    layout: Layout,
    counters: Arc<Counters>,
}

impl LayoutServer {
    /// Serves the layout in `dir`, which may be empty or absent until something is pushed there.
    pub async fn start(dir: impl Into<PathBuf>, addr: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        let counters = Arc::new(Counters::default());
        let shared = Arc::new(Shared { layout: Layout::new(dir), counters: counters.clone() });
        let router = Router::new().fallback(answer::answer).with_state(shared);
        let listener = CountedListener::new(listener, counters.clone());
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let (graceful, cut) = oneshot::channel();
            let wait = async move {
                // An error says that the handle was dropped: stop just the same.
                let _ = stopped.await;
                let _ = graceful.send(());
            };
            let serve = axum::serve(listener, router).with_graceful_shutdown(wait).into_future();
            let deadline = async {
                let _ = cut.await;
                tokio::time::sleep(GRACE).await;
            };
            tokio::select! {
                _ = serve => {}
                () = deadline => tracing::warn!("the layout server cuts connections that do not end"),
            }
        });
        tracing::info!(%addr, "layout server listens");
        Ok(Self { addr, counters, stop: Some(stop), task })
    }

    /// The address it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Counters so far.
    pub fn stats(&self) -> LayoutStats {
        self.counters.read()
    }

    /// Bytes written so far to the sockets of each client.
    pub fn clients(&self) -> BTreeMap<IpAddr, u64> {
        let clients = self.counters.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.iter().map(|(client, bytes)| (*client, bytes.load(Ordering::Relaxed))).collect()
    }

    /// Takes no more connections, lets the answers under way end for a few seconds, and returns.
    pub async fn stop(self) -> LayoutStats {
        self.stop_and_count().await.1
    }

    /// As [`stop`](Self::stop); gives what each client was sent as well.
    pub async fn stop_and_count(mut self) -> (BTreeMap<IpAddr, u64>, LayoutStats) {
        if let Some(stop) = self.stop.take() {
            // An error says that the server has ended by itself.
            let _ = stop.send(());
        }
        if let Err(error) = (&mut self.task).await {
            tracing::error!(%error, "the layout server broke down");
        }
        (self.clients(), self.stats())
    }
}

#[cfg(test)]
mod tests;
