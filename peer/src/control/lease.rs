//! Leases of seed peers: what a seed says of itself over gossip, and which leases are current.
//!
//! A seed publishes its lease three times in its length; it ends when it is not renewed, or at once with a length of
//! zero. The message carries the seed's membership, since most of its readers have no connection to it: gossip
//! proves who wrote it, the certificate proves that the writer is a seed, and of which zone. The sequence
//! (milliseconds since 1970 at the seed, so that it survives a restart) only has to grow; no reader compares it with
//! its own clock.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message;
use shoal_proto::{PeerId, Role};

use super::addresses::MAX_ADDRESSES;
use crate::{admission::Admission, membership::Refusal};

/// Seeds that are remembered, living or gone. A cluster has a few per zone.
const MAX_SEEDS: usize = 1024;

/// Longest lease that is believed; a seed that dies is asked in vain for this long at most.
pub(super) const MAX_LENGTH: Duration = Duration::from_secs(300);

/// Why a message is not a lease.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LeaseError {
    #[error("the lease is malformed")]
    Malformed,
    #[error("its writer is no member")]
    Membership(#[from] Refusal),
    #[error("its writer is no seed peer")]
    NotASeed,
}

/// A lease as its seed states it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) peer: PeerId,
    pub(super) zone: String,
    pub(super) capacity: u32,
    pub(super) data_addresses: Vec<SocketAddr>,
    pub(super) sequence: u64,
    /// Zero withdraws the lease.
    pub(super) length: Duration,
}

impl Lease {
    /// The message that says so; `shown` is the seed's membership.
    pub(super) fn encode(&self, shown: &Bytes) -> Vec<u8> {
        let message = LeaseMessage {
            membership: shown.clone(),
            capacity: self.capacity,
            addresses: self.data_addresses.iter().take(MAX_ADDRESSES).map(encode_address).collect(),
            sequence: self.sequence,
            length_ms: u32::try_from(self.length.as_millis()).unwrap_or(u32::MAX),
        };
        message.encode_to_vec()
    }

    /// Reads what `author` wrote, whom gossip has authenticated.
    pub(super) fn decode(
        bytes: &[u8],
        author: &PeerId,
        admission: &Admission,
        now_unix: u64,
    ) -> Result<Self, LeaseError> {
        let message = LeaseMessage::decode(bytes).map_err(|_| LeaseError::Malformed)?;
        let admitted = admission.admit(&message.membership, author, now_unix)?;
        if admitted.role != Role::Seed {
            return Err(LeaseError::NotASeed);
        }
        if message.capacity == 0 || message.addresses.len() > MAX_ADDRESSES {
            return Err(LeaseError::Malformed);
        }
        let addresses: Option<Vec<_>> = message.addresses.iter().map(|bytes| decode_address(bytes)).collect();
        Ok(Self {
            peer: admitted.peer,
            zone: admitted.zone,
            capacity: message.capacity,
            data_addresses: addresses.ok_or(LeaseError::Malformed)?,
            sequence: message.sequence,
            length: Duration::from_millis(message.length_ms.into()).min(MAX_LENGTH),
        })
    }
}

#[derive(Clone, PartialEq, Message)]
struct LeaseMessage {
    #[prost(bytes = "bytes", tag = "1")]
    membership: Bytes,
    #[prost(uint32, tag = "2")]
    capacity: u32,
    #[prost(bytes = "vec", repeated, tag = "3")]
    addresses: Vec<Vec<u8>>,
    #[prost(uint64, tag = "4")]
    sequence: u64,
    #[prost(uint32, tag = "5")]
    length_ms: u32,
}

/// 4 or 16 bytes of address, 2 of port, both big endian.
fn encode_address(address: &SocketAddr) -> Vec<u8> {
    let mut bytes = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    bytes.extend(address.port().to_be_bytes());
    bytes
}

fn decode_address(bytes: &[u8]) -> Option<SocketAddr> {
    let (ip, port) = bytes.split_last_chunk::<2>()?;
    let ip = match ip.len() {
        4 => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(ip).ok()?)),
        16 => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(ip).ok()?)),
        _ => return None,
    };
    let port = u16::from_be_bytes(*port);
    (port != 0 && !ip.is_unspecified()).then_some(SocketAddr::new(ip, port))
}

