//! The daemon's configuration: one TOML file, every key with a default, `--set` on the command line over it.
//!
//! Keys, units and defaults are documented once, in `docs/shoal.toml`; a test holds that file and [`Config::default`]
//! together. An unknown key is refused with the nearest known one, because a misspelt limit that silently does nothing
//! is found out on the worst day.

mod limits;
mod mirror;
mod mounts;
mod prefetch;
mod pull_secrets;
mod registry;
mod running;
mod store;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use self::{
    limits::LimitsConfig,
    mirror::MirrorConfig,
    mounts::{KeeperMode, MountMode, MountsConfig, OnStop},
    prefetch::PrefetchConfig,
    pull_secrets::PullSecretsConfig,
    registry::{BackendConfig, ProxyConfig, RegistryConfig, RegistryMirrors},
    running::is_adjustable,
    store::StoreConfig,
};
use crate::data::Transport;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The text is not TOML, or a value is of the wrong type or out of range.
    #[error("{origin}: {message}")]
    Invalid {
        /// The file or the flag.
        origin: String,
        /// What is wrong and where.
        message: String,
    },
    /// A key that no option has.
    #[error("{origin}: unknown key {key:?}{}", nearest.as_ref().map(|n| format!("; did you mean {n:?}?")).unwrap_or_default())]
    UnknownKey {
        /// The file or the flag.
        origin: String,
        /// The key, with the tables it lies in.
        key: String,
        /// The known key that is most like it, if any is.
        nearest: Option<String>,
    },
    /// A key that a running daemon does not look at again.
    #[error("{key} is read when the daemon starts: change it in the configuration file, and restart")]
    Fixed {
        /// The key, with the tables it lies in.
        key: String,
    },
}

/// What a node does for the others; see [`shoal_proto::Role`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Mounts images and serves what it has.
    Node,
    /// Also reads the registry for the others.
    Seed,
}

impl From<Role> for shoal_proto::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Node => Self::Node,
            Role::Seed => Self::Seed,
        }
    }
}

/// Everything that can be configured. The meaning of each key stands in `docs/shoal.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct Config {
    pub data_dir: PathBuf,
    pub socket: PathBuf,
    pub role: Role,
    pub zone: String,
    pub capacity: u32,
    pub labels: BTreeMap<String, String>,
    pub cluster: ClusterConfig,
    pub control: ControlConfig,
    pub data: DataConfig,
    pub http: HttpConfig,
    pub limits: LimitsConfig,
    pub registry: RegistryConfig,
    pub read: ReadConfig,
    pub prefetch: PrefetchConfig,
    pub mounts: MountsConfig,
    pub snapshotter: SnapshotterConfig,
    pub pull_secrets: PullSecretsConfig,
    pub mirror: MirrorConfig,
    pub store: StoreConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/shoal".into(),
            socket: "/run/shoal.sock".into(),
            role: Role::Node,
            zone: "default".into(),
            capacity: 100,
            labels: BTreeMap::new(),
            cluster: ClusterConfig::default(),
            control: ControlConfig::default(),
            data: DataConfig::default(),
            http: HttpConfig::default(),
            limits: LimitsConfig::default(),
            registry: RegistryConfig::default(),
            read: ReadConfig::default(),
            prefetch: PrefetchConfig::default(),
            mounts: MountsConfig::default(),
            snapshotter: SnapshotterConfig::default(),
            pull_secrets: PullSecretsConfig::default(),
            mirror: MirrorConfig::default(),
            store: StoreConfig::default(),
        }
    }
}

/// `[cluster]`: who may join.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct ClusterConfig {
    pub public_key: String,
    pub membership: PathBuf,
    pub insecure_open: bool,
}

/// `[control]`: the libp2p plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct ControlConfig {
    pub listen: Vec<String>,
    pub bootstrap_peers: Vec<String>,
    pub mdns: bool,
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self {
            listen: vec!["/ip4/127.0.0.1/tcp/4801".into()],
            bootstrap_peers: Vec::new(),
            mdns: false,
            lease: Duration::from_secs(15),
        }
    }
}

/// `[data]`: the plane that carries pieces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct DataConfig {
    pub listen: SocketAddr,
    pub transport: Transport,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 4802)), transport: Transport::Auto }
    }
}

/// `[http]`: metrics and health.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct HttpConfig {
    pub enabled: bool,
    pub listen: SocketAddr,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self { enabled: true, listen: SocketAddr::from(([127, 0, 0, 1], 4803)) }
    }
}

/// `[read]`: from a read on a mount to its bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct ReadConfig {
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    pub decoded_cache_bytes: u64,
    pub ahead_bytes: u64,
}

impl Default for ReadConfig {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60), decoded_cache_bytes: 16 << 20, ahead_bytes: 1 << 20 }
    }
}

/// `[snapshotter]`: the daemon behind containerd.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct SnapshotterConfig {
    pub socket: PathBuf,
    pub name: String,
    pub containerd: PathBuf,
    #[serde(with = "humantime_serde")]
    pub credentials_lifetime: Duration,
    pub lazy_oci: bool,
}

