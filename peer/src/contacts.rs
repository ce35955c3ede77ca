//! Who is where: the addresses, roles and bans of the nodes that this one has heard of, from either plane.
//!
//! Bounded: the node forgets whom it has not heard of for longest. A shared lock, held for a look-up only, because the
//! data plane, the control plane and fetches all ask.

mod faults;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use shoal_proto::{Contact, PeerId, Role};

use self::faults::Named;
pub(crate) use self::faults::{Fault, Faults};

/// Most nodes remembered; a zone of ten thousand fits.
const MAX_CONTACTS: usize = 16 * 1024;
/// Most addresses kept of one node.
const MAX_ADDRESSES: usize = shoal_proto::MAX_ADDRESSES;

/// What is known of one node.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    /// What it does for the others.
    pub role: Role,
    /// Its zone; empty while unknown.
    pub zone: String,
    /// Where its data plane listens.
    pub addresses: Vec<SocketAddr>,
    /// Whether it is a seed peer with a current lease.
    pub lease: bool,
    /// Until when it is refused, and why.
    pub ban: Option<(Instant, String)>,
    /// What it did that it should not.
    pub faults: Faults,
    heard: Instant,
}

impl Known {
    /// What is left of its ban, rounded up.
    pub(crate) fn banned_seconds(&self) -> u64 {
        let left = self.ban.as_ref().map(|(until, _)| until.saturating_duration_since(Instant::now()));
        left.map_or(0, |left| left.as_secs() + u64::from(left.subsec_nanos() > 0))
    }
}

/// The table. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Contacts {
    known: Arc<Mutex<HashMap<PeerId, Known>>>,
    named: Arc<Mutex<Named>>,
}

impl Contacts {
    /// A node showed itself, with what it says of itself.
    pub(crate) fn seen(&self, peer: PeerId, role: Role, zone: &str, addresses: &[SocketAddr]) {
        self.update(peer, |known| {
            known.role = role;
            zone.clone_into(&mut known.zone);
            if !addresses.is_empty() {
                known.addresses = addresses.iter().copied().take(MAX_ADDRESSES).collect();
            }
        });
    }

    /// Its lease began, was renewed, or ended.
    pub(crate) fn lease(&self, peer: PeerId, current: bool) {
        self.update(peer, |known| known.lease = current);
    }

    /// Another node named it. What the node itself said before counts for more, and where there is no room it is not remembered: else
    /// whoever names nodes without end would have all others forgotten.
    pub(crate) fn heard_of(&self, contact: Contact) {
        {
            let table = self.lock();
            if table.len() >= MAX_CONTACTS && !table.contains_key(&contact.peer) {
                return;
            }
        }
        self.update(contact.peer, |known| {
            if known.addresses.is_empty() {
                known.addresses = contact.addresses.into_iter().take(MAX_ADDRESSES).collect();
            }
        });
    }

    /// Where its data plane listens; empty when nobody has said.
    pub(crate) fn addresses(&self, peer: PeerId) -> Vec<SocketAddr> {
        self.lock().get(&peer).map(|known| known.addresses.clone()).unwrap_or_default()
    }

    /// What it does for the others; a node until it is known to be more.
    pub(crate) fn role(&self, peer: PeerId) -> Role {
        self.lock().get(&peer).map_or(Role::Node, |known| known.role)
    }

    /// Its zone; empty while unknown.
    pub(crate) fn zone(&self, peer: PeerId) -> String {
        self.lock().get(&peer).map(|known| known.zone.clone()).unwrap_or_default()
    }

    /// Notes a ban, for people to see; the data plane enforces it.
    pub(crate) fn ban(&self, peer: PeerId, time: Duration, reason: &str) {
        self.fault(peer, Fault::WrongBytes, reason);
        self.update(peer, |known| known.ban = Some((Instant::now() + time, reason.to_owned())));
    }

    /// Notes that a node did what it should not, for people to see.
    pub(crate) fn fault(&self, peer: PeerId, fault: Fault, detail: &str) {
        self.named.lock().unwrap_or_else(PoisonError::into_inner).count(peer, fault);
        self.update(peer, |known| known.faults.count(fault, detail));
    }

    /// Whether it is refused at present.
    pub(crate) fn is_banned(&self, peer: PeerId) -> bool {
        self.lock().get(&peer).is_some_and(|known| known.banned_seconds() > 0)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// How many there are in a zone.
    pub(crate) fn len_of_zone(&self, zone: &str) -> usize {
        self.lock().values().filter(|known| known.zone == zone).count()
    }

    /// Everyone, in the order of their ids.
    pub(crate) fn all(&self) -> Vec<(PeerId, Known)> {
        let mut all: Vec<_> = self.lock().iter().map(|(peer, known)| (*peer, known.clone())).collect();
        all.sort_by_key(|(peer, _)| *peer);
        all
    }

    fn update(&self, peer: PeerId, change: impl FnOnce(&mut Known)) {
        let now = Instant::now();
        let mut table = self.lock();
        if table.len() >= MAX_CONTACTS && !table.contains_key(&peer) {
            let unbanned = table.iter().filter(|(_, known)| known.banned_seconds() == 0);
            let Some(oldest) = unbanned.min_by_key(|(_, known)| known.heard).map(|(peer, _)| *peer) else { return };
            table.remove(&oldest);
        }
        let known = table.entry(peer).or_insert_with(|| Known {
            role: Role::Node,
            zone: String::new(),
            addresses: Vec::new(),
            lease: false,
            ban: None,
            faults: Faults::default(),
            heard: now,
        });
        known.heard = now;
        change(known);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u64) -> PeerId {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        PeerId::new(bytes)
    }

    #[test]
    fn hearsay_does_not_replace_what_a_node_said() {
        let contacts = Contacts::default();
        let (own, other) = (SocketAddr::from(([127, 0, 0, 1], 1)), SocketAddr::from(([127, 0, 0, 1], 2)));
        contacts.seen(peer(1), Role::Seed, "a", &[own]);
        contacts.heard_of(Contact { peer: peer(1), addresses: vec![other] });
        assert_eq!((contacts.addresses(peer(1)), contacts.role(peer(1))), (vec![own], Role::Seed));
        contacts.heard_of(Contact { peer: peer(2), addresses: vec![other] });
        assert_eq!(contacts.addresses(peer(2)), vec![other]);
    }

    #[test]
    fn the_table_is_bounded_and_keeps_bans() {
        let contacts = Contacts::default();
        contacts.ban(peer(0), Duration::from_secs(600), "wrong bytes");
        let most = MAX_CONTACTS as u64;
        for n in 1..=most + 5 {
            contacts.heard_of(Contact { peer: peer(n), addresses: Vec::new() });
        }
        let known = |n| contacts.all().iter().any(|(known, _)| *known == peer(n));
        assert!(contacts.len() == MAX_CONTACTS && known(1) && !known(most + 5), "hearsay has nobody forgotten");
        for n in most + 10..most + 15 {
            contacts.seen(peer(n), Role::Node, "a", &[]);
            assert!(contacts.len() == MAX_CONTACTS && known(n));
        }
        assert!(contacts.is_banned(peer(0)) && !contacts.is_banned(peer(1)) && !known(1));
    }
}
