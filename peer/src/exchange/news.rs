//! What neighbours are told of the blobs here: when, and once more when there was no room for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use shoal_proto::{Bitfield, Have, MAX_WIRE_PIECES, Message, PeerId};
use shoal_scheduler::{Time, announce_interval};

use super::{Exchange, Topic};
use crate::{data::NotifyError, images::ImageBlob};

/// How often zones hear of each other's news that have seed peers of their own.
const ELSEWHERE: Duration = Duration::from_secs(2);

/// What was told, and what could not be.
#[derive(Debug, Default)]
pub(super) struct News {
    told: BTreeMap<(Topic, Audience), Told>,
    /// Neighbours whose queue was full. There is one entry at most for each of their interests.
    late: BTreeMap<PeerId, Late>,
}

/// Neighbours that hear the same at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Audience {
    OwnZone,
    OtherZones,
}

/// What became of the news for an audience.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Telling {
    /// There is none.
    Nothing,
    /// It is too early by so much.
    Waits(Duration),
    Told,
}

/// What an audience knows of a blob here, and since when.
#[derive(Debug)]
struct Told {
    pieces: Bitfield,
    at: Time,
}

/// What a neighbour has yet to hear.
#[derive(Debug, Default)]
struct Late {
    /// What this node reads, from here on.
    interest: Option<Topic>,
    /// All that is here of these, which have so many pieces.
    haves: BTreeMap<Topic, u32>,
}

impl News {
    /// The peer has gone.
    pub(super) fn forget(&mut self, peer: PeerId) {
        self.late.remove(&peer);
    }

    /// There was no room to say that this node reads a blob.
    pub(super) fn owes_interest(&mut self, peer: PeerId, topic: Topic) {
        let owed = &mut self.late.entry(peer).or_default().interest;
        *owed = Some(owed.map_or(topic, |known| known.min(topic)));
    }

    /// Forgets what was told of topics that are not here any more; gives them, with the number of their pieces.
    fn take_back(&mut self, is_here: impl Fn(&Topic) -> bool) -> BTreeMap<Topic, u32> {
        let gone = self.told.extract_if(.., |(topic, _), _| !is_here(topic));
        gone.map(|((topic, _), told)| (topic, told.pieces.len())).collect()
    }

    /// Whether nobody has anything to hear of a topic.
    fn is_told(&self, topic: Topic, present: &Bitfield) -> bool {
        let told = |to| self.told.get(&(topic, to)).is_some_and(|told: &Told| told.pieces == *present);
        told(Audience::OwnZone) && told(Audience::OtherZones)
    }

    /// An audience has heard all that is here, or there is nobody in it.
    fn note(&mut self, key: (Topic, Audience), present: &Bitfield, at: Time) {
        self.told.insert(key, Told { pieces: present.clone(), at });
    }

    /// What an audience has yet to hear, once it is time to tell it, and whether that is all that there is: what has
    /// gone can be said in no other way. It then counts as told.
    ///
    /// # Errors
    /// Why nothing is to be told.
    fn due(
        &mut self,
        key: (Topic, Audience),
        present: &Bitfield,
        now: Time,
        pause: impl FnOnce(u32, u32) -> Duration,
    ) -> Result<(Bitfield, bool), Telling> {
        let told = self.told.get(&key);
        let (mut news, mut gone) = (present.clone(), Bitfield::new(present.len()));
        if let Some(told) = told {
            news.subtract(&told.pieces);
            gone = told.pieces.clone();
            gone.subtract(present);
        }
        let changed = news.count() + gone.count();
        if changed == 0 {
            return Err(Telling::Nothing);
        }
        let pause = pause(changed, news.len());
        if let Some(due) = told.map(|told| told.at + pause).filter(|&due| now < due) {
            return Err(Telling::Waits(due.since(now)));
        }
        let full = !gone.is_empty();
        let said = if full { present.clone() } else { news };
        self.note(key, present, now);
        Ok((said, full))
    }
}

