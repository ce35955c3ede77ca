//! Wiring: which part is started when, and in what order they stop.
//!
//! Start: the store first, because its lock decides whether this process may run at all; then the identity, the planes,
//! the scheduler's loop, the exchange, the mounts of the last run, and last what lets others in: snapshots for
//! containerd, control API and metrics. Stop is the reverse: nothing new is let in, mounts go or are left to the keeper,
//! leases and records are withdrawn, the store is closed. So it is when another version takes the daemon's place, but that
//! mounts are left to the keeper in any case, and sockets open: see `upgrade.rs`.

mod containerd;
mod ending;
mod error;
mod mirror;
mod parts;
mod settings;

use std::{
    path::Path,
    sync::{Arc, Mutex, OnceLock, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use libp2p::Multiaddr;
use shoal_proto::{FEATURE_HASH_LISTS, FEATURE_START_TRACES, Hello, MIN_VERSION, PeerId, Role, VERSION};
use shoal_rafs::{
    ChunkCache, MountKeeper, MountOptions,
    oci::{Authfile, DecryptionKeys, Keyring, Reference, Registry, RegistryOptions},
};
use shoal_scheduler::{Tracker, TrackerConfig};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

pub use self::error::StartError;
use self::{ending::close, settings::Settings};
pub(crate) use self::{error::RevokeError, parts::Parts};
use crate::{
    admission::{self, Admission, Keeper, KeeperParts, Record},
    api, authfile,
    config::{Config, OnStop, PrefetchConfig},
    contacts::Contacts,
    control::{Control, ControlOptions},
    data::{Budget, DataOptions, DataPlane, Throttle},
    driver::{self, Clock, Driver},
    evictions::Evictions,
    exchange::{Exchange, ExchangeParts},
    fetch::{Fetcher, OBJECT_ROOM},
    filler::{FillError, Filler},
    grpc::UnixServer,
    handover::{Handover, HandoverOptions},
    identity::Identity,
    images::Images,
    membership::{Membership, Policy, unix_now},
    metrics::MetricsServer,
    mirror::MirrorServer,
    mounts::{Mounts, MountsError, MountsSettings, Unrecorded, blocking},
    node::Node,
    origin::Origin,
    pins::Pins,
    plain::Collector,
    preheat::{self, PreheatParts, Preheats},
    pull_secrets,
    serve::Server,
    starts::CollectedStarts,
    store::{Store, StoreOptions},
    traffic::Traffic,
    upgrade::{self, Inheritance, Next},
    watched_file::WatchedFile,
};

/// The node without planes: it reads images from registries and layouts only. `shoal mount REF` is this.
#[derive(Debug)]
pub struct Alone {
    node: Arc<Node>,
    settings: MountsSettings,
    tasks: [JoinHandle<()>; 2],
}

impl Alone {
    /// Opens the store and starts the scheduler.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let core = Core::open(&config).await?;
        let identity = Identity::load_or_create(&config.data_dir)?;
        let node = core.node.clone();
        let evictions = Evictions::of(&node.store).pass_on(node.driver.clone(), None);
        let driver = core.drive(&config, identity.peer(), None);
        Ok(Self {
            node,
            settings: MountsSettings { prefetch: PrefetchConfig::ALONE, ..mounts_settings(&config, &None, None) },
            tasks: [driver, evictions],
        })
    }

    /// Mounts what `reference` names at present; with `traced`, what is read is noted. The mount ends when the value is
    /// dropped.
    ///
    /// # Errors
    /// When the image cannot be loaded, or the kernel refuses the mount.
    pub async fn mount(
        &self,
        reference: &Reference,
        mountpoint: &Path,
        traced: bool,
    ) -> Result<Unrecorded, MountsError> {
        let mounts = Mounts::new(self.node.clone(), None, self.settings.clone());
        mounts.unrecorded(reference, mountpoint, traced).await
    }

    /// Bytes of pieces and objects that came from elsewhere so far.
    pub fn received(&self) -> u64 {
        let total = self.node.traffic.snapshot();
        let parts = [total.bytes.unwrap_or_default(), total.objects.unwrap_or_default()];
        parts.iter().map(|by| by.peer + by.seed + by.registry).sum()
    }

    /// Closes the store.
    pub async fn stop(self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        close(self.node.store.clone()).await;
    }
}

/// The running daemon.
pub struct Daemon {
    parts: Arc<Parts>,
    api: UnixServer,
    snapshots: Option<UnixServer>,
    mirror: Option<MirrorServer>,
    http: Option<MetricsServer>,
    tasks: Vec<JoinHandle<()>>,
    on_stop: OnStop,
    filler: Option<Filler>,
    handover: Option<Arc<Handover>>,
    next: mpsc::Receiver<Next>,
}

impl Daemon {
    /// Whether a daemon would start with `config`, as far as that can be seen without disturbing one that runs: what it names is
    /// read, nothing is opened or made.
    ///
    /// # Errors
    /// See [`StartError`].
    pub(crate) fn check(config: &Config) -> Result<(), StartError> {
        Registry::new(registry_options(config)?)?;
        multiaddresses("control.listen", &config.control.listen)?;
        multiaddresses("control.bootstrap_peers", &config.control.bootstrap_peers)?;
        // A node that has not been started yet has no identity, so no certificate either.
        match Identity::existing(&config.data_dir)? {
            Some(identity) => admission(config, identity.peer()).map(drop),
            None => policy(config).map(drop),
        }
    }

    /// Starts everything, with what another daemon has left in this process, and brings the mounts of the last run back.
    ///
    /// # Errors
    /// See [`StartError`].
    pub(crate) async fn start(config: Config, inheritance: &Inheritance) -> Result<Self, StartError> {
        let core = Core::open(&config).await?;
        let identity = Identity::load_or_create(&config.data_dir)?;
        let admission = admission(&config, identity.peer())?;
        let contacts = core.contacts.clone();
        let role = Role::from(config.role);
        let starts = CollectedStarts::default();

        let server = Server {
            images: core.node.images.clone(),
            driver: core.node.driver.clone(),
            registries: config.registry.serve.clone(),
            tracker: Arc::new(Mutex::new(Tracker::new(TrackerConfig::default()))),
            clock: core.clock,
            contacts: contacts.clone(),
            starts: starts.clone(),
            runtime: tokio::runtime::Handle::current(),
        };
        let data_options = DataOptions {
            keypair: identity.keypair().clone(),
            listen: config.data.listen,
            transport: config.data.transport,
            hello: hello(&config, &admission.own()),
            admit: admission::in_words(&admission),
            limits: config.data_limits(),
        };
        let (data, peer_events) = DataPlane::start(data_options, Arc::new(server))?;
        // Before anybody can tell of a revocation.
        let keeper = Keeper::new(KeeperParts {
            admission: admission.clone(),
            file: config.membership_file(),
            record: Record::new(&config.data_dir),
            data: data.clone(),
        });
        let control_options = ControlOptions {
            identity: identity.clone(),
            admission: admission.clone(),
            insecure_open: config.cluster.insecure_open,
            listen: multiaddresses("control.listen", &config.control.listen)?,
            bootstrap_peers: multiaddresses("control.bootstrap_peers", &config.control.bootstrap_peers)?,
            mdns: config.control.mdns,
            capacity: config.capacity,
            lease: config.control.lease,
            data_address: data.local_address(),
        };
        let (control, control_events) = Control::start(control_options).await?;

        let (node, clock) = (core.node.clone(), core.clock);
        let keyring = node.images.registry().keyring().clone();
        let driver = core.drive(&config, identity.peer(), Some(data.clone()));
        let (listening, heard_listening) = watch::channel(Vec::new());
        let (words, heard_words) = mpsc::channel(preheat::WORDS);
        let exchange = Exchange::new(ExchangeParts {
            me: identity.peer(),
            role,
            zone: config.zone.clone(),
            clock,
            data: data.clone(),
            control: control.clone(),
            listening,
            words,
            driver: node.driver.clone(),
            images: node.images.clone(),
            contacts: contacts.clone(),
            starts: starts.clone(),
        });
        // Set here only.
        let _ = node.exchange.set(exchange.clone());
        let exchanging = tokio::spawn(exchange.clone().run(peer_events, control_events));
        let keeping = tokio::spawn(keeper.run());
        let evictions = Evictions::of(&node.store).pass_on(node.driver.clone(), Some(exchange.clone()));
        let handover = HandoverOptions::from(&config);
        let handover = blocking(move || Handover::open(handover)).await;
        let collector = Collector::new(&node, exchange.clone());
        let filler = fill(&config, &node, &handover).await;
        let settings = mounts_settings(&config, &handover, filler.clone());
        let mounts = Mounts::new(node.clone(), Some(exchange), settings);
        let settings = Settings::new(config.clone(), data.clone(), node.driver.clone(), node.store.clone());
        let pins = Pins::restore(node.clone()).await?;
        let expiring = tokio::spawn(pins.clone().run());
        let preheats = Preheats::new(PreheatParts {
            me: identity.peer(),
            role,
            zone: config.zone.clone(),
            node: node.clone(),
            pins: pins.clone(),
            control: control.clone(),
            contacts: contacts.clone(),
            registries: config.registry.serve.clone(),
        });
        let preheating = tokio::spawn(preheats.clone().run(heard_words));
        let (asked, next) = upgrade::channel();
        let parts = Arc::new(Parts {
            instance: format!("{:016x}", rand::random::<u64>()),
            upgrade_failure: inheritance.failure().to_owned(),
            asked,
            handover: handover.clone(),
            settings,
            node,
            mounts,
            pins,
            preheats,
            control,
            listening: heard_listening,
            data,
            contacts,
            starts,
            identity,
            admission,
            role,
            zone: config.zone.clone(),
            started: Instant::now(),
            http: OnceLock::new(),
            snapshotter: config.snapshotter.clone(),
            set_aside: AtomicUsize::new(0),
        });
        let taking = handover.clone();
        let kept = blocking(move || taking.map_or_else(Vec::new, |handover| handover.kept())).await;
        parts.mounts.restore(kept).await?;
        parts.node.store.records_restored();
        let snapshots = parts.serve_snapshots(&config.data_dir, inheritance).await?;
        let mirror = mirror::start(&config, parts.node.clone(), collector, inheritance).await?;
        let http = parts.clone().serve_http(&config).await?;
        let api = api::serve(&config.socket, parts.clone(), inheritance)
            .await
            .map_err(|source| StartError::Socket { path: config.socket.display().to_string(), source })?;
        tracing::info!(peer = parts.identity_text(), %role, zone = config.zone, "started");
        let mut tasks = vec![driver, exchanging, keeping, evictions, expiring, preheating];
        let authfile = config.registry.authfile().map(|file| WatchedFile::new(file.to_owned()));
        tasks.push(tokio::spawn(parts.mounts.clone().watch()));
        tasks.push(tokio::spawn(pull_secrets::run(config.pull_secrets.clone(), keyring.clone())));
        tasks.extend(authfile.map(|file| tokio::spawn(authfile::keep_fresh(file, keyring))));
        tasks.extend(handover.clone().map(|handover| tokio::spawn(handover.watch())));
        let on_stop = config.mounts.on_stop;
        Ok(Self { parts, api, snapshots, mirror, http, tasks, on_stop, filler, handover, next })
    }

    /// Waits until another daemon is to take the place of this one.
    pub(crate) async fn upgrade(&mut self) -> Next {
        match self.next.recv().await {
            Some(next) => next,
            // The API has gone, so nobody will ask.
            None => std::future::pending().await,
        }
    }
}

/// What a node has with or without planes.
struct Core {
    node: Arc<Node>,
    clock: Clock,
    contacts: Contacts,
    origin: Origin,
    inbox: driver::Inbox,
    sender: tokio::sync::mpsc::WeakSender<driver::Command>,
}

impl Core {
    async fn open(config: &Config) -> Result<Self, StartError> {
        let data_dir = config.data_dir.clone();
        let options = StoreOptions { limits: config.store.limits(), ..StoreOptions::default() };
        let store = tokio::task::spawn_blocking(move || Store::open(&data_dir, options)).await;
        let store = store.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let registry = Registry::new(registry_options(config)?)?;
        let origin = Origin::new(registry);
        let clock = Clock::start();
        let (handle, inbox) = driver::channel(clock);
        let traffic = Arc::new(Traffic::default());
        let images =
            Images::new(store.clone(), origin.clone(), handle.clone(), traffic.clone(), config.read.deadline);
        let sender = handle.downgrade();
        let node = Node {
            store,
            driver: handle,
            images,
            decoded: Arc::new(ChunkCache::new(config.read.decoded_cache_bytes)),
            traffic,
            deadline: config.read.deadline,
            read_ahead: config.read.ahead_bytes,
            ahead: Mutex::default(),
            exchange: OnceLock::new(),
        };
        Ok(Self { node: Arc::new(node), clock, contacts: Contacts::default(), origin, inbox, sender })
    }

    /// Starts the scheduler's loop.
    fn drive(self, config: &Config, me: PeerId, data: Option<DataPlane>) -> JoinHandle<()> {
        let fetcher = Fetcher {
            commands: self.sender,
            data,
            origin: self.origin,
            store: self.node.store.clone(),
            contacts: self.contacts,
            traffic: self.node.traffic.clone(),
            objects: Budget::new(OBJECT_ROOM),
            whole_reads: Arc::new(Throttle::new("registry", config.scheduler_limits().registry)),
        };
        let mut scheduling = shoal_scheduler::Config::new(me, config.zone.clone());
        scheduling.labels = config.labels.clone();
        scheduling.limits = config.scheduler_limits();
        let driver = Driver::new(scheduling, rand::random(), self.clock, self.inbox, fetcher);
        tokio::spawn(driver.run())
    }
}

fn registry_options(config: &Config) -> Result<RegistryOptions, StartError> {
    let file = config.registry.authfile().map_or_else(|| Ok(Authfile::default()), Authfile::load)?;
    Ok(RegistryOptions {
        plain_http: config.registry.plain_http.clone(),
        ca_files: config.registry.ca_files.clone(),
        auth: Keyring::new(file, config.snapshotter.credentials_lifetime),
        token_servers: config.registry.token_servers.clone(),
        decryption_keys: Arc::new(DecryptionKeys::read(
            config.registry.decryption_keys.iter().map(|path| path.as_path()),
        )?),
        mirrors: config.registry.mirrors.iter().map(|of| (of.registry.clone(), of.hosts.clone())).collect(),
        // One that cannot be used was refused when the configuration was read.
        proxy: config.registry.proxy.options().ok().flatten(),
        backends: config.registry.backend_rules(),
        // The scheduler tries again, with everybody else in view; the client only spares it the hiccups.
        retries: 1,
        // Reads are counted by `registry.concurrency`, which may be set up to this while the daemon runs; manifests and the mirror
        // come on top.
        requests_per_host: RegistryOptions::default().requests_per_host + 1024,
        read_timeout: config.registry.timeout,
        connect_timeout: config.registry.timeout.min(Duration::from_secs(10)),
        ..RegistryOptions::default()
    })
}

/// What fills the files of native mounts as they are read, if that is switched on or an earlier daemon has left such mounts.
async fn fill(config: &Config, node: &Arc<Node>, handover: &Option<Arc<Handover>>) -> Option<Filler> {
    let (wanted, node, runtime) = (config.mounts.native_lazy, node.clone(), tokio::runtime::Handle::current());
    let Some(handover) = handover.clone() else {
        if wanted {
            tracing::warn!("incomplete images are not mounted natively: that takes a keeper, which is off");
        }
        return None;
    };
    let opened = blocking(move || {
        let filler = Filler::open(node, handover, runtime, wanted)?;
        filler.as_ref().map_or(Ok(()), Filler::serve)?;
        Ok::<_, FillError>(filler)
    });
    opened.await.unwrap_or_else(|error| {
        tracing::warn!("incomplete images are not mounted natively: {}", crate::chain(&error));
        None
    })
}

fn mounts_settings(config: &Config, handover: &Option<Arc<Handover>>, filler: Option<Filler>) -> MountsSettings {
    let options = MountOptions {
        threads: config.mounts.threads as usize,
        read_ahead_kib: config.mounts.read_ahead_kib,
        keeper: handover.clone().map(|handover| handover as Arc<dyn MountKeeper>),
        ..MountOptions::default()
    };
    MountsSettings {
        options,
        mode: config.mounts.mode,
        filler,
        native_lazy: config.mounts.native_lazy,
        graduate_after: config.mounts.graduate_after,
        prefetch: config.prefetch,
        keep_unmounted: config.store.keep_unmounted,
    }
}

/// The rule by which others are admitted. A cluster without a key stays on loopback.
fn policy(config: &Config) -> Result<Policy, StartError> {
    let policy = Policy::parse(&config.cluster.public_key)?;
    policy.permits(config.data.listen.ip(), config.cluster.insecure_open)?;
    Ok(policy)
}

/// The same, and what this node shows others.
fn admission(config: &Config, me: PeerId) -> Result<Admission, StartError> {
    let (policy, now) = (policy(config)?, unix_now());
    let own = match config.membership_file() {
        None => Membership::open(me, config.role.into(), &config.zone)?,
        Some(file) => Membership::load(&policy, &file, &me, now)?,
    };
    admission::agree(&own, config.role.into(), &config.zone)?;
    let revocations = Record::new(&config.data_dir).load(&policy, now);
    let revocations =
        revocations.map_err(|source| StartError::Revocations { path: config.data_dir.clone(), source })?;
    Ok(Admission::with_revocations(policy, own, revocations))
}

/// What this node says of itself on the data plane.
fn hello(config: &Config, membership: &Membership) -> Hello {
    Hello {
        version: VERSION,
        min_version: MIN_VERSION,
        features: FEATURE_HASH_LISTS | FEATURE_START_TRACES,
        membership: membership.shown().clone(),
        role: config.role.into(),
        zone: config.zone.clone(),
        labels: config.labels.clone(),
        // An unspecified address is none; then the others hear the right one from the control plane.
        data_addresses: Some(config.data.listen)
            .filter(|address| !address.ip().is_unspecified())
            .into_iter()
            .collect(),
        name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
    }
}

fn multiaddresses(key: &'static str, texts: &[String]) -> Result<Vec<Multiaddr>, StartError> {
    let parse = |text: &String| text.parse().map_err(|_| StartError::Address { key, text: text.clone() });
    texts.iter().map(parse).collect()
}
