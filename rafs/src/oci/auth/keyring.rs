//! Who to be, where: what the auth file and its credential helpers say, what pull secrets of a cluster say, and what pulls have
//! shown.
//!
//! Helpers are programs, and asked when a registry wants to know who asks, not before; see [`Keyring::ask_helper`].
//!
//! Credentials of a pull are for its repository alone. They are tried as soon as the pull begins, because it makes this client
//! read, but behind all others: nobody has said yet that they are any good. When the pull has succeeded they come first, and
//! are kept for as long as they are used; when it has failed they are forgotten. What the registry refuses makes way for the
//! next. All of it lies in memory and nowhere else, and is bounded.

use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;

use super::{Authfile, AuthfileError, Credentials, SharedCredentials, answers::Answers, helper};
use crate::oci::Source;

/// Most repositories for which pulls are remembered; those that were used longest ago are forgotten first.
const MAX_REPOSITORIES: NonZeroUsize = NonZeroUsize::new(1024).expect("not 0");
/// Most credentials of one repository.
const MAX_OF_ONE: usize = 4;
/// Longest user name or password of a pull. Tokens of clouds have a few thousand letters.
const MAX_LENGTH: usize = 16 * 1024;
/// Most helpers that run at a time. Each registry has one of as many queues.
const QUEUES: usize = 16;

/// Credentials of this process. Cheap to clone; clones share them.
#[derive(Clone, Default)]
pub struct Keyring {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// How long what a pull has shown is kept after its last use; zero for not at all.
    lifetime: Duration,
    /// Held for a look or a change.
    keys: Mutex<Keys>,
    /// Held while a helper runs, so that a hundred reads that start together ask one once.
    asking: [tokio::sync::Mutex<()>; QUEUES],
}

struct Keys {
    file: Authfile,
    answers: Answers,
    secrets: SharedCredentials,
    pulls: LruCache<Source, Vec<Key>>,
    /// Keys that there have been.
    made: u64,
}

impl Default for Keys {
    fn default() -> Self {
        let pulls = LruCache::sparse(MAX_REPOSITORIES);
        let (answers, secrets) = (Answers::default(), SharedCredentials::default());
        Self { file: Authfile::default(), answers, secrets, pulls, made: 0 }
    }
}

impl Keys {
    /// What the auth file or its helper has for `source`.
    fn own(&self, source: &Source, now: Instant) -> Option<Credentials> {
        self.answers.find(&self.file, source, now)
    }
}

/// What pulls of a repository have shown.
struct Key {
    /// Tells it from one with the same credentials that was forgotten while its pull went on.
    number: u64,
    credentials: Credentials,
    /// Pulls with it that have not ended.
    under_way: usize,
    /// Whether one of them has succeeded.
    good: bool,
    used: Instant,
}

impl From<Authfile> for Keyring {
    /// Remembers no pulls.
    fn from(file: Authfile) -> Self {
        Self::new(file, Duration::ZERO)
    }
}

impl Keyring {
    /// Remembers what pulls have shown for so long after its last use.
    pub fn new(file: Authfile, lifetime: Duration) -> Self {
        let keys = Keys { file, ..Keys::default() };
        Self { shared: Arc::new(Shared { lifetime, keys: Mutex::new(keys), ..Shared::default() }) }
    }

    /// Puts another auth file in the place of the one before. What was got with credentials that are not in it is not used any
    /// more, and its helpers are asked anew.
    pub fn replace(&self, file: Authfile) {
        let mut keys = self.keys();
        keys.file = file;
        keys.answers.clear();
    }

