use std::{fs, path::PathBuf, sync::LazyLock};

use aws_lc_rs::{
    agreement::PrivateKey,
    encoding::{AsDer, EcPrivateKeyRfc5915Der, Pkcs8V1Der, PublicKeyX509Der},
    rsa::{KeySize, PrivateDecryptingKey},
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair,
        KeyPair,
    },
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{keys::CURVES, *};

/// Both halves of a key as PEM files.
pub(in crate::oci) struct KeyFiles {
    pub(in crate::oci) public: PathBuf,
    pub(in crate::oci) private: PathBuf,
}

impl KeyFiles {
    fn write(dir: &TempDir, name: &str, public: &[u8], (label, private): (&str, &[u8])) -> Self {
        let file = |kind: &str, label: &str, der: &[u8]| {
            let path = dir.path().join(format!("{name}-{kind}.pem"));
            fs::write(&path, format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", wrapped(der))).unwrap();
            path
        };
        Self { public: file("public", "PUBLIC KEY", public), private: file("private", label, private) }
    }

    pub(in crate::oci) fn rsa(dir: &TempDir, name: &str) -> Self {
        let key = PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap();
        let pkcs8: Pkcs8V1Der<'_> = key.as_der().unwrap();
        let public: PublicKeyX509Der<'_> = key.public_key().as_der().unwrap();
        Self::write(dir, name, public.as_ref(), ("PRIVATE KEY", pkcs8.as_ref()))
    }

    /// In PKCS#8, as ocicrypt wants it.
    pub(in crate::oci) fn curve(dir: &TempDir, name: &str, curve: usize) -> Self {
        let kinds =
            [&ECDSA_P256_SHA256_ASN1_SIGNING, &ECDSA_P384_SHA384_ASN1_SIGNING, &ECDSA_P521_SHA512_ASN1_SIGNING];
        let key = EcdsaKeyPair::generate(kinds[curve]).unwrap();
        let public: PublicKeyX509Der<'_> = key.public_key().as_der().unwrap();
        Self::write(dir, name, public.as_ref(), ("PRIVATE KEY", key.to_pkcs8v1().unwrap().as_ref()))
    }

    /// In the older form, as `openssl ecparam -genkey` writes it.
    fn older_curve(dir: &TempDir, name: &str, curve: usize) -> Self {
        let key = PrivateKey::generate(CURVES[curve].algorithm).unwrap();
        let sec1: EcPrivateKeyRfc5915Der<'_> = key.as_der().unwrap();
        let public: PublicKeyX509Der<'_> = key.compute_public_key().unwrap().as_der().unwrap();
        Self::write(dir, name, public.as_ref(), ("EC PRIVATE KEY", sec1.as_ref()))
    }

    pub(in crate::oci) fn name(&self) -> String {
        format!("jwe:{}", self.public.display())
    }
}

fn wrapped(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    lines.join("\n")
}

pub(in crate::oci) fn recipients(keys: &[&KeyFiles]) -> Recipients {
    let names: Vec<_> = keys.iter().map(|key| key.name()).collect();
    Recipients::read(names.iter().map(String::as_str)).unwrap().unwrap()
}

pub(in crate::oci) fn openers(keys: &[&KeyFiles]) -> DecryptionKeys {
    DecryptionKeys::read(keys.iter().map(|key| key.private.as_path())).unwrap()
}

fn layer() -> Vec<u8> {
    (0..100_000u32).flat_map(u32::to_le_bytes).collect()
}

/// Seals the layer; what its registry digest is, and the bytes.
fn sealed(recipients: &Recipients) -> (LayerSeal, ObjectId, Vec<u8>) {
    let mut bytes = layer();
    let seal = LayerSeal::seal(&mut bytes, recipients).unwrap();
    (seal, sha256(&bytes), bytes)
}

#[test]
fn every_recipient_reads_it_and_nobody_else() {
    let dir = TempDir::new().unwrap();
    let rsa = KeyFiles::rsa(&dir, "rsa");
    let curves: Vec<_> = (0..3).map(|curve| KeyFiles::curve(&dir, &format!("curve-{curve}"), curve)).collect();
    let strangers = [KeyFiles::rsa(&dir, "other-rsa"), KeyFiles::curve(&dir, "other-curve", 0)];
    let everybody: Vec<_> = curves.iter().chain([&rsa]).collect();
    for chosen in everybody.iter().map(|key| vec![*key]).chain([everybody.clone()]) {
        let (seal, id, bytes) = sealed(&recipients(&chosen));
        assert!(bytes.len() == layer().len() && bytes != layer());
        for key in &everybody {
            let mut opened = bytes.clone();
            match seal.open(id, &mut opened, &openers(&[key])) {
                Ok(()) => assert!(opened == layer() && chosen.iter().any(|known| known.public == key.public)),
                Err(error) => {
                    assert!(matches!(error, SealError::OtherKeys { layer, keys: 1 } if layer == id), "{error}");
                    assert!(!chosen.iter().any(|known| known.public == key.public));
                }
            }
        }
        let many = openers(&[&strangers[0], &strangers[1], chosen[0]]);
        seal.open(id, &mut bytes.clone(), &many).unwrap();
        let refused = seal.open(id, &mut bytes.clone(), &openers(&[&strangers[0], &strangers[1]]));
        assert!(refused.unwrap_err().to_string().contains(&id.to_string()));
        let refused = seal.open(id, &mut bytes.clone(), &DecryptionKeys::default());
        assert!(matches!(refused, Err(SealError::NoKey { .. })));
    }
}

#[test]
fn changed_layers_and_annotations_are_found() {
    let dir = TempDir::new().unwrap();
    let key = KeyFiles::curve(&dir, "key", 0);
    let (seal, id, bytes) = sealed(&recipients(&[&key]));
    let keys = openers(&[&key]);
    for change in [0, bytes.len() / 2, bytes.len() - 1] {
        let mut changed = bytes.clone();
        changed[change] ^= 1;
        let error = seal.open(id, &mut changed, &keys).unwrap_err();
        assert!(error.to_string().contains("not those that were encrypted"), "{error}");
    }
    assert!(seal.open(id, &mut bytes[..1000].to_vec(), &keys).is_err());
    let with = |name: &str, value: Option<String>| {
        let mut changed = seal.clone();
        match value {
            Some(value) => _ = Arc::make_mut(&mut changed.annotations).insert(name.to_owned(), value),
            None => _ = Arc::make_mut(&mut changed.annotations).remove(name),
        }
        changed.open(id, &mut bytes.clone(), &keys).unwrap_err()
    };
    assert!(matches!(with(JWE_KEYS, None), SealError::Wrapping { .. }));
    assert!(matches!(with(JWE_KEYS, Some("~".into())), SealError::OtherKeys { .. }));
    for public in [
        None,
        Some("e30=".to_owned()),
        Some(STANDARD.encode(json!({ "cipher": "x", "hmac": "", "cipheroptions": {} }).to_string())),
    ] {
        assert!(matches!(with(PUBLIC_OPTIONS, public), SealError::Malformed { .. }));
    }
    // Wrapped in a way that is not known here.
    let mut pgp = seal.clone();
    let keys_of = Arc::make_mut(&mut pgp.annotations).remove(JWE_KEYS).unwrap();
    Arc::make_mut(&mut pgp.annotations).insert(format!("{KEYS}pgp"), keys_of);
    let error = pgp.open(id, &mut bytes.clone(), &keys).unwrap_err();
    assert!(error.to_string().contains("wrapped by pgp"), "{error}");
}

#[test]
fn files_that_hold_no_key_are_refused_without_being_shown() {
    let dir = TempDir::new().unwrap();
    let key = KeyFiles::rsa(&dir, "key");
    let none = dir.path().join("none");
    fs::write(&none, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nc2VjcmV0\n-----END ENCRYPTED PRIVATE KEY-----\n")
        .unwrap();
    for path in [&none, &key.public] {
        let error = DecryptionKeys::read([path.as_path()]).unwrap_err();
        assert!(matches!(&error, KeyError::Kind { .. }) && !format!("{error:?}").contains("c2VjcmV0"), "{error}");
    }
    assert!(matches!(DecryptionKeys::read([dir.path().join("missing").as_path()]), Err(KeyError::Io { .. })));
    let private = format!("jwe:{}", key.private.display());
    for name in [private.as_str(), "pgp:somebody", "key.pem", ""] {
        assert!(Recipients::read([name]).is_err(), "{name}");
    }
    assert!(Recipients::read([]).unwrap().is_none());
    let shown = format!("{:?} {:?}", openers(&[&key]), recipients(&[&key]));
    assert_eq!(shown, "DecryptionKeys(1) Recipients(1)");
}

#[test]
fn keys_in_the_older_form_are_read() {
    let dir = TempDir::new().unwrap();
    let key = KeyFiles::rsa(&dir, "key");
    // PKCS#8 is a version, an algorithm, and the older form in an octet string.
    let pem = fs::read_to_string(&key.private).unwrap();
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let pkcs8 = STANDARD.decode(body).unwrap();
    let start = pkcs8.windows(4).skip(20).position(|window| window[..2] == [0x30, 0x82]).unwrap() + 20;
    fs::write(
        &key.private,
        format!("-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----\n", wrapped(&pkcs8[start..])),
    )
    .unwrap();
    for key in [key, KeyFiles::older_curve(&dir, "older", 1)] {
        let (seal, id, mut bytes) = sealed(&recipients(&[&key]));
        seal.open(id, &mut bytes, &openers(&[&key])).unwrap();
        assert!(bytes == layer());
    }
}

/// The forms for one recipient and for two, changed one field after the other.
#[test]
fn messages_that_do_not_fit_open_nothing() {
    let dir = TempDir::new().unwrap();
    let (one, other) = (KeyFiles::curve(&dir, "one", 1), KeyFiles::rsa(&dir, "other"));
    let keys = openers(&[&one, &other]);
    for recipients in [recipients(&[&one]), recipients(&[&one, &other])] {
        let message = jwe::wrap(b"content", &recipients).unwrap();
        assert_eq!(jwe::unwrap(&message, &keys).unwrap(), b"content");
        let parsed: Value = serde_json::from_slice(&message).unwrap();
        assert_eq!(parsed.get("recipients").is_some(), recipients.keys.len() > 1);
        for field in ["protected", "iv", "ciphertext", "tag"] {
            for value in [json!(""), json!("AAAA"), json!(7), Value::Null] {
                let mut changed = parsed.clone();
                changed[field] = value;
                assert_eq!(jwe::unwrap(changed.to_string().as_bytes(), &keys), None, "{field}");
            }
        }
        let mut extended = parsed.clone();
        extended["unprotected"] = json!({ "crit": ["exp"] });
        assert_eq!(jwe::unwrap(extended.to_string().as_bytes(), &keys), None);
    }
}

/// Keys are slow to make.
struct Wrapped {
    keys: DecryptionKeys,
    messages: Vec<Vec<u8>>,
}

static WRAPPED: LazyLock<Wrapped> = LazyLock::new(|| {
    let dir = TempDir::new().unwrap();
    let (one, other) = (KeyFiles::curve(&dir, "one", 0), KeyFiles::rsa(&dir, "other"));
    let to = [recipients(&[&one]), recipients(&[&other]), recipients(&[&one, &other])];
    let messages = to.iter().map(|to| jwe::wrap(b"content", to).unwrap()).collect();
    Wrapped { keys: openers(&[&one, &other]), messages }
});

proptest! {
    #[test]
    fn any_bytes_open_nothing(message in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert_eq!(jwe::unwrap(&message, &WRAPPED.keys), None);
    }

    /// What is changed anywhere is either not looked at, or opens nothing.
    #[test]
    fn a_changed_message_holds_what_it_held_or_nothing(
        which in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut message = which.get(&WRAPPED.messages).clone();
        for (position, byte) in damage {
            let position = position.index(message.len());
            message[position] = byte;
        }
        let opened = jwe::unwrap(&message, &WRAPPED.keys);
        prop_assert!(opened.is_none_or(|opened| opened == b"content"));
    }
}
