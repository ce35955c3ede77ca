//! Who is let in at present, and what this node shows: the one answer that both planes ask for.
//!
//! ```text
//!   membership file --read again when it changes--> Keeper --renew--> Admission <--admit, stands-- both planes
//!   gossip, `shoal ctl revoke` ------------------- revoke ---------------^  |
//!                                                                           '--changed--> planes close, Keeper writes
//! ```
//!
//! What a peer showed when its connection was opened counts until it expires or is revoked; then both planes close the
//! connection, and open a new one to a peer that has a new certificate to show. The keeper is the task that reads
//! the node's own certificate again, closes data connections and writes revocations down; the control plane looks
//! after its own connections.

mod keeper;
mod record;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use shoal_proto::PeerId;
use tokio::sync::watch;

pub(crate) use self::{
    keeper::{Keeper, KeeperParts},
    record::Record,
};
use crate::membership::{self, Admitted, Membership, MembershipError, Policy, Refusal, RevocationError, Revocations};

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Admission(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    policy: Policy,
    /// Held for a look-up or a change, never across a wait.
    state: RwLock<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct State {
    own: Membership,
    revocations: Revocations,
}

impl Admission {
    /// Believes what `policy` says, shows `own`, and knows of no revocation.
    pub fn new(policy: Policy, own: Membership) -> Self {
        Self::with_revocations(policy, own, Revocations::default())
    }

    pub(crate) fn with_revocations(policy: Policy, own: Membership, revocations: Revocations) -> Self {
        let state = RwLock::new(State { own, revocations });
        Self(Arc::new(Shared { policy, state, changed: watch::Sender::new(()) }))
    }

    /// Whose statements are believed.
    pub fn policy(&self) -> &Policy {
        &self.0.policy
    }

    /// This node's membership at present.
    pub fn own(&self) -> Membership {
        self.read().own.clone()
    }

    /// Checks what `claimed` shows, whose identity the channel has proved.
    ///
    /// # Errors
    /// A [`Refusal`]; the caller tells the peer and closes the connection.
    pub fn admit(&self, shown: &[u8], claimed: &PeerId, now_unix: u64) -> Result<Admitted, Refusal> {
        let admitted = membership::verify(&self.0.policy, shown, claimed, now_unix)?;
        if self.read().revocations.void(&admitted) { Err(Refusal::Revoked) } else { Ok(admitted) }
    }

    /// Whether a peer that was let in may stay.
    ///
    /// # Errors
    /// [`Refusal::Expired`] or [`Refusal::Revoked`].
    pub fn stands(&self, admitted: &Admitted, now_unix: u64) -> Result<(), Refusal> {
        if matches!(self.0.policy, Policy::Open) {
            return Ok(());
        }
        if self.read().revocations.void(admitted) {
            return Err(Refusal::Revoked);
        }
        if now_unix >= admitted.expires { Err(Refusal::Expired) } else { Ok(()) }
    }

    /// Shows `own` from now on. Role and zone must be what they were: others rely on them, and so does this node.
    ///
    /// # Errors
    /// [`MembershipError::Mismatch`] if they are not; the old membership is kept.
    pub fn renew(&self, own: Membership) -> Result<(), MembershipError> {
        let mut state = self.write();
        agree(&own, state.own.role(), state.own.zone())?;
        state.own = own;
        drop(state);
        self.0.changed.send_replace(());
        Ok(())
    }

    /// Takes in a signed revocation; false if it says nothing new.
    ///
    /// # Errors
    /// See [`RevocationError`].
    pub fn revoke(&self, signed: &[u8], now_unix: u64) -> Result<bool, RevocationError> {
        let new = self.write().revocations.insert(&self.0.policy, signed, now_unix)?;
        if new {
            let revoked = membership::Revocation::verify(&self.0.policy, signed)?.peer;
            tracing::warn!(peer = crate::identity::to_text(&revoked), "revoked");
            self.0.changed.send_replace(());
        }
        Ok(new)
    }

    /// How many revocations are known.
    pub fn revocations(&self) -> usize {
        self.read().revocations.len()
    }

    /// The signed revocations, in encoded lists of at most `many`.
    pub(crate) fn revocation_lists(&self, many: usize) -> Vec<Vec<u8>> {
        self.read().revocations.lists(many)
    }

    /// Takes in a list of signed revocations that somebody passed on, of which at most `many` are looked at. Gives
    /// those that were new.
    ///
    /// # Errors
    /// The first of them that is not a revocation of this cluster.
    pub(crate) fn revoke_all(&self, list: &[u8], many: usize, now_unix: u64) -> Result<usize, RevocationError> {
        let mut new = 0;
        for signed in membership::decode_list(list)?.iter().take(many) {
            match self.revoke(signed, now_unix) {
                Ok(is_new) => new += usize::from(is_new),
                Err(RevocationError::Old) => {}
                Err(error @ RevocationError::Full) => tracing::error!("{error}"),
                Err(error) => return Err(error),
            }
        }
        Ok(new)
    }

    /// Told after every renewal and every revocation.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses a membership whose role or zone is another one.
pub(crate) fn agree(own: &Membership, role: shoal_proto::Role, zone: &str) -> Result<(), MembershipError> {
    let mismatch =
        |what, certified: String, configured: String| Err(MembershipError::Mismatch { what, certified, configured });
    if own.role() != role {
        return mismatch("role", own.role().to_string(), role.to_string());
    }
    if own.zone() != zone {
        return mismatch("zone", own.zone().to_owned(), zone.to_owned());
    }
    Ok(())
}

/// For the data plane, which tells the other side in words.
pub(crate) fn in_words(admission: &Admission) -> crate::data::Admit {
    let admission = admission.clone();
    Arc::new(move |peer: &PeerId, shown: &[u8]| {
        admission.admit(shown, peer, membership::unix_now()).map_err(|refusal| refusal.to_string())
    })
}

/// One signed revocation as a list, to be passed on.
pub(crate) fn single(signed: Bytes) -> Vec<u8> {
    membership::encode_list(&[signed])
}

#[cfg(test)]
mod tests {
    use shoal_proto::Role;

    use super::*;
    use crate::{identity::Identity, membership::ClusterKey};

    const NOW: u64 = 1_800_000_000;

    struct Cluster {
        _dir: tempfile::TempDir,
        key: ClusterKey,
    }

    impl Cluster {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self { key: ClusterKey::create(dir.path()).unwrap(), _dir: dir }
        }

        fn membership(&self, peer: PeerId, zone: &str, seconds: u64) -> Membership {
            let (_, shown) = self.key.issue(peer, Role::Node, zone, NOW, seconds).unwrap();
            Membership::certified(&self.key.policy(), shown, &peer, NOW).unwrap()
        }

        fn admission(&self) -> Admission {
            Admission::new(self.key.policy(), self.membership(Identity::generate().peer(), "a", 60))
        }
    }

    #[test]
    fn members_stay_until_they_expire_or_are_revoked() {
        let (cluster, peer) = (Cluster::new(), Identity::generate().peer());
        let admission = cluster.admission();
        let shown = cluster.membership(peer, "a", 60).shown().clone();
        let admitted = admission.admit(&shown, &peer, NOW).unwrap();
        assert_eq!(admission.stands(&admitted, NOW + 59), Ok(()));
        assert_eq!(admission.stands(&admitted, NOW + 60), Err(Refusal::Expired));
        let mut changes = admission.changes();
        let signed = cluster.key.revoke(peer, NOW).unwrap();
        assert_eq!(admission.revoke(&signed, NOW), Ok(true));
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert_eq!(admission.revoke(&signed, NOW), Ok(false));
        assert!(!changes.has_changed().unwrap());
        assert_eq!(admission.stands(&admitted, NOW), Err(Refusal::Revoked));
        assert_eq!(admission.admit(&shown, &peer, NOW), Err(Refusal::Revoked));
    }

    #[test]
    fn a_renewal_changes_no_role_and_no_zone() {
        let cluster = Cluster::new();
        let admission = cluster.admission();
        let me = admission.own().peer();
        admission.renew(cluster.membership(me, "a", 600)).unwrap();
        assert_eq!(admission.own().expires(), NOW + 600);
        assert!(matches!(
            admission.renew(cluster.membership(me, "b", 900)),
            Err(MembershipError::Mismatch { what: "zone", .. })
        ));
        assert_eq!(admission.own().expires(), NOW + 600);
    }

    #[test]
    fn lists_travel_from_node_to_node() {
        let cluster = Cluster::new();
        let (from, to) = (cluster.admission(), cluster.admission());
        for _ in 0..5 {
            from.revoke(&cluster.key.revoke(Identity::generate().peer(), NOW).unwrap(), NOW).unwrap();
        }
        for list in from.revocation_lists(2) {
            to.revoke_all(&list, 2, NOW).unwrap();
        }
        assert_eq!(to.revocations(), 5);
        let stranger = Cluster::new().key.revoke(Identity::generate().peer(), NOW).unwrap();
        assert_eq!(to.revoke_all(&single(stranger), 1, NOW), Err(RevocationError::BadSignature));
    }
}
