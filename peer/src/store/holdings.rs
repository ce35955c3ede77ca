//! What the store keeps, by blob and by object: how large it is on disk, when it was last used, and whether somebody
//! needs it. From this follows what is evicted first. In memory only: whoever opens the store tells what there is, and
//! whoever changes a file says so. No IO here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use shoal_proto::{DecodedId, ObjectId};

use super::disk::{folder_name, parse_folder_name};
use crate::index::BlobKey;

/// What is kept or goes as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holding {
    /// A variant of a blob.
    Blob(BlobKey),
    /// An object.
    Object(ObjectId),
    /// The decoded form of a blob.
    Decoded(DecodedId),
}

/// All that an image needs of the store: what a mount or a pin keeps from being evicted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Names", try_from = "Names")]
pub struct Footprint {
    /// Its blobs.
    pub blobs: Vec<BlobKey>,
    /// Its manifests and its bootstrap layer; for a native mount also its bootstrap.
    pub objects: Vec<ObjectId>,
    /// For a native mount, the decoded forms of its blobs.
    pub decoded: Vec<DecodedId>,
}

impl Footprint {
    pub(super) fn holdings(&self) -> impl Iterator<Item = Holding> + '_ {
        let blobs = self.blobs.iter().map(|&key| Holding::Blob(key));
        let objects = self.objects.iter().map(|&id| Holding::Object(id));
        blobs.chain(objects).chain(self.decoded.iter().map(|&id| Holding::Decoded(id)))
    }
}

/// A footprint as JSON has it: blobs by the names of their folders.
#[derive(Serialize, Deserialize)]
struct Names {
    blobs: Vec<String>,
    objects: Vec<String>,
    #[serde(default)]
    decoded: Vec<String>,
}

impl From<Footprint> for Names {
    fn from(footprint: Footprint) -> Self {
        Self {
            blobs: footprint.blobs.into_iter().map(folder_name).collect(),
            objects: footprint.objects.iter().map(ToString::to_string).collect(),
            decoded: footprint.decoded.iter().map(ToString::to_string).collect(),
        }
    }
}

impl TryFrom<Names> for Footprint {
    type Error = String;

    fn try_from(names: Names) -> Result<Self, String> {
        let blob = |name: &String| parse_folder_name(name.as_ref()).ok_or_else(|| format!("{name:?} is no blob"));
        let object = |name: &String| name.parse().map_err(|_| format!("{name:?} is no object"));
        let form = |name: &String| name.parse().map_err(|_| format!("{name:?} is no decoded form"));
        Ok(Self {
            blobs: names.blobs.iter().map(blob).collect::<Result<_, _>>()?,
            objects: names.objects.iter().map(object).collect::<Result<_, _>>()?,
            decoded: names.decoded.iter().map(form).collect::<Result<_, _>>()?,
        })
    }
}

/// When something was last used: seconds since 1970, and what came first within the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct LastUse {
    seconds: u64,
    turn: u64,
}

#[derive(Debug)]
struct Entry {
    bytes: u64,
    used: LastUse,
    /// The last use that the disk knows of, in seconds since 1970.
    recorded: u64,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<Holding, Entry>,
    /// The entries by last use.
    order: BTreeSet<(LastUse, Holding)>,
    /// How many need what, whether it is there or not.
    needed: BTreeMap<Holding, u32>,
    bytes: u64,
    turn: u64,
}

impl State {
    fn stamp(&mut self, seconds: u64) -> LastUse {
        self.turn += 1;
        LastUse { seconds, turn: self.turn }
    }
}

/// The table of everything that is kept. Locked for one look or one change.
#[derive(Debug, Default)]
pub(super) struct Holdings(Mutex<State>);

impl Holdings {
    /// On opening: this is there, of that size, last used then.
    pub(super) fn found(&self, holding: Holding, bytes: u64, last_use: u64) {
        let mut state = self.lock();
        let used = state.stamp(last_use);
        state.bytes += bytes;
        state.order.insert((used, holding));
        state.entries.insert(holding, Entry { bytes, used, recorded: last_use });
    }

