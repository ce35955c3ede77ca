//! Bootstrap layers as OCI image encryption has them: whoever holds a private key of a recipient can read one, a registry
//! cannot. As the bootstrap has the keys of the blobs, this is what keeps an encrypted image secret.
//!
//! ```text
//! layer (tar.gz) --AES-256-CTR--> what the registry has     media type ends in +encrypted, digest and size are of this
//!   key, nonce, sha256 of the layer --JWE, for each recipient--> annotation org.opencontainers.image.enc.keys.jwe
//!   cipher, HMAC-SHA256 of what the registry has ------------> annotation org.opencontainers.image.enc.pubopts
//! ```
//!
//! The form is that of the ocicrypt library, which skopeo, buildah, nerdctl and containerd's imgcrypt use. Of its ways to wrap
//! keys JWE is done here, with RSA and elliptic curve keys in PEM; not PGP, PKCS#7, and programs that hold keys. JWE is done
//! on the cryptography that TLS brings along: two ways of wrapping and one cipher, and no library of it comes without
//! OpenSSL or a second set of ciphers.
//!
//! A layer is sealed and opened in memory, and never lies decrypted in a file.

use std::{collections::BTreeMap, fmt, sync::Arc};

use aws_lc_rs::{
    cipher::{AES_256, DecryptingKey, DecryptionContext, EncryptingKey, EncryptionContext, UnboundCipherKey},
    error::Unspecified,
    hmac,
    iv::FixedLength,
    rand,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use shoal_proto::ObjectId;

use super::registry::sha256;

mod jwe;
mod keys;

pub use keys::{DecryptionKeys, KeyError, Recipients};

/// How the media type of an encrypted layer ends.
pub(super) const ENCRYPTED: &str = "+encrypted";
/// How annotations with wrapped keys begin; the way of wrapping follows.
const KEYS: &str = "org.opencontainers.image.enc.keys.";
/// The keys, wrapped by JWE for one recipient or several: texts in base64 with commas between them.
const JWE_KEYS: &str = "org.opencontainers.image.enc.keys.jwe";
/// What of the encryption is no secret.
const PUBLIC_OPTIONS: &str = "org.opencontainers.image.enc.pubopts";
/// The one cipher.
const CIPHER: &str = "AES_256_CTR_HMAC_SHA256";
/// Most wrapped keys of a layer that are looked at: each costs a decryption by each private key.
const MAX_WRAPPED: usize = 64;

/// Why an encrypted layer could not be read, or a layer not encrypted.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// No key is known.
    #[error("the bootstrap layer sha256:{layer} is encrypted, and no decryption key is given")]
    NoKey {
        /// The layer.
        layer: ObjectId,
    },
    /// None of the keys fits.
    #[error("the bootstrap layer sha256:{layer} is encrypted for others: none of {keys} decryption keys opens it")]
    OtherKeys {
        /// The layer.
        layer: ObjectId,
        /// How many keys were tried.
        keys: usize,
    },
    /// Its keys are wrapped in a way that is not known here.
    #[error("the bootstrap layer sha256:{layer} is encrypted, but its keys are wrapped by {found}, not by JWE")]
    Wrapping {
        /// The layer.
        layer: ObjectId,
        /// The ways in which they are.
        found: String,
    },
    /// Bytes that are no layer, and perhaps an encrypted one, of which nobody has said how it is encrypted.
    #[error(
        "the bootstrap layer sha256:{layer} is no gzip: if it is encrypted, its manifest says how, which is not known here"
    )]
    NoManifest {
        /// The layer.
        layer: ObjectId,
    },
    /// An annotation, or what is wrapped, is not as it must be.
    #[error("the encryption of the bootstrap layer sha256:{layer}: {problem}")]
    Malformed {
        /// The layer.
        layer: ObjectId,
        /// What is wrong.
        problem: &'static str,
    },
    /// A layer cannot be encrypted.
    #[error("cannot encrypt the bootstrap layer: {problem}")]
    Seal {
        /// What failed.
        problem: &'static str,
    },
}

/// What a manifest says of an encrypted layer. Nothing in it is a secret. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct LayerSeal {
    annotations: Arc<BTreeMap<String, String>>,
}

impl fmt::Debug for LayerSeal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.annotations.keys()).finish()
    }
}

/// What is wrapped for the recipients.
#[derive(Serialize, Deserialize)]
struct PrivateOptions {
    symkey: String,
    digest: String,
    cipheroptions: Nonce,
}

#[derive(Serialize, Deserialize)]
struct Nonce {
    nonce: String,
}

/// What anybody may know.
#[derive(Serialize, Deserialize)]
struct PublicOptions {
    cipher: String,
    hmac: String,
    cipheroptions: BTreeMap<String, String>,
}

