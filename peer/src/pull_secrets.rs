//! Pull secrets of a Kubernetes cluster: credentials for registries that the API server tells of, as they come and go.
//!
//! ```text
//!   kubeconfig ──> Server ──list──> API server       each watch reads the files anew: tokens and certificates are rotated
//!      or            │    ──watch─> ADDED, MODIFIED, DELETED, BOOKMARK ──> Table ──> Keyring
//!   service account  └── 410 Gone: list again; anything else: again from where it was, after a pause that grows
//! ```
//!
//! - Of the **types** `kubernetes.io/dockerconfigjson` and `kubernetes.io/dockercfg` only; the server selects them. It can select one
//!   type at a time, so each namespace has two watches.
//! - **Where they go**: to the registries, and repositories, that their keys name, as those of the auth file do, and after these. To
//!   no log: what a secret holds has no `Debug`, and errors tell where something is wrong, never what is there.
//! - **Who is spoken to**: the server of the kubeconfig, over TLS, verified with the authority that it names, without redirects.
//! - **Bounds**: a page of a list, an event, the number of secrets, and the bytes of all; see the constants. What is beyond them is
//!   not used, and that is logged.
//! - While the API server is away, what is known is used on.
//!
//! Why not the crate `kube`: with its client it brings tower-http, hyper-timeout, jsonpath, secrecy, a second set-up of TLS
//! and the generated types of all of Kubernetes, which take longer to compile than this crate. A watch is a GET whose answer is a line of
//! JSON for each event, and two fields of one kind are read here. Besides, its store keeps whole objects, without a bound.
//!
//! Not here: other ways to log in that kubeconfigs know (`exec`, `auth-provider`, user and password), which are refused; proxies of
//! kubeconfigs; globs in the keys of secrets, which match nothing.

mod api;
mod event;
mod kubeconfig;
mod table;

use std::{path::PathBuf, sync::Arc, time::Duration};

use futures::future::join_all;
use shoal_rafs::oci::Keyring;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};

use self::{
    api::{ApiError, Server},
    event::{Change, Kind, Scope},
    kubeconfig::Login,
    table::SharedTable,
};
use crate::{chain, config::PullSecretsConfig, mounts::blocking};

/// Where the API server is found, and who this node is there.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    /// The service account of a pod.
    InCluster,
    /// A kubeconfig.
    File(PathBuf),
}

impl Origin {
    fn login(&self) -> Result<Login, ApiError> {
        let login = match self {
            Self::InCluster => kubeconfig::in_cluster(),
            Self::File(path) => kubeconfig::load(path),
        };
        login.map_err(ApiError::from)
    }
}

/// Pauses between attempts.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// The first. It doubles with each failure.
    first: Duration,
    longest: Duration,
    /// A watch that was open for so long was a success, however it ended.
    settled: Duration,
}

const PACE: Pace =
    Pace { first: Duration::from_secs(1), longest: Duration::from_secs(60), settled: Duration::from_secs(10) };

/// Keeps the keyring up to date for as long as the node runs, if that is configured.
pub(crate) async fn run(config: PullSecretsConfig, keyring: Keyring) {
    let Some(kubeconfig) = config.kubeconfig() else { return };
    let origin = match kubeconfig {
        PullSecretsConfig::IN_CLUSTER => Origin::InCluster,
        path => Origin::File(path.into()),
    };
    watch(origin, &config.namespaces, keyring, PACE).await;
}

/// The same at another pace.
async fn watch(origin: Origin, namespaces: &[String], keyring: Keyring, pace: Pace) {
    let (table, lists) = (SharedTable::new(keyring), Arc::new(Semaphore::new(1)));
    let namespaces: Vec<_> = match namespaces {
        [] => vec![None],
        some => some.iter().cloned().map(Some).collect(),
    };
    let scopes = namespaces
        .into_iter()
        .flat_map(|namespace| Kind::ALL.map(|kind| Arc::new(Scope { namespace: namespace.clone(), kind })));
    let watches = scopes.map(|scope| Watch {
        scope,
        origin: origin.clone(),
        table: table.clone(),
        lists: lists.clone(),
        version: None,
        pace,
        failures: 0,
        in_trouble: false,
    });
    join_all(watches.map(Watch::run)).await;
}

