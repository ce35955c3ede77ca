//! The daemon's side of the keeper: mounts are handed over as they are made, and those of an earlier daemon taken over.
//!
//! ```text
//!   mount made ──keep──> Handover ──> keeper          a copy of the connection stays here, for the next keeper
//!   watch: is the keeper there?
//!     no ──> connect (or start one) ──> hand all over again
//! ```
//!
//! Daemon and keeper each outlive the other: what one of them holds keeps the mounts alive, and only if both go within the
//! [interval of the watch](WATCH_INTERVAL) are they lost. Nothing that fails here stops a mount from being served; it is logged,
//! and the mount ends with the daemon, as without a keeper.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use shoal_keeper::{Client, ClientError, Mount};
use shoal_rafs::{KeptMount, MountKeeper};

use crate::{
    config::{Config, KeeperMode},
    mounts::blocking,
};

mod start;

/// How often the daemon looks whether the keeper is there.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Where the keeper is, and whether one is started.
#[derive(Debug, Clone)]
pub(crate) struct HandoverOptions {
    mode: KeeperMode,
    socket: PathBuf,
    /// Of a keeper that is started from here.
    patience: Duration,
    /// Where that one writes its log.
    log: PathBuf,
}

impl From<&Config> for HandoverOptions {
    fn from(config: &Config) -> Self {
        Self {
            mode: config.mounts.keeper,
            socket: config.keeper_socket(),
            patience: config.mounts.keeper_patience,
            log: config.data_dir.join("keeper.log"),
        }
    }
}

/// Hands mounts to the keeper. Its methods block for as long as the keeper takes to answer.
#[derive(Debug)]
pub(crate) struct Handover {
    options: HandoverOptions,
    /// Locked for a message to the keeper and its answer, which it gives at once; and while a keeper starts.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    keeper: Option<Client>,
    /// All mounts of this daemon, by device number.
    mounts: BTreeMap<String, KeptMount>,
    /// Those that the keeper has.
    held: BTreeSet<String>,
    /// Why there is no keeper, if that has been logged.
    trouble: Option<String>,
    /// The daemon stops.
    closed: bool,
}

impl Handover {
    /// Looks for a keeper, or starts one, as configured; none where that is switched off. What another daemon has left with a
    /// keeper then is let go: nobody will serve it.
    pub(crate) fn open(options: HandoverOptions) -> Option<Arc<Self>> {
        if options.mode == KeeperMode::Off {
            if let Ok(keeper) = Client::connect(&options.socket) {
                tracing::warn!(socket = %options.socket.display(), "what the keeper has is let go, since it is off");
                release(keeper).unwrap_or_else(|error| tracing::error!("{}", crate::chain(&error)));
            }
            return None;
        }
        let handover = Self { options, state: Mutex::default() };
        handover.check();
        Some(Arc::new(handover))
    }

    /// The mounts that an earlier daemon has left. Those that are not where they were are forgotten.
    pub(crate) fn kept(&self) -> Vec<KeptMount> {
        let mut state = self.lock();
        let Some(keeper) = &mut state.keeper else { return Vec::new() };
        let all = match keeper.kept() {
            Ok(all) => all,
            Err(error) => {
                tracing::error!("the mounts that were kept cannot be taken over: {}", crate::chain(&error));
                state.lose_keeper();
                return Vec::new();
            }
        };
        let mut standing = Vec::new();
        for (mount, connection) in all {
            let (device, path) = (mount.device.clone(), mount.mountpoint.clone());
            match understand(mount, connection) {
                Ok(mount) => standing.push(mount),
                Err(reason) => {
                    tracing::warn!(device, mountpoint = %path.display(), "a kept mount is let go: {reason}");
                    state.forget(&device);
                }
            }
        }
        standing
    }