impl Default for SnapshotterConfig {
    fn default() -> Self {
        let containerd = "/run/containerd/containerd.sock".into();
        let credentials_lifetime = Duration::from_secs(24 * 3600);
        Self { socket: PathBuf::new(), name: "shoal".into(), containerd, credentials_lifetime, lazy_oci: false }
    }
}

impl SnapshotterConfig {
    /// Where containerd is served; none if it is not.
    pub(crate) fn socket(&self) -> Option<&Path> {
        Some(self.socket.as_path()).filter(|socket| !socket.as_os_str().is_empty())
    }
}

impl Config {
    /// Reads `file` (none: the defaults) and puts each `KEY=VALUE` of `overrides` over it, in order. `KEY` is dotted
    /// (`control.mdns`), `VALUE` is TOML, or a bare string where it is not.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the file or flag and the key.
    pub fn load(file: Option<&Path>, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut table = Table::new();
        if let Some(path) = file {
            let origin = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
            table = parse_table(&origin, &text)?;
            check(&origin, &table)?;
        }
        for text in overrides {
            merge(&mut table, overlay(&format!("--set {text}"), text)?);
        }
        whole(table)
    }

    /// Where the keeper listens.
    pub(crate) fn keeper_socket(&self) -> PathBuf {
        let socket = &self.mounts.keeper_socket;
        if socket.as_os_str().is_empty() { self.data_dir.join("keeper.sock") } else { socket.clone() }
    }

    fn reads_through_itself(&self) -> bool {
        let (Ok(Some(proxy)), Some(own)) = (self.registry.proxy.options(), self.mirror.address()) else {
            return false;
        };
        let host = proxy.url.host_str().unwrap_or_default();
        let here = host == "localhost" || host.parse() == Ok(own.ip());
        here && proxy.url.port_or_known_default() == Some(own.port())
    }

    /// Where the node's certificate of membership lies; none in a cluster without a key.
    pub fn membership_file(&self) -> Option<PathBuf> {
        let cluster = &self.cluster;
        let file = &cluster.membership;
        let file = if file.as_os_str().is_empty() { self.data_dir.join("membership") } else { file.clone() };
        (!cluster.public_key.is_empty()).then_some(file)
    }
}

fn parse_table(origin: &str, text: &str) -> Result<Table, ConfigError> {
    text.parse::<Table>()
        .map_err(|e| ConfigError::Invalid { origin: origin.to_owned(), message: e.to_string().trim_end().to_owned() })
}

fn parse_override(origin: &str, text: &str) -> Result<Table, ConfigError> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(ConfigError::Invalid { origin: origin.to_owned(), message: "expected KEY=VALUE".into() });
    };
    let key = key.trim();
    parse_table(origin, &format!("{key} = {value}"))
        .or_else(|_| parse_table(origin, &format!("{key} = {}", Value::String(value.to_owned()))))
}

fn overlay(origin: &str, text: &str) -> Result<Table, ConfigError> {
    let overlay = parse_override(origin, text)?;
    check(origin, &overlay)?;
    Ok(overlay)
}

/// Unknown keys first, since their message is the more helpful one, then types and ranges.
fn check(origin: &str, table: &Table) -> Result<(), ConfigError> {
    let known = Table::try_from(Config::default()).map_err(|e| invalid(origin, &e))?;
    refuse_unknown(origin, "", table, &known)?;
    typed(origin, table.clone()).map(|_| ())
}

/// The configuration that all of these keys are, once none is to come any more: those that limit each other fit.
fn whole(table: Table) -> Result<Config, ConfigError> {
    let config = typed("configuration", table)?;
    let fault = config.store.order_fault();
    fault.map_or(Ok(config), |(key, why)| Err(invalid("configuration", &format!("{key} {why}"))))
}

fn typed(origin: &str, table: Table) -> Result<Config, ConfigError> {
    let config: Config = table.try_into().map_err(|e: toml::de::Error| invalid(origin, &e))?;
    let refuse = |key: &str, why: &str| Err(invalid(origin, &format!("{key} {why}")));
    let zone_ok = config.zone.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if config.zone.is_empty() || config.zone.len() > 64 || !zone_ok {
        return refuse("zone", "must be 1 to 64 letters, digits, '-', '_' or '.'");
    }
    if let Some((key, why)) = config.registry.fault() {
        return refuse(key, &why);
    }
    if config.reads_through_itself() {
        return refuse("registry.proxy.url", "is the mirror of this daemon: reads would wait for themselves");
    }
    if let Some((key, why)) = config.limits.fault() {
        return refuse(key, why);
    }
    if config.capacity == 0 {
        return refuse("capacity", "must be at least 1");
    }
    if config.read.deadline.is_zero() {
        return refuse("read.deadline", "must be longer than nothing");
    }
    if !(1..=64).contains(&config.mounts.threads) {
        return refuse("mounts.threads", "must be 1 to 64 threads");
    }
    config.pull_secrets.fault().map_or(Ok(()), |(key, why)| refuse(key, why).map(drop))?;
    config.mirror.fault().map_or(Ok(()), |(key, why)| refuse(key, why).map(drop))?;
    config.store.fault().map_or(Ok(()), |(key, why)| refuse(key, why).map(drop))?;
    if config.control.lease < Duration::from_secs(1) {
        return refuse("control.lease", "must be at least 1 s");
    }
    Ok(config)
}

