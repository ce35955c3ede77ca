//! How the units of an encrypted blob are encrypted: AES-128 in XTS mode, with one key and one tweak for the whole blob.
//!
//! A *unit* is what is encrypted as one: a chunk or a batch as it is stored, the stored chunk table, its header. Every unit
//! begins with the same tweak, so equal units of a blob have equal ciphertexts; a blob has each chunk once. Ciphertext
//! stealing keeps the length of a unit, but for those of less than a block, which are padded to 18 bytes:
//!
//! ```text
//! 0..n: the unit (n < 16) | n..16: bytes of the value 16 - n | 0x78 0x90
//! ```
//!
//! The format has no mark for padding. Where a unit's length is known it decides; of a compressed unit only the form of its
//! 18 bytes can, so writers make no compressed unit that is padded or looks like it.
//!
//! XTS hides content and nothing else: that bytes were changed is found by the digests of chunks, over plain bytes, as with
//! any blob. Keys lie in the bootstrap alone. No type here shows one: `Debug` leaves them out.

use std::fmt;
use std::sync::Arc;

use aes::Aes128;
use aes::cipher::KeyInit;
use xts_mode::Xts128;

/// Bytes of a block: shorter units are padded.
pub(crate) const BLOCK: usize = 16;
/// Bytes of a padded unit.
const PADDED: usize = 18;
/// How a padded unit ends.
const PADDING_END: [u8; 2] = [0x78, 0x90];
/// Most bytes of a unit: XTS allows 2^20 blocks under one tweak, and other implementations refuse more.
pub(crate) const MAX_UNIT: usize = 16 << 20;

/// Why bytes could not be decrypted. A wrong key is no reason: it gives other bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CipherError {
    /// Less than a block.
    #[error("{found} encrypted bytes are less than a block of 16")]
    Short {
        /// Their number.
        found: usize,
    },
    /// More than one tweak is good for.
    #[error("{found} encrypted bytes are more than 16 MiB, the most of one unit")]
    Long {
        /// Their number.
        found: usize,
    },
    /// A unit of less than a block has not the form that padding gives it.
    #[error("the padding of an encrypted unit of less than 16 bytes is wrong")]
    Padding,
}

/// The two halves of an XTS key are the same, which makes it no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the two halves of the key are the same")]
pub struct WeakKey;

/// Key and tweak of a blob, as the blob table has them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CipherKey {
    /// The key for blocks, then the one for tweaks.
    key: [u8; 32],
    iv: [u8; 16],
}

impl CipherKey {
    /// From the blob table.
    ///
    /// # Errors
    /// [`WeakKey`], which other implementations refuse, too.
    pub fn new(key: [u8; 32], iv: [u8; 16]) -> Result<Self, WeakKey> {
        if key[..BLOCK] == key[BLOCK..] { Err(WeakKey) } else { Ok(Self { key, iv }) }
    }

    /// One that nobody has, from the system's random numbers.
    pub(crate) fn fresh() -> std::io::Result<Self> {
        loop {
            let (mut key, mut iv) = ([0; 32], [0; 16]);
            getrandom::fill(&mut key)?;
            getrandom::fill(&mut iv)?;
            if let Ok(fresh) = Self::new(key, iv) {
                return Ok(fresh);
            }
        }
    }

    /// The key of 32 bytes and the tweak, for the blob table.
    pub(crate) fn parts(&self) -> (&[u8; 32], &[u8; 16]) {
        (&self.key, &self.iv)
    }
}

impl fmt::Debug for CipherKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CipherKey(..)")
    }
}

/// Encrypts and decrypts the units of one blob. Cheap to clone.
#[derive(Clone)]
pub struct Cipher(Arc<Inner>);

struct Inner {
    key: CipherKey,
    xts: Xts128<Aes128>,
}

impl Cipher {
    /// With this key.
    pub fn new(key: CipherKey) -> Self {
        let (blocks, tweaks) = key.key.split_at(BLOCK);
        let xts = Xts128::new(Aes128::new(blocks.into()), Aes128::new(tweaks.into()));
        Self(Arc::new(Inner { key, xts }))
    }

    /// Its key.
    pub(crate) fn key(&self) -> &CipherKey {
        &self.0.key
    }

