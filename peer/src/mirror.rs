//! The mirror: registries as containerd and other clients know them, with bytes from the swarm.
//!
//! ```text
//! client --GET, HEAD--> upstream: which registry is meant   (`ns=`, a header, the proxy form, a default)
//!                       access: may this client read it?    (a HEAD at the registry, remembered for a short time)
//!                       manifests, small blobs: objects     large blobs: plain blobs, piece by piece
//! ```
//!
//! - **Nothing before the registry has agreed.** What is here is given to a client only after the registry has said that it
//!   would give it to that client. What the client showed goes to that registry, in that one question, and nowhere else; it is
//!   neither logged nor kept, only a keyed hash of it.
//! - **Never in the way.** An answer begins within `mirror.patience`, or is an error: clients with another host in their list
//!   go on there. A body that stops for as long, or that turns out wrong, is cut, never completed; and so is a client that takes
//!   nothing for as long.
//! - **Bounds.** [`ANSWERS`] at a time, each with a piece or a manifest in memory; remembered permissions, and blobs on their
//!   way, are bounded where they are kept. It listens on loopback only, because what clients show is not encrypted.
//!
//! Not here: pushes, lists of tags, the referrers API. Clients find those at the registry.

mod access;
mod answer;
mod body;
mod connection;
pub(crate) mod hosts;
mod upstream;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode},
    response::Response,
};
use shoal_rafs::oci::Registry;
use tokio::{net::TcpListener, sync::Semaphore, task::JoinHandle};

use self::{access::Permissions, connection::Impatient};
use crate::{
    distribution::{API_VERSION, Refusal},
    node::Node,
    plain::Collector,
    upgrade::{Inheritance, Listener},
};

/// Answers at a time; who comes on top of that is sent away.
const ANSWERS: usize = 64;

/// What a mirror starts from.
pub(crate) struct MirrorOptions {
    /// Where it listens, on loopback.
    pub(crate) listen: SocketAddr,
    /// Registries that it stands for; `*` is any.
    pub(crate) registries: Vec<String>,
    /// The registry of requests that name none; empty for none.
    pub(crate) default_registry: String,
    /// How long a client waits at most for the first byte, or for the next one.
    pub(crate) patience: Duration,
    /// How long a registry's word that a client may read something is good.
    pub(crate) access_lifetime: Duration,
    /// How long what a tag means is good.
    pub(crate) tag_lifetime: Duration,
}

/// What its answers come from.
pub(super) struct Mirror {
    options: MirrorOptions,
    permissions: Permissions,
    node: Arc<Node>,
    collector: Collector,
    places: Arc<Semaphore>,
}

/// The running mirror.
#[derive(Debug)]
pub(crate) struct MirrorServer {
    task: JoinHandle<()>,
    address: SocketAddr,
    /// A copy, to be left to the next daemon.
    listener: std::net::TcpListener,
}

impl MirrorServer {
    /// Listens, on a socket that the daemon before may have left. `registry` is a client without credentials.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub(crate) async fn start(
        options: MirrorOptions,
        registry: Registry,
        node: Arc<Node>,
        collector: Collector,
        inheritance: &Inheritance,
    ) -> std::io::Result<Self> {
        let (address, patience) = (options.listen, options.patience);
        let listener = match inheritance.tcp_listener(address)? {
            Some(listener) => listener,
            None => TcpListener::bind(address).await?.into_std()?,
        };
        listener.set_nonblocking(true)?;
        let accepting = TcpListener::from_std(listener.try_clone()?)?;
        let permissions = Permissions::new(registry, options.access_lifetime, options.tag_lifetime);
        let places = Arc::new(Semaphore::new(ANSWERS));
        tracing::info!("the mirror listens on {}", listener.local_addr()?);
        let mirror = Arc::new(Mirror { options, permissions, node, collector, places });
        let router = Router::new().fallback(answer).with_state(mirror);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(Impatient::new(accepting, patience), router).await {
                tracing::error!("the mirror ended: {error}");
            }
        });
        Ok(Self { task, address, listener })
    }

    /// Takes no more requests.
    pub(crate) fn stop(self) {
        self.task.abort();
    }

    /// The same, and gives the socket for the next daemon: who connects waits until that accepts. Answers under way are cut when this
    /// process makes way for it; clients have the registry to turn to.
    pub(crate) fn leave(self) -> Listener {
        self.task.abort();
        Listener::on_tcp(self.address, self.listener)
    }
}

async fn answer(State(mirror): State<Arc<Mirror>>, request: Request) -> Response {
    let head = request.method() == Method::HEAD;
    let answered = match mirror.places.clone().try_acquire_owned() {
        Err(_) => Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", "too many requests are answered")),
        Ok(place) => match tokio::time::timeout(mirror.options.patience, mirror.clone().answer(request, place)).await
        {
            Ok(answered) => answered,
            Err(_) => Err(Refusal::new(StatusCode::GATEWAY_TIMEOUT, "UNAVAILABLE", "it takes too long")),
        },
    };
    let mut response = answered.unwrap_or_else(|refusal| {
        tracing::debug!(status = refusal.status().as_u16(), "refused: {}", refusal.message());
        refusal.response()
    });
    metrics::counter!("shoal_mirror_requests_total", "status" => response.status().as_u16().to_string()).increment(1);
    response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    if head {
        // The length stays as it would be.
        *response.body_mut() = Body::empty();
    }
    response
}
