//! How a daemon ends: for good, for one that somebody else starts, or for one that takes its place in this process.

use tokio::task::JoinHandle;

use super::Daemon;
use crate::{config::OnStop, mounts::blocking, store::Store, upgrade::Listener};

/// What becomes of the sockets on which others call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sockets {
    /// They go.
    Removed,
    /// Who calls waits for the next daemon.
    Left,
}

impl Daemon {
    /// Stops in order: see the module above.
    pub(crate) async fn stop(self) {
        let on_stop = self.on_stop;
        self.end(on_stop, Sockets::Removed).await;
    }

    /// The same for a next daemon, which goes on with the mounts.
    pub(crate) async fn make_way(self) {
        self.end(OnStop::Keep, Sockets::Removed).await;
    }

    /// The same for one in this process, to which the sockets are left.
    pub(crate) async fn leave(self) -> Vec<Listener> {
        self.end(OnStop::Keep, Sockets::Left).await
    }

    async fn end(self, on_stop: OnStop, sockets: Sockets) -> Vec<Listener> {
        tracing::info!("stopping");
        let servers = std::iter::once(self.api).chain(self.snapshots);
        // All at once: what one of them still answers need not keep the others from being left.
        let ended = servers.map(|server| async move {
            match sockets {
                Sockets::Left => Some(server.leave().await),
                Sockets::Removed => {
                    server.stop().await;
                    None
                }
            }
        });
        let mut listeners: Vec<_> = futures::future::join_all(ended).await.into_iter().flatten().collect();
        match (self.mirror, sockets) {
            (Some(mirror), Sockets::Left) => listeners.push(mirror.leave()),
            (Some(mirror), Sockets::Removed) => mirror.stop(),
            (None, _) => {}
        }
        if let Some(http) = &self.http {
            http.stop();
        }
        self.parts.mounts.stop(on_stop).await;
        if let Some(filler) = self.filler {
            blocking(move || filler.close()).await;
        }
        if let Some(handover) = self.handover {
            blocking(move || handover.close()).await;
        }
        self.parts.control.stop().await;
        self.parts.data.stop().await;
        self.tasks.iter().for_each(JoinHandle::abort);
        close(self.parts.node.store.clone()).await;
        tracing::info!("stopped");
        listeners
    }
}

pub(super) async fn close(store: Store) {
    match tokio::task::spawn_blocking(move || store.close()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!("closing the store: {}", crate::chain(&error)),
        Err(panic) => tracing::error!("closing the store: {panic}"),
    }
}
