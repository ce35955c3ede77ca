//! Headers of tar entries: ustar, with PAX records for what does not fit.

use std::io::{self, Write};

use tar::{EntryType, Header};

use crate::bootstrap::{Inode, Kind};

/// Bytes that name and link name have in a plain header.
const NAME_FIELD: usize = 100;

/// The header of anything but a further name of a file, with all xattrs but one.
pub(super) fn write(
    output: &mut impl Write,
    path: &[u8],
    target: &[u8],
    inode: &Inode<'_>,
    left_out: Option<&[u8]>,
) -> io::Result<()> {
    let entry_type = match inode.kind() {
        Kind::Directory => EntryType::Directory,
        Kind::Symlink => EntryType::Symlink,
        Kind::CharDevice => EntryType::Char,
        Kind::BlockDevice => EntryType::Block,
        Kind::Fifo => EntryType::Fifo,
        Kind::File | Kind::Socket => EntryType::Regular,
    };
    let xattrs = inode.xattrs().filter(|(name, _)| Some(name.as_slice()) != left_out);
    let xattrs = xattrs.map(|(name, value)| ([b"SCHILY.xattr.", name.as_slice()].concat(), value.to_vec()));
    entry(output, path, target, entry_type, xattrs.collect(), inode)
}

/// The header of an empty file with the attributes of something that is no file.
pub(super) fn write_empty_file(output: &mut impl Write, path: &[u8], inode: &Inode<'_>) -> io::Result<()> {
    entry(output, path, b"", EntryType::Regular, Vec::new(), inode)
}

/// The header of a further name of a file.
pub(super) fn write_hard_link(
    output: &mut impl Write,
    path: &[u8],
    first: &[u8],
    inode: &Inode<'_>,
) -> io::Result<()> {
    entry(output, path, first, EntryType::Link, Vec::new(), inode)
}

fn entry(
    output: &mut impl Write,
    path: &[u8],
    link: &[u8],
    entry_type: EntryType,
    mut records: Vec<(Vec<u8>, Vec<u8>)>,
    inode: &Inode<'_>,
) -> io::Result<()> {
    for (key, name) in [(&b"path"[..], path), (b"linkpath", link)] {
        if name.len() > NAME_FIELD {
            records.push((key.to_vec(), name.to_vec()));
        }
    }
    let (seconds, nanoseconds) = inode.mtime();
    if seconds < 0 || nanoseconds != 0 {
        records.push((b"mtime".to_vec(), decimal_time(seconds, nanoseconds).into_bytes()));
    }
    if !records.is_empty() {
        let body: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        put(&mut header.as_old_mut().name, b"PaxHeader");
        header.set_mode(0o644);
        header.set_size(body.len() as u64);
        header.set_cksum();
        output.write_all(header.as_bytes())?;
        output.write_all(&body)?;
        output.write_all(&vec![0; body.len().next_multiple_of(512) - body.len()])?;
    }
    let mut header = Header::new_ustar();
    header.set_entry_type(entry_type);
    put(&mut header.as_old_mut().name, path);
    put(&mut header.as_old_mut().linkname, link);
    header.set_mode(inode.mode() & 0o7777);
    header.set_uid(inode.uid().into());
    header.set_gid(inode.gid().into());
    header.set_mtime(seconds.max(0) as u64);
    let has_content = entry_type == EntryType::Regular && inode.kind() == Kind::File;
    header.set_size(if has_content { inode.size() } else { 0 });
    if matches!(entry_type, EntryType::Char | EntryType::Block) {
        let (major, minor) = split_device(inode.rdev());
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
    }
    header.set_cksum();
    output.write_all(header.as_bytes())
}

/// As much of a name as the field holds; a PAX record has the rest.
fn put(field: &mut [u8; NAME_FIELD], name: &[u8]) {
    let len = name.len().min(NAME_FIELD);
    field[..len].copy_from_slice(&name[..len]);
}

/// `<length> <key>=<value>\n`, where the length counts its own digits.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// Seconds with a fraction; the nanoseconds count forward also before 1970.
fn decimal_time(seconds: i64, nanoseconds: u32) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let sign = if total < 0 { "-" } else { "" };
    let (seconds, nanoseconds) = (total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000);
    if nanoseconds == 0 { format!("{sign}{seconds}") } else { format!("{sign}{seconds}.{nanoseconds:09}") }
}

/// The kernel's `new_decode_dev`.
fn split_device(dev: u32) -> (u32, u32) {
    ((dev & 0xF_FF00) >> 8, (dev & 0xFF) | ((dev >> 12) & 0xF_FF00))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_their_own_length() {
        assert_eq!(record(b"path", b"x"), b"9 path=x\n");
        for len in [0, 1, 80, 90, 91, 92, 93, 94, 990, 991, 992, 993, 994, 70_000] {
            let record = record(b"k", &vec![b'v'; len]);
            let stated: usize = String::from_utf8_lossy(&record).split(' ').next().unwrap().parse().unwrap();
            assert_eq!(stated, record.len());
        }
    }

    #[test]
    fn times_are_exact_on_both_sides_of_1970() {
        let cases = [
            (0, 5, "0.000000005"),
            (-1, 0, "-1"),
            (-1, 999_999_999, "-0.000000001"),
            (-2, 500_000_000, "-1.500000000"),
        ];
        for (seconds, nanoseconds, expected) in cases {
            assert_eq!(decimal_time(seconds, nanoseconds), expected);
        }
    }

    #[test]
    fn devices_are_decoded_as_the_kernel_does() {
        assert_eq!(split_device(0x103), (1, 3));
        assert_eq!(split_device(0x1231_0345), (259, 0x1_2345 & 0xFF | 0x1_2300));
    }
}
