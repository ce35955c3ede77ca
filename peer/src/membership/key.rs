//! The cluster's key, in a folder that only the operator has: whoever can read it decides who joins.
//!
//! ```text
//! DIR/key          the ed25519 key, mode 0600
//! DIR/public_key   64 hexadecimal digits: `cluster.public_key` in every node's configuration
//! ```
//!
//! No daemon ever reads it.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt,
    path::Path,
};

use bytes::Bytes;
use libp2p::identity::{Keypair, ed25519};
use shoal_proto::{PeerId, Role};

use super::{Certificate, MAX_LIFETIME, MembershipError, Policy, Revocation};
use crate::identity::{self, IdentityError};

const KEY: &str = "key";
const PUBLIC_KEY: &str = "public_key";

/// See the module.
#[derive(Debug)]
pub struct ClusterKey {
    key: ed25519::Keypair,
}

impl ClusterKey {
    /// Makes a key in `dir`, which is made with mode 0700 if it is not there.
    ///
    /// # Errors
    /// There is a key already, or the folder cannot be written.
    pub fn create(dir: &Path) -> Result<Self, MembershipError> {
        let file_error = |path: &Path, source| IdentityError::File { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| file_error(dir, source))?;
        let made = Self { key: ed25519::Keypair::generate() };
        identity::create_key(&dir.join(KEY), &made.key)?;
        let public = dir.join(PUBLIC_KEY);
        fs::write(&public, made.public_key() + "\n").map_err(|source| file_error(&public, source))?;
        Ok(made)
    }

    /// Reads the key in `dir`.
    ///
    /// # Errors
    /// It is not there, is no key, or may be read by others.
    pub fn load(dir: &Path) -> Result<Self, MembershipError> {
        Ok(Self { key: identity::load_key(&dir.join(KEY))? })
    }

    /// The public key, as configurations have it.
    pub fn public_key(&self) -> String {
        hex::encode(self.key.public().to_bytes())
    }

    /// What nodes of this cluster believe.
    pub fn policy(&self) -> Policy {
        Policy::Key(self.key.public())
    }

    /// A certificate for `peer` that is valid from `now_unix` for `seconds`.
    ///
    /// # Errors
    /// The zone is not a valid name, or the life too short or longer than [`MAX_LIFETIME`].
    pub fn issue(
        &self,
        peer: PeerId,
        role: Role,
        zone: &str,
        now_unix: u64,
        seconds: u64,
    ) -> Result<(Certificate, Bytes), MembershipError> {
        if !(1..=MAX_LIFETIME.as_secs()).contains(&seconds) {
            return Err(MembershipError::Lifetime);
        }
        let expires = now_unix.saturating_add(seconds);
        let certificate = Certificate { peer, role, zone: zone.to_owned(), issued: now_unix, expires };
        let shown = certificate.sign(&self.keypair())?;
        Ok((certificate, shown))
    }

    /// Takes back what was issued to `peer` until now, `now_unix` included.
    ///
    /// # Errors
    /// The key cannot sign.
    pub fn revoke(&self, peer: PeerId, now_unix: u64) -> Result<Bytes, MembershipError> {
        Revocation { peer, until: now_unix }.sign(&self.keypair())
    }

    fn keypair(&self) -> Keypair {
        self.key.clone().into()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::{identity::Identity, membership::verify};

    const NOW: u64 = 1_800_000_000;

    #[test]
    fn the_key_is_made_once_for_its_owner_and_issues() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new/cluster");
        let key = ClusterKey::create(&dir).unwrap();
        assert_eq!(fs::metadata(dir.join(KEY)).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::read_to_string(dir.join(PUBLIC_KEY)).unwrap().trim(), key.public_key());
        assert!(ClusterKey::create(&dir).is_err(), "a key is never replaced");
        let loaded = ClusterKey::load(&dir).unwrap();
        assert_eq!(Policy::parse(&loaded.public_key()).unwrap(), key.policy());

        let peer = Identity::generate().peer();
        let (certificate, shown) = loaded.issue(peer, Role::Seed, "a", NOW, 60).unwrap();
        assert_eq!(verify(&key.policy(), &shown, &peer, NOW), Ok(certificate));
    }

    #[test]
    fn lives_and_zones_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let key = ClusterKey::create(dir.path()).unwrap();
        let issue = |zone, seconds| key.issue(Identity::generate().peer(), Role::Node, zone, NOW, seconds);
        assert!(matches!(issue("a", 0), Err(MembershipError::Lifetime)));
        assert!(matches!(issue("a", MAX_LIFETIME.as_secs() + 1), Err(MembershipError::Lifetime)));
        assert!(matches!(issue("a b", 60), Err(MembershipError::Zone { .. })));
    }
}
