//! Words about preheats, in and out. Whoever is a member may speak, but not without end: what a writer says beyond a pace is
//! neither taken in nor passed on.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::gossipsub::MessageAcceptance;
use shoal_proto::PeerId;

use super::Plane;
use crate::{
    control::{
        ControlEvent, behaviour,
        preheat::{Word, WordError},
    },
    membership::{Refusal, unix_now},
};

/// A writer may say so much in a window. Progress comes once a second at most.
const WINDOW: Duration = Duration::from_secs(5);
const WORDS_PER_WINDOW: u32 = 16;
/// Writers that are watched at a time; further ones wait for the window of another to end.
const MAX_WRITERS: usize = 16 * 1024;

/// How much each writer has said of late.
#[derive(Debug, Default)]
pub(super) struct Pace(HashMap<PeerId, (Instant, u32)>);

impl Pace {
    /// Whether a word of `writer` is within the pace.
    fn allows(&mut self, now: Instant, writer: PeerId) -> bool {
        let recent = |since: Instant| now.saturating_duration_since(since) < WINDOW;
        if self.0.len() >= MAX_WRITERS && !self.0.contains_key(&writer) {
            self.0.retain(|_, (since, _)| recent(*since));
            if self.0.len() >= MAX_WRITERS {
                return false;
            }
        }
        let (since, words) = self.0.entry(writer).or_insert((now, 0));
        if !recent(*since) {
            (*since, *words) = (now, 0);
        }
        *words += 1;
        *words <= WORDS_PER_WINDOW
    }
}

impl Plane {
    pub(super) fn say(&mut self, word: &Word) {
        let message = word.encode(self.options.admission.own().shown());
        if let Err(error) = self.swarm.behaviour_mut().gossip.publish(behaviour::preheats(), message) {
            // Nobody is subscribed.
            tracing::debug!(%error, "a word about a preheat reached nobody");
        }
    }

    /// Takes in what `author` says about a preheat.
    pub(super) fn handle_word(&mut self, now: Instant, author: PeerId, message: &[u8]) -> MessageAcceptance {
        if !self.pace.allows(now, author) {
            return MessageAcceptance::Ignore;
        }
        match Word::decode(message, &author, &self.options.admission, unix_now()) {
            Ok(word) => {
                self.backlog.push_back(ControlEvent::Preheat { peer: author, word });
                MessageAcceptance::Accept
            }
            Err(WordError::Membership(Refusal::Expired | Refusal::Revoked)) => MessageAcceptance::Ignore,
            Err(error) => {
                tracing::debug!(%author, %error, "not a word about a preheat");
                MessageAcceptance::Reject
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_has_a_pace_and_others_have_their_own() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let peer = |n| PeerId::new([n; 32]);
        for _ in 0..WORDS_PER_WINDOW {
            assert!(pace.allows(start, peer(1)));
        }
        assert!(!pace.allows(start, peer(1)) && pace.allows(start, peer(2)));
        assert!(pace.allows(start + WINDOW, peer(1)));
    }
}
