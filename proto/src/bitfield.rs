//! Which pieces of a blob somebody has: a fixed length, set operations, and a compact wire form.
//!
//! Pieces arrive mostly in order, so a bitfield is either a few long runs or noise: the wire form is a list of runs
//! or the raw bits, whichever is smaller. Decoding takes the greatest length that the reader expects, and checks it
//! before anything is allocated.

use std::{fmt, ops::Range};

use prost::Message;

use crate::generated::wire;

/// Most pieces that one bitfield on the wire describes: 32 KiB of raw bits. A longer blob is described window by
/// window.
pub const MAX_WIRE_PIECES: u32 = 1 << 18;

const WORD: u32 = u64::BITS;

/// Why a wire form is not a bitfield.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BitfieldError {
    /// It speaks of more pieces than the reader expects.
    #[error("a bitfield of {found} pieces where at most {limit} were expected")]
    TooLong {
        /// Number of pieces claimed.
        found: u32,
        /// Greatest number accepted.
        limit: u32,
    },
    /// The raw bits are not as many as the length says, or a bit past the end is set.
    #[error("{found} bytes of bits do not describe {length} pieces")]
    WrongBits {
        /// Number of bytes found.
        found: usize,
        /// Number of pieces claimed.
        length: u32,
    },
    /// The runs do not end within the length.
    #[error("the runs of a bitfield pass its length of {length} pieces")]
    WrongRuns {
        /// Number of pieces claimed.
        length: u32,
    },
    /// Both forms at once.
    #[error("a bitfield in two forms at once")]
    TwoForms,
    /// Not the protobuf message.
    #[error("a bitfield that does not parse: {0}")]
    Malformed(#[from] prost::DecodeError),
}

/// A set of piece numbers below a fixed length.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Bitfield {
    len: u32,
    count: u32,
    /// Bits past `len` are zero.
    words: Vec<u64>,
}

impl Bitfield {
    /// The empty set over `len` pieces.
    pub fn new(len: u32) -> Self {
        Self { len, count: 0, words: vec![0; len.div_ceil(WORD) as usize] }
    }

    /// All of `len` pieces.
    pub fn full(len: u32) -> Self {
        let mut full = Self::new(len);
        full.insert_range(0..len);
        full
    }

    /// The number of pieces that it speaks about.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether no piece is in the set.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether every piece is in the set.
    pub fn is_full(&self) -> bool {
        self.count == self.len
    }

    /// The number of pieces in the set.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether `piece` is in the set; never for a piece past the length.
    pub fn contains(&self, piece: u32) -> bool {
        piece < self.len && self.words[(piece / WORD) as usize] >> (piece % WORD) & 1 == 1
    }

    /// Adds `piece` and says whether it was new. A piece past the length is not added.
    pub fn insert(&mut self, piece: u32) -> bool {
        let new = piece < self.len && !self.contains(piece);
        if new {
            self.words[(piece / WORD) as usize] |= 1 << (piece % WORD);
            self.count += 1;
        }
        new
    }

    /// Adds every piece of `range` that is below the length.
    pub fn insert_range(&mut self, range: Range<u32>) {
        let end = range.end.min(self.len);
        let mut at = range.start;
        while at < end {
            let stop = end.min((at / WORD + 1) * WORD);
            let mask = (u64::MAX >> (WORD - (stop - at))) << (at % WORD);
            let word = &mut self.words[(at / WORD) as usize];
            self.count += (mask & !*word).count_ones();
            *word |= mask;
            at = stop;
        }
    }

    /// Takes `piece` out and says whether it was there.
    pub fn remove(&mut self, piece: u32) -> bool {
        let there = self.contains(piece);
        if there {
            self.words[(piece / WORD) as usize] &= !(1 << (piece % WORD));
            self.count -= 1;
        }
        there
    }

