//! Who may join: certificates of membership, signed by the cluster key, which both planes ask for before anything else.
//!
//! A certificate says that a node identity is a member with a role, in a zone, until a time. The node shows it at the
//! start of every connection, over a channel that already proved the identity, so that a certificate alone is of no
//! use to whoever copies it. What is shown is at most [`MAX_BYTES`] long and looks like this (prost):
//!
//! ```text
//! Signed { body: Body { peer, role, zone, expires, issued }, signature: ed25519("shoal membership 1\0" | body) }
//! ```
//!
//! A cluster without a key is *open*: its nodes show the same statement without a signature, and everybody who
//! reaches the port is a member. That is allowed on loopback only, unless the operator says otherwise in so many words
//! ([`Policy::permits`]).
//!
//! A certificate that should end before its time is revoked ([`Revocation`]): the cluster's key says that whatever
//! was issued to a peer until then is void.
//!
//! Not here: when a node reads its certificate again and who is told of a revocation, and what a member may read.

mod key;
mod revocation;

use std::{
    fs::File,
    io::Read,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use libp2p::identity::{Keypair, ed25519};
use prost::Message;
use shoal_proto::{PeerId, Role};

pub(crate) use self::revocation::{MAX_SIGNED, decode_list, encode_list};
pub use self::{
    key::ClusterKey,
    revocation::{MAX_REVOCATIONS, Revocation, RevocationError, Revocations},
};
use crate::identity::{self, IdentityError};

/// Longest statement of membership that is looked at. A real one has about 200 bytes; the lease of a seed peer has to
/// carry it in one small gossip message.
pub const MAX_BYTES: usize = 1024;

/// Longest name of a zone, in bytes.
pub const MAX_ZONE_BYTES: usize = 64;

/// Longest life of a certificate. It bounds how long a revocation has to be remembered.
pub const MAX_LIFETIME: Duration = Duration::from_secs(400 * 24 * 3600);

/// Signed in front of the body, so that a signature made for something else with the same key is none here.
const DOMAIN: &[u8] = b"shoal membership 1\0";

/// What a certificate of membership says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The node's identity.
    pub peer: PeerId,
    /// What it may do for the others.
    pub role: Role,
    /// Where it is.
    pub zone: String,
    /// When it was signed, in seconds since 1970: a revocation is about what was issued until then.
    pub issued: u64,
    /// Seconds since 1970 from which on it is void; at most [`MAX_LIFETIME`] after `issued`.
    pub expires: u64,
}

impl Certificate {
    /// The bytes that the node shows: this certificate, signed with the cluster's key.
    ///
    /// # Errors
    /// The zone is not a valid name, or the key cannot sign.
    pub fn sign(&self, cluster_key: &Keypair) -> Result<Bytes, MembershipError> {
        let body = self.encode()?;
        let signature = cluster_key.sign(&signed_text(DOMAIN, &body)).map_err(|_| MembershipError::Signing)?;
        Ok(Signed { body, signature }.encode_to_vec().into())
    }

    /// What the statement `shown` says, whoever signed it: for people to look at.
    ///
    /// # Errors
    /// [`Refusal::TooLong`] or [`Refusal::Malformed`].
    pub fn read(shown: &[u8]) -> Result<Self, Refusal> {
        decode_shown(shown).map(|(_, certificate)| certificate)
    }

    fn encode(&self) -> Result<Vec<u8>, MembershipError> {
        if !valid_zone(&self.zone) {
            return Err(MembershipError::Zone { zone: self.zone.clone() });
        }
        let role = match self.role {
            Role::Node => RoleCode::Node,
            Role::Seed => RoleCode::Seed,
        };
        let body = Body {
            peer: self.peer.as_bytes().to_vec(),
            role: role.into(),
            zone: self.zone.clone(),
            expires: self.expires,
            issued: self.issued,
        };
        Ok(body.encode_to_vec())
    }
}

/// Whose statements a node believes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    /// Everybody's.
    Open,
    /// Those signed by the key of the cluster.
    Key(ed25519::PublicKey),
}

impl Policy {
    /// From the configured public key, 64 hexadecimal digits; an empty text is an open cluster.
    ///
    /// # Errors
    /// [`MembershipError::Key`] if the text is not an ed25519 public key.
    pub fn parse(public_key: &str) -> Result<Self, MembershipError> {
        if public_key.is_empty() {
            return Ok(Self::Open);
        }
        let bytes = hex::decode(public_key).map_err(|_| MembershipError::Key)?;
        ed25519::PublicKey::try_from_bytes(&bytes).map(Self::Key).map_err(|_| MembershipError::Key)
    }

    /// Whether the planes may listen on `address`, or dial it: always with a key; without one on loopback only,
    /// unless `insecure_open`.
    ///
    /// # Errors
    /// [`MembershipError::OpenCluster`] if not.
    pub fn permits(&self, address: IpAddr, insecure_open: bool) -> Result<(), MembershipError> {
        match self {
            Self::Open if !insecure_open && !address.to_canonical().is_loopback() => {
                Err(MembershipError::OpenCluster { address })
            }
            _ => Ok(()),
        }
    }
}