impl LayerSeal {
    /// From the annotations of an encrypted layer.
    pub(super) fn new<'a>(annotations: impl Iterator<Item = (&'a String, &'a String)>) -> Self {
        let known = annotations.filter(|(name, _)| name.starts_with(KEYS) || *name == PUBLIC_OPTIONS);
        Self { annotations: Arc::new(known.map(|(name, value)| (name.clone(), value.clone())).collect()) }
    }

    /// The annotations of the layer.
    pub(super) fn annotations(&self) -> &BTreeMap<String, String> {
        &self.annotations
    }

    /// Encrypts a layer where it is, for all `recipients`.
    ///
    /// # Errors
    /// [`SealError::Seal`].
    pub fn seal(layer: &mut [u8], recipients: &Recipients) -> Result<Self, SealError> {
        let failed = |problem| move |_| SealError::Seal { problem };
        let (mut key, mut nonce) = ([0; 32], [0; 16]);
        rand::fill(&mut key).and_then(|()| rand::fill(&mut nonce)).map_err(failed("there are no random numbers"))?;
        let digest = format!("sha256:{}", sha256(layer));
        let cipher = UnboundCipherKey::new(&AES_256, &key).and_then(EncryptingKey::ctr);
        let iv = EncryptionContext::Iv128(FixedLength::from(nonce));
        let sealed = cipher.and_then(|cipher| cipher.less_safe_encrypt(layer, iv));
        sealed.map_err(failed("its cipher fails"))?;
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), layer);
        let cipheroptions = Nonce { nonce: STANDARD.encode(nonce) };
        let private = PrivateOptions { symkey: STANDARD.encode(key), digest, cipheroptions };
        let public =
            PublicOptions { cipher: CIPHER.to_owned(), hmac: STANDARD.encode(tag), cipheroptions: BTreeMap::new() };
        let wrapped = serde_json::to_vec(&private).ok().and_then(|private| jwe::wrap(&private, recipients).ok());
        let wrapped = wrapped.ok_or(SealError::Seal { problem: "its key cannot be wrapped" })?;
        let public =
            serde_json::to_vec(&public).map_err(|_| SealError::Seal { problem: "its options are no JSON" })?;
        let annotations = [(JWE_KEYS, STANDARD.encode(wrapped)), (PUBLIC_OPTIONS, STANDARD.encode(public))];
        let annotations = annotations.map(|(name, value)| (name.to_owned(), value)).into();
        Ok(Self { annotations: Arc::new(annotations) })
    }

    /// Decrypts the layer with this digest where it is, and checks that it is what was encrypted.
    ///
    /// # Errors
    /// Any [`SealError`] but `Seal`; `bytes` then holds nothing of use.
    pub fn open(&self, layer: ObjectId, bytes: &mut [u8], keys: &DecryptionKeys) -> Result<(), SealError> {
        let malformed = |problem| SealError::Malformed { layer, problem };
        let private = self.unwrap(layer, keys)?;
        let public = self.annotations.get(PUBLIC_OPTIONS).and_then(|public| STANDARD.decode(public).ok());
        let public = public.and_then(|public| serde_json::from_slice::<PublicOptions>(&public).ok());
        let public = public.ok_or_else(|| malformed("its public options cannot be read"))?;
        if public.cipher != CIPHER {
            return Err(malformed("its cipher is not AES_256_CTR_HMAC_SHA256"));
        }
        let decoded = |text: &str| STANDARD.decode(text).ok();
        let key =
            decoded(&private.symkey).filter(|key| key.len() == 32).ok_or_else(|| malformed("no key of 32 bytes"))?;
        let nonce: Option<[u8; 16]> = decoded(&private.cipheroptions.nonce).and_then(|nonce| nonce.try_into().ok());
        let nonce = nonce.ok_or_else(|| malformed("no nonce of 16 bytes"))?;
        let tag = decoded(&public.hmac).unwrap_or_default();
        // Before anything is decrypted: changed bytes are nobody's layer.
        let genuine = hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &key), bytes, &tag);
        genuine.map_err(|Unspecified| malformed("its bytes are not those that were encrypted"))?;
        let cipher = UnboundCipherKey::new(&AES_256, &key).and_then(DecryptingKey::ctr);
        let iv = DecryptionContext::Iv128(FixedLength::from(nonce));
        let opened = cipher.and_then(|cipher| cipher.decrypt(bytes, iv).map(|_| ()));
        opened.map_err(|Unspecified| malformed("its cipher fails"))?;
        match private.digest.strip_prefix("sha256:").and_then(|hex| hex.parse::<ObjectId>().ok()) {
            Some(digest) if digest == sha256(bytes) => Ok(()),
            _ => Err(malformed("what is decrypted is not the layer that was encrypted")),
        }
    }

    fn unwrap(&self, layer: ObjectId, keys: &DecryptionKeys) -> Result<PrivateOptions, SealError> {
        let Some(wrapped) = self.annotations.get(JWE_KEYS) else {
            let found: Vec<_> = self.annotations.keys().filter_map(|name| name.strip_prefix(KEYS)).collect();
            let found = if found.is_empty() { "nothing".to_owned() } else { found.join(", ") };
            return Err(SealError::Wrapping { layer, found: found.chars().take(80).collect() });
        };
        if keys.is_empty() {
            return Err(SealError::NoKey { layer });
        }
        let wrapped = wrapped.split(',').take(MAX_WRAPPED).filter_map(|wrapped| STANDARD.decode(wrapped).ok());
        let private = wrapped.into_iter().find_map(|wrapped| jwe::unwrap(&wrapped, keys));
        let private = private.ok_or(SealError::OtherKeys { layer, keys: keys.len() })?;
        let unreadable = |_| SealError::Malformed { layer, problem: "what is wrapped cannot be read" };
        serde_json::from_slice(&private).map_err(unreadable)
    }
}

#[cfg(test)]
pub(super) mod tests;