    /// Runs the credential helper that the auth file names for `source`, if there is one and it has not said lately what it
    /// has. At most 16 run at a time, each for half a minute at most. May be dropped at any time.
    ///
    /// # Errors
    /// That it gave no answer, now or up to half a minute ago.
    pub(in crate::oci) async fn ask_helper(&self, source: &Source) -> Result<(), AuthfileError> {
        if self.wanted(source)?.is_none() {
            return Ok(());
        }
        let mut hasher = DefaultHasher::new();
        source.registry().hash(&mut hasher);
        let _turn = self.shared.asking[(hasher.finish() % QUEUES as u64) as usize].lock().await;
        // Somebody may have asked meanwhile.
        let Some((helper, registry)) = self.wanted(source)? else { return Ok(()) };
        let given = helper::ask(&helper, &registry).await;
        self.keys().answers.note(source, helper, given, Instant::now());
        self.wanted(source).map(drop).inspect_err(|error| tracing::warn!("no credentials: {error}"))
    }

    fn wanted(&self, source: &Source) -> Result<Option<(String, String)>, AuthfileError> {
        let Keys { file, answers, .. } = &mut *self.keys();
        answers.wanted(file, source, Instant::now())
    }

    /// Notes that the registry did not take these: a helper that gave them is asked again, soon.
    pub(in crate::oci) fn refused(&self, source: &Source, credentials: &Credentials) {
        self.keys().answers.refused(source, credentials);
    }

    /// Puts other pull secrets in the place of those before. They come behind the auth file, or nothing at all where that has nothing.
    pub fn share(&self, secrets: SharedCredentials) {
        self.keys().secrets = secrets;
    }

    /// Takes what a pull of `source` shows, until it ends: then [`Offer::keep`] or drop. `None` where none are remembered, or
    /// there is no room.
    pub fn offer(&self, source: &Source, credentials: Credentials) -> Option<Offer> {
        self.offer_at(source, credentials, Instant::now())
    }

    fn offer_at(&self, source: &Source, credentials: Credentials, now: Instant) -> Option<Offer> {
        let long = credentials.username.len().max(credentials.password.len()) > MAX_LENGTH;
        if self.shared.lifetime.is_zero() || long {
            return None;
        }
        let mut keys = self.keys();
        keys.made += 1;
        let number = keys.made;
        let of_source = keys.pulls.get_or_insert_mut(source.clone(), Vec::new);
        self.forget(of_source, now);
        if !of_source.iter().any(|key| key.credentials == credentials) {
            if of_source.len() >= MAX_OF_ONE {
                let idle = of_source.iter().enumerate().filter(|(_, key)| key.under_way == 0);
                let (oldest, _) = idle.min_by_key(|(_, key)| key.used)?;
                of_source.remove(oldest);
            }
            let credentials = credentials.clone();
            of_source.push(Key { number, credentials, under_way: 0, good: false, used: now });
        }
        let key = of_source.iter_mut().find(|key| key.credentials == credentials)?;
        key.under_way += 1;
        key.used = now;
        Some(Offer { keyring: self.clone(), source: source.clone(), number: key.number, good: false })
    }

    /// All that may be shown to read `source`, in the order in which it is tried; once nothing at all, where the auth file and
    /// what its helper has said have nothing.
    pub(in crate::oci) fn candidates(&self, source: &Source) -> Vec<Option<Credentials>> {
        self.candidates_at(source, Instant::now())
    }

    fn candidates_at(&self, source: &Source, now: Instant) -> Vec<Option<Credentials>> {
        let mut keys = self.keys();
        let mut pulled: Vec<(Instant, bool, Credentials)> = Vec::new();
        if let Some(of_source) = keys.pulls.get_mut(source) {
            self.forget(of_source, now);
            pulled.extend(of_source.iter().map(|key| (key.used, key.good, key.credentials.clone())));
        }
        pulled.sort_by_key(|(used, ..)| std::cmp::Reverse(*used));
        let of_pulls = |good| pulled.iter().filter(move |(_, is, _)| *is == good).map(|(.., key)| Some(key.clone()));
        let mut all: Vec<Option<Credentials>> = of_pulls(true).collect();
        let secrets = keys.secrets.find(source).into_iter().map(|secret| Some(secret.clone()));
        // What is open to anybody stays so, whatever a pull or a secret shows.
        for next in [keys.own(source, now)].into_iter().chain(secrets).chain(of_pulls(false)) {
            if !all.contains(&next) {
                all.push(next);
            }
        }
        all
    }

