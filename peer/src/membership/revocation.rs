//! Certificates that end before their time.
//!
//! A revocation is about a peer and a time: whatever was issued to the peer until then is void. A certificate that is
//! issued later is good, so that a node can get another role. It is signed by the cluster's key and looks like this:
//!
//! ```text
//! Signed { body: Body { peer, until }, signature: ed25519("shoal revocation 1\0" | body) }
//! ```
//!
//! Anybody may pass it on. It is remembered for as long as a certificate can live, [`MAX_LIFETIME`]; after that there
//! is nothing left that it could be about. Many together, in files and messages, are a list of them.

use std::collections::BTreeMap;

use bytes::Bytes;
use libp2p::identity::Keypair;
use prost::Message;
use shoal_proto::PeerId;

use super::{Certificate, MAX_LIFETIME, MembershipError, Policy, Signed, decode_canonical, signed_text};

/// Signed in front of the body.
const DOMAIN: &[u8] = b"shoal revocation 1\0";

/// Longest signed revocation that is looked at. A real one has about 110 bytes.
pub(crate) const MAX_SIGNED: usize = 160;

/// Revocations that are remembered. Who needs more has lost the key and makes another one.
pub const MAX_REVOCATIONS: usize = 4096;

/// What was issued to a peer until some time is void.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revocation {
    /// Whose certificates.
    pub peer: PeerId,
    /// Those issued until then, in seconds since 1970, this second included.
    pub until: u64,
}

/// Why a revocation is not believed or not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RevocationError {
    /// Not the canonical encoding of one.
    #[error("the revocation is malformed")]
    Malformed,
    /// The cluster's key did not sign it, or the cluster has none.
    #[error("the revocation is not signed by the cluster's key")]
    BadSignature,
    /// What it is about has expired by itself.
    #[error("the revocation is too old to matter")]
    Old,
    /// [`MAX_REVOCATIONS`] are remembered already.
    #[error("{MAX_REVOCATIONS} revocations are remembered, and there is room for no more")]
    Full,
}

impl Revocation {
    pub(super) fn sign(&self, cluster_key: &Keypair) -> Result<Bytes, MembershipError> {
        let body = Body { peer: self.peer.as_bytes().to_vec(), until: self.until }.encode_to_vec();
        let signature = cluster_key.sign(&signed_text(DOMAIN, &body)).map_err(|_| MembershipError::Signing)?;
        Ok(Signed { body, signature }.encode_to_vec().into())
    }

    /// Reads and checks a signed revocation.
    ///
    /// # Errors
    /// [`RevocationError::Malformed`] or [`RevocationError::BadSignature`].
    pub fn verify(policy: &Policy, signed: &[u8]) -> Result<Self, RevocationError> {
        if signed.len() > MAX_SIGNED {
            return Err(RevocationError::Malformed);
        }
        let envelope: Signed = decode_canonical(signed).map_err(|_| RevocationError::Malformed)?;
        let body: Body = decode_canonical(&envelope.body).map_err(|_| RevocationError::Malformed)?;
        let peer = PeerId::try_from(body.peer.as_slice()).map_err(|_| RevocationError::Malformed)?;
        match policy {
            Policy::Key(key) if key.verify(&signed_text(DOMAIN, &envelope.body), &envelope.signature) => {
                Ok(Self { peer, until: body.until })
            }
            _ => Err(RevocationError::BadSignature),
        }
    }

    fn is_over(&self, now_unix: u64) -> bool {
        self.until.saturating_add(MAX_LIFETIME.as_secs()) < now_unix
    }
}

/// The revocations that a node knows. Pure.
#[derive(Debug, Clone, Default)]
pub struct Revocations {
    known: BTreeMap<PeerId, (u64, Bytes)>,
}

impl Revocations {
    /// Takes in a signed revocation; false if it says nothing new.
    ///
    /// # Errors
    /// A [`RevocationError`]; nothing changes then.
    pub fn insert(&mut self, policy: &Policy, signed: &[u8], now_unix: u64) -> Result<bool, RevocationError> {
        let revocation = Revocation::verify(policy, signed)?;
        if revocation.is_over(now_unix) {
            return Err(RevocationError::Old);
        }
        let known = self.known.get(&revocation.peer);
        if known.is_some_and(|(until, _)| *until >= revocation.until) {
            return Ok(false);
        }
        if known.is_none() && self.known.len() >= MAX_REVOCATIONS {
            self.forget(now_unix);
            if self.known.len() >= MAX_REVOCATIONS {
                return Err(RevocationError::Full);
            }
        }
        self.known.insert(revocation.peer, (revocation.until, Bytes::copy_from_slice(signed)));
        Ok(true)
    }

