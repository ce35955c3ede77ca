//! Credentials, where they are found, and what a registry's challenge asks for.
//!
//! Credentials stay in this process: they have no `Display`, their `Debug` hides the password, and the HTTP side sends
//! them to the registry they belong to and to its token server, nowhere else. An identity token goes to the token
//! server alone.

use std::{collections::BTreeMap, fmt, fs, io, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;

use super::Source;

mod answers;
mod helper;
mod keyring;
mod shared;

pub use keyring::{Keyring, Offer};
pub use shared::SharedCredentials;

/// Largest auth file that is read.
const MAX_AUTHFILE: u64 = 1 << 20;

/// The user name of an identity token, as docker's credential helpers give it.
const TOKEN_USER: &str = "<token>";

/// A user name and a password, or an [identity token](Self::identity_token).
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user name; `<token>` is that of an identity token.
    pub username: String,
    /// The password, or an access token that the registry takes for one, or the identity token.
    pub password: String,
}

impl Credentials {
    /// An identity token: what a token server gives access tokens for, in the place of a password (the refresh token of
    /// RFC 6749, section 6).
    pub fn identity_token(token: String) -> Self {
        Self { username: TOKEN_USER.to_owned(), password: token }
    }

    /// The identity token, if this is one.
    pub(super) fn as_identity_token(&self) -> Option<&str> {
        (self.username == TOKEN_USER).then_some(&self.password)
    }

