//! containerd's `hosts.toml`: what is written there so that it asks the mirror first, and which files are this program's to
//! change. Pure.
//!
//! The first line says who wrote the file and what its rest hashes to, so a file that somebody has changed since counts as
//! theirs. The registry stays in it as `server`: containerd goes there when the mirror does not answer, or answers with an error.

use std::{fmt, net::SocketAddr, str::FromStr};

use sha2::{Digest, Sha256};
use shoal_rafs::oci::{Source, is_loopback_registry};

/// Before the hash in the first line.
const MARK: &str =
    "# Written by `shoal mirror configure`, which takes it back with --remove. sha256 of what follows: ";

/// Whose `hosts.toml` it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Namespace {
    /// Of every registry that has none of its own.
    Default,
    /// Of one registry.
    Registry {
        /// `host[:port]`, as references name it.
        host: String,
        /// Whether it is spoken to over plain HTTP.
        plain_http: bool,
    },
}

/// Why a text names no registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a registry such as docker.io or http://registry.lan:5000")]
pub(crate) struct NotARegistry(String);

impl FromStr for Namespace {
    type Err = NotARegistry;

    fn from_str(text: &str) -> Result<Self, NotARegistry> {
        let (rest, scheme) = match text.split_once("://") {
            Some(("http", rest)) => (rest, Some(true)),
            Some(("https", rest)) => (rest, Some(false)),
            Some(_) => return Err(NotARegistry(text.to_owned())),
            None => (text, None),
        };
        // Any repository will do: only the host is of interest.
        let source = Source::new(rest, "a").ok().filter(|source| !source.is_layout());
        let host = source.ok_or_else(|| NotARegistry(text.to_owned()))?.registry().to_owned();
        let plain_http = scheme.unwrap_or_else(|| is_loopback_registry(&host));
        Ok(Self::Registry { host, plain_http })
    }
}

impl fmt::Display for Namespace {
    /// The name of the folder.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("_default"),
            Self::Registry { host, .. } => f.write_str(host),
        }
    }
}

/// Whose a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Author {
    /// This program's, as it was written.
    Ours,
    /// This program's, and changed since.
    Changed,
    /// Somebody else's.
    Other,
}

/// The file for a registry, with the mirror first.
pub(crate) fn render(namespace: &Namespace, mirror: SocketAddr) -> String {
    let server = match namespace {
        // Without one, containerd goes to the registry that the image names.
        Namespace::Default => String::new(),
        Namespace::Registry { host, plain_http } => {
            let scheme = if *plain_http { "http" } else { "https" };
            // Docker Hub is called by a name under which it does not serve.
            let host = if host == "docker.io" { "registry-1.docker.io" } else { host };
            format!("server = \"{scheme}://{host}\"\n\n")
        }
    };
    let rest = format!("{server}[host.\"http://{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    format!("{MARK}{}\n{rest}", hash(&rest))
}

/// Who wrote a file.
pub(crate) fn author(text: &str) -> Author {
    match text.strip_prefix(MARK).and_then(|marked| marked.split_once('\n')) {
        None => Author::Other,
        Some((hashed, rest)) if hashed == hash(rest) => Author::Ours,
        Some(_) => Author::Changed,
    }
}

fn hash(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use toml::Table;

    use super::*;

    const MIRROR: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4804);

    #[test]
    fn the_registry_stays_behind_the_mirror() {
        for (name, folder, server) in [
            ("docker.io", "docker.io", "https://registry-1.docker.io"),
            ("Registry.example:5000", "registry.example:5000", "https://registry.example:5000"),
            ("http://registry.lan:5000", "registry.lan:5000", "http://registry.lan:5000"),
            ("127.0.0.1:5000", "127.0.0.1:5000", "http://127.0.0.1:5000"),
            ("https://localhost:5000", "localhost:5000", "https://localhost:5000"),
        ] {
            let namespace: Namespace = name.parse().unwrap();
            assert_eq!(namespace.to_string(), folder);
            let file: Table = render(&namespace, MIRROR).parse().unwrap();
            assert_eq!(file["server"].as_str(), Some(server), "{name}");
            assert!(file["host"].as_table().unwrap().contains_key("http://127.0.0.1:4804"));
        }
        let default: Table = render(&Namespace::Default, MIRROR).parse().unwrap();
        assert!(!default.contains_key("server") && default.contains_key("host"));
    }

    #[test]
    fn what_is_no_registry_is_refused() {
        for text in ["", "a/b", "ftp://r.example", "oci:/var", "../x", "r.example/", "user@r.example", "http://"] {
            assert!(text.parse::<Namespace>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_that_somebody_has_changed_is_theirs() {
        let text = render(&Namespace::Default, MIRROR);
        assert_eq!(author(&text), Author::Ours);
        assert_eq!(author(&text.replace("pull", "push")), Author::Changed);
        assert_eq!(author(&format!("{text}# mine\n")), Author::Changed);
        for other in ["", "server = \"https://r.example\"\n", &text[1..]] {
            assert_eq!(author(other), Author::Other, "{other}");
        }
    }

    proptest! {
        #[test]
        fn whatever_names_a_registry_makes_a_file_of_ours(name in "(https?://)?[a-z0-9.:-]{1,20}", port in 1..u16::MAX) {
            if let Ok(namespace) = name.parse::<Namespace>() {
                let folder = namespace.to_string();
                prop_assert!(!folder.contains('/') && folder != ".." && folder != ".");
                let text = render(&namespace, SocketAddr::from(([127, 0, 0, 1], port)));
                prop_assert_eq!(author(&text), Author::Ours);
                let file: Table = text.parse().unwrap();
                prop_assert!(file["server"].as_str().unwrap().starts_with("http"));
            }
        }
    }
}
