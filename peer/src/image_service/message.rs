//! What a pull says, as far as it is looked at: `runtime.v1.PullImageRequest` of the CRI.
//!
//! Written by hand because generated messages show all of themselves in their `Debug`.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use shoal_rafs::oci::{Credentials, Source};

/// A pull.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(super) struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    pub(super) auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub(super) image: String,
}

/// Who the puller is. A registry token, its field 6, is not supported: it is good for minutes only.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub(super) struct AuthConfig {
    #[prost(string, tag = "1")]
    pub(super) username: String,
    #[prost(string, tag = "2")]
    pub(super) password: String,
    /// Base64 of the two with a colon between them, in place of them.
    #[prost(string, tag = "3")]
    pub(super) auth: String,
    /// For whom they are; any registry, if it is empty.
    #[prost(string, tag = "4")]
    pub(super) server_address: String,
    /// In place of a password.
    #[prost(string, tag = "5")]
    pub(super) identity_token: String,
}

impl fmt::Debug for PullImageRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullImageRequest").field("image", &self.image).finish_non_exhaustive()
    }
}

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig").finish_non_exhaustive()
    }
}

impl PullImageRequest {
    /// The repository of the image and what the puller shows for it. `None` if it shows nothing that can be used there.
    pub(super) fn shown(self) -> Option<(Source, Credentials)> {
        let (source, auth) = (source_of(&self.image?.image)?, self.auth?);
        if !auth.server_address.is_empty() && host_of(&auth.server_address) != source.registry() {
            return None;
        }
        Some((source, auth.credentials()?))
    }
}

impl AuthConfig {
    fn credentials(self) -> Option<Credentials> {
        if !self.identity_token.is_empty() {
            return Some(Credentials::identity_token(self.identity_token));
        }
        if !self.username.is_empty() {
            return Some(Credentials { username: self.username, password: self.password });
        }
        let text = String::from_utf8(STANDARD.decode(self.auth.trim()).ok()?).ok()?;
        let (username, password) = text.split_once(':').filter(|(username, _)| !username.is_empty())?;
        Some(Credentials { username: username.into(), password: password.trim_end_matches('\0').into() })
    }
}

/// The repository that containerd takes an image's name for: without a host it is one of Docker Hub.
fn source_of(image: &str) -> Option<Source> {
    let name = image.split('@').next()?;
    // A colon behind the last slash begins a tag.
    let name = match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => name,
    };
    let is_host = |first: &str| first.contains(['.', ':']) || first == "localhost";
    let (host, path) = match name.split_once('/') {
        Some((first, path)) if is_host(first) => (host_of(first), path.to_owned()),
        _ => ("docker.io".to_owned(), name.to_owned()),
    };
    let path = if host == "docker.io" && !path.contains('/') { format!("library/{path}") } else { path };
    Source::new(&host, &path).ok()
}

/// `https://index.docker.io/v1/` means `docker.io`, and any other URL its host.
fn host_of(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default().to_ascii_lowercase();
    match host.as_str() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pull(image: &str, auth: AuthConfig) -> Option<(String, String, String)> {
        let request = PullImageRequest { image: Some(ImageSpec { image: image.to_owned() }), auth: Some(auth) };
        let (source, credentials) = request.shown()?;
        Some((source.to_string(), credentials.username, credentials.password))
    }

    fn user() -> AuthConfig {
        AuthConfig { username: "user".into(), password: "word".into(), ..AuthConfig::default() }
    }

    #[test]
    fn images_are_named_as_containerd_names_them() {
        let digest = format!("h.io/app@sha256:{}", "ab".repeat(32));
        for (image, source) in [
            ("h.io/team/app:1", "h.io/team/app"),
            ("h.io:5000/app", "h.io:5000/app"),
            ("H.io:5000/app:1", "h.io:5000/app"),
            (digest.as_str(), "h.io/app"),
            ("localhost/app", "localhost/app"),
            ("alpine:3", "docker.io/library/alpine"),
            ("alpine", "docker.io/library/alpine"),
            ("team/app", "docker.io/team/app"),
            ("docker.io/alpine", "docker.io/library/alpine"),
            ("index.docker.io/team/app", "docker.io/team/app"),
        ] {
            assert_eq!(pull(image, user()).expect(image).0, source, "{image}");
        }
        assert_eq!(pull("", user()), None);
        assert_eq!(pull("h.io/", user()), None);
    }

    #[test]
    fn credentials_are_for_the_server_that_they_name() {
        for (server, counts) in [
            ("", true),
            ("h.io", true),
            ("https://h.io/v1/", true),
            ("https://H.io", true),
            ("other.io", false),
            ("https://h.io.evil", false),
            ("h.io:5000", false),
        ] {
            let auth = AuthConfig { server_address: server.into(), ..user() };
            assert_eq!(pull("h.io/app", auth).is_some(), counts, "{server}");
        }
        let token = AuthConfig { identity_token: "word".into(), ..user() };
        assert_eq!(pull("h.io/app", token), Some(("h.io/app".into(), "<token>".into(), "word".into())));
        let hub = AuthConfig { server_address: "https://index.docker.io/v1/".into(), ..user() };
        assert!(pull("alpine", hub).is_some());
    }

    #[test]
    fn both_forms_are_read_and_neither_is_shown() {
        let encoded = AuthConfig { auth: STANDARD.encode("user:wo:rd\0\0"), ..AuthConfig::default() };
        assert_eq!(pull("h.io/app", encoded.clone()).unwrap(), ("h.io/app".into(), "user".into(), "wo:rd".into()));
        for auth in ["", "%%", "bm9jb2xvbg==", "OnBhc3M="] {
            let broken = AuthConfig { auth: auth.into(), ..AuthConfig::default() };
            assert_eq!(pull("h.io/app", broken), None, "{auth}");
        }
        assert_eq!(PullImageRequest::default().shown(), None);
        let request = PullImageRequest { image: None, auth: Some(user()) };
        let shown = format!("{request:?} {:?} {encoded:?}", user());
        assert!(!shown.contains("word") && !shown.contains(&encoded.auth), "{shown}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_not(bytes in prop::collection::vec(any::<u8>(), 0..200), image in ".{0,40}") {
            if let Ok(request) = <PullImageRequest as prost::Message>::decode(&bytes[..]) {
                let _ = request.shown();
            }
            let _ = pull(&image, user());
        }
    }
}
