//! Which token servers are shown the credentials for a registry.
//!
//! A registry names its token server itself, and whoever has taken a registry over, or owns the name that somebody has
//! mistyped, names one of their own. So a password or an identity token goes to the registry's own host, to hosts under the
//! same registered domain by the public suffix list (`auth.docker.io` for `docker.io`, `gitlab.com` for `registry.gitlab.com`),
//! to the few that are known to be elsewhere, and to those that the operator names. Everybody else is asked as nobody.

use reqwest::Url;

use super::{describe, transport::host_of};
use crate::oci::RegistryError;

/// The token server that a registry, `host[:port]`, names. It must be reached over https, or be on the registry's own host
/// when that is itself spoken to in the clear (`plain`). With `shown` it will see credentials; `named` are the servers,
/// `host[:port]`, that may see them all the same.
///
/// # Errors
/// [`RegistryError::BadRealm`], [`RegistryError::UntrustedRealm`].
pub(super) fn checked(
    realm: &str,
    registry: &str,
    plain: bool,
    shown: bool,
    named: &[String],
) -> Result<Url, RegistryError> {
    let bad = |realm: String| RegistryError::BadRealm { registry: registry.to_owned(), realm };
    let url = Url::parse(realm).map_err(|_| bad("(not a URL)".to_owned()))?;
    let told = || format!("{}://{}", url.scheme(), describe(&url));
    let Some(host) = url.host_str() else { return Err(bad(told())) };
    let own = host_of(registry);
    let allowed = url.scheme() == "https" || (url.scheme() == "http" && host == own && plain);
    if !allowed || !url.username().is_empty() || url.password().is_some() {
        return Err(bad(told()));
    }
    let is_named = || named.iter().any(|name| is(&url, host, name));
    if shown && host != own && !same_domain(own, host) && !known_pair(own, host) && !is_named() {
        let (registry, server) = (registry.to_owned(), host.to_owned());
        return Err(RegistryError::UntrustedRealm { registry, realm: told(), server });
    }
    Ok(url)
}

/// Whether a URL is at `host` or `host:port`.
fn is(url: &Url, host: &str, name: &str) -> bool {
    let port = url.port_or_known_default();
    host.eq_ignore_ascii_case(name) || port.is_some_and(|port| format!("{host}:{port}").eq_ignore_ascii_case(name))
}

/// Whether two hosts are under one registered domain. Addresses are under none.
fn same_domain(one: &str, other: &str) -> bool {
    let domain = |host: &str| {
        let is_address = host.starts_with('[') || host.parse::<std::net::IpAddr>().is_ok();
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        (!is_address).then(|| psl::domain_str(&host).map(str::to_owned)).flatten()
    };
    domain(one).is_some_and(|one| domain(other).is_some_and(|other| one == other))
}

/// Registries whose token server is under another domain.
fn known_pair(registry: &str, server: &str) -> bool {
    // Scaleway: rg.REGION.scw.cloud.
    let region = registry.strip_prefix("rg.").and_then(|rest| rest.strip_suffix(".scw.cloud"));
    server == "api.scaleway.com" && region.is_some_and(|region| !region.is_empty() && !region.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trusts(registry: &str, realm: &str, named: &[&str]) -> bool {
        let named: Vec<_> = named.iter().map(|name| (*name).to_owned()).collect();
        match checked(realm, registry, false, true, &named) {
            Ok(_) => true,
            Err(RegistryError::UntrustedRealm { .. }) => false,
            Err(error) => panic!("{realm}: {error}"),
        }
    }

    #[test]
    fn credentials_go_where_the_registry_is_at_home() {
        for (registry, realm) in [
            ("docker.io", "https://auth.docker.io/token"),
            ("ghcr.io", "https://ghcr.io/token"),
            ("quay.io", "https://quay.io:443/v2/auth"),
            ("registry.gitlab.com", "https://gitlab.com/jwt/auth"),
            ("registry.connect.redhat.com", "https://sso.redhat.com/auth"),
            ("registry.example.co.uk:5000", "https://auth.example.co.uk/token"),
            ("harbor.corp.lan", "https://sso.corp.lan/token"),
            ("10.0.0.1:5000", "https://10.0.0.1:5001/token"),
            ("[fd00::1]:5000", "https://[fd00::1]/token"),
            ("localhost:5000", "https://localhost:5001/token"),
            ("rg.fr-par.scw.cloud", "https://api.scaleway.com/registry-internal/v1/tokens"),
        ] {
            assert!(trusts(registry, realm, &[]), "{registry} {realm}");
        }
    }

    #[test]
    fn credentials_go_to_nobody_else() {
        for (registry, realm) in [
            ("docker.io", "https://auth.docker.io.evil.example/token"),
            ("ghcr.io", "https://evil.example/token"),
            ("ghcr.io", "https://evilghcr.io/token"),
            // Domains that are sold or given to anybody.
            ("registry.co.uk", "https://evil.co.uk/token"),
            ("one.github.io", "https://other.github.io/token"),
            ("registry.lan", "https://evil.lan/token"),
            ("10.0.0.1:5000", "https://10.0.0.2/token"),
            ("10.0.0.1", "https://1.0.0.1/token"),
            ("[fd00::1]:5000", "https://[fd00::2]/token"),
            ("localhost:5000", "https://127.0.0.1/token"),
            ("rg.evil.scw.cloud.evil.example", "https://api.scaleway.com/token"),
            ("rg.a.b.scw.cloud", "https://api.scaleway.com/token"),
            ("s3.fr-par.scw.cloud", "https://api.scaleway.com/token"),
        ] {
            assert!(!trusts(registry, realm, &[]), "{registry} {realm}");
            // Nobody is shown to anybody.
            assert!(checked(realm, registry, false, false, &[]).is_ok(), "{registry} {realm}");
        }
    }

    #[test]
    fn the_operator_may_name_others() {
        let realm = "https://auth.other.example:8443/token";
        for (named, trusted) in [
            ("auth.other.example", true),
            ("AUTH.other.example:8443", true),
            ("auth.other.example:443", false),
            ("other.example", false),
            ("", false),
        ] {
            assert_eq!(trusts("registry.example.com", realm, &[named]), trusted, "{named}");
        }
        assert!(trusts("registry.example.com", "https://auth.other.example/token", &["auth.other.example:443"]));
    }
}
