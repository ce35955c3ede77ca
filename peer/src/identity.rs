//! The node's identity: one ed25519 key, which names the node on both planes.
//!
//! The key is made at the first start and lies in `<data_dir>/identity` (mode 0600), because the node's place in the
//! DHT, its certificate of membership and what others remember of it all hang on it. A file that others may read is
//! refused rather than used: whoever copies the key is the node.
//!
//! libp2p names a peer by a multihash of its encoded public key. For ed25519 that is the key itself with a few bytes
//! in front, so its identities and ours translate both ways; every other kind of key is refused.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use libp2p::identity::{Keypair, PublicKey, ed25519};
use shoal_proto::PeerId;

/// Name of the key file below the data directory.
const FILE: &str = "identity";

/// A key file is 68 bytes; whatever is much longer is something else.
const MAX_FILE_BYTES: u64 = 4096;

/// Longest text of an identity that is looked at; both forms have less than 80 bytes.
const MAX_TEXT_BYTES: usize = 128;

/// Why an identity could not be loaded, made or translated.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file could not be read or written.
    #[error("cannot use the key file {path}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is not an ed25519 key.
    #[error("{path} does not hold an ed25519 key")]
    Malformed {
        /// Path of the file.
        path: PathBuf,
    },
    /// Others than the owner may read or write the file.
    #[error("{path} has mode {mode:04o}; a key file must be for its owner alone (chmod 600)")]
    Exposed {
        /// Path of the file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The peer's key is not ed25519, or its identity is not the canonical one of its key.
    #[error("peer {0} is not named by an ed25519 key")]
    Unsupported(String),
    /// A text that names no peer.
    #[error("{0:?} is no peer id, such as `shoal identity` prints")]
    Text(String),
}

/// The node's key pair, and the identity that it gives.
#[derive(Debug, Clone)]
pub struct Identity {
    keypair: Keypair,
    peer: PeerId,
}

impl Identity {
    /// A new key that is kept nowhere: for tools and tests.
    pub fn generate() -> Self {
        Self::from_ed25519(&ed25519::Keypair::generate())
    }

    /// The key in `<data_dir>/identity`, if there is one.
    ///
    /// # Errors
    /// The file cannot be read, is not a key, or may be read by others.
    pub(crate) fn existing(data_dir: &Path) -> Result<Option<Self>, IdentityError> {
        match load(&data_dir.join(FILE)) {
            Err(IdentityError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            loaded => loaded.map(Some),
        }
    }

    /// The key in `<data_dir>/identity`, which is made if it is not there. Of two processes that start at the same
    /// time in an empty directory, both get the same key.
    ///
    /// # Errors
    /// The file cannot be read or written, is not a key, or may be read by others.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, IdentityError> {
        if let Some(existing) = Self::existing(data_dir)? {
            return Ok(existing);
        }
        let path = data_dir.join(FILE);
        match create_key(&path, &ed25519::Keypair::generate()) {
            Err(IdentityError::File { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
            created => created?,
        }
        load(&path)
    }

    /// The key pair, as libp2p wants it.
    pub fn keypair(&self) -> &Keypair {
        &self.keypair
    }

    /// Who this node is.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    fn from_ed25519(key: &ed25519::Keypair) -> Self {
        Self { peer: PeerId::new(key.public().to_bytes()), keypair: key.clone().into() }
    }
}

/// The peer behind a libp2p identity.
///
/// # Errors
/// [`IdentityError::Unsupported`] if it is not the canonical identity of an ed25519 key.
pub fn from_libp2p(peer: &libp2p::PeerId) -> Result<PeerId, IdentityError> {
    let unsupported = || IdentityError::Unsupported(peer.to_string());
    // Identities of long keys are hashes, which decode as a key only by chance; comparing the way back settles it.
    let key = PublicKey::try_decode_protobuf(peer.as_ref().digest()).map_err(|_| unsupported())?;
    if key.to_peer_id() != *peer {
        return Err(unsupported());
    }
    let key = key.try_into_ed25519().map_err(|_| unsupported())?;
    Ok(PeerId::new(key.to_bytes()))
}

/// What libp2p calls `peer`.
///
/// # Errors
/// [`IdentityError::Unsupported`] if the bytes are not a point of the curve, so no key at all.
pub fn to_libp2p(peer: &PeerId) -> Result<libp2p::PeerId, IdentityError> {
    let key = ed25519::PublicKey::try_from_bytes(peer.as_bytes())
        .map_err(|_| IdentityError::Unsupported(peer.to_string()))?;
    Ok(PublicKey::from(key).to_peer_id())
}

/// A peer id as people see it, the way libp2p's tools print it.
pub fn to_text(peer: &PeerId) -> String {
    to_libp2p(peer).map_or_else(|_| peer.to_string(), |id| id.to_string())
}

/// The peer that `text` names: as [`to_text`] writes it, or as 64 hexadecimal digits, which stand in logs.
///
/// # Errors
/// [`IdentityError::Text`] if it is neither, [`IdentityError::Unsupported`] if it is the name of another kind of key.
pub fn from_text(text: &str) -> Result<PeerId, IdentityError> {
    let unknown = || IdentityError::Text(text.chars().take(MAX_TEXT_BYTES).collect());
    if text.len() > MAX_TEXT_BYTES {
        return Err(unknown());
    }
    match text.parse::<PeerId>() {
        Ok(peer) => to_libp2p(&peer).map(|_| peer),
        Err(_) => from_libp2p(&text.parse().map_err(|_| unknown())?),
    }
}

fn load(path: &Path) -> Result<Identity, IdentityError> {
    load_key(path).map(|key| Identity::from_ed25519(&key))
}

/// The key in the file `path`.
///
/// # Errors
/// The file cannot be read, is not a key, or may be read by others.
pub(crate) fn load_key(path: &Path) -> Result<ed25519::Keypair, IdentityError> {
    let file_error = |source| IdentityError::File { path: path.to_owned(), source };
    let malformed = || IdentityError::Malformed { path: path.to_owned() };
    let metadata = fs::metadata(path).map_err(file_error)?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed { path: path.to_owned(), mode });
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(malformed());
    }
    let encoded = fs::read(path).map_err(file_error)?;
    let key = Keypair::from_protobuf_encoding(&encoded).map_err(|_| malformed())?;
    key.try_into_ed25519().map_err(|_| malformed())
}