/// A node's own membership: what it shows to others, and what that says.
#[derive(Debug, Clone)]
pub struct Membership {
    shown: Bytes,
    admitted: Admitted,
}

impl Membership {
    /// The unsigned statement of a node in an open cluster.
    ///
    /// # Errors
    /// The zone is not a valid name.
    pub fn open(peer: PeerId, role: Role, zone: &str) -> Result<Self, MembershipError> {
        let certificate = Certificate { peer, role, zone: zone.to_owned(), issued: 0, expires: u64::MAX };
        let shown = Signed { body: certificate.encode()?, signature: Vec::new() }.encode_to_vec();
        Ok(Self { shown: shown.into(), admitted: certificate })
    }

    /// The certificate of `peer`, checked as the others will check it.
    ///
    /// # Errors
    /// The [`Refusal`] that the node would meet with.
    pub fn certified(policy: &Policy, shown: Bytes, peer: &PeerId, now_unix: u64) -> Result<Self, Refusal> {
        let admitted = verify(policy, &shown, peer, now_unix)?;
        Ok(Self { shown, admitted })
    }

    /// Reads the certificate of `peer` from `file` and checks it as the others will.
    ///
    /// # Errors
    /// The file cannot be read, or the certificate would be refused.
    pub fn load(policy: &Policy, file: &Path, peer: &PeerId, now_unix: u64) -> Result<Self, MembershipError> {
        let path = || file.to_owned();
        let unreadable = |source| MembershipError::File { path: path(), node: identity::to_text(peer), source };
        let mut shown = Vec::new();
        // A byte more than is ever right is enough to refuse the rest.
        let limit = MAX_BYTES as u64 + 1;
        File::open(file).and_then(|file| file.take(limit).read_to_end(&mut shown)).map_err(unreadable)?;
        Self::certified(policy, shown.into(), peer, now_unix)
            .map_err(|refusal| MembershipError::Certificate { path: path(), refusal })
    }

    /// The bytes to show at the start of a connection.
    pub fn shown(&self) -> &Bytes {
        &self.shown
    }

    /// The same node, which shows something else.
    #[cfg(test)]
    pub(crate) fn showing(self, shown: Bytes) -> Self {
        Self { shown, ..self }
    }

    /// The node itself.
    pub fn peer(&self) -> PeerId {
        self.admitted.peer
    }

    /// Its certified role.
    pub fn role(&self) -> Role {
        self.admitted.role
    }

    /// Its certified zone.
    pub fn zone(&self) -> &str {
        &self.admitted.zone
    }

    /// Until when others accept it, in seconds since 1970; `u64::MAX` in an open cluster.
    pub fn expires(&self) -> u64 {
        self.admitted.expires
    }

    /// When it was issued, in seconds since 1970; 0 in an open cluster.
    pub fn issued(&self) -> u64 {
        self.admitted.issued
    }
}

/// A peer that may join, as what, and until when: what its certificate says, once it was checked.
pub type Admitted = Certificate;

/// Why a statement of membership is refused. The codes are what the refused side is told on the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum Refusal {
    /// Nothing was shown, or a statement without a signature where the cluster has a key.
    #[error("no certificate of membership was shown")]
    Missing = 1,
    /// More than [`MAX_BYTES`].
    #[error("the certificate of membership is longer than {MAX_BYTES} bytes")]
    TooLong = 2,
    /// Not the canonical encoding of a certificate with valid fields.
    #[error("the certificate of membership is malformed")]
    Malformed = 3,
    /// It names another peer than the one that shows it.
    #[error("the certificate of membership is somebody else's")]
    WrongPeer = 4,
    /// The cluster's key did not sign it.
    #[error("the certificate of membership is not signed by the cluster's key")]
    BadSignature = 5,
    /// It was good once.
    #[error("the certificate of membership has expired")]
    Expired = 6,
    /// The cluster took it back.
    #[error("the certificate of membership was revoked")]
    Revoked = 7,
}

impl Refusal {
    /// The refusal with this code on the wire; `None` for codes of a later version.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::KNOWN.into_iter().find(|refusal| *refusal as u8 == code)
    }

    const KNOWN: [Self; 7] = [
        Self::Missing,
        Self::TooLong,
        Self::Malformed,
        Self::WrongPeer,
        Self::BadSignature,
        Self::Expired,
        Self::Revoked,
    ];
}

