//! Who may stay: once a second, and whenever a membership or a revocation changed, connections of peers that may not
//! are closed, and a revoked seed peer's lease ends. Revocations are told to everyone, and told again to who turns up
//! later, since gossip has no memory.

use std::time::{Duration, Instant};

use libp2p::{
    gossipsub::MessageAcceptance,
    swarm::dial_opts::{DialOpts, PeerCondition},
};
use shoal_proto::PeerId;

use super::Plane;
use crate::{
    control::{
        ControlEvent,
        behaviour::{self, MAX_LISTED},
    },
    membership::{Refusal, unix_now},
};

/// How often the clock is compared with the certificates of the connected peers.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Pause after somebody turned up, so that those who come with it are told together.
const TELL_AFTER: Duration = Duration::from_secs(1);
/// Shortest time between two times that all revocations are told.
const TELL_PAUSE: Duration = Duration::from_secs(10);

/// When there is something to do.
#[derive(Debug)]
pub(super) struct Members {
    look: Instant,
    tell: Option<Instant>,
    told: Option<Instant>,
}

impl Members {
    pub(super) fn new(now: Instant) -> Self {
        Self { look: now + LOOK_EVERY, tell: None, told: None }
    }

    pub(super) fn deadline(&self) -> Instant {
        self.tell.map_or(self.look, |tell| tell.min(self.look))
    }

    pub(super) fn look_now(&mut self) {
        self.look = Instant::now();
    }

    /// Somebody has turned up who may not know of the revocations.
    pub(super) fn tell_soon(&mut self, now: Instant) {
        let soon = self.told.map_or(now + TELL_AFTER, |told| (told + TELL_PAUSE).max(now + TELL_AFTER));
        self.tell.get_or_insert(soon);
    }
}

impl Plane {
    pub(super) fn look_after_members(&mut self, now: Instant) {
        if self.members.tell.is_some_and(|tell| tell <= now) {
            self.members.tell = None;
            self.members.told = Some(now);
            for list in self.options.admission.revocation_lists(MAX_LISTED) {
                self.tell_revocations(list);
            }
        }
        if self.members.look <= now {
            self.members.look = now + LOOK_EVERY;
            self.expel();
        }
    }

    fn expel(&mut self) {
        let now = unix_now();
        let admission = &self.options.admission;
        let expelled: Vec<_> = self
            .peers
            .members()
            .filter_map(|(peer, admitted, addresses)| {
                let refusal = admission.stands(admitted, now).err()?;
                Some((*peer, admitted.peer, refusal, addresses.iter().cloned().collect::<Vec<_>>()))
            })
            .collect();
        for (peer, id, refusal, addresses) in expelled {
            tracing::info!(peer = crate::identity::to_text(&id), "expelled: {refusal}");
            // An error says that it has just gone by itself.
            let _ = self.swarm.disconnect_peer_id(peer);
            if refusal == Refusal::Expired && !addresses.is_empty() {
                // It may have a new certificate to show.
                let anew = DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(addresses);
                self.dial(anew.build());
            } else {
                self.swarm.behaviour_mut().kad.remove_peer(&peer);
            }
            self.end_lease(id);
        }
    }

    /// A seed that was let in again says so with its next lease.
    fn end_lease(&mut self, peer: PeerId) {
        if self.leases.end(&peer) {
            self.backlog.push_back(ControlEvent::LeaseEnded { peer });
        }
    }

    /// Takes revocations in that `author` passed on.
    pub(super) fn handle_revocations(&mut self, author: &PeerId, list: &[u8]) -> MessageAcceptance {
        match self.options.admission.revoke_all(list, MAX_LISTED, unix_now()) {
            Ok(0) => MessageAcceptance::Ignore,
            Ok(_) => MessageAcceptance::Accept,
            Err(error) => {
                tracing::debug!(%author, %error, "not a list of revocations");
                MessageAcceptance::Reject
            }
        }
    }

    pub(super) fn tell_revocations(&mut self, list: Vec<u8>) {
        if let Err(error) = self.swarm.behaviour_mut().gossip.publish(behaviour::revocations(), list) {
            // Nobody is subscribed; whoever subscribes is told.
            tracing::debug!(%error, "revocations reached nobody");
        }
    }
}
