//! Keys of recipients, in PEM files: public ones to encrypt for, private ones to decrypt with.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::{
    agreement::{self, ECDH_P256, ECDH_P384, ECDH_P521, ParsedPublicKey, PrivateKey, UnparsedPublicKey},
    rsa::{OaepPrivateDecryptingKey, OaepPublicEncryptingKey, PrivateDecryptingKey, PublicEncryptingKey},
};
use rustls_pki_types::{PrivateKeyDer, SubjectPublicKeyInfoDer, pem::PemObject};

/// Most bytes of a file with a key.
const MAX_FILE: u64 = 1 << 20;

/// Why a key cannot be used. Never tells what the file holds.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Its file cannot be read.
    #[error("cannot read the key {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is no key of a kind that is known here.
    #[error("{} holds no {expected}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
    },
    /// A recipient is named in a way that is not known here.
    #[error("recipient {found:?} must be jwe:FILE, with a public key in PEM")]
    Recipient {
        /// What was given, cut to a sane length.
        found: String,
    },
}

/// A curve, with its name in JWE and the bytes of a coordinate.
#[derive(Clone, Copy)]
pub(super) struct Curve {
    pub(super) name: &'static str,
    pub(super) algorithm: &'static agreement::Algorithm,
    pub(super) coordinate: usize,
}

/// The curves that JWE knows.
pub(super) const CURVES: [Curve; 3] = [
    Curve { name: "P-256", algorithm: &ECDH_P256, coordinate: 32 },
    Curve { name: "P-384", algorithm: &ECDH_P384, coordinate: 48 },
    Curve { name: "P-521", algorithm: &ECDH_P521, coordinate: 66 },
];

/// Whom a layer is encrypted for.
pub(super) enum Recipient {
    Rsa(OaepPublicEncryptingKey),
    /// With the key as a SubjectPublicKeyInfo.
    Curve(Curve, Vec<u8>),
}

/// Public keys of those who shall be able to read an image; at least one. Cheap to clone.
#[derive(Clone)]
pub struct Recipients {
    pub(super) keys: Arc<[Recipient]>,
}

impl Recipients {
    /// Reads the keys that `names` lead to, each `jwe:FILE`. None without names.
    ///
    /// # Errors
    /// Any [`KeyError`].
    pub fn read<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Option<Self>, KeyError> {
        let read = |name: &str| match name.strip_prefix("jwe:") {
            Some(path) => recipient(Path::new(path)),
            None => Err(KeyError::Recipient { found: name.chars().take(80).collect() }),
        };
        let keys: Arc<[_]> = names.into_iter().map(read).collect::<Result<_, _>>()?;
        Ok((!keys.is_empty()).then_some(Self { keys }))
    }
}

impl fmt::Debug for Recipients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recipients({})", self.keys.len())
    }
}

/// What opens a layer.
pub(super) enum Opener {
    Rsa(OaepPrivateDecryptingKey),
    Curve(Curve, PrivateKey),
}

/// Private keys to read encrypted images with. `Debug` shows how many there are.
#[derive(Default)]
pub struct DecryptionKeys {
    pub(super) keys: Vec<Opener>,
}

impl DecryptionKeys {
    /// Reads private keys in PEM: PKCS#8, PKCS#1, or SEC 1, not encrypted.
    ///
    /// # Errors
    /// Any [`KeyError`] but `Recipient`.
    pub fn read<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Self, KeyError> {
        Ok(Self { keys: paths.into_iter().map(opener).collect::<Result<_, _>>()? })
    }

    /// Their number.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl fmt::Debug for DecryptionKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DecryptionKeys({})", self.keys.len())
    }
}

fn file(path: &Path) -> Result<Vec<u8>, KeyError> {
    use io::Read;
    let failed = |source| KeyError::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    std::fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes)).map_err(failed)?;
    Ok(bytes)
}

fn recipient(path: &Path) -> Result<Recipient, KeyError> {
    let pem = file(path)?;
    let key = SubjectPublicKeyInfoDer::from_pem_slice(&pem).ok().and_then(|der| public_key(&der));
    let expected = "public key in PEM for RSA or the curves P-256, P-384 and P-521";
    key.ok_or_else(|| KeyError::Kind { path: path.to_owned(), expected })
}

fn public_key(der: &[u8]) -> Option<Recipient> {
    let rsa = PublicEncryptingKey::from_der(der).ok().and_then(|rsa| OaepPublicEncryptingKey::new(rsa).ok());
    if let Some(rsa) = rsa {
        return Some(Recipient::Rsa(rsa));
    }
    let on = |curve: &Curve| ParsedPublicKey::try_from(UnparsedPublicKey::new(curve.algorithm, der)).is_ok();
    CURVES.into_iter().find(on).map(|curve| Recipient::Curve(curve, der.to_vec()))
}

fn opener(path: &Path) -> Result<Opener, KeyError> {
    let pem = file(path)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).ok().and_then(|der| private_key(&der));
    let expected = "unencrypted private key in PEM for RSA or the curves P-256, P-384 and P-521";
    key.ok_or_else(|| KeyError::Kind { path: path.to_owned(), expected })
}

fn private_key(der: &PrivateKeyDer<'_>) -> Option<Opener> {
    let rsa = |pkcs8: &[u8]| {
        PrivateDecryptingKey::from_pkcs8(pkcs8).ok().and_then(|rsa| OaepPrivateDecryptingKey::new(rsa).ok())
    };
    let found = match der {
        PrivateKeyDer::Pkcs1(key) => rsa(&pkcs8_of_rsa(key.secret_pkcs1_der())),
        PrivateKeyDer::Pkcs8(key) => rsa(key.secret_pkcs8_der()),
        _ => None,
    };
    let on = |curve: Curve| {
        let key = PrivateKey::from_private_key_der(curve.algorithm, der.secret_der()).ok()?;
        Some(Opener::Curve(curve, key))
    };
    found.map(Opener::Rsa).or_else(|| CURVES.into_iter().find_map(on))
}

/// A PKCS#1 key as PKCS#8: version 0, the identifier of RSA, and the key in an octet string (RFC 5208, section 5).
fn pkcs8_of_rsa(pkcs1: &[u8]) -> Vec<u8> {
    // OBJECT IDENTIFIER 1.2.840.113549.1.1.1, NULL
    const RSA: [u8; 15] = [0x30, 0x0D, 0x06, 0x09, 0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x01, 0x05, 0x00];
    let tagged = |tag: u8, content: &[u8]| {
        let len = (content.len() as u32).to_be_bytes();
        // Files are bounded; a length takes as few bytes as it can.
        let len = &len[(content.len() as u32).leading_zeros().min(24) as usize / 8..];
        let long = if content.len() < 0x80 { &[][..] } else { &[0x80 | len.len() as u8][..] };
        [&[tag], long, len, content].concat()
    };
    tagged(0x30, &[&[0x02, 0x01, 0x00], &RSA[..], &tagged(0x04, pkcs1)].concat())
}