fn invalid(origin: &str, error: &impl ToString) -> ConfigError {
    ConfigError::Invalid { origin: origin.to_owned(), message: error.to_string().trim_end().to_owned() }
}

fn refuse_unknown(origin: &str, prefix: &str, table: &Table, known: &Table) -> Result<(), ConfigError> {
    for (key, value) in table {
        let full = format!("{prefix}{key}");
        match (value, known.get(key)) {
            (_, None) => {
                let nearest = known
                    .keys()
                    .map(|k| (strsim::normalized_damerau_levenshtein(k, key), k))
                    .filter(|(likeness, _)| *likeness > 0.5)
                    .max_by(|a, b| a.0.total_cmp(&b.0))
                    .map(|(_, k)| format!("{prefix}{k}"));
                return Err(ConfigError::UnknownKey { origin: origin.to_owned(), key: full, nearest });
            }
            // The keys of these are the operator's own.
            (Value::Table(_), Some(Value::Table(_))) if full == "labels" || full == "registry.proxy.headers" => {}
            (Value::Table(inner), Some(Value::Table(known))) => {
                refuse_unknown(origin, &format!("{full}."), inner, known)?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(into)), Value::Table(from)) => merge(into, from),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENTED: &str = include_str!("../../docs/shoal.toml");

    #[test]
    fn the_documented_file_is_the_default() {
        let table = DOCUMENTED.parse::<Table>().unwrap();
        check("docs/shoal.toml", &table).unwrap();
        assert_eq!(typed("docs/shoal.toml", table.clone()).unwrap(), Config::default());
        assert_eq!(table, Table::try_from(Config::default()).unwrap(), "a key is missing in docs/shoal.toml");
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest() {
        let table = "[control]\nboostrap_peers = []".parse().unwrap();
        let error = check("shoal.toml", &table).unwrap_err().to_string();
        assert_eq!(
            error,
            "shoal.toml: unknown key \"control.boostrap_peers\"; did you mean \"control.bootstrap_peers\"?"
        );
        let error = check("shoal.toml", &"qqq = 1".parse().unwrap()).unwrap_err().to_string();
        assert_eq!(error, "shoal.toml: unknown key \"qqq\"");
    }

    #[test]
    fn overrides_go_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shoal.toml");
        std::fs::write(&file, "zone = \"a\"\n[control]\nmdns = true\n[labels]\nrack = \"r1\"\n").unwrap();
        let config = Config::load(
            Some(&file),
            &["zone=b".into(), "control.lease=\"3s\"".into(), "data.listen=127.0.0.1:0".into()],
        )
        .unwrap();
        assert_eq!(config.zone, "b");
        assert!(config.control.mdns);
        assert_eq!(config.control.lease, Duration::from_secs(3));
        assert_eq!(config.data.listen.port(), 0);
        assert_eq!(config.labels["rack"], "r1");
    }

    #[test]
    fn a_daemon_is_no_proxy_of_its_own() {
        let set = |url: &str| {
            let proxy = format!("registry.proxy.url=\"{url}\"");
            Config::load(None, &["mirror.listen=127.0.0.1:4804".into(), proxy])
        };
        for own in ["http://127.0.0.1:4804", "http://localhost:4804/"] {
            assert!(set(own).unwrap_err().to_string().contains("wait for themselves"), "{own}");
        }
        let other = set("http://127.0.0.1:4001").unwrap();
        assert!(other.registry.proxy.options().unwrap().is_some());
        let headers = ["registry.proxy.headers.X-Dragonfly-Tag=a".to_owned()];
        let headers = Config::load(None, &headers).unwrap().registry.proxy.headers;
        assert_eq!(headers["X-Dragonfly-Tag"], "a");
    }

    #[test]
    fn wrong_types_and_ranges_name_the_flag() {
        for (text, part) in [
            ("capacity=0", "capacity must be at least 1"),
            ("zone=\"a b\"", "zone must be"),
            ("role=king", "king"),
            ("novalue", "expected KEY=VALUE"),
            ("read.deadline=\"0s\"", "read.deadline"),
            ("registry.proxy.url=ftp://127.0.0.1", "registry.proxy cannot be used"),
            ("registry.proxy={url = \"http://h\", headers = { Range = \"x\" }}", "set by each request"),
            ("registry.proxy.form=other", "other"),
        ] {
            let error = Config::load(None, &[text.into()]).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(part), "{error}");
        }
    }
}