    /// The value of an `Authorization` header; an identity token has none.
    pub(super) fn basic(&self) -> Option<String> {
        let pair = || format!("{}:{}", self.username, self.password);
        self.as_identity_token().is_none().then(|| format!("Basic {}", STANDARD.encode(pair())))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Why an auth file could not be used. Says nothing of its content.
#[derive(Debug, thiserror::Error)]
pub enum AuthfileError {
    /// It could not be read.
    #[error("cannot read the auth file {path}")]
    Read {
        /// The file.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// It is too large to be one.
    #[error("the auth file {path} is larger than 1 MiB")]
    TooLarge {
        /// The file.
        path: String,
    },
    /// It is not JSON of the right shape. The position alone is told: the text around it may be a secret.
    #[error("the auth file {path} is broken at line {line}")]
    Json {
        /// The file.
        path: String,
        /// The line.
        line: usize,
    },
    /// An entry is neither a user with a password nor base64 of the two.
    #[error("the auth file {path} has a broken entry for {registry}")]
    Entry {
        /// The file.
        path: String,
        /// The key of the entry.
        registry: String,
    },
    /// A credential helper that the auth file names did not answer.
    #[error("the credential helper {helper:?} for {registry}: {reason}")]
    Helper {
        /// Its name.
        helper: String,
        /// Whose credentials it was asked for.
        registry: String,
        /// What went wrong.
        reason: String,
    },
}

/// Credentials by registry, or by registry and path, as in `~/.docker/config.json` and containers' `auth.json`.
#[derive(Debug, Clone, Default)]
pub struct Authfile {
    entries: BTreeMap<String, Credentials>,
    /// Helpers by registry.
    helpers: BTreeMap<String, String>,
    /// The helper for all other registries.
    store: Option<String>,
    /// Where to look for what is not in this one.
    next: Option<Box<Authfile>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl Authfile {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, AuthfileError> {
        Self::parse(&Self::read(path)?, &path.display().to_string())
    }

    /// Reads a file that has the entries alone, such as `~/.dockercfg`.
    ///
    /// # Errors
    /// See [`Self::load`].
    pub fn load_entries(path: &Path) -> Result<Self, AuthfileError> {
        Self::parse_entries(&Self::read(path)?, &path.display().to_string())
    }

    fn read(path: &Path) -> Result<Vec<u8>, AuthfileError> {
        let name = path.display().to_string();
        let read = |source| AuthfileError::Read { path: name.clone(), source };
        if fs::metadata(path).map_err(read)?.len() > MAX_AUTHFILE {
            return Err(AuthfileError::TooLarge { path: name });
        }
        fs::read(path).map_err(read)
    }

    /// Parses the content of the file that errors call `path`.
    pub fn parse(bytes: &[u8], path: &str) -> Result<Self, AuthfileError> {
        Self::of(json(bytes, path)?, path)
    }

    /// Parses the entries alone, as they stood in `~/.dockercfg`.
    ///
    /// # Errors
    /// See [`Self::parse`].
    pub fn parse_entries(bytes: &[u8], path: &str) -> Result<Self, AuthfileError> {
        Self::of(Document { auths: json(bytes, path)?, ..Document::default() }, path)
    }

    fn of(document: Document, path: &str) -> Result<Self, AuthfileError> {
        let mut entries = BTreeMap::new();
        for (key, entry) in document.auths {
            let broken = || AuthfileError::Entry { path: path.to_owned(), registry: key.clone() };
            if let Some(credentials) = entry.credentials().map_err(|()| broken())? {
                entries.insert(normal_key(&key), credentials);
            }
        }
        let helpers = document.cred_helpers.into_iter().map(|(key, helper)| (normal_key(&key), helper)).collect();
        let store = document.creds_store.filter(|store| !store.is_empty());
        Ok(Self { entries, helpers, store, next: None })
    }

    /// This one, and behind it another for what it has nothing of.
    pub fn before(mut self, next: Self) -> Self {
        let last = match self.next.take() {
            Some(own) => own.before(next),
            None => next,
        };
        self.next = Some(Box::new(last));
        self
    }

    /// This one and those behind it.
    fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |file| file.next.as_deref())
    }

    /// The helper that knows credentials for `source`, where no file has any itself.
    fn helper(&self, source: &Source) -> Option<&str> {
        if self.find(source).is_some() {
            return None;
        }
        let named = self.all().find_map(|file| file.helpers.get(source.registry()).or(file.store.as_ref()));
        named.map(String::as_str)
    }

    /// Adds or replaces the credentials for a registry, or a registry and the beginning of a path.
    pub fn insert(&mut self, registry: &str, credentials: Credentials) {
        self.entries.insert(normal_key(registry), credentials);
    }

    /// The entry with the longest path that `source` lies under, of the first file that has one.
    pub fn find(&self, source: &Source) -> Option<&Credentials> {
        self.all().find_map(|file| file.own(source))
    }

    fn own(&self, source: &Source) -> Option<&Credentials> {
        let name = source.to_string();
        let mut key = name.as_str();
        loop {
            if let Some(credentials) = self.entries.get(key) {
                return Some(credentials);
            }
            key = key.rsplit_once('/')?.0;
        }
    }
}

fn json<T: serde::de::DeserializeOwned>(bytes: &[u8], path: &str) -> Result<T, AuthfileError> {
    serde_json::from_slice(bytes).map_err(|error| AuthfileError::Json { path: path.to_owned(), line: error.line() })
}

impl Entry {
    /// `None` for an entry with nothing in it.
    fn credentials(&self) -> Result<Option<Credentials>, ()> {
        if let Some(token) = self.identitytoken.as_ref().filter(|token| !token.is_empty()) {
            return Ok(Some(Credentials::identity_token(token.clone())));
        }
        let decoded = match (&self.username, &self.password, self.auth.as_deref()) {
            (Some(username), Some(password), _) => Some((username.clone(), password.clone())),
            (_, _, None | Some("")) => None,
            (_, _, Some(auth)) => {
                let bytes = STANDARD.decode(auth.trim()).map_err(|_| ())?;
                let text = String::from_utf8(bytes).map_err(|_| ())?;
                let (username, password) = text.split_once(':').ok_or(())?;
                Some((username.to_owned(), password.trim_end_matches('\0').to_owned()))
            }
        };
        Ok(decoded.map(|(username, password)| Credentials { username, password }))
    }
}

/// What helpers know a registry by.
fn server(registry: &str) -> &str {
    if registry == "docker.io" { "https://index.docker.io/v1/" } else { registry }
}

/// Docker writes `https://index.docker.io/v1/`, others write bare hosts.
fn normal_key(key: &str) -> String {
    let key =
        key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key).trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    let (host, path) = key.split_once('/').map_or((key, None), |(host, path)| (host, Some(path)));
    let host = match host.to_ascii_lowercase() {
        host if host == "index.docker.io" || host == "registry-1.docker.io" => "docker.io".to_owned(),
        host => host,
    };
    path.map_or_else(|| host.clone(), |path| format!("{host}/{path}"))
}

/// What a registry wants before it answers, from `WWW-Authenticate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// A token from another server.
    Bearer {
        /// The URL of the token server.
        realm: String,
        /// What to call the registry there.
        service: Option<String>,
    },
    /// User and password.
    Basic,
}

impl Challenge {
    /// The best of the challenges in all header values: a token rather than a password.
    pub(super) fn parse<'a>(values: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut basic = None;
        for value in values {
            for (scheme, params) in split_challenges(value) {
                if scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                } else if scheme.eq_ignore_ascii_case("bearer")
                    && let Some(realm) = params.get("realm")
                {
                    return Some(Self::Bearer { realm: realm.clone(), service: params.get("service").cloned() });
                }
            }
        }
        basic
    }
}

