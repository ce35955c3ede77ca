//! The HTTP library, set up: TLS with ring, certificates, proxies, and who is spoken to in the clear.

use std::{net::IpAddr, sync::Arc, time::Duration};

use reqwest::{
    Client, ClientBuilder, Method, Response, StatusCode, Url,
    header::{self, HeaderValue},
    redirect,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use super::{Body, Request, Route, describe, hosts::Hosts, progress::Progress};
use crate::oci::{BlobStream, RegistryError, RegistryOptions};

/// Two HTTP clients: one that minds the proxy variables of the environment, and one for this machine, which does not.
#[derive(Debug)]
pub(super) struct Transport {
    proxied: Client,
    direct: Client,
    plain_http: Vec<String>,
    https: Vec<String>,
    read_timeout: Duration,
    hosts: Hosts,
}

impl Transport {
    pub(super) fn new(options: &RegistryOptions) -> Result<Self, RegistryError> {
        let tls = tls_config(options)?;
        let client = |adjust: fn(ClientBuilder) -> ClientBuilder| build(adjust(with_tls(options, tls.clone())));
        let lower = |hosts: &[String]| hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        Ok(Self {
            proxied: client(|builder| builder)?,
            direct: client(ClientBuilder::no_proxy)?,
            plain_http: lower(&options.plain_http),
            https: lower(&options.https),
            read_timeout: options.read_timeout,
            hosts: Hosts::new(options.requests_per_host),
        })
    }

    /// Whether a registry, `host[:port]`, is spoken to without TLS.
    pub(super) fn is_plain(&self, registry: &str) -> bool {
        let listed = |hosts: &[String]| hosts.iter().any(|host| host == registry);
        listed(&self.plain_http) || (is_loopback(host_of(registry)) && !listed(&self.https))
    }

    /// Sends a request to `url`, through a proxy where there is a route, and waits for the head of the answer.
    pub(super) async fn execute(
        &self,
        request: &Request<'_>,
        url: &Url,
        grant: Option<&HeaderValue>,
        route: Option<&Route>,
    ) -> Result<Response, RegistryError> {
        let what = describe(url);
        let begun = match route {
            Some(route) => route.request(request.method.clone(), url),
            None => self.client(url).request(request.method.clone(), url.clone()),
        };
        let mut builder = begun.headers(request.headers.clone()).header(header::ACCEPT_ENCODING, "identity");
        if let Some(grant) = grant {
            builder = builder.header(header::AUTHORIZATION, grant);
        }
        let progress = Progress::of(request.body.len());
        let body = match &request.body {
            Body::None => None,
            Body::Bytes(bytes) => Some(progress.watch_bytes(bytes.clone())),
            Body::File { path, from, size } => Some(progress.watch(BlobStream::from_file(path, *from..*size).await?)),
            Body::Remote { open, from, .. } => Some(progress.watch(open(*from).await?)),
        };
        if let Some(body) = body {
            builder = builder.header(header::CONTENT_LENGTH, request.body.len()).body(body);
        }
        let permit = self.hosts.enter(url, body_is_sent(&request.body)).await;
        let sent = progress.answer(builder.send(), self.read_timeout).await;
        if let Some(error) = progress.take_error() {
            return Err(error);
        }
        let sent = sent.map_err(|after| RegistryError::Timeout { what: what.clone(), after })?;
        let mut response = sent.map_err(|error| RegistryError::transport(&what, error))?;
        let bytes_follow = matches!(response.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT);
        if request.method == Method::GET && bytes_follow {
            // It ends with the answer's last byte, or with who does not want it. No other answer keeps anybody out: who has
            // it may ask more before it goes away.
            response.extensions_mut().insert(permit);
        }
        Ok(response)
    }

    /// Asks a token server: GET, or POST of a form.
    pub(super) async fn token(&self, url: &Url, shown: Shown) -> Result<Response, RegistryError> {
        let (what, client) = (describe(url), self.client(url));
        let builder = match shown {
            Shown::Nothing => client.get(url.clone()),
            Shown::Basic(value) => {
                let mut value = HeaderValue::from_str(&value).map_err(|_| RegistryError::Protocol {
                    what: what.clone(),
                    reason: "the password cannot be sent in a header".to_owned(),
                })?;
                value.set_sensitive(true);
                client.get(url.clone()).header(header::AUTHORIZATION, value)
            }
            Shown::Form(form) => {
                let post = client.post(url.clone());
                post.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
            }
        };
        let builder = builder.header(header::ACCEPT, "application/json");
        let after = self.read_timeout;
        let sent = tokio::time::timeout(after, builder.send()).await;
        let sent = sent.map_err(|_| RegistryError::Timeout { what: what.clone(), after })?;
        sent.map_err(|error| RegistryError::transport(&what, error))
    }

    pub(super) fn client(&self, url: &Url) -> &Client {
        if url.host_str().is_some_and(is_loopback) { &self.direct } else { &self.proxied }
    }
}

fn body_is_sent(body: &Body<'_>) -> bool {
    !matches!(body, Body::None)
}

/// What a token server is shown.
pub(super) enum Shown {
    Nothing,
    /// A value of `Authorization`.
    Basic(String),
    /// A form with an identity token in it.
    Form(String),
}

/// An HTTP client with these options, which minds the proxy variables of the environment.
pub(super) fn builder(options: &RegistryOptions) -> Result<ClientBuilder, RegistryError> {
    Ok(with_tls(options, tls_config(options)?))
}

/// The same that minds nothing.
pub(in crate::oci) fn plain_client(options: &RegistryOptions) -> Result<Client, RegistryError> {
    build(builder(options)?.no_proxy())
}

fn with_tls(options: &RegistryOptions, tls: ClientConfig) -> ClientBuilder {
    Client::builder()
        .tls_backend_preconfigured(tls)
        .http1_only()
        .redirect(redirect::Policy::none())
        .connect_timeout(options.connect_timeout)
        .user_agent(concat!("shoal/", env!("CARGO_PKG_VERSION")))
}

fn build(builder: ClientBuilder) -> Result<Client, RegistryError> {
    builder.build().map_err(|error| RegistryError::Tls { reason: error.to_string() })
}

/// Whether a registry, `host[:port]`, is on a loopback address, where it speaks plain HTTP unless told otherwise.
pub fn is_loopback_registry(registry: &str) -> bool {
    is_loopback(host_of(registry))
}

/// Whether a registry, `host[:port]`, may be anywhere in the world: its name ends in a public suffix, or its address is none of
/// those that are for private networks.
pub fn is_public_registry(registry: &str) -> bool {
    let host = host_of(registry);
    match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(address) => !is_private(address),
        Err(_) => {
            let name = host.trim_end_matches('.').to_ascii_lowercase();
            name.contains('.') && psl::suffix(name.as_bytes()).is_some_and(|suffix| suffix.is_known())
        }
    }
}