    /// Encrypts a unit of at most [`MAX_UNIT`] bytes where it is; one of less than a block becomes 18 bytes.
    pub(crate) fn seal(&self, unit: &mut Vec<u8>) {
        if unit.len() < BLOCK {
            let fill = (BLOCK - unit.len()) as u8;
            unit.resize(BLOCK, fill);
            unit.extend_from_slice(&PADDING_END);
        }
        self.0.xts.encrypt_sector(unit, self.0.key.iv);
    }

    /// Decrypts a unit that is `len` bytes long. No key makes this fail.
    pub(crate) fn open(&self, sealed: &[u8], len: usize) -> Result<Vec<u8>, CipherError> {
        let mut unit = self.decrypt(sealed)?;
        if len < BLOCK {
            unit.truncate(padded_len(&unit).filter(|found| *found == len).ok_or(CipherError::Padding)?);
        }
        Ok(unit)
    }

    /// Decrypts a unit of unknown length: a compressed one.
    pub(crate) fn open_compressed(&self, sealed: &[u8]) -> Result<Vec<u8>, CipherError> {
        let mut unit = self.decrypt(sealed)?;
        if let Some(len) = padded_len(&unit) {
            unit.truncate(len);
        }
        Ok(unit)
    }

    fn decrypt(&self, sealed: &[u8]) -> Result<Vec<u8>, CipherError> {
        match sealed.len() {
            found if found < BLOCK => Err(CipherError::Short { found }),
            found if found > MAX_UNIT => Err(CipherError::Long { found }),
            _ => {
                let mut unit = sealed.to_vec();
                self.0.xts.decrypt_sector(&mut unit, self.0.key.iv);
                Ok(unit)
            }
        }
    }
}

impl PartialEq for Cipher {
    fn eq(&self, other: &Self) -> bool {
        self.0.key == other.0.key
    }
}

impl Eq for Cipher {}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

/// Bytes that a stored unit of `len` bytes takes once it is encrypted.
pub(crate) fn sealed_len(len: u32) -> u32 {
    if len < BLOCK as u32 { PADDED as u32 } else { len }
}

/// Whether a compressed unit can be told from a padded one once it is encrypted.
pub(crate) fn is_unmistakable(compressed: &[u8]) -> bool {
    // Other readers look at the end of 18 bytes alone.
    compressed.len() >= BLOCK && !(compressed.len() == PADDED && compressed.ends_with(&PADDING_END))
}