/// Splits `Scheme k="v", k=v, Scheme2 ...` (RFC 9110, section 11.6.1). Stops at the first thing it does not understand.
fn split_challenges(value: &str) -> Vec<(String, BTreeMap<String, String>)> {
    let mut challenges: Vec<(String, BTreeMap<String, String>)> = Vec::new();
    let mut rest = value.trim_start();
    while !rest.is_empty() {
        let end = rest.find([' ', '=', ',']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if let Some(after) = after.strip_prefix('=') {
            let Some((text, after)) = split_value(after) else { break };
            let Some((_, params)) = challenges.last_mut() else { break };
            params.insert(word.to_ascii_lowercase(), text);
            rest = after;
        } else {
            if !word.is_empty() {
                challenges.push((word.to_owned(), BTreeMap::new()));
            }
            rest = after;
        }
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    challenges
}

/// A quoted string with backslash escapes, or a token.
fn split_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, rest) = text.split_at(text.find([',', ' ']).unwrap_or(text.len()));
        return Some((word.to_owned(), rest));
    };
    let mut out = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((out, &quoted[at + 1..])),
            '\\' => out.push(chars.next()?.1),
            c => out.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn user(name: &str) -> Credentials {
        Credentials { username: name.to_owned(), password: "secret".to_owned() }
    }

    #[test]
    fn the_longest_entry_wins_and_odd_keys_are_understood() {
        let text = format!(
            r#"{{"auths": {{
                "https://index.docker.io/v1/": {{"auth": "{hub}"}},
                "h.io": {{"username": "host", "password": "secret"}},
                "H.io/team": {{"auth": "{team}"}},
                "helper.io": {{}},
                "token.io": {{"auth": "{hub}", "identitytoken": "secret"}}
            }}}}"#,
            hub = STANDARD.encode("hub:secret"),
            team = STANDARD.encode("team:secret"),
        );
        let file = Authfile::parse(text.as_bytes(), "auth.json").unwrap();
        let find = |registry, repository| file.find(&Source::new(registry, repository).unwrap()).cloned();
        assert_eq!(find("docker.io", "library/alpine"), Some(user("hub")));
        assert_eq!(find("h.io", "other/app"), Some(user("host")));
        assert_eq!(find("h.io", "team/app"), Some(user("team")));
        assert_eq!(find("h.io", "teams/app"), Some(user("host")));
        assert_eq!(find("helper.io", "a"), None);
        assert_eq!(find("token.io", "a"), Some(Credentials::identity_token("secret".to_owned())));
        assert_eq!(find("token.io", "a").unwrap().basic(), None);
        assert_eq!(find("elsewhere.io", "a"), None);
    }

    #[test]
    fn the_first_file_that_has_something_counts() {
        let file = |text: &str| Authfile::parse(text.as_bytes(), "auth.json").unwrap();
        let entry = |name| format!(r#"{{"username": "{name}", "password": "secret"}}"#);
        let first = file(&format!(r#"{{"auths": {{"h.io": {}}}, "credHelpers": {{"i.io": "one"}}}}"#, entry("a")));
        let second = file(&format!(r#"{{"auths": {{"h.io/team": {}, "j.io": {}}}}}"#, entry("b"), entry("c")));
        let third = file(&format!(r#"{{"auths": {{"i.io/team": {}}}, "credsStore": "all"}}"#, entry("d")));
        let all = first.before(second).before(third);
        let source = |registry, repository| Source::new(registry, repository).unwrap();
        for (source, user_name, helper) in [
            (source("h.io", "team/app"), Some("a"), None),
            (source("j.io", "app"), Some("c"), None),
            (source("i.io", "app"), None, Some("one")),
            (source("i.io", "team/app"), Some("d"), None),
            (source("k.io", "app"), None, Some("all")),
        ] {
            assert_eq!(all.find(&source), user_name.map(user).as_ref(), "{source}");
            assert_eq!(all.helper(&source), helper, "{source}");
        }
    }

    #[test]
    fn broken_files_are_named_and_never_quoted() {
        let secret = "c2VjcmV0LXdpdGhvdXQtY29sb24=";
        for text in [
            format!(r#"{{"auths": {{"h.io": {{"auth": "{secret}"}}}}}}"#),
            format!(r#"{{"auths": {{"h.io": {{"auth": "%%{secret}"}}}}}}"#),
            format!(r#"{{"auths": {{"h.io": "{secret}"}}}}"#),
        ] {
            let error = Authfile::parse(text.as_bytes(), "auth.json").unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(shown.contains("auth.json") && !shown.contains(secret), "{shown}");
        }
        assert!(!format!("{:?}", user("name")).contains("secret"));
    }

    #[test]
    fn challenges_are_parsed() {
        let bearer = r#"Bearer realm="https://auth.io/token?a=b",service="reg \"x\"",scope="repository:a:pull""#;
        let wanted = Challenge::Bearer {
            realm: "https://auth.io/token?a=b".to_owned(),
            service: Some(r#"reg "x""#.to_owned()),
        };
        assert_eq!(Challenge::parse([bearer].into_iter()), Some(wanted.clone()));
        assert_eq!(Challenge::parse(["Basic realm=\"x\"", bearer].into_iter()), Some(wanted.clone()));
        let both = format!("Basic realm=x, {bearer}");
        assert_eq!(Challenge::parse([both.as_str()].into_iter()), Some(wanted));
        assert_eq!(Challenge::parse(["basic"].into_iter()), Some(Challenge::Basic));
        assert_eq!(Challenge::parse(["Bearer service=x", "Negotiate"].into_iter()), None);
    }

    proptest! {
        #[test]
        fn no_challenge_makes_it_panic_or_hang(value in "[Bb=a ,\"\\\\\té]{0,40}") {
            let _ = Challenge::parse([value.as_str()].into_iter());
        }
    }
}
