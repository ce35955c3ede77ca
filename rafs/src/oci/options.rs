//! What a client of registries starts from.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use super::{BackendRule, DecryptionKeys, Keyring, ProxyOptions};

/// How a [`Registry`](super::Registry) behaves.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Registries (`host` or `host:port`) that speak plain HTTP. Those on a loopback address do so by themselves.
    pub plain_http: Vec<String>,
    /// Registries on a loopback address that speak TLS all the same.
    pub https: Vec<String>,
    /// Files of PEM certificates to trust beside those of the system.
    pub ca_files: Vec<PathBuf>,
    /// Who to be, where.
    pub auth: Keyring,
    /// Token servers (`host` or `host:port`) that see the credentials for a registry that names them, beside those under the
    /// registry's own domain.
    pub token_servers: Vec<String>,
    /// Hosts (`host` or `host:port`) that are asked for what a registry has before it is asked itself, in their order.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// What is asked for all that a digest names before the registry is. Mirrors come first.
    pub proxy: Option<ProxyOptions>,
    /// What opens encrypted bootstrap layers.
    pub decryption_keys: Arc<DecryptionKeys>,
    /// Where blobs of images lie that are not in their registry. The first rule for an image counts.
    pub backends: Vec<BackendRule>,
    /// Tries after the first, for what may pass: broken connections, 429, 5xx. Default 4.
    pub retries: u32,
    /// The longest wait before a try. A registry that asks for more gets an error instead of a wait. Default 20 s.
    pub max_wait: Duration,
    /// Most reads of one host that are under way at the same time, until their last byte, and as many writes. Who wants more
    /// waits. Token servers are asked at any time. Default 64.
    pub requests_per_host: usize,
    /// For a connection with its handshake. Default 5 s.
    pub connect_timeout: Duration,
    /// For the next byte. Default 20 s.
    pub read_timeout: Duration,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            https: Vec::new(),
            ca_files: Vec::new(),
            auth: Keyring::default(),
            token_servers: Vec::new(),
            mirrors: BTreeMap::new(),
            proxy: None,
            decryption_keys: Arc::default(),
            backends: Vec::new(),
            retries: 4,
            max_wait: Duration::from_secs(20),
            requests_per_host: 64,
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(20),
        }
    }
}