/// What a lease changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// The seed is current until then.
    Until(Instant),
    /// It withdrew.
    Ended,
    /// Old news, or news of a seed that was not current.
    Nothing,
    /// There is no room for another seed.
    Full,
}

/// The seeds whose lease is current. A seed that is gone stays remembered while there is room, so that an old lease
/// of it, sent again by somebody, does not bring it back.
#[derive(Debug, Default)]
pub(super) struct Leases {
    seeds: BTreeMap<PeerId, Seed>,
}

#[derive(Debug, Clone, Copy)]
struct Seed {
    sequence: u64,
    /// When the lease ends, or `None` if it has.
    until: Option<Instant>,
}

impl Leases {
    pub(super) fn handle(&mut self, now: Instant, peer: PeerId, sequence: u64, length: Duration) -> Change {
        let known = self.seeds.get(&peer).copied();
        if known.is_some_and(|seed| sequence <= seed.sequence) {
            return Change::Nothing;
        }
        if known.is_none() && !self.make_room() {
            return Change::Full;
        }
        let was_current = known.is_some_and(|seed| seed.until.is_some());
        let until = (!length.is_zero()).then(|| now + length);
        self.seeds.insert(peer, Seed { sequence, until });
        match until {
            Some(until) => Change::Until(until),
            None if was_current => Change::Ended,
            None => Change::Nothing,
        }
    }

    /// Ends the lease of a seed that may not stay; false if it had none.
    pub(super) fn end(&mut self, peer: &PeerId) -> bool {
        self.seeds.get_mut(peer).and_then(|seed| seed.until.take()).is_some()
    }

