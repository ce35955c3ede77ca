//! Stripes, leases and the hash that says whose home a piece has.
//!
//! A capacity-weighted rendezvous hash (Mosko, Schindelhauer and Thaler: score = weight / -ln(u)): every node that
//! knows the same leases finds the same order, and a seed peer that comes or goes moves only its own share. Scores
//! are computed with IEEE basic operations alone, so they are the same on every machine.

use std::{cmp::Ordering, collections::BTreeMap, time::Duration};

use shoal_proto::PeerId;

use crate::Time;

/// How many homes in hash order are worth remembering for a stripe.
pub(crate) const RANKED: usize = 8;

/// A live seed peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) zone: String,
    pub(crate) capacity: u64,
    pub(crate) until: Time,
}

/// The leases that are current.
#[derive(Debug)]
pub(crate) struct Homes {
    leases: BTreeMap<PeerId, Lease>,
    limit: usize,
    /// Changes whenever the order of homes may have.
    pub(crate) epoch: u64,
}

impl Homes {
    pub(crate) fn new(limit: usize) -> Self {
        Self { leases: BTreeMap::new(), limit, epoch: 1 }
    }

    /// Notes a lease; says whether more changed than its end, or nothing if there is no room for it.
    pub(crate) fn renew(&mut self, peer: PeerId, lease: Lease) -> Option<bool> {
        if self.leases.len() >= self.limit && !self.leases.contains_key(&peer) {
            return None;
        }
        let (zone, capacity) = (lease.zone.clone(), lease.capacity);
        let old = self.leases.insert(peer, lease);
        let changed = old.is_none_or(|old| old.zone != zone || old.capacity != capacity);
        self.epoch += u64::from(changed);
        Some(changed)
    }

    /// Ends a lease; says whether there was one.
    pub(crate) fn end(&mut self, peer: PeerId) -> bool {
        let ended = self.leases.remove(&peer).is_some();
        self.epoch += u64::from(ended);
        ended
    }

    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    /// The seed peers of a zone with their capacities.
    pub(crate) fn of_zone<'a>(&'a self, zone: &'a str) -> impl Iterator<Item = (PeerId, u64)> + 'a {
        self.leases.iter().filter(move |(_, lease)| lease.zone == zone).map(|(&peer, lease)| (peer, lease.capacity))
    }
}

/// The best [`RANKED`] of the candidates for a stripe, best first.
pub(crate) fn rank(blob: &[u8; 32], stripe: u64, candidates: impl Iterator<Item = (PeerId, u64)>) -> Vec<PeerId> {
    let mut scored: Vec<_> = candidates.map(|(peer, capacity)| (score(blob, stripe, peer, capacity), peer)).collect();
    let best_first =
        |a: &(f64, PeerId), b: &(f64, PeerId)| b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1));
    scored.sort_by(best_first);
    scored.truncate(RANKED);
    scored.into_iter().map(|(_, peer)| peer).collect()
}

fn score(blob: &[u8; 32], stripe: u64, peer: PeerId, capacity: u64) -> f64 {
    let words = blob.chunks_exact(8).chain(peer.as_bytes().chunks_exact(8));
    let seed = mix(stripe ^ 0x5348_4f41_4c68_6f6d);
    let hash = words.fold(seed, |hash, word| mix(hash ^ u64::from_le_bytes(word.try_into().expect("8 bytes"))));
    // 52 bits and a half: never 0 and never 1.
    let uniform = ((hash >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    capacity.max(1) as f64 / -ln(uniform)
}

/// The finaliser of splitmix64 (Steele, Lea and Flood 2014).
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The natural logarithm of a positive normal number by basic operations: m * 2^e with m in [0.75, 1.5), and
/// ln m = 2 atanh((m - 1) / (m + 1)) as a series whose terms shrink by 25 and more.
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut mantissa = f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 1023 << 52);
    if mantissa >= 1.5 {
        mantissa /= 2.0;
        exponent += 1;
    }
    let ratio = (mantissa - 1.0) / (mantissa + 1.0);
    let (mut sum, mut power) = (0.0, ratio);
    for odd in 0..14 {
        sum += power / f64::from(2 * odd + 1);
        power *= ratio * ratio;
    }
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * sum
}

/// Grows with each failure, by doubling, up to `longest`.
pub(crate) fn backoff(first: Duration, longest: Duration, failures: u32) -> Duration {
    first.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u64) -> PeerId {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&mix(n).to_le_bytes());
        PeerId::new(bytes)
    }

    #[test]
    fn ln_agrees_with_the_standard_library() {
        for x in [1e-16, 1e-9, 0.1, 0.4999, 0.5, 0.74, 0.75, 0.9, 0.999_999_9, 1.0 - f64::EPSILON, 2.0] {
            assert!((ln(x) - x.ln()).abs() <= 1e-14 * x.ln().abs().max(1e-2), "{x}: {} {}", ln(x), x.ln());
        }
    }

    #[test]
    fn shares_follow_capacity() {
        let seeds = [(peer(1), 1), (peer(2), 2), (peer(3), 5)];
        let mut wins = BTreeMap::new();
        for stripe in 0..8000 {
            *wins.entry(rank(&[7; 32], stripe, seeds.into_iter())[0]).or_insert(0) += 1;
        }
        for (peer, capacity) in seeds {
            let expected = i64::try_from(capacity).unwrap() * 1000;
            assert!((wins[&peer] - expected).abs() < 150, "{wins:?}");
        }
    }

    #[test]
    fn who_goes_moves_only_its_own_stripes() {
        let seeds: Vec<_> = (0..5).map(|n| (peer(n), 1)).collect();
        for stripe in 0..500 {
            let before = rank(&[9; 32], stripe, seeds.iter().copied());
            let after = rank(&[9; 32], stripe, seeds.iter().copied().filter(|&(peer, _)| peer != seeds[2].0));
            let without: Vec<_> = before.into_iter().filter(|&peer| peer != seeds[2].0).collect();
            assert_eq!(without, after);
        }
    }

    #[test]
    fn a_renewal_changes_nothing_but_the_end() {
        let lease = |capacity| Lease { zone: "a".into(), capacity, until: Time::ZERO };
        let mut homes = Homes::new(1);
        assert_eq!(homes.renew(peer(1), lease(1)), Some(true));
        assert_eq!(homes.renew(peer(1), lease(1)), Some(false));
        assert_eq!(homes.renew(peer(1), lease(2)), Some(true));
        assert_eq!(homes.renew(peer(2), lease(1)), None, "bounded");
        assert!(homes.end(peer(1)) && !homes.end(peer(1)));
        assert_eq!(homes.epoch, 4);
    }
}
