//! Credentials of many auth files at once, such as the pull secrets of a cluster: several for one registry.

use std::collections::BTreeMap;

use super::{Authfile, Credentials};
use crate::oci::Source;

/// Most credentials that are tried for one repository, and kept for one key.
const MAX_OF_ONE: usize = 4;

/// Credentials by registry, or by registry and path. Says nothing of itself.
#[derive(Default)]
pub struct SharedCredentials {
    entries: BTreeMap<String, Vec<Credentials>>,
}

impl SharedCredentials {
    /// Adds what is in a file, but not its helpers: nobody else decides what this node runs. The same twice counts once, and of
    /// one key the first four are kept.
    pub fn add(&mut self, file: &Authfile) {
        for (key, credentials) in &file.entries {
            let of_key = self.entries.entry(key.clone()).or_default();
            if of_key.len() < MAX_OF_ONE && !of_key.contains(credentials) {
                of_key.push(credentials.clone());
            }
        }
    }

    /// What may be shown to read `source`, at most four; those with the longest path come first.
    pub(super) fn find(&self, source: &Source) -> Vec<&Credentials> {
        let name = source.to_string();
        let mut found = Vec::new();
        let mut key = Some(name.as_str());
        while let Some(here) = key {
            found.extend(self.entries.get(here).into_iter().flatten());
            key = here.rsplit_once('/').map(|(above, _)| above);
        }
        found.truncate(MAX_OF_ONE);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(key: &str, user: &str) -> Authfile {
        let mut file = Authfile::default();
        file.insert(key, Credentials { username: user.into(), password: "correct horse".into() });
        file
    }

    fn found(shared: &SharedCredentials, registry: &str, repository: &str) -> Vec<String> {
        let source = Source::new(registry, repository).unwrap();
        shared.find(&source).into_iter().map(|one| one.username.clone()).collect()
    }

    #[test]
    fn all_that_name_a_registry_are_found_and_the_nearest_first() {
        let mut shared = SharedCredentials::default();
        for (key, user) in [("h.io", "a"), ("h.io/team", "b"), ("h.io", "c"), ("h.io", "a"), ("other.io", "d")] {
            shared.add(&file(key, user));
        }
        assert_eq!(found(&shared, "h.io", "team/app"), ["b", "a", "c"]);
        assert_eq!(found(&shared, "h.io", "teams/app"), ["a", "c"]);
        assert!(found(&shared, "i.io", "team/app").is_empty());
        for n in 0..9 {
            shared.add(&file("h.io", &n.to_string()));
        }
        assert_eq!(found(&shared, "h.io", "app"), ["a", "c", "0", "1"]);
        assert_eq!(found(&shared, "h.io", "team/app").len(), MAX_OF_ONE);
    }
}