impl Exchange {
    /// Tells who is interested what is new since the last time, or gone. Returns when it is time for what no neighbour had and
    /// comes too early.
    pub(super) async fn tell_news(&self) -> Option<Duration> {
        let here: BTreeMap<Topic, ImageBlob> = self.parts.images.all_described().into_iter().collect();
        self.take_back(&here).await;
        self.say_what_is_late();
        let mut next: Option<Duration> = None;
        for (topic, blob) in here {
            let peers = {
                let state = self.lock();
                let Some(peers) = state.interests.of(&topic) else { continue };
                if state.news.is_told(topic, &blob.handle.present()) {
                    self.parts.driver.pressing_news().remove(blob.key);
                    continue;
                }
                peers.clone()
            };
            let listeners = peers.len();
            let (others, own): (Vec<_>, Vec<_>) = {
                let zones = self.zones();
                peers.into_iter().partition(|&peer| zones.is_other(peer))
            };
            let told = self.tell(topic, &blob, Audience::OwnZone, &own, listeners);
            let told_others = self.tell(topic, &blob, Audience::OtherZones, &others, listeners);
            // What presses waits for its own zone to hear of it, if somebody listens there.
            match if own.is_empty() { told_others } else { told } {
                Telling::Waits(wait) if self.parts.driver.pressing_news().contains(blob.key) => {
                    next = Some(next.map_or(wait, |next| next.min(wait)));
                }
                Telling::Waits(_) => {}
                Telling::Nothing | Telling::Told => self.parts.driver.pressing_news().remove(blob.key),
            }
            if [told, told_others].contains(&Telling::Told) {
                self.announce(&blob).await;
            }
        }
        next
    }

    /// Tells an audience its news, if there is any and it is time; of all `listeners` it may be a part.
    fn tell(&self, topic: Topic, blob: &ImageBlob, to: Audience, peers: &[PeerId], listeners: usize) -> Telling {
        let (now, present) = (self.parts.clock.now(), blob.handle.present());
        if peers.is_empty() {
            self.lock().news.note((topic, to), &present, now);
            return Telling::Nothing;
        }
        let helps_itself = {
            let zones = self.zones();
            to == Audience::OtherZones && peers.iter().all(|&peer| zones.is_provided_for(peer))
        };
        let pressing = self.parts.driver.pressing_news().contains(blob.key);
        let pause = |changed, pieces| {
            if helps_itself { ELSEWHERE } else { announce_interval(changed, pieces, pressing, listeners) }
        };
        let due = self.lock().news.due((topic, to), &present, now, pause);
        let (news, full) = match due {
            Ok(said) => said,
            Err(telling) => return telling,
        };
        let haves = windows(topic, &news, full);
        peers.iter().for_each(|&peer| self.say(peer, topic, &haves, present.len()));
        Telling::Told
    }

    /// Tells `peer`, who has just begun to listen, all that is here of a blob.
    pub(super) fn tell_first(&self, peer: PeerId, topic: Topic, present: &Bitfield) {
        self.tell_all(peer, topic, present);
        let to = if self.zones().is_other(peer) { Audience::OtherZones } else { Audience::OwnZone };
        let first = Told { pieces: present.clone(), at: self.parts.clock.now() };
        // Where others listen, it hears with them what they have not heard yet.
        self.lock().news.told.entry((topic, to)).or_insert(first);
    }

    /// Tells `peer` all that is here of a blob.
    fn tell_all(&self, peer: PeerId, topic: Topic, present: &Bitfield) {
        self.say(peer, topic, &windows(topic, present, true), present.len());
    }

    /// Says what is here, or is new, to a neighbour; where there is no room for all of it, it is told everything later.
    fn say(&self, peer: PeerId, topic: Topic, haves: &[Have], pieces: u32) {
        for have in haves {
            if self.notify(peer, Message::Have(have.clone())) == Err(NotifyError::Full) {
                self.lock().news.late.entry(peer).or_default().haves.insert(topic, pieces);
                return;
            }
        }
    }

    /// Says once more what there was no room for; what there still is none for waits again.
    fn say_what_is_late(&self) {
        let late = std::mem::take(&mut self.lock().news.late);
        for (peer, Late { interest, haves }) in late {
            for (topic, pieces) in haves {
                let present = self.blob(topic).map_or_else(|| Bitfield::new(pieces), |blob| blob.handle.present());
                self.tell_all(peer, topic, &present);
            }
            if let Some(from) = interest {
                self.show_all_interest(peer, from);
            }
        }
    }

