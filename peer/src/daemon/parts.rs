//! What the control API and the metrics ask of a running daemon.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use bytes::Bytes;
use libp2p::{Multiaddr, multiaddr::Protocol};
use shoal_proto::{
    PeerId, Role,
    control::{PeerStatus, StatusReply, StoreStatus, UpgradeReply},
};
use tokio::sync::watch;

use super::{RevokeError, StartError, settings::Settings};
use crate::{
    admission::Admission,
    config::{Config, SnapshotterConfig},
    contacts::Contacts,
    control::Control,
    data::DataPlane,
    handover::Handover,
    identity::{self, Identity},
    membership::{Policy, unix_now},
    metrics::{MetricsServer, Vitals},
    mounts::{Mounts, blocking},
    node::Node,
    pins::Pins,
    preheat::Preheats,
    starts::CollectedStarts,
    upgrade::{Asked, Candidate, Next, UpgradeError},
    usage,
};

/// The parts that answer, and what was settled when they started.
pub(crate) struct Parts {
    /// Another one for each daemon of a process.
    pub(super) instance: String,
    /// Why an upgrade has failed, after which this daemon was started.
    pub(super) upgrade_failure: String,
    /// Where it is said what takes this daemon's place.
    pub(super) asked: Asked,
    pub(super) handover: Option<Arc<Handover>>,
    pub(crate) settings: Settings,
    pub(crate) node: Arc<Node>,
    pub(crate) mounts: Mounts,
    pub(crate) pins: Pins,
    pub(crate) preheats: Preheats,
    pub(super) control: Control,
    pub(super) listening: watch::Receiver<Vec<Multiaddr>>,
    pub(super) data: DataPlane,
    pub(super) contacts: Contacts,
    pub(super) starts: CollectedStarts,
    pub(super) identity: Identity,
    pub(super) admission: Admission,
    pub(super) role: Role,
    pub(super) zone: String,
    pub(super) started: Instant,
    pub(super) http: OnceLock<SocketAddr>,
    pub(super) snapshotter: SnapshotterConfig,
    /// Snapshots whose records cannot be used.
    pub(super) set_aside: AtomicUsize,
}

impl Parts {
    pub(super) async fn serve_http(self: Arc<Self>, config: &Config) -> Result<Option<MetricsServer>, StartError> {
        if !config.http.enabled {
            return Ok(None);
        }
        let address = config.http.listen;
        let server = MetricsServer::start(address, self.clone()).await;
        let server = server.map_err(|source| StartError::Http { address, source })?;
        // Set here only.
        let _ = self.http.set(server.address());
        Ok(Some(server))
    }

    pub(crate) fn status(&self) -> StatusReply {
        let id = self.identity_text();
        let listening = self.listening.borrow().clone();
        StatusReply {
            version: env!("CARGO_PKG_VERSION").into(),
            peer: id.clone(),
            role: self.role.to_string(),
            zone: self.zone.clone(),
            control_addresses: listening.iter().map(|address| with_id(address, &id)).collect(),
            data_address: self.data.local_address().to_string(),
            http_address: self.http.get().map(ToString::to_string).unwrap_or_default(),
            uptime_seconds: self.started.elapsed().as_secs(),
            total: Some(self.node.traffic.snapshot()),
            mounts: self.mounts.status(),
            store: Some(self.store()),
            membership_expires: self.membership_expires(),
            revocations: self.admission.revocations() as u64,
            start_traces: Some(self.starts.figures()),
            instance: self.instance.clone(),
            pid: std::process::id(),
            upgrade_failure: self.upgrade_failure.clone(),
        }
    }

    /// Has this daemon make way for `binary` (none: what is now where its own program was), which is examined first. With `exit` it
    /// ends, and somebody else starts the next one. Answers before it does.
    pub(crate) async fn upgrade(
        &self,
        binary: Option<PathBuf>,
        exit: bool,
        force: bool,
    ) -> Result<UpgradeReply, UpgradeError> {
        // Before anything is done, so that there is one at a time.
        let place = self.asked.try_reserve().map_err(|_| UpgradeError::UnderWay)?;
        let candidate = Candidate::examine(binary).await?;
        let unkept = self.unkept(exit).await;
        if unkept > 0 && !force {
            return Err(UpgradeError::Unkept(unkept));
        }
        let reply = UpgradeReply {
            version: env!("CARGO_PKG_VERSION").into(),
            instance: self.instance.clone(),
            new_version: candidate.version().to_owned(),
            binary: candidate.path().display().to_string(),
            mounts: self.mounts.kept() as u32,
        };
        let (path, version) = (candidate.path().display(), candidate.version());
        tracing::info!(exit, "making way for {path}, version {version}");
        place.send(if exit { Next::Supervisor } else { Next::Program(candidate) });
        Ok(reply)
    }