    /// It has this size now, and was used just now if it is new.
    pub(super) fn sized(&self, holding: Holding, bytes: u64) {
        let mut state = self.lock();
        match state.entries.get_mut(&holding) {
            Some(entry) => {
                let before = std::mem::replace(&mut entry.bytes, bytes);
                state.bytes = state.bytes - before + bytes;
            }
            None => {
                let now = unix_seconds();
                let used = state.stamp(now);
                state.bytes += bytes;
                state.order.insert((used, holding));
                state.entries.insert(holding, Entry { bytes, used, recorded: now });
            }
        }
    }

    /// It was used just now.
    pub(super) fn used(&self, holding: Holding) {
        let mut state = self.lock();
        let now = state.stamp(unix_seconds());
        let Some(entry) = state.entries.get_mut(&holding) else { return };
        let before = std::mem::replace(&mut entry.used, now);
        state.order.remove(&(before, holding));
        state.order.insert((now, holding));
    }

    /// It is not there any more; gives the bytes that it had.
    pub(super) fn gone(&self, holding: Holding) -> u64 {
        let mut state = self.lock();
        let Some(entry) = state.entries.remove(&holding) else { return 0 };
        state.order.remove(&(entry.used, holding));
        state.bytes -= entry.bytes;
        entry.bytes
    }

    /// Bytes on disk of all that is kept.
    pub(super) fn bytes(&self) -> u64 {
        self.lock().bytes
    }

    /// Of all that takes up room, that nobody needs and that is not among `passed`, what was used longest ago; decoded forms
    /// first, which can be made again without asking anybody.
    pub(super) fn oldest(&self, passed: &BTreeSet<Holding>) -> Option<Holding> {
        let state = self.lock();
        let free = |holding: &Holding| !state.needed.contains_key(holding) && !passed.contains(holding);
        let may_go = || {
            let unneeded = state.order.iter().map(|(_, holding)| *holding).filter(free);
            unneeded.filter(|holding| state.entries[holding].bytes > 0)
        };
        may_go().find(|holding| matches!(holding, Holding::Decoded(_))).or_else(|| may_go().next())
    }

    pub(super) fn is_needed(&self, holding: Holding) -> bool {
        self.lock().needed.contains_key(&holding)
    }

    /// Everything that is kept, with its bytes and its last use in seconds since 1970.
    pub(super) fn all(&self) -> Vec<(Holding, u64, u64)> {
        let state = self.lock();
        state.entries.iter().map(|(holding, entry)| (*holding, entry.bytes, entry.used.seconds)).collect()
    }

    /// The last uses that are at least `seconds` later than what the disk knows of; from here on they count as known.
    pub(super) fn unrecorded_uses(&self, seconds: u64) -> Vec<(Holding, u64)> {
        let mut state = self.lock();
        let due = state.entries.iter_mut().filter(|(_, entry)| entry.used.seconds > entry.recorded);
        let due = due.filter(|(_, entry)| entry.used.seconds - entry.recorded >= seconds);
        let record = |(holding, entry): (&Holding, &mut Entry)| {
            entry.recorded = entry.used.seconds;
            (*holding, entry.recorded)
        };
        due.map(record).collect()
    }

    /// Keeps what `footprint` names, now or later, from being evicted.
    pub(super) fn hold(self: &Arc<Self>, footprint: Footprint) -> Hold {
        let mut state = self.lock();
        for holding in footprint.holdings() {
            *state.needed.entry(holding).or_default() += 1;
        }
        Hold { holdings: self.clone(), footprint }
    }

