//! PAX records: `<length> <key>=<value>\n`, where values may hold any byte.

use std::collections::BTreeMap;

/// The records in front of one entry, in order.
#[derive(Debug, Default)]
pub(super) struct Records {
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Records {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, String> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let (key, value, rest) = split(bytes).ok_or_else(|| {
                format!("malformed PAX record {:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(80)]))
            })?;
            records.push((key.to_vec(), value.to_vec()));
            bytes = rest;
        }
        Ok(Self { records })
    }

    /// The last record of a key. An empty value takes an earlier one back.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        let mut found = self.records.iter().rev().filter(|(name, _)| name == key.as_bytes());
        found.next().map(|(_, value)| value.as_slice()).filter(|value| !value.is_empty())
    }

    /// All records, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.records.iter().map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    /// The name of the entry; sparse files carry it under a key of their own.
    pub(super) fn path(&self) -> Option<&[u8]> {
        self.get("GNU.sparse.name").or_else(|| self.get("path"))
    }

    /// Extended attributes, sorted, the last of each name.
    pub(super) fn xattrs(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let named = self.iter().filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?, value)));
        let xattrs: BTreeMap<_, _> = named.collect();
        xattrs.into_iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
    }
}

/// The first record and what follows it.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let record = record.strip_suffix(b"\n")?.get(space + 1..)?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], rest))
}

/// A number without a sign.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(text).ok()?;
    // `parse` would take a plus sign.
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// Seconds since 1970, possibly negative, possibly with a fraction: whole seconds, rounded down, and nanoseconds.
pub(super) fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |text| (true, text));
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, &b""[..]),
    };
    if whole.is_empty() || !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_may_hold_any_byte() {
        let records = Records::parse(b"9 path=x\n23 SCHILY.xattr.a=\n=\0 \n11 path=y\x01\n").unwrap();
        assert_eq!(records.path(), Some(&b"y\x01"[..]));
        assert_eq!(records.xattrs(), [(b"a".to_vec(), b"\n=\0 ".to_vec())]);
        assert_eq!(Records::parse(b"9 path=x\n8 path=\n").unwrap().path(), None);
    }

    #[test]
    fn malformed_records_are_refused() {
        for bytes in
            [&b"x"[..], b"9 path=x", b"11 path=x\n", b"8 path=x\n", b"3 \n", b"+9 path=x\n", b"6 path\n", b"1 "]
        {
            assert!(Records::parse(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn times_are_exact_on_both_sides_of_1970() {
        let cases = [
            ("0", Some((0, 0))),
            ("12.5", Some((12, 500_000_000))),
            ("1.0000000019", Some((1, 1))),
            ("-1", Some((-1, 0))),
            ("-0.000000001", Some((-1, 999_999_999))),
            ("-1.5", Some((-2, 500_000_000))),
            ("5.", Some((5, 0))),
            (".5", None),
            ("", None),
            ("-", None),
            ("1e3", None),
            ("1.-5", None),
            ("99999999999999999999", None),
        ];
        for (text, expected) in cases {
            assert_eq!(time(text.as_bytes()), expected, "{text:?}");
        }
    }
}
