//! Identities: parsed once, valid for ever.
//!
//! Everything that comes from a socket, a file or a command line becomes one of these types or an error, so that the
//! rest of the code never handles a raw string or an array of unknown length.

use std::{fmt, str::FromStr};

/// Why a text or a byte string is not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is not `64` lower-case hexadecimal digits.
    #[error("{what} must be 64 lower-case hexadecimal digits, found {found:?}")]
    NotHex {
        /// Which kind of identity was parsed.
        what: &'static str,
        /// At most the first 80 characters of what was found.
        found: String,
    },
    /// The bytes are not 32 in number.
    #[error("{what} must be 32 bytes, found {found}")]
    WrongLength {
        /// Which kind of identity was parsed.
        what: &'static str,
        /// Number of bytes found.
        found: usize,
    },
    /// A digest text without a known algorithm in front.
    #[error("digest {found:?} must start with \"sha256:\" or \"blake3:\"")]
    UnknownAlgorithm {
        /// At most the first 80 characters of what was found.
        found: String,
    },
}

fn parse_hex(what: &'static str, text: &str) -> Result<[u8; 32], IdError> {
    let not_hex = || IdError::NotHex { what, found: text.chars().take(80).collect() };
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(not_hex());
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).map_err(|_| not_hex())?;
    Ok(bytes)
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            /// From the 32 bytes that are the identity.
            pub const fn new(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes of the identity.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = IdError;

            fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
                let found = bytes.len();
                bytes.try_into().map(Self).map_err(|_| IdError::WrongLength { what: $what, found })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), hex::encode(&self.0[..6]))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_hex($what, text).map(Self)
            }
        }
    };
}

id! {
    /// A data blob: the sha256 of the stored file, which is also its digest in the registry.
    BlobId, "blob id"
}
id! {
    /// An object: the sha256 of all its bytes. Manifests, configs, bootstrap layers and chunk tables are objects.
    ObjectId, "object id"
}
id! {
    /// A peer: its ed25519 public key, the same on both planes.
    PeerId, "peer id"
}
id! {
    /// What a piece must be: a hash over the algorithm, digest and both ranges of every chunk in it, in order.
    ///
    /// Two images agree about a piece of a blob exactly when their fingerprints of it are equal, so comparing
    /// fingerprints is the whole check that ties stored bytes to digest and place.
    Fingerprint, "piece fingerprint"
}
id! {
    /// What the decoded form of a blob must be: a hash over the blob and the fingerprint of every piece that an image
    /// names. Images that name the same pieces share the form.
    DecodedId, "decoded form"
}

/// The hash function behind a chunk digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// BLAKE3, unkeyed, 32 bytes of output.
    Blake3,
    /// SHA-256.
    Sha256,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blake3 => "blake3",
            Self::Sha256 => "sha256",
        })
    }
}

/// A chunk digest: what the decoded bytes of a chunk must hash to. Text form `blake3:<hex>` or `sha256:<hex>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    /// The hash function.
    pub algorithm: Algorithm,
    /// Its output.
    pub bytes: [u8; 32],
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, hex::encode(self.bytes))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({}:{})", self.algorithm, hex::encode(&self.bytes[..6]))
    }
}

impl FromStr for Digest {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let (algorithm, hex) = if let Some(hex) = text.strip_prefix("sha256:") {
            (Algorithm::Sha256, hex)
        } else if let Some(hex) = text.strip_prefix("blake3:") {
            (Algorithm::Blake3, hex)
        } else {
            return Err(IdError::UnknownAlgorithm { found: text.chars().take(80).collect() });
        };
        Ok(Self { algorithm, bytes: parse_hex("digest", hex)? })
    }
}

/// How urgent a read is. On-demand goes before prefetch at every queue; the order of the variants is that order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Nobody waits for it.
    Prefetch,
    /// A process waits for it.
    OnDemand,
}

/// What a node does for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Mounts images and serves what it has.
    Node,
    /// Also reads the registry for the others and may be home to stripes.
    Seed,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Node => "node",
            Self::Seed => "seed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms_round_trip() {
        let id = BlobId::new([0xa5; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for algorithm in [Algorithm::Blake3, Algorithm::Sha256] {
            let digest = Digest { algorithm, bytes: [7; 32] };
            assert_eq!(digest.to_string().parse(), Ok(digest));
        }
    }

    #[test]
    fn malformed_text_is_refused_and_named() {
        let upper = "A5".repeat(32);
        for text in ["", "a5", upper.as_str(), &"a5".repeat(33), &"zz".repeat(32), "é"] {
            assert!(matches!(text.parse::<BlobId>(), Err(IdError::NotHex { what: "blob id", .. })), "{text}");
        }
        assert!(matches!("md5:00".parse::<Digest>(), Err(IdError::UnknownAlgorithm { .. })));
        assert_eq!(PeerId::try_from(&[0u8; 31][..]), Err(IdError::WrongLength { what: "peer id", found: 31 }));
    }
}
