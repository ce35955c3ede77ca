//! What keys stand for, and for how long: until nobody has a stake in one any more.
//!
//! A stake may be dropped before the loop has heard of what was added with it, or after. Both ways nothing stays behind: what is added
//! is looked at when it comes, and what is known when a stake says that it is dropped.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Weak},
};

use shoal_scheduler::BlobKey;

use super::farewells::{Farewell, Farewells};
use crate::fetch::Target;

/// Whoever has this needs what its key stands for. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Stake(Arc<Held>);

#[derive(Debug)]
struct Held {
    key: BlobKey,
    farewells: Arc<Farewells>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.farewells.say(Farewell::Stake(self.key));
    }
}

impl Stake {
    pub(super) fn new(key: BlobKey, farewells: Arc<Farewells>) -> Self {
        Self(Arc::new(Held { key, farewells }))
    }

    /// In what.
    pub(crate) fn key(&self) -> BlobKey {
        self.0.key
    }

    /// Tells whether it is still held.
    pub(crate) fn watch(&self) -> StakeWatch {
        StakeWatch { key: self.0.key, held: Arc::downgrade(&self.0) }
    }
}

/// A look at a stake that does not keep it.
#[derive(Debug, Clone)]
pub(crate) struct StakeWatch {
    key: BlobKey,
    held: Weak<Held>,
}

impl StakeWatch {
    /// In what.
    pub(super) fn key(&self) -> BlobKey {
        self.key
    }

    /// Whether there is a clone of it left.
    pub(crate) fn is_held(&self) -> bool {
        self.held.strong_count() > 0
    }

    /// Whether both look at the same stake.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.held.ptr_eq(&other.held)
    }
}

/// What is known of one key.
#[derive(Debug)]
struct Known {
    /// What was added with each stake.
    parts: Vec<(StakeWatch, Target)>,
    /// All of that together.
    all: Target,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Targets(HashMap<BlobKey, Known>);

impl Targets {
    pub(super) fn get(&self, key: BlobKey) -> Option<&Target> {
        Some(&self.0.get(&key)?.all)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes in what is needed to fetch what a stake is in; false if that is not held any more.
    pub(super) fn add(&mut self, by: StakeWatch, target: Target) -> bool {
        if !by.is_held() {
            return false;
        }
        match self.0.entry(by.key) {
            Entry::Vacant(entry) => {
                entry.insert(Known { parts: vec![(by, target.clone())], all: target });
            }
            Entry::Occupied(entry) => {
                let known = entry.into_mut();
                known.all.merge(&target);
                known.parts.push((by, target));
            }
        }
        true
    }

    /// Forgets what was added with stakes that are held no more, or with one that is `retracted`; whether nothing is left of the key,
    /// of which something was known.
    pub(super) fn tidy(&mut self, key: BlobKey, retracted: Option<&StakeWatch>) -> bool {
        let Some(known) = self.0.get_mut(&key) else { return false };
        let before = known.parts.len();
        known.parts.retain(|(by, _)| by.is_held() && retracted.is_none_or(|retracted| !retracted.is(by)));
        let Some(((_, first), rest)) = known.parts.split_first() else {
            self.0.remove(&key);
            return true;
        };
        if known.parts.len() < before {
            let mut all = first.clone();
            rest.iter().for_each(|(_, part)| all.merge(part));
            known.all = all;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::{ObjectId, ObjectKind};
    use shoal_rafs::oci::Source;

    use super::*;
    use crate::fetch::ObjectTarget;

    const KEY: BlobKey = BlobKey { id: [1; 32], variant: 0 };

    fn target(limit: u64) -> Target {
        let (source, id) = (Source::new("r.example", "app").unwrap(), ObjectId::new(KEY.id));
        Target::Object(Arc::new(ObjectTarget { source, id, kind: ObjectKind::Blob, limit }))
    }

    fn limit(targets: &Targets) -> Option<u64> {
        let Target::Object(object) = targets.get(KEY)? else { return None };
        Some(object.limit)
    }

    #[test]
    fn a_key_is_known_until_its_last_stake_goes() {
        let (farewells, mut targets) = (Arc::<Farewells>::default(), Targets::default());
        let stake = || Stake::new(KEY, farewells.clone());
        let (first, second) = (stake(), stake());
        assert!(targets.add(first.watch(), target(1)) && targets.add(second.watch(), target(2)));
        let clone = first.clone();
        drop(first);
        assert!(farewells.take().is_empty() && limit(&targets) == Some(1));
        drop(clone);
        assert_eq!(farewells.take(), [Farewell::Stake(KEY)]);
        assert!(!targets.tidy(KEY, None));
        assert_eq!(limit(&targets), Some(2));
        drop(second);
        assert!(targets.tidy(KEY, None) && targets.get(KEY).is_none());
        assert!(!targets.tidy(KEY, None), "it is gone already");
    }

    #[test]
    fn what_is_added_for_nobody_is_not_kept() {
        let (farewells, mut targets) = (Arc::<Farewells>::default(), Targets::default());
        let watch = Stake::new(KEY, farewells).watch();
        assert!(!targets.tidy(KEY, None) && !targets.add(watch, target(1)) && targets.get(KEY).is_none());
    }

    #[test]
    fn who_retracts_leaves_what_others_added() {
        let (farewells, mut targets) = (Arc::<Farewells>::default(), Targets::default());
        let (first, second) = (Stake::new(KEY, farewells.clone()), Stake::new(KEY, farewells));
        targets.add(first.watch(), target(1));
        targets.add(second.watch(), target(2));
        assert!(!targets.tidy(KEY, Some(&first.watch())));
        assert_eq!(limit(&targets), Some(2));
        assert!(targets.tidy(KEY, Some(&second.watch())));
    }
}
