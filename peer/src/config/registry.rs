//! `[registry]`: how this node reads registries.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use shoal_rafs::oci::{BackendRule, BlobPlace, ProxyForm, ProxyOptions};
use url::Url;

/// `[registry]`: how this node reads registries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct RegistryConfig {
    pub plain_http: Vec<String>,
    pub ca_files: Vec<PathBuf>,
    pub authfile: PathBuf,
    pub token_servers: Vec<String>,
    pub decryption_keys: Vec<PathBuf>,
    pub mirrors: Vec<RegistryMirrors>,
    pub proxy: ProxyConfig,
    pub backends: Vec<BackendConfig>,
    pub serve: Vec<String>,
    pub concurrency: u32,
    pub prefetch_concurrency: u32,
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

/// An entry of `registry.mirrors`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct RegistryMirrors {
    pub registry: String,
    pub hosts: Vec<String>,
}

/// An entry of `registry.backends`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct BackendConfig {
    pub place: String,
    #[serde(default)]
    pub images: Vec<String>,
    #[serde(default)]
    pub credentials: PathBuf,
}

/// `[registry.proxy]`: a proxy that keeps what registries have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct ProxyConfig {
    pub url: String,
    pub form: ProxyForm,
    pub registries: Vec<String>,
    pub credentials: bool,
    pub headers: BTreeMap<String, String>,
    pub ping_url: String,
    #[serde(with = "humantime_serde")]
    pub check_interval: Duration,
    pub fallback: bool,
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            form: ProxyForm::Mirror,
            registries: vec!["*".into()],
            credentials: false,
            headers: BTreeMap::new(),
            ping_url: String::new(),
            check_interval: Duration::from_secs(5),
            fallback: true,
            timeout: Duration::from_secs(5),
        }
    }
}

impl ProxyConfig {
    /// The proxy, if there is one.
    ///
    /// # Errors
    /// What cannot be meant.
    pub(crate) fn options(&self) -> Result<Option<ProxyOptions>, String> {
        if self.url.is_empty() {
            return Ok(None);
        }
        let url = |text: &str| text.parse::<Url>().map_err(|error| format!("{text:?} is no URL: {error}"));
        let options = ProxyOptions {
            url: url(&self.url)?,
            form: self.form,
            registries: self.registries.clone(),
            credentials: self.credentials,
            headers: self.headers.clone(),
            ping_url: Some(&self.ping_url).filter(|text| !text.is_empty()).map(|text| url(text)).transpose()?,
            check_interval: self.check_interval,
            fallback: self.fallback,
            timeout: self.timeout,
        };
        options.check().map(|()| Some(options))
    }
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            ca_files: Vec::new(),
            authfile: PathBuf::new(),
            token_servers: Vec::new(),
            decryption_keys: Vec::new(),
            mirrors: Vec::new(),
            proxy: ProxyConfig::default(),
            backends: Vec::new(),
            serve: vec!["*".into()],
            concurrency: 16,
            prefetch_concurrency: 12,
            timeout: Duration::from_secs(30),
        }
    }
}

impl RegistryConfig {
    /// What cannot be meant: the key, and why.
    pub(super) fn fault(&self) -> Option<(&'static str, String)> {
        let requests =
            |key, number| (!(1..=1024).contains(&number)).then(|| (key, "must be 1 to 1024 requests".to_owned()));
        let wrong_place = |backend: &BackendConfig| {
            let error = backend.place.parse::<BlobPlace>().err()?;
            Some(("registry.backends", format!("has a place {:?}: {error}", backend.place)))
        };
        requests("registry.concurrency", self.concurrency)
            .or_else(|| requests("registry.prefetch_concurrency", self.prefetch_concurrency))
            .or_else(|| self.backends.iter().find_map(wrong_place))
            .or_else(|| Some(("registry.proxy", format!("cannot be used: {}", self.proxy.options().err()?))))
    }

    /// Where credentials are; none if there are none.
    pub(crate) fn authfile(&self) -> Option<&Path> {
        Some(self.authfile.as_path()).filter(|path| !path.as_os_str().is_empty())
    }

    /// Where blobs lie that are not in registries.
    pub(crate) fn backend_rules(&self) -> Vec<BackendRule> {
        let rule = |backend: &BackendConfig| {
            // Others were refused when the configuration was read.
            let place = backend.place.parse().ok()?;
            let credentials = Some(backend.credentials.clone()).filter(|path| !path.as_os_str().is_empty());
            Some(BackendRule { place, images: backend.images.clone(), credentials })
        };
        self.backends.iter().filter_map(rule).collect()
    }
}
