//! A scheduler with one blob and a clock, and what its actions say.

use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Duration};

use shoal_proto::{Bitfield, PeerId, Priority, Role};
use shoal_scheduler::{
    Action, BlobKey, Config, Event, Item, Origin, RequestId, Scheduler, Source, Time, WantError, WantId,
};

pub(crate) const ME: u8 = 1;
pub(crate) const SEED: u8 = 100;
pub(crate) const BLOB: BlobKey = BlobKey { id: [9; 32], variant: 0 };
pub(crate) const PIECE: u64 = 1 << 20;

pub(crate) fn peer(n: u8) -> PeerId {
    PeerId::new([n; 32])
}

pub(crate) fn item(piece: u32) -> Item {
    Item { blob: BLOB, piece }
}

pub(crate) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A scheduler with one blob of 64 pieces, and a clock.
pub(crate) struct World {
    pub(crate) scheduler: Scheduler,
    pub(crate) now: Time,
    wants: u64,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with_pieces(PIECE)
    }

    pub(crate) fn with_pieces(bytes: u64) -> Self {
        Self::with_extents((0..64).map(|at| at * bytes..(at + 1) * bytes).collect())
    }

    pub(crate) fn with_extents(extents: Arc<[Range<u64>]>) -> Self {
        let mut world = Self {
            scheduler: Scheduler::new(Config::new(peer(ME), "a"), Time::ZERO, [7; 32]),
            now: Time::ZERO,
            wants: 0,
        };
        world.tell(Event::BlobAdded { blob: BLOB, extents, present: Bitfield::new(64) });
        world
    }

    pub(crate) fn tell(&mut self, event: Event) -> Vec<Action> {
        self.scheduler.handle_event(self.now, event);
        self.actions()
    }

    pub(crate) fn actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.scheduler.poll_action(self.now)).collect()
    }

    pub(crate) fn wait(&mut self, time: Duration) -> Vec<Action> {
        let until = self.now + time;
        let mut actions = Vec::new();
        while let Some(at) = self.scheduler.poll_timeout().filter(|&at| at <= until) {
            self.now = self.now.max(at);
            self.scheduler.handle_timeout(self.now);
            actions.extend(self.actions());
        }
        self.now = until;
        actions
    }

    pub(crate) fn note_want(&mut self, piece: u32, priority: Priority, origin: Origin) -> WantId {
        self.wants += 1;
        let (want, deadline) = (WantId(self.wants), self.now + Duration::from_secs(60));
        self.scheduler.handle_event(self.now, Event::Want { want, item: item(piece), priority, deadline, origin });
        want
    }

    pub(crate) fn want(&mut self, piece: u32) -> Vec<Action> {
        self.note_want(piece, Priority::OnDemand, Origin::Local);
        self.actions()
    }

    pub(crate) fn up(&mut self, n: u8) -> Vec<Action> {
        let role = if n >= SEED { Role::Seed } else { Role::Node };
        self.tell(Event::PeerUp { peer: peer(n), role, zone: "a".into(), labels: BTreeMap::new() })
    }

    pub(crate) fn seed(&mut self, n: u8) -> Vec<Action> {
        let until = self.now + Duration::from_secs(3600);
        self.tell(Event::Lease { peer: peer(n), zone: "a".into(), capacity: 1, until })
    }

    pub(crate) fn has(&mut self, n: u8, pieces: std::ops::Range<u32>) -> Vec<Action> {
        let have = Bitfield::full(pieces.end - pieces.start);
        self.tell(Event::PeerHave { peer: peer(n), blob: BLOB, first: pieces.start, have, full: false })
    }
}

/// Where an action goes, with the pieces.
pub(crate) fn asked(action: &Action) -> Option<(Source, Vec<u32>)> {
    match action {
        Action::Request { peer, pieces, source: false, .. } => Some((Source::Peer(*peer), pieces.clone())),
        Action::Request { peer, pieces, source: true, .. } => Some((Source::Home(*peer), pieces.clone())),
        Action::BackToSource { pieces, .. } => Some((Source::Registry, pieces.clone())),
        _ => None,
    }
}

/// A request to a home, with its first piece.
pub(crate) fn asked_of_home(action: &Action) -> Option<(RequestId, u32)> {
    match action {
        Action::Request { request, pieces, source: true, .. } => Some((*request, pieces[0])),
        _ => None,
    }
}

pub(crate) fn all_asked(actions: &[Action]) -> Vec<(Source, Vec<u32>)> {
    actions.iter().filter_map(asked).collect()
}

pub(crate) fn request(actions: &[Action]) -> RequestId {
    let id = |action: &Action| match action {
        Action::Request { request, .. } | Action::BackToSource { request, .. } => Some(*request),
        _ => None,
    };
    actions.iter().find_map(id).expect("something was asked")
}

pub(crate) fn outcomes(actions: &[Action]) -> Vec<(WantId, Result<(), WantError>)> {
    let outcome = |action: &Action| match action {
        Action::Complete { want, outcome, .. } => Some((*want, outcome.clone())),
        _ => None,
    };
    actions.iter().filter_map(outcome).collect()
}