/// Why a node's own membership or the policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// The file with the certificate could not be read.
    #[error(
        "cannot read {path}, the certificate of membership of this node, {node} (`shoal cluster issue` makes it)"
    )]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Whose certificate should be there.
        node: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Others would refuse the certificate.
    #[error("the certificate of membership {path} cannot be used")]
    Certificate {
        /// Path of the file.
        path: PathBuf,
        /// Why they would.
        #[source]
        refusal: Refusal,
    },
    /// The certificate is for another place or another purpose than the configuration.
    #[error("the certificate of membership says {what} {certified}, the configuration says {configured}")]
    Mismatch {
        /// `role` or `zone`.
        what: &'static str,
        /// As the cluster's key signed it.
        certified: String,
        /// As the configuration has it.
        configured: String,
    },
    /// The file with the cluster's key.
    #[error(transparent)]
    KeyFile(#[from] IdentityError),
    /// It would be valid for too long.
    #[error("a certificate is valid for a second at least and {} days at most", MAX_LIFETIME.as_secs() / 86400)]
    Lifetime,
    /// The configured key of the cluster is not one.
    #[error("the cluster's public key must be 64 hexadecimal digits that are an ed25519 key")]
    Key,
    /// The key could not sign.
    #[error("the cluster's key cannot sign")]
    Signing,
    /// Not a name for a zone.
    #[error("zone {zone:?} is not 1 to {MAX_ZONE_BYTES} letters, digits, '-', '_' or '.'")]
    Zone {
        /// What was given.
        zone: String,
    },
    /// An open cluster would be open to others than this machine.
    #[error("a cluster without a key runs on loopback only, and {address} is not; set a key, or insecure_open")]
    OpenCluster {
        /// The address to listen on or to dial.
        address: IpAddr,
    },
}

/// Checks what `claimed` shows, whose identity the channel has proved, at `now_unix` seconds since 1970. Revocations
/// are not looked at here.
///
/// # Errors
/// A [`Refusal`]; the caller tells the peer and closes the connection.
pub fn verify(policy: &Policy, shown: &[u8], claimed: &PeerId, now_unix: u64) -> Result<Admitted, Refusal> {
    if shown.is_empty() {
        return Err(Refusal::Missing);
    }
    let (envelope, certificate) = decode_shown(shown)?;
    if certificate.peer != *claimed {
        return Err(Refusal::WrongPeer);
    }
    if let Policy::Key(key) = policy {
        if envelope.signature.is_empty() {
            return Err(Refusal::Missing);
        }
        if !key.verify(&signed_text(DOMAIN, &envelope.body), &envelope.signature) {
            return Err(Refusal::BadSignature);
        }
        if certificate.expires.saturating_sub(certificate.issued) > MAX_LIFETIME.as_secs() {
            return Err(Refusal::Malformed);
        }
        if now_unix >= certificate.expires {
            return Err(Refusal::Expired);
        }
    }
    Ok(certificate)
}

/// The wall clock, in seconds since 1970. A clock before 1970 counts as 1970.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A statement of the cluster's key: of membership here, of its end in `revocation`.
#[derive(Clone, PartialEq, Message)]
struct Signed {
    #[prost(bytes = "vec", tag = "1")]
    body: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    signature: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Body {
    #[prost(bytes = "vec", tag = "1")]
    peer: Vec<u8>,
    #[prost(enumeration = "RoleCode", tag = "2")]
    role: i32,
    #[prost(string, tag = "3")]
    zone: String,
    #[prost(uint64, tag = "4")]
    expires: u64,
    #[prost(uint64, tag = "5")]
    issued: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum RoleCode {
    Unknown = 0,
    Node = 1,
    Seed = 2,
}

fn signed_text(domain: &[u8], body: &[u8]) -> Vec<u8> {
    [domain, body].concat()
}

fn decode_shown(shown: &[u8]) -> Result<(Signed, Certificate), Refusal> {
    if shown.len() > MAX_BYTES {
        return Err(Refusal::TooLong);
    }
    let envelope: Signed = decode_canonical(shown)?;
    let certificate = decode_body(&envelope.body)?;
    Ok((envelope, certificate))
}

/// One text per certificate: nothing may be added that decoders skip.
fn decode_canonical<M: Message + Default>(bytes: &[u8]) -> Result<M, Refusal> {
    let message = M::decode(bytes).map_err(|_| Refusal::Malformed)?;
    if message.encode_to_vec() == bytes { Ok(message) } else { Err(Refusal::Malformed) }
}

fn decode_body(bytes: &[u8]) -> Result<Certificate, Refusal> {
    let body: Body = decode_canonical(bytes)?;
    let role = match RoleCode::try_from(body.role) {
        Ok(RoleCode::Node) => Role::Node,
        Ok(RoleCode::Seed) => Role::Seed,
        Ok(RoleCode::Unknown) | Err(_) => return Err(Refusal::Malformed),
    };
    if !valid_zone(&body.zone) {
        return Err(Refusal::Malformed);
    }
    let peer = PeerId::try_from(body.peer.as_slice()).map_err(|_| Refusal::Malformed)?;
    Ok(Certificate { peer, role, zone: body.zone, issued: body.issued, expires: body.expires })
}

fn valid_zone(zone: &str) -> bool {
    (1..=MAX_ZONE_BYTES).contains(&zone.len())
        && zone.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

#[cfg(test)]
mod tests;
