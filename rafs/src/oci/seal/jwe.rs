//! JSON Web Encryption (RFC 7516) as far as encrypted layers use it: the JSON forms for one recipient and for several, A256GCM
//! for the content, its key wrapped by RSA-OAEP or by ECDH-ES+A256KW (RFC 7518, sections 4.3 and 4.6).
//!
//! What is unwrapped comes from strangers: anything that does not fit a key is no answer, whatever the reason. Which reason
//! it is, only an attacker would want to know.

use aws_lc_rs::{
    aead::{self, Aad, LessSafeKey, Nonce, UnboundKey},
    agreement::{self, PrivateKey, UnparsedPublicKey},
    error::Unspecified,
    key_wrap::{AES_256, KeyEncryptionKey, KeyWrap},
    rand,
    rsa::{OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::keys::{CURVES, Curve, DecryptionKeys, Opener, Recipient, Recipients};

const RSA_OAEP: &str = "RSA-OAEP";
const RSA_OAEP_256: &str = "RSA-OAEP-256";
const ECDH: &str = "ECDH-ES+A256KW";
const GCM: &str = "A256GCM";
/// Bytes of the tag of GCM.
const TAG: usize = 16;
/// Most recipients of one message that are looked at.
const MAX_RECIPIENTS: usize = 64;

/// Both JSON forms in one.
#[derive(Serialize, Deserialize)]
struct Message {
    protected: String,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    unprotected: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    recipients: Vec<Wrapped>,
    #[serde(flatten)]
    only: Wrapped,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    aad: Option<String>,
    iv: String,
    ciphertext: String,
    tag: String,
}

/// The content's key, for one recipient.
#[derive(Default, Serialize, Deserialize)]
struct Wrapped {
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    header: Map<String, Value>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    encrypted_key: String,
}

/// Encrypts for all recipients.
pub(super) fn wrap(content: &[u8], recipients: &Recipients) -> Result<Vec<u8>, Unspecified> {
    let (mut key, mut iv) = ([0; 32], [0; 12]);
    rand::fill(&mut key)?;
    rand::fill(&mut iv)?;
    let wrapped = recipients.keys.iter().map(|recipient| recipient.wrap(&key)).collect::<Result<Vec<_>, _>>()?;
    let mut protected = Map::from_iter([("enc".to_owned(), json!(GCM))]);
    let (recipients, only) = match <[Wrapped; 1]>::try_from(wrapped) {
        // With one recipient its header is the common one.
        Ok([only]) => {
            protected.extend(only.header);
            (Vec::new(), Wrapped { header: Map::new(), ..only })
        }
        Err(several) => (several, Wrapped::default()),
    };
    let protected = BASE64.encode(Value::from(protected).to_string());
    let mut ciphertext = content.to_vec();
    let cipher = LessSafeKey::new(UnboundKey::new(&aead::AES_256_GCM, &key)?);
    let (nonce, aad) = (Nonce::assume_unique_for_key(iv), Aad::from(protected.as_bytes()));
    let tag = cipher.seal_in_place_separate_tag(nonce, aad, &mut ciphertext)?;
    let message = Message {
        unprotected: Map::new(),
        recipients,
        only,
        aad: None,
        iv: BASE64.encode(iv),
        ciphertext: BASE64.encode(ciphertext),
        tag: BASE64.encode(tag),
        protected,
    };
    serde_json::to_vec(&message).map_err(|_| Unspecified)
}

/// Decrypts with the first key that fits.
pub(super) fn unwrap(message: &[u8], keys: &DecryptionKeys) -> Option<Vec<u8>> {
    let message: Message = serde_json::from_slice(message).ok()?;
    let protected: Map<String, Value> = serde_json::from_slice(&BASE64.decode(&message.protected).ok()?).ok()?;
    let recipients = match message.recipients.as_slice() {
        [] => std::slice::from_ref(&message.only),
        several => &several[..several.len().min(MAX_RECIPIENTS)],
    };
    let openings = recipients.iter().flat_map(|wrapped| keys.keys.iter().map(move |opener| (wrapped, opener)));
    openings.into_iter().find_map(|(wrapped, opener)| {
        let mut header = wrapped.header.clone();
        header.extend(message.unprotected.clone());
        header.extend(protected.clone());
        // Extensions that must be understood, and compression.
        let strange = header.contains_key("crit") || header.contains_key("zip");
        if strange || text(&header, "enc") != Some(GCM) {
            return None;
        }
        let key = opener.unwrap(&header, &BASE64.decode(&wrapped.encrypted_key).ok()?)?;
        message.open(&key)
    })
}

impl Message {
    fn open(&self, key: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = BASE64.decode(&self.ciphertext).ok()?;
        let tag = BASE64.decode(&self.tag).ok().filter(|tag| tag.len() == TAG)?;
        bytes.extend_from_slice(&tag);
        let nonce = Nonce::try_assume_unique_for_key(&BASE64.decode(&self.iv).ok()?).ok()?;
        let aad = match &self.aad {
            Some(aad) => format!("{}.{aad}", self.protected),
            None => self.protected.clone(),
        };
        let cipher = LessSafeKey::new(UnboundKey::new(&aead::AES_256_GCM, key).ok()?);
        Some(cipher.open_in_place(nonce, Aad::from(aad.as_bytes()), &mut bytes).ok()?.to_vec())
    }
}

impl Recipient {
    fn wrap(&self, key: &[u8; 32]) -> Result<Wrapped, Unspecified> {
        match self {
            Self::Rsa(rsa) => {
                let mut wrapped = vec![0; rsa.ciphertext_size()];
                let wrapped = rsa.encrypt(&OAEP_SHA1_MGF1SHA1, key, &mut wrapped, None)?;
                let header = Map::from_iter([("alg".to_owned(), json!(RSA_OAEP))]);
                Ok(Wrapped { header, encrypted_key: BASE64.encode(wrapped) })
            }
            Self::Curve(curve, public) => {
                let ephemeral = PrivateKey::generate(curve.algorithm)?;
                let point = ephemeral.compute_public_key()?;
                // 4, and both coordinates.
                let (x, y) = point.as_ref().get(1..).ok_or(Unspecified)?.split_at(curve.coordinate);
                let header = json!({
                    "alg": ECDH,
                    "epk": { "kty": "EC", "crv": curve.name, "x": BASE64.encode(x), "y": BASE64.encode(y) },
                });
                let Value::Object(header) = header else { return Err(Unspecified) };
                let kek = kek(&ephemeral, UnparsedPublicKey::new(curve.algorithm, public), (&[], &[]))?;
                let mut wrapped = [0; 40];
                let wrapped = kek.wrap(key, &mut wrapped)?;
                Ok(Wrapped { header, encrypted_key: BASE64.encode(wrapped) })
            }
        }
    }
}

impl Opener {
    fn unwrap(&self, header: &Map<String, Value>, wrapped: &[u8]) -> Option<Vec<u8>> {
        match (self, text(header, "alg")?) {
            (Self::Rsa(rsa), algorithm @ (RSA_OAEP | RSA_OAEP_256)) => {
                let oaep = if algorithm == RSA_OAEP { &OAEP_SHA1_MGF1SHA1 } else { &OAEP_SHA256_MGF1SHA256 };
                let mut key = vec![0; rsa.min_output_size()];
                rsa.decrypt(oaep, wrapped, &mut key, None).ok().map(|key| key.to_vec())
            }
            (Self::Curve(curve, own), ECDH) => {
                let point = point(curve, header.get("epk")?.as_object()?)?;
                let party = |name| match header.get(name) {
                    Some(info) => BASE64.decode(info.as_str()?).ok(),
                    None => Some(Vec::new()),
                };
                let kek = kek(own, UnparsedPublicKey::new(curve.algorithm, &point), (&party("apu")?, &party("apv")?));
                let mut key = [0; 32];
                kek.ok()?.unwrap(wrapped, &mut key).ok().map(|key| key.to_vec())
            }
            _ => None,
        }
    }
}

fn text<'a>(header: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    header.get(name)?.as_str()
}

/// A public key in JSON as an uncompressed point.
fn point(curve: &Curve, key: &Map<String, Value>) -> Option<Vec<u8>> {
    let known = CURVES.iter().find(|known| Some(known.name) == text(key, "crv"))?;
    if known.name != curve.name || text(key, "kty") != Some("EC") {
        return None;
    }
    let coordinate = |name| BASE64.decode(text(key, name)?).ok().filter(|bytes| bytes.len() == curve.coordinate);
    Some([&[4][..], &coordinate("x")?, &coordinate("y")?].concat())
}

/// The key that wraps keys, agreed on with another party: one round of the Concat KDF (NIST SP 800-56A, section 5.8.1).
fn kek(
    own: &PrivateKey,
    other: UnparsedPublicKey<impl AsRef<[u8]>>,
    (apu, apv): (&[u8], &[u8]),
) -> Result<KeyEncryptionKey<aws_lc_rs::key_wrap::AesBlockCipher>, Unspecified> {
    let derived = agreement::agree(own, other, Unspecified, |shared| {
        let mut hasher = Sha256::new_with_prefix(1u32.to_be_bytes());
        hasher.update(shared);
        for part in [ECDH.as_bytes(), apu, apv] {
            hasher.update((part.len() as u32).to_be_bytes());
            hasher.update(part);
        }
        hasher.update(256u32.to_be_bytes());
        Ok(hasher.finalize())
    })?;
    KeyEncryptionKey::new(&AES_256, &derived)
}