    /// Whether these may be shown to read `source`, which counts as a use.
    pub(in crate::oci) fn holds(&self, source: &Source, credentials: &Credentials) -> bool {
        self.holds_at(source, credentials, Instant::now())
    }

    fn holds_at(&self, source: &Source, credentials: &Credentials, now: Instant) -> bool {
        let mut keys = self.keys();
        let in_file =
            keys.own(source, now).as_ref() == Some(credentials) || keys.secrets.find(source).contains(&credentials);
        let pulled = keys.pulls.get_mut(source).and_then(|of_source| {
            self.forget(of_source, now);
            of_source.iter_mut().find(|key| key.credentials == *credentials)
        });
        match pulled {
            Some(key) => key.used = now,
            None => return in_file,
        }
        true
    }

    /// Whether there are any for `source`.
    pub fn knows(&self, source: &Source) -> bool {
        self.candidates(source).iter().any(Option::is_some)
    }

    fn forget(&self, of_source: &mut Vec<Key>, now: Instant) {
        of_source.retain(|key| key.under_way > 0 || (key.good && now < key.used + self.shared.lifetime));
    }

    fn ended(&self, offer: &Offer) {
        let (mut keys, now) = (self.keys(), Instant::now());
        let Some(of_source) = keys.pulls.get_mut(&offer.source) else { return };
        if let Some(key) = of_source.iter_mut().find(|key| key.number == offer.number) {
            key.under_way -= 1;
            key.good |= offer.good;
        }
        self.forget(of_source, now);
        if of_source.is_empty() {
            keys.pulls.pop(&offer.source);
        }
    }

    fn keys(&self) -> MutexGuard<'_, Keys> {
        self.shared.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").finish_non_exhaustive()
    }
}

/// Credentials of a pull that is under way. When it is dropped the pull has failed.
#[derive(Debug)]
pub struct Offer {
    keyring: Keyring,
    source: Source,
    number: u64,
    good: bool,
}