/// One list, and the watch that goes on from it.
struct Watch {
    scope: Arc<Scope>,
    origin: Origin,
    table: SharedTable,
    /// One list is read at a time: its parts may be large.
    lists: Arc<Semaphore>,
    /// What the table has of this scope is the state at this version; none if it has to be listed.
    version: Option<String>,
    pace: Pace,
    /// In a row.
    failures: u32,
    /// It has been logged that something is wrong.
    in_trouble: bool,
}

impl Watch {
    async fn run(mut self) {
        loop {
            let begun = Instant::now();
            let ended = self.turn().await;
            match &ended {
                Ok(()) => {}
                Err(ApiError::Gone) => {
                    tracing::debug!("{}: what is known is too old, it is listed again", self.scope);
                    self.version = None;
                }
                Err(error) => self.complain(error),
            }
            // A server that ends every watch at once, or always says that it has gone, is not asked all the time either.
            if begun.elapsed() >= self.pace.settled {
                self.failures = 0;
            }
            sleep(self.pause()).await;
        }
    }

    /// Lists if need be, and watches until that ends.
    async fn turn(&mut self) -> Result<(), ApiError> {
        let origin = self.origin.clone();
        let server = Server::new(blocking(move || origin.login()).await?)?;
        let version = match self.version.take() {
            Some(version) => version,
            None => self.list(&server).await?,
        };
        let mut events = server.watch(&self.scope, self.version.insert(version)).await?;
        self.recovered();
        while let Some(changes) = events.next().await? {
            for change in changes {
                match change {
                    Change::Put { name, version, secret } => {
                        self.table.put(&self.scope, name, secret);
                        self.version = Some(version);
                    }
                    Change::Removed { name, version } => {
                        self.table.remove(&self.scope, &name);
                        self.version = Some(version);
                    }
                    Change::Bookmark { version } => self.version = Some(version),
                }
            }
            self.table.publish();
        }
        Ok(())
    }

    /// Puts all that there is into the table, and gives the version of that state.
    async fn list(&self, server: &Server) -> Result<String, ApiError> {
        // It is never closed.
        let _turn = self.lists.acquire().await;
        let mut rest = None;
        let mut seen = Vec::new();
        loop {
            let page = server.list(&self.scope, rest.as_deref()).await?;
            for (name, secret) in page.secrets {
                self.table.put(&self.scope, name.clone(), secret);
                seen.push(name);
            }
            if seen.len() > table::MAX_LISTED {
                return Err(ApiError::TooMany);
            }
            if page.rest.is_empty() {
                self.table.retain(&self.scope, &seen);
                self.table.publish();
                tracing::info!("{}: {} are known", self.scope, self.table.count(&self.scope));
                return Ok(page.version);
            }
            rest = Some(page.rest);
        }
    }

    fn complain(&mut self, error: &ApiError) {
        let (scope, said) = (&self.scope, chain(error));
        if std::mem::replace(&mut self.in_trouble, true) {
            tracing::debug!("{scope}: {said}");
        } else {
            tracing::warn!("{scope}: what is known is used on: {said}");
        }
    }

    fn recovered(&mut self) {
        if std::mem::take(&mut self.in_trouble) {
            tracing::info!("{}: the API server tells of them again", self.scope);
        }
    }

    /// How long to wait, with as much again by chance, so that not all nodes come back at once.
    fn pause(&mut self) -> Duration {
        let pause = self.pace.first.saturating_mul(1 << self.failures.min(16)).min(self.pace.longest);
        self.failures = self.failures.saturating_add(1);
        pause + pause.mul_f64(f64::from(rand::random::<u16>()) / f64::from(u16::MAX))
    }
}

#[cfg(test)]
mod tests;
