//! The secrets that are known, and what the keyring is told of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shoal_rafs::oci::{Authfile, Keyring, SharedCredentials};

use super::event::{Scope, Secret};

/// Most secrets that are used.
const MAX_SECRETS: usize = 4096;
/// Most bytes of their contents.
const MAX_BYTES: usize = 16 << 20;
/// Most names of a list that are kept while it is read; a name has up to half a KiB.
pub(super) const MAX_LISTED: usize = 65_536;

/// Shared by all watches. Cheap to clone.
#[derive(Clone)]
pub(super) struct SharedTable {
    keyring: Keyring,
    /// Held for a change, and while the keyring is told.
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    secrets: BTreeMap<(Scope, String), (Authfile, usize)>,
    bytes: usize,
    /// Something has changed since the keyring was told.
    changed: bool,
    /// It has been logged that there is no room.
    full: bool,
}

impl SharedTable {
    pub(super) fn new(keyring: Keyring) -> Self {
        Self { keyring, table: Arc::default() }
    }

    /// Puts a secret in, in place of what had its name. One of no use, or for which there is no room, takes that away.
    pub(super) fn put(&self, scope: &Scope, name: String, secret: Option<Secret>) {
        let mut table = self.lock();
        table.remove(scope, &name);
        let Some(Secret { file, bytes }) = secret else { return };
        if table.secrets.len() >= MAX_SECRETS || table.bytes + bytes > MAX_BYTES {
            if !std::mem::replace(&mut table.full, true) {
                tracing::error!(
                    "the pull secret {name} and others are not used: {MAX_SECRETS} of {} MiB are the most",
                    MAX_BYTES >> 20
                );
            }
            return;
        }
        table.bytes += bytes;
        table.secrets.insert((scope.clone(), name), (file, bytes));
        table.changed = true;
    }

    pub(super) fn remove(&self, scope: &Scope, name: &str) {
        self.lock().remove(scope, name);
    }

    /// Keeps only these names of a scope.
    pub(super) fn retain(&self, scope: &Scope, names: &[String]) {
        let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let mut table = self.lock();
        let gone: Vec<_> = table.of(scope).filter(|name| !names.contains(name.as_str())).cloned().collect();
        gone.iter().for_each(|name| table.remove(scope, name));
    }

    pub(super) fn count(&self, scope: &Scope) -> usize {
        self.lock().of(scope).count()
    }

    /// Tells the keyring, if something has changed.
    pub(super) fn publish(&self) {
        let mut table = self.lock();
        if !std::mem::take(&mut table.changed) {
            return;
        }
        let mut shared = SharedCredentials::default();
        table.secrets.values().for_each(|(file, _)| shared.add(file));
        metrics::gauge!("shoal_pull_secrets").set(table.secrets.len() as f64);
        self.keyring.share(shared);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn remove(&mut self, scope: &Scope, name: &str) {
        if let Some((_, bytes)) = self.secrets.remove(&(scope.clone(), name.to_owned())) {
            self.bytes -= bytes;
            (self.changed, self.full) = (true, false);
        }
    }

    fn of<'a>(&'a self, scope: &'a Scope) -> impl Iterator<Item = &'a String> {
        let first = (scope.clone(), String::new());
        self.secrets
            .range(first..)
            .map(|((of, name), _)| (of, name))
            .take_while(move |(of, _)| *of == scope)
            .map(|(_, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use shoal_rafs::oci::Source;

    use super::{super::event::Kind, *};

    fn scope(namespace: &str) -> Scope {
        Scope { namespace: Some(namespace.into()), kind: Kind::Config }
    }

    fn secret(host: &str, bytes: usize) -> Option<Secret> {
        let text = format!(r#"{{"auths": {{"{host}": {{"username": "u", "password": "p"}}}}}}"#);
        Some(Secret { file: Authfile::parse(text.as_bytes(), "a").unwrap(), bytes })
    }

    fn knows(keyring: &Keyring, host: &str) -> bool {
        keyring.knows(&Source::new(host, "app").unwrap())
    }

    #[test]
    fn the_keyring_knows_what_is_there() {
        let keyring = Keyring::from(Authfile::default());
        let table = SharedTable::new(keyring.clone());
        let (a, b) = (scope("a"), scope("b"));
        table.put(&a, "a/1".into(), secret("one.io", 10));
        table.put(&a, "a/2".into(), secret("two.io", 10));
        table.put(&b, "b/1".into(), secret("one.io", 10));
        assert!(!knows(&keyring, "one.io"), "nobody has told it");
        table.publish();
        assert!(knows(&keyring, "one.io") && knows(&keyring, "two.io") && !knows(&keyring, "three.io"));
        table.remove(&a, "a/1");
        table.publish();
        assert!(knows(&keyring, "one.io"), "another one has them, too");
        table.put(&a, "a/2".into(), secret("three.io", 10));
        table.put(&b, "b/1".into(), None);
        table.publish();
        assert!(!knows(&keyring, "one.io") && !knows(&keyring, "two.io") && knows(&keyring, "three.io"));
        table.retain(&a, &[]);
        table.publish();
        assert!(!knows(&keyring, "three.io"));
        assert_eq!((table.count(&a), table.lock().bytes), (0, 0));
    }

    #[test]
    fn a_list_takes_only_its_own_away() {
        let table = SharedTable::new(Keyring::from(Authfile::default()));
        let scopes = [scope("a"), scope("b"), Scope { namespace: None, kind: Kind::Legacy }];
        for scope in &scopes {
            for n in 0..3 {
                table.put(scope, n.to_string(), secret("h.io", 1));
            }
        }
        table.retain(&scopes[1], &["1".into()]);
        assert_eq!(scopes.each_ref().map(|scope| table.count(scope)), [3, 1, 3]);
    }

    #[test]
    fn there_is_room_for_so_many_and_no_more() {
        let table = SharedTable::new(Keyring::from(Authfile::default()));
        let all = scope("a");
        for n in 0..MAX_SECRETS + 3 {
            table.put(&all, n.to_string(), secret("h.io", 1));
        }
        assert_eq!(table.count(&all), MAX_SECRETS);
        table.put(&all, "0".into(), secret("h.io", 2));
        assert_eq!(
            (table.count(&all), table.lock().bytes),
            (MAX_SECRETS, MAX_SECRETS + 1),
            "one in place of another"
        );
        table.put(&all, "0".into(), secret("h.io", MAX_BYTES));
        assert_eq!(table.count(&all), MAX_SECRETS - 1);
        table.put(&all, "new".into(), secret("h.io", 1));
        assert_eq!(table.count(&all), MAX_SECRETS);
    }
}