    /// Whether `certificate` was taken back.
    pub fn void(&self, certificate: &Certificate) -> bool {
        self.known.get(&certificate.peer).is_some_and(|(until, _)| certificate.issued <= *until)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// The signed revocations, in lists of at most `many`.
    pub fn lists(&self, many: usize) -> Vec<Vec<u8>> {
        let signed: Vec<_> = self.known.values().map(|(_, signed)| signed.clone()).collect();
        signed.chunks(many.max(1)).map(encode_list).collect()
    }

    fn forget(&mut self, now_unix: u64) {
        self.known.retain(|peer, (until, _)| !Revocation { peer: *peer, until: *until }.is_over(now_unix));
    }
}

/// Signed revocations as files and messages carry them.
pub(crate) fn encode_list(signed: &[Bytes]) -> Vec<u8> {
    List { signed: signed.to_vec() }.encode_to_vec()
}

/// What [`encode_list`] wrote; nothing of it is checked.
pub(crate) fn decode_list(bytes: &[u8]) -> Result<Vec<Bytes>, RevocationError> {
    List::decode(bytes).map(|list| list.signed).map_err(|_| RevocationError::Malformed)
}

#[derive(Clone, PartialEq, Message)]
struct Body {
    #[prost(bytes = "vec", tag = "1")]
    peer: Vec<u8>,
    #[prost(uint64, tag = "2")]
    until: u64,
}

#[derive(Clone, PartialEq, Message)]
struct List {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    signed: Vec<Bytes>,
}

#[cfg(test)]
mod tests {
    use libp2p::identity::ed25519;
    use proptest::prelude::*;
    use shoal_proto::Role;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn cluster() -> (Keypair, Policy) {
        let key = ed25519::Keypair::generate();
        let policy = Policy::Key(key.public());
        (key.into(), policy)
    }

    fn peer(n: u16) -> PeerId {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&n.to_be_bytes());
        PeerId::new(bytes)
    }

    fn issued(peer: PeerId, issued: u64) -> Certificate {
        Certificate { peer, role: Role::Node, zone: "a".into(), issued, expires: NOW + 1000 }
    }

    #[test]
    fn what_was_issued_until_then_is_void_and_nothing_else() {
        let ((key, policy), mut known) = (cluster(), Revocations::default());
        let signed = Revocation { peer: peer(1), until: NOW }.sign(&key).unwrap();
        assert_eq!(known.insert(&policy, &signed, NOW), Ok(true));
        assert_eq!(known.insert(&policy, &signed, NOW), Ok(false));
        let earlier = Revocation { peer: peer(1), until: NOW - 5 }.sign(&key).unwrap();
        assert_eq!(known.insert(&policy, &earlier, NOW), Ok(false));
        assert!(known.void(&issued(peer(1), NOW)) && known.void(&issued(peer(1), NOW - 100)));
        assert!(!known.void(&issued(peer(1), NOW + 1)) && !known.void(&issued(peer(2), NOW)));
    }

    #[test]
    fn only_the_clusters_key_revokes() {
        let ((key, policy), (_, other)) = (cluster(), cluster());
        let signed = Revocation { peer: peer(1), until: NOW }.sign(&key).unwrap();
        assert!(signed.len() <= MAX_SIGNED);
        assert_eq!(Revocation::verify(&other, &signed), Err(RevocationError::BadSignature));
        assert_eq!(Revocation::verify(&Policy::Open, &signed), Err(RevocationError::BadSignature));
        for bit in 0..signed.len() * 8 {
            let mut bad = signed.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Revocation::verify(&policy, &bad).is_err(), "bit {bit}");
        }
        // A certificate is no revocation, although the same key signs both.
        let certificate = issued(peer(1), NOW).sign(&key).unwrap();
        assert!(Revocation::verify(&policy, &certificate).is_err());
    }

    #[test]
    fn the_table_is_bounded_and_forgets_what_has_expired_by_itself() {
        let ((key, policy), mut known) = (cluster(), Revocations::default());
        let sign = |n, until| Revocation { peer: peer(n), until }.sign(&key).unwrap();
        for n in 0..MAX_REVOCATIONS as u16 {
            assert_eq!(known.insert(&policy, &sign(n, NOW - u64::from(n == 7)), NOW), Ok(true));
        }
        assert_eq!(known.insert(&policy, &sign(60_000, NOW), NOW), Err(RevocationError::Full));
        let later = NOW + MAX_LIFETIME.as_secs();
        assert_eq!(known.insert(&policy, &sign(60_000, NOW), later), Ok(true));
        assert_eq!((known.len(), known.known.contains_key(&peer(7))), (MAX_REVOCATIONS, false));
        assert_eq!(known.insert(&policy, &sign(7, NOW - 1), later), Err(RevocationError::Old));
        let lists: Vec<_> = known.lists(24).iter().map(|list| decode_list(list).unwrap()).collect();
        assert_eq!(lists.iter().map(Vec::len).sum::<usize>(), MAX_REVOCATIONS);
        assert!(known.lists(24).iter().all(|list| list.len() < 4096));
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Revocation::verify(&cluster().1, &bytes).is_err());
            let _ = decode_list(&bytes);
        }
    }
}
