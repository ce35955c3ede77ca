//! Lists and events of secrets, as the API server writes them, and what is read of them.

use std::{collections::BTreeMap, fmt};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use shoal_rafs::oci::Authfile;

use super::api::ApiError;

/// Most bytes of a secret's content; the API server takes no larger one.
const MAX_CONTENT: usize = 1 << 20;
/// Most bytes of a name or a version.
const MAX_NAME: usize = 512;

/// The two kinds of secrets that have credentials for registries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A `~/.docker/config.json`.
    Config,
    /// What was a `~/.dockercfg`: the entries alone.
    Legacy,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Config, Self::Legacy];

    /// What the API calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Config => "kubernetes.io/dockerconfigjson",
            Self::Legacy => "kubernetes.io/dockercfg",
        }
    }

    /// Where its content is.
    fn key(self) -> &'static str {
        match self {
            Self::Config => ".dockerconfigjson",
            Self::Legacy => ".dockercfg",
        }
    }
}

/// What one watch tells of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Scope {
    /// None for all.
    pub(super) namespace: Option<String>,
    pub(super) kind: Kind,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "secrets {} of ", self.kind.name())?;
        match &self.namespace {
            Some(namespace) => write!(f, "the namespace {namespace}"),
            None => f.write_str("all namespaces"),
        }
    }
}

/// A secret that can be used. Says nothing of itself.
pub(super) struct Secret {
    pub(super) file: Authfile,
    /// Bytes of its content.
    pub(super) bytes: usize,
}

/// What has happened. Names are `NAMESPACE/NAME`.
pub(super) enum Change {
    /// It is there, or other than it was. None: it is of no use.
    Put {
        name: String,
        version: String,
        secret: Option<Secret>,
    },
    Removed {
        name: String,
        version: String,
    },
    /// Nothing, up to this version.
    Bookmark {
        version: String,
    },
}

/// A part of a list.
pub(super) struct Page {
    pub(super) secrets: Vec<(String, Option<Secret>)>,
    /// Version of the whole list.
    pub(super) version: String,
    /// What to ask for the rest with; empty at the end.
    pub(super) rest: String,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    resource_version: Option<String>,
    #[serde(rename = "continue")]
    rest: Option<String>,
}

/// A secret or a status.
#[derive(Deserialize)]
struct Object {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    data: Option<BTreeMap<String, String>>,
    #[serde(default)]
    code: Option<u16>,
    #[serde(default)]
    message: Option<String>,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    items: Option<Vec<Object>>,
}

#[derive(Deserialize)]
struct Event {
    r#type: String,
    object: Object,
}

/// Reads a part of a list.
///
/// # Errors
/// It is none. What is wrong with it is not told, since that might quote a secret.
pub(super) fn page(bytes: &[u8], kind: Kind) -> Result<Page, ApiError> {
    let list: List = serde_json::from_slice(bytes).map_err(|_| ApiError::NotUnderstood("list"))?;
    let items = list.items.unwrap_or_default().into_iter();
    let secrets = items.map(|object| {
        let name = object.name()?;
        let secret = object.secret(&name, kind);
        Ok((name, secret))
    });
    Ok(Page {
        secrets: secrets.collect::<Result<_, ApiError>>()?,
        version: version(&list.metadata)?,
        rest: list.metadata.rest.unwrap_or_default(),
    })
}

/// Reads a line of a watch.
///
/// # Errors
/// It is none, or it says that the watch has failed.
pub(super) fn change(line: &[u8], kind: Kind) -> Result<Change, ApiError> {
    let Event { r#type, object } = serde_json::from_slice(line).map_err(|_| ApiError::NotUnderstood("event"))?;
    match r#type.as_str() {
        "ADDED" | "MODIFIED" => {
            let (name, version) = (object.name()?, version(&object.metadata)?);
            let secret = object.secret(&name, kind);
            Ok(Change::Put { name, version, secret })
        }
        "DELETED" => Ok(Change::Removed { name: object.name()?, version: version(&object.metadata)? }),
        "BOOKMARK" => Ok(Change::Bookmark { version: version(&object.metadata)? }),
        "ERROR" => Err(ApiError::status(object.code.unwrap_or_default(), object.message.unwrap_or_default())),
        _ => Err(ApiError::NotUnderstood("event")),
    }
}

/// The message of a status, if it is one.
pub(super) fn message(bytes: &[u8]) -> String {
    serde_json::from_slice::<Object>(bytes).ok().and_then(|object| object.message).unwrap_or_default()
}

fn version(metadata: &Metadata) -> Result<String, ApiError> {
    let version = metadata.resource_version.clone().filter(|version| (1..=MAX_NAME).contains(&version.len()));
    version.ok_or(ApiError::NotUnderstood("version"))
}

