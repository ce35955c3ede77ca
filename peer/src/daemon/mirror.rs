//! The daemon as a mirror of registries.

use std::sync::Arc;

use shoal_rafs::oci::{Registry, RegistryOptions};

use super::{StartError, registry_options};
use crate::{
    config::Config,
    mirror::{MirrorOptions, MirrorServer},
    node::Node,
    plain::Collector,
    upgrade::Inheritance,
};

/// Starts the mirror, if one is configured.
pub(super) async fn start(
    config: &Config,
    node: Arc<Node>,
    collector: Collector,
    inheritance: &Inheritance,
) -> Result<Option<MirrorServer>, StartError> {
    let Some(address) = config.mirror.address() else { return Ok(None) };
    // What a client may read is asked for with what the client shows, never with what this node could. A client that waits
    // has another host to go to.
    let (auth, decryption_keys) = Default::default();
    let options = RegistryOptions { auth, decryption_keys, retries: 0, proxy: None, ..registry_options(config)? };
    let registry = Registry::new(options)?;
    let options = MirrorOptions {
        listen: address,
        registries: config.mirror.registries.clone(),
        default_registry: config.mirror.default_registry.clone(),
        patience: config.mirror.patience,
        access_lifetime: config.mirror.access_lifetime,
        tag_lifetime: config.mirror.tag_lifetime,
    };
    let server = MirrorServer::start(options, registry, node, collector, inheritance).await;
    server.map(Some).map_err(|source| StartError::Http { address, source })
}