    /// How many mounts nobody would have. For a daemon that goes on in this process a keeper is started where there is none; with one
    /// that ends it might be killed by its supervisor.
    async fn unkept(&self, exit: bool) -> usize {
        if self.mounts.unkept() > 0
            && !exit
            && let Some(handover) = self.handover.clone()
        {
            let started = blocking(move || handover.start_keeper().map(|()| handover.check())).await;
            started.unwrap_or_else(|error| tracing::warn!("no keeper starts: {error}"));
        }
        self.mounts.unkept()
    }

    /// When others stop to accept this node, in seconds since 1970; 0 for never, in an open cluster.
    fn membership_expires(&self) -> u64 {
        match self.admission.policy() {
            Policy::Open => 0,
            Policy::Key(_) => self.admission.own().expires(),
        }
    }

    /// Takes a signed revocation in and passes it on to everyone; false if it says nothing new.
    pub(crate) async fn revoke(&self, signed: Bytes) -> Result<bool, RevokeError> {
        let new = self.admission.revoke(&signed, unix_now())?;
        self.control.revoke(signed).await?;
        Ok(new)
    }

    pub(super) fn identity_text(&self) -> String {
        identity::to_text(&self.identity.peer())
    }

    pub(crate) fn peers(&self) -> Vec<PeerStatus> {
        let connections = self.data.connections();
        let connection = |peer: PeerId| connections.iter().find(|connection| connection.peer == peer);
        let all = self.contacts.all().into_iter().map(|(peer, known)| {
            let open = connection(peer);
            PeerStatus {
                peer: identity::to_text(&peer),
                role: known.role.to_string(),
                zone: known.zone.clone(),
                connected: open.is_some(),
                addresses: known.addresses.iter().map(ToString::to_string).collect(),
                banned_seconds: known.banned_seconds(),
                ban_reason: known.ban.map(|(_, reason)| reason).unwrap_or_default(),
                received_bytes: open.map_or(0, |open| open.received_bytes),
                sent_bytes: open.map_or(0, |open| open.sent_bytes),
                lease: known.lease,
                transport: open.map_or_else(String::new, |open| open.transport.to_owned()),
                violations: known.faults.violations,
                wrong_bytes: known.faults.wrong_bytes,
                stalls: known.faults.stalls,
                broken_promises: known.faults.broken_promises,
                floods: known.faults.floods,
                last_fault: known.faults.last,
            }
        });
        all.collect()
    }

    fn store(&self) -> StoreStatus {
        usage::status(&self.node.store).unwrap_or_else(|error| {
            tracing::warn!("cannot say what the store holds: {}", crate::chain(&error));
            StoreStatus::default()
        })
    }
}

impl Vitals for Parts {
    fn export(&self) {
        self.node.traffic.export();
        self.settings.export();
        if let Some(proxy) = self.node.images.registry().proxy_stats() {
            metrics::gauge!("shoal_registry_proxy_used").set(f64::from(u8::from(proxy.used)));
            metrics::counter!("shoal_registry_proxy_reads_total").absolute(proxy.reads);
            metrics::counter!("shoal_registry_proxy_failed_reads_total").absolute(proxy.failed);
        }
        let starts = self.starts.figures();
        metrics::gauge!("shoal_start_traces").set(starts.starts as f64);
        metrics::gauge!("shoal_start_traces_bytes").set(starts.bytes as f64);
        self.mounts.export_reads();
        let store = self.store();
        metrics::gauge!("shoal_snapshots_set_aside").set(self.set_aside.load(Relaxed) as f64);
        metrics::gauge!("shoal_mounts").set(self.mounts.count() as f64);
        metrics::gauge!("shoal_mounts_kept").set(self.mounts.kept() as f64);
        metrics::gauge!("shoal_mounts_native").set(self.mounts.native() as f64);
        metrics::gauge!("shoal_mounts_lazy").set(self.mounts.lazy() as f64);
        metrics::gauge!("shoal_store_bytes").set(store.bytes as f64);
        metrics::gauge!("shoal_store_pieces").set(store.pieces as f64);
        metrics::gauge!("shoal_store_disk_bytes").set(store.disk_bytes as f64);
        metrics::gauge!("shoal_store_limit_bytes").set(store.limit_bytes as f64);
        metrics::gauge!("shoal_pins").set(self.pins.all().len() as f64);
        metrics::gauge!("shoal_membership_expires_seconds").set(self.membership_expires() as f64);
        metrics::gauge!("shoal_revocations").set(self.admission.revocations() as f64);
        metrics::gauge!("shoal_connections").set(self.data.connected() as f64);
    }

    fn ready(&self) -> bool {
        self.mounts.ready()
    }
}

/// The address for others to join through.
fn with_id(address: &Multiaddr, id: &str) -> String {
    let named = address.iter().any(|part| matches!(part, Protocol::P2p(_)));
    if named { address.to_string() } else { format!("{address}/p2p/{id}") }
}
