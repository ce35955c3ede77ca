//! Which registry a request means. Pure.
//!
//! The first of these that is there: the host of a request in the form that proxies are sent (`GET http://host/v2/..`), as of
//! nydusd with a `proxy`; `ns=`, as of containerd; the header `X-Dragonfly-Registry` with the registry's URL, as of nydusd with
//! `mirrors`; what the configuration says.

use std::net::SocketAddr;

use axum::http::{HeaderMap, Uri};
use url::form_urlencoded;

/// Names a registry by its URL, in the configurations of nydusd.
const REGISTRY: &str = "x-dragonfly-registry";

/// The registry, as the request names it: not checked in any way. `own` is where the mirror listens.
pub(super) fn upstream(uri: &Uri, headers: &HeaderMap, own: SocketAddr, default: &str) -> Option<String> {
    let authority = uri.authority().map(|authority| authority.as_str()).filter(|host| !is_own(host, own));
    if let Some(host) = authority {
        return Some(host.to_owned());
    }
    let query = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
    if let Some((_, namespace)) = query.into_iter().find(|(key, _)| key == "ns") {
        return Some(namespace.into_owned());
    }
    let named = headers.get(REGISTRY).and_then(|value| value.to_str().ok()).map(host_of_url);
    named.map(str::to_owned).or_else(|| Some(default.to_owned()).filter(|default| !default.is_empty()))
}

fn is_own(host: &str, own: SocketAddr) -> bool {
    host.parse() == Ok(own) || host.strip_prefix("localhost:").and_then(|port| port.parse().ok()) == Some(own.port())
}

/// `https://host:port/` means `host:port`, and so does `host:port`.
fn host_of_url(text: &str) -> &str {
    let text = text.trim();
    let text = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    text.trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn named(uri: &str, header: Option<&str>, default: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert(REGISTRY, header.parse().unwrap());
        }
        upstream(&uri.parse().unwrap(), &headers, ([127, 0, 0, 1], 4804).into(), default)
    }

    #[test]
    fn the_first_that_names_a_registry_counts() {
        for (uri, header, default, expected) in [
            ("/v2/a/blobs/b", None, "", None),
            ("/v2/a/blobs/b", None, "docker.io", Some("docker.io")),
            ("/v2/a/blobs/b", Some("https://r.example:5000/"), "docker.io", Some("r.example:5000")),
            ("/v2/a/blobs/b", Some("r.example"), "docker.io", Some("r.example")),
            ("/v2/a/blobs/b?ns=ghcr.io", Some("https://r.example"), "docker.io", Some("ghcr.io")),
            ("/v2/a/blobs/b?x=1&ns=127.0.0.1%3A5000", None, "", Some("127.0.0.1:5000")),
            ("http://r.example/v2/a/blobs/b?ns=ghcr.io", Some("https://other"), "", Some("r.example")),
            // Not a proxy's request, only a client that likes whole URLs.
            ("http://127.0.0.1:4804/v2/a/blobs/b?ns=ghcr.io", None, "", Some("ghcr.io")),
            ("http://localhost:4804/v2/a/blobs/b", None, "docker.io", Some("docker.io")),
        ] {
            assert_eq!(named(uri, header, default).as_deref(), expected, "{uri}");
        }
    }

    proptest! {
        #[test]
        fn any_query_and_header_give_a_name_or_none(query in "[ -~]{0,40}", header in "[ -~]{0,40}") {
            if let Ok(uri) = format!("/v2/?{query}").parse::<Uri>() {
                let mut headers = HeaderMap::new();
                headers.insert(REGISTRY, header.parse().unwrap());
                let named = upstream(&uri, &headers, ([127, 0, 0, 1], 1).into(), "");
                prop_assert!(named.is_some());
            }
        }
    }
}