/// Loopback, link-local, and what RFC 1918, 6598, 2544 and 4193 set aside.
fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => {
            let [first, second, ..] = address.octets();
            let shared = first == 100 && second & 0xC0 == 64;
            let bench = first == 198 && second & 0xFE == 18;
            address.is_private() || address.is_loopback() || address.is_link_local() || shared || bench
        }
        IpAddr::V6(address) => address.is_loopback() || address.is_unique_local() || address.is_unicast_link_local(),
    }
}

/// The host of `host[:port]`.
pub(super) fn host_of(registry: &str) -> &str {
    match registry.strip_prefix('[') {
        Some(_) => &registry[..registry.find(']').map_or(registry.len(), |end| end + 1)],
        None => registry.split(':').next().unwrap_or(registry),
    }
}

pub(super) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

fn tls_config(options: &RegistryOptions) -> Result<ClientConfig, RegistryError> {
    let mut roots = RootCertStore::empty();
    // A machine without certificates can still reach registries whose certificates are given, or that need none.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for file in &options.ca_files {
        let broken = |reason: String| RegistryError::Tls { reason: format!("{}: {reason}", file.display()) };
        let certificates = CertificateDer::pem_file_iter(file).map_err(|error| broken(error.to_string()))?;
        let mut found = false;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| broken(error.to_string()))?;
            roots.add(certificate).map_err(|error| broken(error.to_string()))?;
            found = true;
        }
        if !found {
            return Err(broken("no certificate in it".to_owned()));
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| RegistryError::Tls { reason: error.to_string() })?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_and_listed_registries_are_plain() {
        let options = RegistryOptions {
            plain_http: vec!["Mirror.lan:5000".to_owned()],
            https: vec!["localhost:5443".to_owned()],
            ..Default::default()
        };
        let transport = Transport::new(&options).unwrap();
        for plain in
            ["localhost", "localhost:5000", "127.0.0.1:1", "127.0.0.9", "[::1]", "[::1]:5000", "mirror.lan:5000"]
        {
            assert!(transport.is_plain(plain), "{plain}");
        }
        for tls in ["localhost:5443", "docker.io", "mirror.lan", "localhost.example.com", "128.0.0.1", "[::2]:5000"] {
            assert!(!transport.is_plain(tls), "{tls}");
        }
    }

    #[test]
    fn private_networks_are_told_from_the_world() {
        for private in [
            "localhost:5000",
            "registry:5000",
            "registry.lan",
            "mirror.test:5000",
            "registry.default.svc.cluster.local",
            "10.1.2.3:5000",
            "172.31.0.1",
            "192.168.1.1:80",
            "127.0.0.1",
            "169.254.1.1",
            "100.64.0.1",
            "198.18.0.1",
            "[::1]:5000",
            "[fd00::1]:5000",
            "[fe80::1]",
            "[::ffff:10.0.0.1]:5000",
        ] {
            assert!(!is_public_registry(private), "{private}");
        }
        for public in [
            "docker.io",
            "ghcr.io",
            "registry.example.com:5000",
            "a.co.uk.",
            "QUAY.IO",
            "8.8.8.8:5000",
            "172.32.0.1",
            "100.128.0.1",
            "198.20.0.1",
            "[2001:4860::1]:5000",
            "[::ffff:8.8.8.8]",
        ] {
            assert!(is_public_registry(public), "{public}");
        }
    }

    #[test]
    fn certificate_files_are_named_when_broken() {
        let empty = tempfile::NamedTempFile::new().unwrap();
        let options = RegistryOptions { ca_files: vec![empty.path().to_owned()], ..Default::default() };
        let error = Transport::new(&options).unwrap_err().to_string();
        assert!(error.contains(&empty.path().display().to_string()), "{error}");
    }
}