/// How much of a unit is not padding, if it is padded.
fn padded_len(unit: &[u8]) -> Option<usize> {
    let padded = unit.strip_suffix(&PADDING_END).filter(|padded| padded.len() == BLOCK)?;
    let fill = padded[BLOCK - 1];
    let len = BLOCK.checked_sub(fill.into()).filter(|len| *len < BLOCK)?;
    padded[len..].iter().all(|byte| *byte == fill).then_some(len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cipher(key: [u8; 32], iv: [u8; 16]) -> Cipher {
        Cipher::new(CipherKey::new(key, iv).unwrap())
    }

    fn key(first: &str, second: &str) -> [u8; 32] {
        hex::decode(format!("{first}{second}")).unwrap().try_into().unwrap()
    }

    /// The data unit's number as a tweak.
    fn unit(number: u64) -> [u8; 16] {
        u128::from(number).to_le_bytes()
    }

    /// IEEE 1619-2007, annex B: vectors 2 to 4 (whole blocks) and 15 to 18 (ciphertext stealing). Vector 1 has equal halves.
    #[test]
    fn the_vectors_of_the_standard_hold() {
        let counting = |len: u8| (0..len).collect::<Vec<u8>>();
        let stealing = key("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0", "bfbebdbcbbbab9b8b7b6b5b4b3b2b1b0");
        let number = unit(0x12_3456_789A);
        let vectors = [
            (
                key("11111111111111111111111111111111", "22222222222222222222222222222222"),
                unit(0x33_3333_3333),
                vec![0x44; 32],
                "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
            ),
            (
                key("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0", "22222222222222222222222222222222"),
                unit(0x33_3333_3333),
                vec![0x44; 32],
                "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89",
            ),
            (stealing, number, counting(17), "6c1625db4671522d3d7599601de7ca09ed"),
            (stealing, number, counting(18), "d069444b7a7e0cab09e24447d24deb1fedbf"),
            (stealing, number, counting(19), "e5df1351c0544ba1350b3363cd8ef4beedbf9d"),
            (stealing, number, counting(20), "9d84c813f719aa2c7be3f66171c7c5c2edbf9dac"),
        ];
        for (key, iv, plain, sealed) in vectors {
            let (cipher, mut bytes) = (cipher(key, iv), plain.clone());
            cipher.seal(&mut bytes);
            assert_eq!(hex::encode(&bytes), sealed);
            assert_eq!(cipher.open(&bytes, plain.len()).unwrap(), plain);
        }
    }

    #[test]
    fn short_units_are_padded_and_their_padding_is_checked() {
        let cipher = cipher(key(&"12".repeat(16), &"34".repeat(16)), [7; 16]);
        for len in 0..BLOCK {
            let plain = vec![9; len];
            let mut sealed = plain.clone();
            cipher.seal(&mut sealed);
            assert_eq!(sealed.len(), PADDED);
            assert_eq!(sealed_len(len as u32), 18);
            assert_eq!(cipher.open(&sealed, len).unwrap(), plain);
            assert_eq!(cipher.open_compressed(&sealed).unwrap(), plain);
            assert_eq!(cipher.open(&sealed, (len + 1) % BLOCK), Err(CipherError::Padding));
            for position in 0..PADDED {
                let mut wrong = sealed.clone();
                wrong[position] ^= 1;
                assert_ne!(cipher.open(&wrong, len).as_ref(), Ok(&plain));
            }
        }
        assert_eq!(cipher.open(&[0; 15], 15), Err(CipherError::Short { found: 15 }));
    }

    #[test]
    fn what_ends_like_padding_and_is_none_stays_whole() {
        let cipher = cipher(key(&"12".repeat(16), &"34".repeat(16)), [7; 16]);
        // Eighteen bytes of a file, whose length says what they are.
        let like_padding = [&[5; 11][..], &[5; 5], &PADDING_END].concat();
        let mut sealed = like_padding.clone();
        cipher.seal(&mut sealed);
        assert_eq!(cipher.open(&sealed, 18).unwrap(), like_padding);
        assert_eq!(cipher.open_compressed(&sealed).unwrap(), [5; 11]);
        assert!(!is_unmistakable(&like_padding) && !is_unmistakable(&[0; 15]));
        assert!(is_unmistakable(&[0; 16]) && is_unmistakable(&[0; 18]));
    }

    #[test]
    fn keys_are_random_and_shown_to_nobody() {
        let (one, other) = (CipherKey::fresh().unwrap(), CipherKey::fresh().unwrap());
        assert!(one != other && one.iv != other.iv);
        assert_eq!(CipherKey::new([1; 32], [2; 16]), Err(WeakKey));
        let known = CipherKey::new(key(&"ab".repeat(16), &"cd".repeat(16)), [0xEF; 16]).unwrap();
        for shown in [format!("{known:?}"), format!("{:?}", Cipher::new(known))] {
            assert!(!shown.to_lowercase().contains("ab") && !shown.contains("171"), "{shown}");
        }
    }

    proptest! {
        #[test]
        fn units_of_any_length_round_trip_under_their_key_alone(
            key: [u8; 32],
            other: [u8; 32],
            iv: [u8; 16],
            plain in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            prop_assume!(key[..16] != key[16..] && other[..16] != other[16..] && key != other);
            let (cipher, wrong) = (cipher(key, iv), cipher(other, iv));
            let mut sealed = plain.clone();
            cipher.seal(&mut sealed);
            prop_assert_eq!(sealed.len(), sealed_len(plain.len() as u32) as usize);
            prop_assert_eq!(cipher.open(&sealed, plain.len()), Ok(plain.clone()));
            prop_assert_ne!(wrong.open(&sealed, plain.len()), Ok(plain.clone()));
            if is_unmistakable(&plain) {
                prop_assert_eq!(cipher.open_compressed(&sealed), Ok(plain));
            }
        }

        #[test]
        fn any_bytes_are_decrypted_or_refused(key: [u8; 32], iv: [u8; 16], sealed in prop::collection::vec(any::<u8>(), 0..40)) {
            prop_assume!(key[..16] != key[16..]);
            let cipher = cipher(key, iv);
            let _ = (cipher.open(&sealed, 3), cipher.open_compressed(&sealed));
        }
    }
}