    /// Adds what is in `other`; pieces past the length are left out.
    pub fn union_with(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine | theirs);
    }

    /// Keeps only what is also in `other`.
    pub fn intersect_with(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine & theirs);
    }

    /// Takes out what is in `other`.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine & !theirs);
    }

    fn combine(&mut self, other: &Self, op: impl Fn(u64, u64) -> u64) {
        self.count = 0;
        for (at, word) in self.words.iter_mut().enumerate() {
            *word = op(*word, other.words.get(at).copied().unwrap_or(0));
            let over = ((at as u64 + 1) * u64::from(WORD)).saturating_sub(u64::from(self.len));
            if over > 0 {
                *word &= u64::MAX >> over;
            }
            self.count += word.count_ones();
        }
    }

    /// The pieces in the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(at, &word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                left &= left.checked_sub(1)?;
                Some(at as u32 * WORD + bit)
            })
        })
    }

    /// The longest ranges of consecutive pieces in the set, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.next(from, true)?;
            let end = self.next(start, false).unwrap_or(self.len);
            from = end;
            Some(start..end)
        })
    }

    /// The first piece at or after `from` that is in the set.
    pub fn next_set(&self, from: u32) -> Option<u32> {
        self.next(from, true)
    }

    /// The first piece at or after `from` that is in this set and in `other`.
    pub fn next_common(&self, other: &Self, from: u32) -> Option<u32> {
        let mut mask = u64::MAX << (from % WORD);
        for at in (from / WORD) as usize..self.words.len().min(other.words.len()) {
            let both = self.words[at] & other.words[at] & mask;
            if both != 0 {
                return Some(at as u32 * WORD + both.trailing_zeros());
            }
            mask = u64::MAX;
        }
        None
    }

    /// The 64 pieces from `from` on, the first in the lowest bit; what lies past the length is absent.
    pub fn bits_from(&self, from: u32) -> u64 {
        let word = |at: u32| self.words.get(at as usize).copied().unwrap_or(0);
        let (at, shift) = (from / WORD, from % WORD);
        match shift {
            0 => word(at),
            _ => word(at) >> shift | word(at + 1) << (WORD - shift),
        }
    }

    /// Replaces the 64 pieces from `64 * at` on, the first in the lowest bit. What lies past the length is left out.
    pub fn set_word(&mut self, at: u32, bits: u64) {
        let left = self.len.saturating_sub(at.saturating_mul(WORD));
        let Some(word) = self.words.get_mut(at as usize) else { return };
        let bits = if left < WORD { bits & !(u64::MAX << left) } else { bits };
        self.count = self.count - word.count_ones() + bits.count_ones();
        *word = bits;
    }

    /// The first piece at or after `from` that is not in the set.
    pub fn next_unset(&self, from: u32) -> Option<u32> {
        self.next(from, false)
    }

    fn next(&self, from: u32, set: bool) -> Option<u32> {
        let mut at = from;
        while at < self.len {
            let word = self.words[(at / WORD) as usize];
            let left = (if set { word } else { !word }) >> (at % WORD);
            if left != 0 {
                let found = at + left.trailing_zeros();
                return (found < self.len).then_some(found);
            }
            at = (at / WORD + 1) * WORD;
        }
        None
    }

    /// The `len` pieces from `first` on as a bitfield of their own; pieces past the end are absent.
    pub fn window(&self, first: u32, len: u32) -> Self {
        let mut window = Self::new(len);
        let end = first.saturating_add(len);
        let mut from = first;
        while let Some(start) = self.next(from, true).filter(|&start| start < end) {
            let stop = self.next(start, false).unwrap_or(self.len).min(end);
            window.insert_range(start - first..stop - first);
            from = stop;
        }
        window
    }

    /// The wire form.
    pub fn encode(&self) -> Vec<u8> {
        self.to_wire().encode_to_vec()
    }

    /// From the wire form of at most `limit` pieces.
    pub fn decode(bytes: &[u8], limit: u32) -> Result<Self, BitfieldError> {
        Self::from_wire(&wire::Bitfield::decode(bytes)?, limit)
    }

    pub(crate) fn to_wire(&self) -> wire::Bitfield {
        let size = self.len.div_ceil(8) as usize;
        let mut runs = Vec::new();
        let (mut spent, mut at) = (0, 0);
        for run in self.runs() {
            spent += prost::length_delimiter_len((run.start - at) as usize) + prost::length_delimiter_len(run.len());
            if spent > size {
                let bytes = self.words.iter().flat_map(|word| word.to_le_bytes()).take(size).collect();
                return wire::Bitfield { length: self.len, runs: Vec::new(), bits: bytes };
            }
            runs.extend([run.start - at, run.end - run.start]);
            at = run.end;
        }
        wire::Bitfield { length: self.len, runs, bits: Vec::new() }
    }

    pub(crate) fn from_wire(wire: &wire::Bitfield, limit: u32) -> Result<Self, BitfieldError> {
        if wire.length > limit {
            return Err(BitfieldError::TooLong { found: wire.length, limit });
        }
        match (wire.runs.is_empty(), wire.bits.is_empty()) {
            (_, true) => Self::from_runs(&wire.runs, wire.length),
            (true, false) => Self::from_bits(&wire.bits, wire.length),
            (false, false) => Err(BitfieldError::TwoForms),
        }
    }

    fn from_runs(runs: &[u32], length: u32) -> Result<Self, BitfieldError> {
        let mut field = Self::new(length);
        let mut at = 0u32;
        for (turn, &run) in runs.iter().enumerate() {
            let wrong = BitfieldError::WrongRuns { length };
            let end = at.checked_add(run).filter(|&end| end <= length).ok_or(wrong)?;
            if turn % 2 == 1 {
                field.insert_range(at..end);
            }
            at = end;
        }
        Ok(field)
    }

    fn from_bits(bits: &[u8], length: u32) -> Result<Self, BitfieldError> {
        let wrong = BitfieldError::WrongBits { found: bits.len(), length };
        if bits.len() != length.div_ceil(8) as usize {
            return Err(wrong);
        }
        let mut field = Self::new(length);
        for (word, bytes) in field.words.iter_mut().zip(bits.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(whole);
            field.count += word.count_ones();
        }
        match length % 8 {
            0 => Ok(field),
            used if bits.last().is_some_and(|last| last >> used != 0) => Err(wrong),
            _ => Ok(field),
        }
    }
}

impl fmt::Debug for Bitfield {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bitfield({}/{}:", self.count, self.len)?;
        for run in self.runs().take(8) {
            write!(f, " {}..{}", run.start, run.end)?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests;