    /// Of what nobody needs here any more, nothing is served: whoever was told that it is here hears that it is not.
    async fn take_back(&self, here: &BTreeMap<Topic, ImageBlob>) {
        let (gone, withdrawn) = {
            let mut state = self.lock();
            state.mine.retain(|_, stake| stake.is_held());
            let gone = state.news.take_back(|topic| here.contains_key(topic));
            let blobs: BTreeSet<_> = here.keys().map(|(_, blob)| *blob).collect();
            (gone, state.records.take_back(|blob| blobs.contains(blob)))
        };
        for (topic, pieces) in gone {
            let peers = self.lock().interests.of(&topic).cloned().unwrap_or_default();
            peers.into_iter().for_each(|peer| self.tell_all(peer, topic, &Bitfield::new(pieces)));
        }
        for blob in withdrawn {
            self.withdraw(blob).await;
        }
    }
}

/// `pieces` cut to what fits a message; of a full set every window, of news only those with something in it.
fn windows((bootstrap, blob): Topic, pieces: &Bitfield, full: bool) -> Vec<Have> {
    let starts = (0..pieces.len()).step_by(MAX_WIRE_PIECES as usize);
    let windows = starts.map(|first| {
        let end = pieces.len().min(first.saturating_add(MAX_WIRE_PIECES));
        Have { bootstrap, blob, full, first, pieces: pieces.window(first, end - first) }
    });
    windows.filter(|have| full || !have.pieces.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use shoal_proto::{BlobId, ObjectId};

    use super::*;

    const TOPIC: Topic = (ObjectId::new([1; 32]), BlobId::new([2; 32]));

    fn bits(pieces: &[u32]) -> Bitfield {
        let mut bits = Bitfield::new(8);
        pieces.iter().for_each(|&piece| _ = bits.insert(piece));
        bits
    }

    fn at(seconds: u64) -> Time {
        Time::ZERO + Duration::from_secs(seconds)
    }

    #[test]
    fn each_audience_hears_what_is_new_to_it_and_all_when_something_went() {
        let (mut news, pause) = (News::default(), |_, _| Duration::from_secs(5));
        let (own, others) = ((TOPIC, Audience::OwnZone), (TOPIC, Audience::OtherZones));
        assert_eq!(news.due(own, &bits(&[1]), at(0), pause), Ok((bits(&[1]), false)));
        assert_eq!(news.due(own, &bits(&[1]), at(9), pause), Err(Telling::Nothing));
        let early = Err(Telling::Waits(Duration::from_secs(1)));
        assert_eq!(news.due(own, &bits(&[1, 2]), at(4), pause), early);
        assert_eq!(news.due(others, &bits(&[1, 2]), at(4), pause), Ok((bits(&[1, 2]), false)));
        assert!(!news.is_told(TOPIC, &bits(&[1, 2])));
        assert_eq!(news.due(own, &bits(&[1, 2]), at(5), pause), Ok((bits(&[2]), false)));
        assert!(news.is_told(TOPIC, &bits(&[1, 2])));
        assert_eq!(news.due(own, &bits(&[2, 3]), at(10), pause), Ok((bits(&[2, 3]), true)));
    }

    #[test]
    fn what_is_not_here_any_more_is_taken_back_once() {
        let mut news = News::default();
        news.note((TOPIC, Audience::OwnZone), &bits(&[1]), at(0));
        news.note((TOPIC, Audience::OtherZones), &bits(&[]), at(0));
        assert!(news.take_back(|_| true).is_empty());
        assert_eq!(news.take_back(|_| false), BTreeMap::from([(TOPIC, 8)]));
        assert!(news.take_back(|_| false).is_empty() && news.told.is_empty());
    }

    #[test]
    fn a_large_blob_is_told_in_windows() {
        let mut pieces = Bitfield::new(MAX_WIRE_PIECES * 2 + 5);
        pieces.insert(MAX_WIRE_PIECES + 1);
        let places = |full| -> Vec<_> {
            windows(TOPIC, &pieces, full).iter().map(|have| (have.first, have.pieces.count())).collect()
        };
        let second = MAX_WIRE_PIECES;
        assert_eq!(places(true), [(0, 0), (second, 1), (2 * second, 0)]);
        assert_eq!(places(false), [(second, 1)]);
    }
}
