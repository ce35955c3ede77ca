//! The way through a proxy: how a request for a registry is put to it, and what is not taken from it.

use std::{fmt, sync::Arc};

use reqwest::{
    Client, Method, Proxy, RequestBuilder, Response, StatusCode, Url,
    header::{HeaderMap, HeaderValue},
};

use super::{Body, Http, Request, transport};
use crate::oci::{ProxyForm, RegistryError, RegistryOptions, proxy::State};

/// Names the registry to a proxy that is spoken to as a mirror.
const REGISTRY: &str = "x-dragonfly-registry";

/// How requests go through a proxy.
pub(in crate::oci) struct Route {
    client: Client,
    proxy: Url,
    form: ProxyForm,
    /// With every request.
    headers: HeaderMap,
    /// Whether links that a registry has signed may be shown to the proxy.
    credentials: bool,
    state: Arc<State>,
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("proxy", &self.proxy.as_str()).field("form", &self.form).finish_non_exhaustive()
    }
}

impl Route {
    pub(in crate::oci) fn new(
        options: &RegistryOptions,
        proxy: &Url,
        form: ProxyForm,
        mut headers: HeaderMap,
        credentials: bool,
        state: Arc<State>,
    ) -> Result<Self, RegistryError> {
        let failed = |error: reqwest::Error| RegistryError::Tls { reason: error.to_string() };
        let mut builder = transport::builder(options)?.no_proxy();
        if form != ProxyForm::Mirror {
            let mut own = HeaderMap::new();
            if form == ProxyForm::Tunnel {
                // What is behind the tunnel has no business with these.
                let names: Vec<_> =
                    headers.keys().filter(|name| name.as_str().starts_with("proxy-")).cloned().collect();
                for name in names {
                    own.extend(headers.remove(&name).map(|value| (name, value)));
                }
            }
            builder = builder.proxy(Proxy::all(proxy.clone()).map_err(failed)?.headers(own));
        }
        let client = builder.build().map_err(failed)?;
        Ok(Self { client, proxy: proxy.clone(), form, headers, credentials, state })
    }

    /// A request for `url`, as the proxy is to see it.
    pub(super) fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        let mut headers = self.headers.clone();
        let mut target = url.clone();
        match self.form {
            ProxyForm::Tunnel => {}
            // Without a port of its own the registry is named as it always is: the proxy knows where it serves.
            ProxyForm::Forward => drop(target.set_scheme("http")),
            ProxyForm::Mirror => {
                if let Ok(registry) = HeaderValue::from_str(&url.origin().ascii_serialization()) {
                    headers.insert(REGISTRY, registry);
                }
                target = self.proxy.clone();
                target.set_path(url.path());
                target.set_query(url.query());
            }
        }
        self.client.request(method, target).headers(headers)
    }

    /// Whether what the registry redirects to is asked for through the proxy as well. Such links let in whoever has them.
    pub(super) fn takes_redirect(&self, url: &Url) -> bool {
        self.credentials || (self.form == ProxyForm::Tunnel && url.scheme() == "https")
    }

    pub(super) fn state(&self) -> &Arc<State> {
        &self.state
    }
}

impl Http {
    /// The same through a proxy, with the same tokens.
    pub(in crate::oci) fn through(&self, options: RegistryOptions, route: Route) -> Result<Self, RegistryError> {
        let grants = Arc::clone(&self.grants);
        Ok(Self { grants, route: Some(route), ..Self::new(options)? })
    }

    /// What the registry itself asks to see, after a 401. Only it may ask: not whoever it redirected to, and not a proxy, which
    /// is asked past.
    pub(super) async fn challenge(
        &self,
        request: &Request<'_>,
        response: &Response,
        grant: Option<&HeaderValue>,
    ) -> Result<Option<HeaderMap>, RegistryError> {
        if self.route.is_none() {
            // An upload may go on elsewhere without a redirect.
            let own = response.url().origin() == self.request(Method::GET, request.source, "")?.url.origin();
            return Ok(own.then(|| response.headers().clone()));
        }
        let (url, headers) = (request.url.clone(), HeaderMap::new());
        let source = request.source;
        let head = Request { method: Method::HEAD, url, source, push: false, also: None, headers, body: Body::None };
        let asked = self.transport.execute(&head, &request.url, grant, None).await?;
        Ok((asked.status() == StatusCode::UNAUTHORIZED).then(|| asked.headers().clone()))
    }
}