    /// The seeds whose lease ended by `now`, each told once.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<PeerId> {
        let ended = self.seeds.iter_mut().filter(|(_, seed)| seed.until.is_some_and(|until| until <= now));
        ended.map(|(peer, seed)| (*peer, seed.until = None).0).collect()
    }

    /// When `expire` will have something to tell.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.seeds.values().filter_map(|seed| seed.until).min()
    }

    pub(super) fn is_current(&self, peer: &PeerId) -> bool {
        self.seeds.get(peer).is_some_and(|seed| seed.until.is_some())
    }

    /// Forgets the seed that was heard of longest ago among those that are gone, if there is no room otherwise.
    fn make_room(&mut self) -> bool {
        if self.seeds.len() < MAX_SEEDS {
            return true;
        }
        let gone = self.seeds.iter().filter(|(_, seed)| seed.until.is_none());
        let Some(oldest) = gone.min_by_key(|(_, seed)| seed.sequence).map(|(peer, _)| *peer) else { return false };
        self.seeds.remove(&oldest);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        identity::Identity,
        membership::{Membership, Policy},
    };

    const SECOND: Duration = Duration::from_secs(1);

    fn peer(n: u16) -> PeerId {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&n.to_be_bytes());
        PeerId::new(bytes)
    }

    fn lease(role: Role) -> (Lease, Membership) {
        let membership = Membership::open(Identity::generate().peer(), role, "a").unwrap();
        let data_addresses = vec!["10.0.0.1:4802".parse().unwrap(), "[2001:db8::1]:4802".parse().unwrap()];
        let (peer, zone) = (membership.peer(), membership.zone().to_owned());
        (Lease { peer, zone, capacity: 7, data_addresses, sequence: 3, length: 15 * SECOND }, membership)
    }

    fn decode(bytes: &[u8], author: &PeerId) -> Result<Lease, LeaseError> {
        let own = Membership::open(Identity::generate().peer(), Role::Node, "a").unwrap();
        Lease::decode(bytes, author, &Admission::new(Policy::Open, own), 0)
    }

    #[test]
    fn a_seeds_lease_round_trips() {
        let (lease, membership) = lease(Role::Seed);
        assert_eq!(decode(&lease.encode(membership.shown()), &lease.peer), Ok(lease.clone()));
        let forever = Lease { length: 1000 * MAX_LENGTH, ..lease.clone() };
        assert_eq!(decode(&forever.encode(membership.shown()), &lease.peer).unwrap().length, MAX_LENGTH);
    }

    #[test]
    fn only_seeds_speak_and_only_for_themselves() {
        let (plain, membership) = lease(Role::Node);
        assert_eq!(decode(&plain.encode(membership.shown()), &plain.peer), Err(LeaseError::NotASeed));
        let (lease, membership) = lease(Role::Seed);
        let refused = decode(&lease.encode(membership.shown()), &plain.peer);
        assert_eq!(refused, Err(LeaseError::Membership(Refusal::WrongPeer)));
        let weightless = Lease { capacity: 0, ..lease.clone() };
        assert_eq!(decode(&weightless.encode(membership.shown()), &lease.peer), Err(LeaseError::Malformed));
        let nowhere = Lease { data_addresses: vec!["0.0.0.0:1".parse().unwrap()], ..lease.clone() };
        assert_eq!(decode(&nowhere.encode(membership.shown()), &lease.peer), Err(LeaseError::Malformed));
    }

    #[test]
    fn a_lease_ends_once_and_old_news_does_not_revive_it() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        assert_eq!(leases.handle(now, peer(1), 10, 3 * SECOND), Change::Until(now + 3 * SECOND));
        assert_eq!(leases.handle(now + SECOND, peer(1), 11, 3 * SECOND), Change::Until(now + 4 * SECOND));
        assert_eq!(leases.handle(now + SECOND, peer(1), 11, 9 * SECOND), Change::Nothing);
        assert_eq!(leases.deadline(), Some(now + 4 * SECOND));
        assert!(leases.expire(now + 3 * SECOND).is_empty() && leases.is_current(&peer(1)));
        assert_eq!(leases.expire(now + 4 * SECOND), [peer(1)]);
        assert_eq!((leases.deadline(), leases.expire(now + 9 * SECOND)), (None, vec![]));
        assert_eq!(leases.handle(now + 5 * SECOND, peer(1), 11, 3 * SECOND), Change::Nothing);
        assert_eq!(leases.handle(now + 5 * SECOND, peer(1), 12, Duration::ZERO), Change::Nothing);
        assert!(matches!(leases.handle(now + 5 * SECOND, peer(1), 13, SECOND), Change::Until(_)));
        assert!(leases.end(&peer(1)) && !leases.end(&peer(1)) && !leases.end(&peer(2)));
        assert!(matches!(leases.handle(now + 5 * SECOND, peer(1), 14, SECOND), Change::Until(_)));
        assert_eq!(leases.handle(now + 5 * SECOND, peer(1), 15, Duration::ZERO), Change::Ended);
    }

    #[test]
    fn the_table_is_bounded_and_prefers_the_living() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        for n in 0..MAX_SEEDS as u16 {
            assert!(matches!(leases.handle(now, peer(n), 10 + u64::from(n), SECOND), Change::Until(_)));
        }
        assert_eq!(leases.handle(now, peer(5000), 1, SECOND), Change::Full);
        leases.handle(now, peer(3), 99, Duration::ZERO);
        assert!(matches!(leases.handle(now, peer(5000), 1, SECOND), Change::Until(_)));
        assert_eq!((leases.seeds.len(), leases.seeds.contains_key(&peer(3))), (MAX_SEEDS, false));
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            prop_assert!(decode(&bytes, &peer(1)).is_err());
        }

        /// Against a map of end times: the same seeds are current, and each end is told once.
        #[test]
        fn current_leases_match_a_plain_model(
            steps in proptest::collection::vec((0u16..4, 0u64..8, 0u64..5, 0u64..3), 0..60),
        ) {
            let (mut leases, mut now) = (Leases::default(), Instant::now());
            let mut model = BTreeMap::<u16, (u64, Option<Instant>)>::new();
            for (n, sequence, length, wait) in steps {
                now += SECOND * wait as u32;
                let mut told = leases.expire(now);
                for (n, (_, until)) in &mut model {
                    if until.is_some_and(|until| until <= now) {
                        *until = None;
                        let place = told.iter().position(|p| *p == peer(*n));
                        prop_assert!(place.is_some());
                        told.remove(place.unwrap_or(0));
                    }
                }
                prop_assert!(told.is_empty());
                leases.handle(now, peer(n), sequence, SECOND * length as u32);
                if model.get(&n).is_none_or(|(last, _)| sequence > *last) {
                    model.insert(n, (sequence, (length > 0).then(|| now + SECOND * length as u32)));
                }
                for n in 0..4 {
                    let current = model.get(&n).is_some_and(|(_, until)| until.is_some());
                    prop_assert_eq!(leases.is_current(&peer(n)), current);
                }
                prop_assert_eq!(leases.deadline(), model.values().filter_map(|(_, until)| *until).min());
            }
        }
    }
}
