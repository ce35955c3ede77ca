//! `[mirror]`: registries for those who know no better way.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// `[mirror]`: the registry mirror.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct MirrorConfig {
    pub listen: String,
    pub registries: Vec<String>,
    pub default_registry: String,
    #[serde(with = "humantime_serde")]
    pub patience: Duration,
    #[serde(with = "humantime_serde")]
    pub access_lifetime: Duration,
    #[serde(with = "humantime_serde")]
    pub tag_lifetime: Duration,
}

impl Default for MirrorConfig {
    fn default() -> Self {
        Self {
            listen: String::new(),
            registries: vec!["*".into()],
            default_registry: String::new(),
            patience: Duration::from_secs(30),
            access_lifetime: Duration::from_secs(60),
            tag_lifetime: Duration::from_secs(10),
        }
    }
}

impl MirrorConfig {
    /// Where it listens; none if there is no mirror.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }

    /// The key that is wrong, and why.
    pub(super) fn fault(&self) -> Option<(&'static str, &'static str)> {
        let address = self.listen.parse::<SocketAddr>();
        if !self.listen.is_empty() && !address.is_ok_and(|address| address.ip().is_loopback()) {
            // Clients show their credentials to it, in the clear.
            return Some((
                "mirror.listen",
                "must be empty, or a loopback address with a port, such as 127.0.0.1:4804",
            ));
        }
        self.patience.is_zero().then_some(("mirror.patience", "must be longer than nothing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_listens_on_loopback_or_not_at_all() {
        let listening = |listen: &str| MirrorConfig { listen: listen.into(), ..MirrorConfig::default() };
        assert_eq!((listening("").fault(), listening("").address()), (None, None));
        for good in ["127.0.0.1:4804", "[::1]:4804"] {
            assert_eq!((listening(good).fault(), listening(good).address().is_some()), (None, true), "{good}");
        }
        for bad in ["0.0.0.0:4804", "192.0.2.1:4804", "localhost", "4804"] {
            assert!(listening(bad).fault().is_some(), "{bad}");
        }
    }
}
