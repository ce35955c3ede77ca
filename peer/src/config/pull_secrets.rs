//! `[pull_secrets]`: credentials for registries from Kubernetes.

use serde::{Deserialize, Serialize};

/// Most namespaces that are watched one by one. Each takes two connections to the API server.
const MAX_NAMESPACES: usize = 64;

/// `[pull_secrets]`: which secrets are used, and who tells of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct PullSecretsConfig {
    pub kubeconfig: String,
    pub namespaces: Vec<String>,
}

impl PullSecretsConfig {
    /// In the place of a file: the service account of the daemon's pod.
    pub(crate) const IN_CLUSTER: &'static str = "in-cluster";

    /// The file, or [`IN_CLUSTER`](Self::IN_CLUSTER); none if no secrets are used.
    pub(crate) fn kubeconfig(&self) -> Option<&str> {
        Some(self.kubeconfig.as_str()).filter(|kubeconfig| !kubeconfig.is_empty())
    }

    /// The key that is wrong, and why.
    pub(super) fn fault(&self) -> Option<(&'static str, &'static str)> {
        if self.kubeconfig().is_some_and(|kubeconfig| kubeconfig != Self::IN_CLUSTER && !kubeconfig.starts_with('/'))
        {
            return Some(("pull_secrets.kubeconfig", "must be empty, \"in-cluster\" or an absolute path"));
        }
        // They become part of a URL.
        let named = |name: &String| {
            (1..=63).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        if self.namespaces.len() > MAX_NAMESPACES || !self.namespaces.iter().all(named) {
            return Some(("pull_secrets.namespaces", "must be up to 64 names of namespaces"));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_lead_elsewhere_are_refused() {
        let of = |kubeconfig: &str, namespaces: &[&str]| PullSecretsConfig {
            kubeconfig: kubeconfig.into(),
            namespaces: namespaces.iter().map(ToString::to_string).collect(),
        };
        for good in [of("", &[]), of("in-cluster", &["default", "a-1"]), of("/etc/kubeconfig", &[])] {
            assert_eq!(good.fault(), None);
        }
        for bad in [of("kubeconfig", &[]), of("", &["../nodes"]), of("", &[""]), of("", &["a"; 65])] {
            assert!(bad.fault().is_some(), "{bad:?}");
        }
    }
}