    fn release(&self, footprint: &Footprint) {
        let mut state = self.lock();
        for holding in footprint.holdings() {
            if let Some(count) = state.needed.get_mut(&holding) {
                *count -= 1;
                if *count == 0 {
                    state.needed.remove(&holding);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps what a footprint names from being evicted until it is dropped.
#[derive(Debug)]
#[must_use = "what nobody holds may be evicted"]
pub struct Hold {
    holdings: Arc<Holdings>,
    footprint: Footprint,
}

impl Hold {
    /// What is held.
    pub fn footprint(&self) -> &Footprint {
        &self.footprint
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.holdings.release(&self.footprint);
    }
}

pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use shoal_proto::BlobId;

    use super::*;

    fn blob(n: u8) -> Holding {
        Holding::Blob(key(n))
    }

    fn key(n: u8) -> BlobKey {
        BlobKey { blob: BlobId::new([n; 32]), variant: 0 }
    }

    fn needs(numbers: &[u8]) -> Footprint {
        Footprint { blobs: numbers.iter().map(|&n| key(n)).collect(), ..Footprint::default() }
    }

    #[test]
    fn the_oldest_that_nobody_needs_goes_first() {
        let holdings = Arc::new(Holdings::default());
        // Found in any order; 4 takes up no room, so that nothing is won by its going.
        for (n, bytes, last_use) in [(2, 20, 200), (1, 10, 100), (3, 30, 300), (4, 0, 1)] {
            holdings.found(blob(n), bytes, last_use);
        }
        let oldest = |passed: &[u8]| holdings.oldest(&passed.iter().map(|&n| blob(n)).collect());
        assert_eq!((holdings.bytes(), oldest(&[]), oldest(&[1])), (60, Some(blob(1)), Some(blob(2))));
        let (mount, pin) = (holdings.hold(needs(&[1, 7])), holdings.hold(needs(&[1])));
        drop(mount);
        assert_eq!(
            (oldest(&[]), holdings.is_needed(blob(1)), holdings.is_needed(blob(7))),
            (Some(blob(2)), true, false)
        );
        holdings.used(blob(2));
        assert_eq!(oldest(&[]), Some(blob(3)));
        drop(pin);
        assert_eq!(oldest(&[]), Some(blob(1)));
        assert_eq!((holdings.gone(blob(1)), holdings.gone(blob(1)), holdings.bytes()), (10, 0, 50));
        holdings.sized(blob(3), 35);
        holdings.sized(blob(5), 5);
        assert_eq!((holdings.bytes(), oldest(&[3, 2])), (60, Some(blob(5))));
        // What can be made again without asking anybody goes before all that, whenever it was used.
        let form = DecodedId::new([1; 32]);
        holdings.sized(Holding::Decoded(form), 5);
        assert_eq!(oldest(&[]), Some(Holding::Decoded(form)));
        let held = holdings.hold(Footprint { decoded: vec![form], ..Footprint::default() });
        assert_eq!(oldest(&[]), Some(blob(3)));
        drop(held);
    }

    #[test]
    fn a_use_is_to_be_recorded_once_it_is_old_news_on_disk() {
        let holdings = Holdings::default();
        holdings.found(blob(1), 1, unix_seconds() - 100);
        assert_eq!(holdings.unrecorded_uses(0), []);
        holdings.used(blob(1));
        assert_eq!(holdings.unrecorded_uses(1_000), []);
        assert_eq!(holdings.unrecorded_uses(60).len(), 1);
        assert_eq!(holdings.unrecorded_uses(0), []);
    }

    #[test]
    fn a_footprint_round_trips_as_json_and_strange_names_are_refused() {
        let footprint = Footprint {
            blobs: vec![key(1), BlobKey { variant: 3, ..key(2) }],
            objects: vec![ObjectId::new([7; 32])],
            decoded: vec![DecodedId::new([8; 32])],
        };
        let text = serde_json::to_string(&footprint).unwrap();
        assert_eq!(serde_json::from_str::<Footprint>(&text).unwrap(), footprint);
        let earlier = r#"{"blobs":[],"objects":[]}"#;
        assert_eq!(serde_json::from_str::<Footprint>(earlier).unwrap(), Footprint::default());
        for strange in [
            r#"{"blobs":["x"],"objects":[]}"#,
            r#"{"blobs":[],"objects":["../x"]}"#,
            r#"{"blobs":[],"objects":[],"decoded":["x"]}"#,
        ] {
            assert!(serde_json::from_str::<Footprint>(strange).is_err(), "{strange}");
        }
    }
}