impl Object {
    fn name(&self) -> Result<String, ApiError> {
        let Metadata { name, namespace, .. } = &self.metadata;
        match (namespace, name) {
            (Some(namespace), Some(name)) if namespace.len() + name.len() <= MAX_NAME => {
                Ok(format!("{namespace}/{name}"))
            }
            _ => Err(ApiError::NotUnderstood("name")),
        }
    }

    /// What it holds, or nothing, and a line in the log that says where it is wrong.
    fn secret(&self, name: &str, kind: Kind) -> Option<Secret> {
        let text = self.data.as_ref()?.get(kind.key())?;
        let content = STANDARD.decode(text).ok().filter(|content| content.len() <= MAX_CONTENT);
        let Some(content) = content else {
            tracing::warn!("the pull secret {name} is not used: it is too large, or no base64");
            return None;
        };
        let file = match kind {
            Kind::Config => Authfile::parse(&content, name),
            Kind::Legacy => Authfile::parse_entries(&content, name),
        };
        let file = file.inspect_err(|error| tracing::warn!("a pull secret is not used: {error}")).ok()?;
        Some(Secret { file, bytes: content.len() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn secret(data: serde_json::Value) -> serde_json::Value {
        json!({"metadata": {"name": "s", "namespace": "n", "resourceVersion": "7"}, "data": data})
    }

    #[test]
    fn events_are_told_apart() {
        let read = |event: serde_json::Value| change(event.to_string().as_bytes(), Kind::Config);
        let config = STANDARD.encode(r#"{"auths": {"h.io": {"username": "u", "password": "p"}}}"#);
        let put = read(json!({"type": "ADDED", "object": secret(json!({".dockerconfigjson": config}))}));
        assert!(matches!(put, Ok(Change::Put { name, version, secret: Some(_) }) if name == "n/s" && version == "7"));
        for broken in
            [json!({}), json!(null), json!({".dockerconfigjson": "%"}), json!({".dockerconfigjson": "e30K"})]
        {
            let usable = broken == json!({".dockerconfigjson": "e30K"});
            let put = read(json!({"type": "MODIFIED", "object": secret(broken)}));
            assert!(matches!(put, Ok(Change::Put { secret, .. }) if secret.is_some() == usable));
        }
        assert!(matches!(
            read(json!({"type": "DELETED", "object": secret(json!(null))})),
            Ok(Change::Removed { .. })
        ));
        let bookmark = json!({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}});
        assert!(matches!(read(bookmark), Ok(Change::Bookmark { version }) if version == "9"));
        let error =
            |code: u16| read(json!({"type": "ERROR", "object": {"code": code, "message": "m", "metadata": {}}}));
        assert!(matches!(error(410), Err(ApiError::Gone)));
        assert!(matches!(error(500), Err(ApiError::Refused { status: 500, .. })));
        let unnamed = json!({"metadata": {"name": "s", "resourceVersion": "7"}});
        for wrong in [json!({"type": "ADDED", "object": unnamed}), json!({"type": "OTHER", "object": {}}), json!(3)] {
            assert!(matches!(read(wrong), Err(ApiError::NotUnderstood(_))));
        }
    }

    #[test]
    fn a_page_has_its_version_and_how_to_go_on() {
        let list = json!({"metadata": {"resourceVersion": "5", "continue": "more"}, "items": [secret(json!({}))]});
        let read = page(list.to_string().as_bytes(), Kind::Legacy).ok().unwrap();
        assert_eq!((read.version.as_str(), read.rest.as_str(), read.secrets.len()), ("5", "more", 1));
        let empty = json!({"metadata": {"resourceVersion": "5"}, "items": null});
        assert!(page(empty.to_string().as_bytes(), Kind::Config).is_ok_and(|page| page.rest.is_empty()));
        assert!(page(b"{}", Kind::Config).is_err(), "it has no version");
    }

    #[test]
    fn what_is_wrong_with_a_secret_is_told_without_it() {
        let hidden = "aGlkZGVu";
        for wrong in [json!({"type": hidden, "object": {"code": hidden}}), json!({"type": "ADDED", "object": hidden})]
        {
            let error = change(wrong.to_string().as_bytes(), Kind::Config).err().unwrap();
            assert!(!format!("{error} {error:?}").contains(hidden));
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_it_panic(line in proptest::collection::vec(any::<u8>(), 0..200), text in "[{}\":,a-z0-9\\[\\]]{0,80}") {
            for kind in Kind::ALL {
                let _ = (change(&line, kind), change(text.as_bytes(), kind), page(text.as_bytes(), kind));
            }
        }
    }
}