/// Writes `key` to the file `path`, whole or not at all, readable by its owner alone from the first moment.
///
/// # Errors
/// [`IdentityError::File`]; its kind is `AlreadyExists` if there is such a file.
pub(crate) fn create_key(path: &Path, key: &ed25519::Keypair) -> Result<(), IdentityError> {
    let file_error = |source| IdentityError::File { path: path.to_owned(), source };
    let encoded = Keypair::from(key.clone()).to_protobuf_encoding();
    let encoded = encoded.map_err(|error| file_error(io::Error::other(error)))?;
    create(path, &encoded).map_err(file_error)
}

fn create(path: &Path, contents: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::Builder::new().prefix(".key").tempfile_in(dir)?;
    file.write_all(contents)?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path).map_err(|e| e.error)?;
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_key_is_made_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(dir.path()).unwrap();
        let second = Identity::load_or_create(dir.path()).unwrap();
        assert_eq!(first.peer(), second.peer());
        assert_ne!(first.peer(), Identity::generate().peer());
        assert_eq!(fs::metadata(dir.path().join(FILE)).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn an_exposed_or_damaged_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        Identity::load_or_create(dir.path()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = Identity::load_or_create(dir.path());
        assert!(matches!(refused, Err(IdentityError::Exposed { mode: 0o640, .. })), "{refused:?}");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&file, b"not a key").unwrap();
        let refused = Identity::load_or_create(dir.path());
        assert!(matches!(refused, Err(IdentityError::Malformed { .. })), "{refused:?}");
    }

    #[test]
    fn identities_translate_both_ways() {
        let identity = Identity::generate();
        let other = to_libp2p(&identity.peer()).unwrap();
        assert_eq!(other, identity.keypair().public().to_peer_id());
        assert_eq!(from_libp2p(&other).unwrap(), identity.peer());
    }

    #[test]
    fn texts_name_peers_in_both_forms() {
        let peer = Identity::generate().peer();
        assert_eq!(from_text(&to_text(&peer)).unwrap(), peer);
        assert_eq!(from_text(&peer.to_string()).unwrap(), peer);
        for text in ["", "me", &"1".repeat(1000)] {
            assert!(matches!(from_text(text), Err(IdentityError::Text(_))), "{text}");
        }
        let other = libp2p::PeerId::random().to_string();
        assert!(matches!(from_text(&other), Err(IdentityError::Unsupported(_))));
    }

    #[test]
    fn what_is_no_ed25519_key_is_refused() {
        assert!(matches!(from_libp2p(&libp2p::PeerId::random()), Err(IdentityError::Unsupported(_))));
        // The same key with a field that decoders skip: another text, so it must not pass for the same peer.
        let mut padded = Identity::generate().keypair().public().encode_protobuf();
        padded.extend([0x18, 0x01]);
        let multihash = [&[0u8, padded.len() as u8][..], &padded].concat();
        let alias = libp2p::PeerId::from_bytes(&multihash).unwrap();
        assert!(matches!(from_libp2p(&alias), Err(IdentityError::Unsupported(_))));
        // About half of all byte strings are no point of the curve.
        let points = (0..=255u8).filter(|b| to_libp2p(&PeerId::new([*b; 32])).is_ok()).count();
        assert!((1..255).contains(&points), "{points}");
    }
}
