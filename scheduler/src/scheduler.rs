//! The scheduler itself.

use std::collections::VecDeque;

use shoal_proto::PeerId;

use crate::{Action, BlobKey, Config, Event, Time};

/// Decides which piece to get, from whom and when. See the crate's documentation.
#[derive(Debug)]
pub struct Scheduler {
    config: Config,
    actions: VecDeque<Action>,
}

impl Scheduler {
    /// A scheduler that knows nothing yet. The same seed and events give the same actions.
    pub fn new(config: Config, _now: Time, _seed: [u8; 32]) -> Self {
        Self { config, actions: VecDeque::new() }
    }

    /// Takes note of what happened. Never calls back; follow with [`poll_action`](Self::poll_action).
    pub fn handle_event(&mut self, _now: Time, _event: Event) {}

    /// To be called at or after the time that [`poll_timeout`](Self::poll_timeout) named.
    pub fn handle_timeout(&mut self, _now: Time) {}

    /// The next thing to do; call until there is none.
    pub fn poll_action(&mut self, _now: Time) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Time> {
        None
    }

    /// The home of a piece: the first in hash order of the zone's live seed peers, or of the nodes with this blob if
    /// there are none; possibly this node. Nothing if the blob or piece is unknown.
    pub fn home_of(&self, _blob: BlobKey, _piece: u32) -> Option<PeerId> {
        Some(self.config.me)
    }
}