    /// Looks after the keeper for as long as the daemon runs.
    pub(crate) async fn watch(self: Arc<Self>) {
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let handover = self.clone();
            blocking(move || handover.check()).await;
        }
    }

    /// Ends the keeper if it was this daemon that had it started and there is nothing left to keep.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let keeper = state.keeper.take().filter(|_| self.options.mode == KeeperMode::On);
        match keeper.map(|mut keeper| keeper.stop()) {
            Some(Err(ClientError::Refused(reason))) => tracing::info!("the keeper stays: {reason}"),
            Some(Err(error)) => tracing::warn!("{}", crate::chain(&error)),
            Some(Ok(())) | None => {}
        }
    }

    /// Where a keeper listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.options.socket
    }

    /// Starts a keeper, configured or not, if nobody answers: for a daemon that ends and may not leave what it has to nobody.
    ///
    /// # Errors
    /// It does not start.
    pub(crate) fn start_keeper(&self) -> io::Result<()> {
        match Client::connect(&self.options.socket) {
            Ok(_) => Ok(()),
            Err(_) => start::keeper(&self.options).map(drop),
        }
    }

    /// Finds a keeper if there is none, and hands everything to it.
    pub(crate) fn check(&self) {
        let mut state = self.lock();
        if state.closed || state.keeper.as_ref().is_some_and(Client::is_connected) {
            return;
        }
        if state.keeper.is_some() {
            tracing::warn!("the keeper has gone");
            state.lose_keeper();
        }
        let found = Client::connect(&self.options.socket);
        let found = match (found, self.options.mode) {
            (Err(_), KeeperMode::On) => start::keeper(&self.options).map_err(|error| error.to_string()),
            (found, _) => found.map_err(|error| crate::chain(&error)),
        };
        match found {
            Ok(keeper) => state.hand_over(keeper),
            Err(trouble) => state.complain(trouble, self.options.mode),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MountKeeper for Handover {
    fn keep(&self, mount: KeptMount) {
        let mut state = self.lock();
        state.pass_on(&mount);
        state.mounts.insert(mount.device.clone(), mount);
    }

    fn holds(&self, device: &str) -> bool {
        let state = self.lock();
        state.held.contains(device) && state.keeper.as_ref().is_some_and(Client::is_connected)
    }

    fn forget(&self, device: &str) {
        let mut state = self.lock();
        state.mounts.remove(device);
        state.forget(device);
    }
}

impl State {
    fn hand_over(&mut self, keeper: Client) {
        self.keeper = Some(keeper);
        self.trouble = None;
        let mounts = std::mem::take(&mut self.mounts);
        mounts.values().for_each(|mount| self.pass_on(mount));
        self.mounts = mounts;
        tracing::info!("a keeper is there, it has {} mounts of this daemon", self.held.len());
    }

    fn pass_on(&mut self, mount: &KeptMount) {
        let Some(keeper) = &mut self.keeper else { return };
        let passed = describe(mount).and_then(|described| keeper.keep(described, mount.connection.as_fd()));
        match passed {
            Ok(()) => drop(self.held.insert(mount.device.clone())),
            Err(error) => {
                let path = mount.mountpoint.display();
                tracing::error!("the mount at {path} would not outlive this daemon: {}", crate::chain(&error));
                self.after(&error);
            }
        }
    }

    fn forget(&mut self, device: &str) {
        self.held.remove(device);
        if let Some(Err(error)) = self.keeper.as_mut().map(|keeper| keeper.forget(device)) {
            tracing::warn!("the keeper may still have the mount {device}: {}", crate::chain(&error));
            self.after(&error);
        }
    }

    /// A refusal is an answer; after anything else there is no use in asking more.
    fn after(&mut self, error: &ClientError) {
        if !matches!(error, ClientError::Refused(_)) {
            self.lose_keeper();
        }
    }

    fn lose_keeper(&mut self) {
        self.keeper = None;
        self.held.clear();
    }

    /// Once, and not at all where a keeper may or may not be there.
    fn complain(&mut self, trouble: String, mode: KeeperMode) {
        if mode == KeeperMode::On && self.trouble.as_ref() != Some(&trouble) {
            tracing::error!("mounts would not outlive this daemon: {trouble}");
            self.trouble = Some(trouble);
        }
    }
}

fn describe(mount: &KeptMount) -> Result<Mount, ClientError> {
    let record = serde_json::to_vec(&mount.session).map_err(std::io::Error::from)?;
    Ok(Mount { device: mount.device.clone(), mountpoint: mount.mountpoint.clone(), record })
}

/// The mount as this daemon could go on with it, or why it could not.
fn understand(mount: Mount, connection: std::os::fd::OwnedFd) -> Result<KeptMount, String> {
    let session =
        serde_json::from_slice(&mount.record).map_err(|error| format!("its record cannot be read: {error}"))?;
    let kept = KeptMount { device: mount.device, mountpoint: mount.mountpoint, connection, session };
    match kept.is_mounted() {
        Ok(true) => Ok(kept),
        Ok(false) => Err("it is not mounted any more".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Has a keeper let go of everything, and end.
fn release(mut keeper: Client) -> Result<(), ClientError> {
    for (mount, _) in keeper.kept()? {
        keeper.forget(&mount.device)?;
    }
    keeper.stop()
}

#[cfg(test)]
mod tests;