impl Offer {
    /// The pull has succeeded.
    pub fn keep(mut self) {
        self.good = true;
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.keyring.ended(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> Credentials {
        Credentials { username: name.to_owned(), password: "correct horse".to_owned() }
    }

    fn source(repository: &str) -> Source {
        Source::new("h.io", repository).unwrap()
    }

    fn names(keyring: &Keyring, repository: &str) -> Vec<String> {
        let all = keyring.candidates(&source(repository)).into_iter();
        all.map(|one| one.map_or_else(|| "nobody".to_owned(), |one| one.username)).collect()
    }

    fn with_file(lifetime: Duration) -> Keyring {
        let mut file = Authfile::default();
        file.insert("h.io", user("file"));
        Keyring::new(file, lifetime)
    }

    #[test]
    fn what_is_not_known_to_be_good_comes_last_and_goes_with_its_pull() {
        let keyring = with_file(Duration::from_secs(60));
        let open = Keyring::new(Authfile::default(), Duration::from_secs(60));
        let _pull = open.offer(&source("app"), user("x")).unwrap();
        assert_eq!(names(&open, "app"), ["nobody", "x"]);
        let good = keyring.offer(&source("app"), user("good")).unwrap();
        let bad = keyring.offer(&source("app"), user("bad")).unwrap();
        assert_eq!(names(&keyring, "app")[0], "file");
        assert_eq!(names(&keyring, "app").len(), 3);
        good.keep();
        assert_eq!(names(&keyring, "app"), ["good", "file", "bad"]);
        drop(bad);
        assert_eq!(names(&keyring, "app"), ["good", "file"]);
        // For this repository alone.
        assert_eq!(names(&keyring, "app/other"), ["file"]);
        assert_eq!(names(&keyring, "ap"), ["file"]);
        // Another pull with the same, which fails: it was good once.
        drop(keyring.offer(&source("app"), user("good")).unwrap());
        assert_eq!(names(&keyring, "app"), ["good", "file"]);
        assert!(!format!("{keyring:?} {:?}", keyring.offer(&source("app"), user("x"))).contains("correct horse"));
    }

    #[test]
    fn they_are_kept_as_long_as_they_are_used() {
        let keyring = Keyring::new(Authfile::default(), Duration::from_secs(60));
        let mut now = Instant::now();
        keyring.offer_at(&source("app"), user("a"), now).unwrap().keep();
        for _ in 0..3 {
            now += Duration::from_secs(59);
            assert!(keyring.holds_at(&source("app"), &user("a"), now));
        }
        assert!(!keyring.holds_at(&source("app"), &user("b"), now));
        let long = keyring.offer_at(&source("other"), user("a"), now).unwrap();
        now += Duration::from_secs(61);
        assert!(!keyring.holds_at(&source("app"), &user("a"), now));
        assert_eq!(keyring.candidates_at(&source("app"), now), [None]);
        assert!(keyring.holds_at(&source("other"), &user("a"), now), "its pull goes on");
        long.keep();
        // Who wants none remembered remembers none.
        let none = Keyring::from(Authfile::default());
        assert!(none.offer(&source("app"), user("a")).is_none());
        let long = Credentials { username: "a".to_owned(), password: "x".repeat(MAX_LENGTH + 1) };
        assert!(keyring.offer(&source("app"), long).is_none());
    }

    #[test]
    fn many_are_forgotten_and_those_in_use_are_not() {
        let keyring = Keyring::new(Authfile::default(), Duration::from_secs(3600));
        let start = Instant::now();
        for n in 0..10 {
            let now = start + Duration::from_secs(n);
            keyring.offer_at(&source("app"), user(&n.to_string()), now).unwrap().keep();
        }
        assert_eq!(names(&keyring, "app"), ["9", "8", "7", "6", "nobody"]);
        let busy: Vec<_> =
            (0..4).map(|n| keyring.offer(&source("app"), user(&format!("busy{n}"))).unwrap()).collect();
        assert!(keyring.offer(&source("app"), user("more")).is_none());
        // Repositories, too; an offer that outlives its entry ends nothing else.
        for n in 0..MAX_REPOSITORIES.get() {
            keyring.offer(&source(&format!("r{n}")), user("a")).unwrap().keep();
        }
        assert_eq!(names(&keyring, "app"), ["nobody"]);
        let again = keyring.offer(&source("app"), user("busy0")).unwrap();
        drop(busy);
        again.keep();
        assert_eq!(names(&keyring, "app"), ["busy0", "nobody"]);
    }

    #[test]
    fn pull_secrets_come_behind_the_auth_file_and_before_what_nobody_has_tried() {
        let keyring = with_file(Duration::from_secs(60));
        let mut secrets = SharedCredentials::default();
        let mut file = Authfile::default();
        file.insert("h.io", user("secret"));
        file.insert("i.io", user("secret"));
        secrets.add(&file);
        keyring.share(secrets);
        let _pull = keyring.offer(&source("app"), user("pull")).unwrap();
        assert_eq!(names(&keyring, "app"), ["file", "secret", "pull"]);
        let other = Source::new("i.io", "app").unwrap();
        assert_eq!(keyring.candidates(&other), [None, Some(user("secret"))], "what is open stays so");
        assert!(keyring.holds(&other, &user("secret")) && keyring.holds(&source("app"), &user("secret")));
        keyring.share(SharedCredentials::default());
        assert!(!keyring.holds(&other, &user("secret")) && !keyring.knows(&other));
    }

    #[test]
    fn another_auth_file_takes_the_place_of_the_first() {
        let keyring = with_file(Duration::ZERO);
        assert!(keyring.holds(&source("app"), &user("file")));
        let mut file = Authfile::default();
        file.insert("h.io/app", user("new"));
        keyring.replace(file);
        assert!(!keyring.holds(&source("app"), &user("file")) && !keyring.knows(&source("other")));
        assert_eq!(names(&keyring, "app"), ["new"]);
    }
}
