//! Certificates under attack: every bit flipped, cut off at every length, shown by somebody else, too late.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::identity::Identity;

const NOW: u64 = 1_800_000_000;

struct Cluster {
    key: Keypair,
    policy: Policy,
}

fn seed_in_a(peer: PeerId) -> Certificate {
    Certificate { peer, role: Role::Seed, zone: "a".into(), issued: NOW - 10, expires: NOW + 10 }
}

impl Cluster {
    fn new() -> Self {
        let key = ed25519::Keypair::generate();
        Self { policy: Policy::Key(key.public()), key: key.into() }
    }

    fn certificate(&self, peer: PeerId) -> Bytes {
        seed_in_a(peer).sign(&self.key).unwrap()
    }

    fn verify(&self, shown: &[u8], peer: &PeerId) -> Result<Admitted, Refusal> {
        verify(&self.policy, shown, peer, NOW)
    }
}

#[test]
fn a_member_is_admitted_with_its_role_and_zone() {
    let (cluster, peer) = (Cluster::new(), Identity::generate().peer());
    let shown = cluster.certificate(peer);
    assert_eq!(cluster.verify(&shown, &peer), Ok(seed_in_a(peer)));
    assert_eq!(Certificate::read(&shown), Ok(seed_in_a(peer)));
    let own = Membership::certified(&cluster.policy, shown.clone(), &peer, NOW).unwrap();
    assert_eq!((own.shown(), own.peer(), own.role(), own.zone()), (&shown, peer, Role::Seed, "a"));
}

#[test]
fn strangers_are_refused_for_what_they_lack() {
    let (cluster, peer) = (Cluster::new(), Identity::generate().peer());
    let shown = cluster.certificate(peer);
    let open = Membership::open(peer, Role::Node, "a").unwrap();
    let other = Identity::generate().peer();
    assert_eq!(cluster.verify(&[], &peer), Err(Refusal::Missing));
    assert_eq!(cluster.verify(open.shown(), &peer), Err(Refusal::Missing));
    assert_eq!(cluster.verify(&vec![0; MAX_BYTES + 1], &peer), Err(Refusal::TooLong));
    assert_eq!(cluster.verify(b"garbage", &peer), Err(Refusal::Malformed));
    assert_eq!(cluster.verify(&shown, &other), Err(Refusal::WrongPeer));
    assert_eq!(cluster.verify(&Cluster::new().certificate(peer), &peer), Err(Refusal::BadSignature));
    assert_eq!(verify(&cluster.policy, &shown, &peer, NOW + 9).map(|a| a.peer), Ok(peer));
    assert_eq!(verify(&cluster.policy, &shown, &peer, NOW + 10), Err(Refusal::Expired));
    let eternal = Certificate { expires: NOW + MAX_LIFETIME.as_secs(), ..seed_in_a(peer) };
    assert_eq!(cluster.verify(&eternal.sign(&cluster.key).unwrap(), &peer), Err(Refusal::Malformed));
}

#[test]
fn an_open_cluster_still_ties_the_statement_to_the_peer() {
    let peer = Identity::generate().peer();
    let open = Membership::open(peer, Role::Node, "b").unwrap();
    let admitted = verify(&Policy::Open, open.shown(), &peer, NOW).unwrap();
    assert_eq!((admitted.role, admitted.zone.as_str()), (Role::Node, "b"));
    let other = Identity::generate().peer();
    assert_eq!(verify(&Policy::Open, open.shown(), &other, NOW), Err(Refusal::WrongPeer));
}

#[test]
fn an_open_cluster_is_for_loopback() {
    let key = Cluster::new().policy;
    let outside = [IpAddr::from([10, 0, 0, 1]), Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let inside = [IpAddr::from([127, 0, 0, 2]), Ipv6Addr::LOCALHOST.into(), "::ffff:127.0.0.1".parse().unwrap()];
    for address in outside {
        assert!(matches!(Policy::Open.permits(address, false), Err(MembershipError::OpenCluster { .. })));
        assert!(Policy::Open.permits(address, true).is_ok() && key.permits(address, false).is_ok());
    }
    for address in inside {
        assert!(Policy::Open.permits(address, false).is_ok(), "{address}");
    }
}

#[test]
fn the_policy_is_parsed_from_hexadecimal_digits() {
    let Policy::Key(key) = Cluster::new().policy else { unreachable!("made with a key") };
    assert_eq!(Policy::parse(&hex::encode(key.to_bytes())).unwrap(), Policy::Key(key));
    assert_eq!(Policy::parse("").unwrap(), Policy::Open);
    for text in ["00", "zz", &"02".repeat(32)] {
        assert!(matches!(Policy::parse(text), Err(MembershipError::Key)), "{text}");
    }
}

#[test]
fn refusals_keep_their_codes() {
    for code in 0..=u8::MAX {
        let refusal = Refusal::from_code(code);
        assert_eq!(refusal.map(|r| r as u8), (1..=7).contains(&code).then_some(code));
    }
}

#[test]
fn zones_have_plain_names() {
    let peer = Identity::generate().peer();
    for zone in ["", "a b", "a/b", "ä", &"a".repeat(MAX_ZONE_BYTES + 1)] {
        assert!(matches!(Membership::open(peer, Role::Node, zone), Err(MembershipError::Zone { .. })), "{zone}");
    }
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let (cluster, peer) = (Cluster::new(), Identity::generate().peer());
    let good = cluster.certificate(peer);
    for bit in 0..good.len() * 8 {
        let mut bad = good.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(cluster.verify(&bad, &peer).is_err(), "bit {bit}");
    }
    for length in 0..good.len() {
        assert!(cluster.verify(&good[..length], &peer).is_err(), "cut to {length}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_signed_is_what_is_admitted(
        seed: bool,
        zone in "[a-zA-Z0-9._-]{1,64}",
        expires in 0..2 * NOW,
        lifetime in 0..=MAX_LIFETIME.as_secs(),
        flips in proptest::collection::btree_set(0usize..4096, 1..4),
    ) {
        let (cluster, peer) = (Cluster::new(), Identity::generate().peer());
        let role = if seed { Role::Seed } else { Role::Node };
        let issued = expires.saturating_sub(lifetime);
        let certificate = Certificate { peer, role, zone, issued, expires };
        let shown = certificate.sign(&cluster.key).unwrap();
        prop_assert!(shown.len() <= MAX_BYTES / 2);
        let expected = if expires > NOW { Ok(certificate) } else { Err(Refusal::Expired) };
        prop_assert_eq!(cluster.verify(&shown, &peer), expected);

        let mut bad = shown.to_vec();
        for flip in flips {
            let bit = flip % (bad.len() * 8);
            bad[bit / 8] ^= 1 << (bit % 8);
        }
        prop_assert!(bad == shown || cluster.verify(&bad, &peer).is_err());
    }

    #[test]
    fn bytes_of_any_kind_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2 * MAX_BYTES)) {
        let (cluster, peer) = (Cluster::new(), Identity::generate().peer());
        prop_assert!(cluster.verify(&bytes, &peer).is_err());
        prop_assert!(verify(&Policy::Open, &bytes, &peer, NOW).is_err());
    }
}
