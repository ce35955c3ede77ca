//! The kernel's table of mounts, as /proc/self/mountinfo shows it. Reading it never asks a file system anything, so
//! it works with dead mounts too, whose root may still answer stat(2) from the kernel's cache.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// `MAJOR:MINOR` of its device number; unique as long as the file system lives.
    pub(super) device: String,
    pub(super) mountpoint: PathBuf,
    pub(super) fs_type: String,
    /// Device, or whatever the file system was told to show in its place.
    pub(super) source: PathBuf,
}

impl Entry {
    pub(super) fn is_fuse(&self) -> bool {
        self.fs_type == "fuse" || self.fs_type.starts_with("fuse.")
    }

    pub(super) fn is_erofs(&self) -> bool {
        self.fs_type == "erofs"
    }
}

/// The mount that is seen at `mountpoint`, an absolute path without links: of several one over another, the last.
pub(super) fn top(mountpoint: &Path) -> io::Result<Option<Entry>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').rev().filter_map(parse).find(|entry| entry.mountpoint == mountpoint))
}

/// All mounts.
pub(super) fn entries() -> io::Result<Vec<Entry>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// A line is `id parent device root mountpoint options [optional fields..] - type source options`; see proc(5).
fn parse(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = fields.nth(2)?;
    let mountpoint = fields.nth(1)?;
    let mut fields = fields.skip_while(|field| *field != b"-");
    let (fs_type, source) = (fields.nth(1)?, fields.next()?);
    let path = |field| PathBuf::from(OsString::from_vec(unescape(field)));
    let text = |field: &[u8]| String::from_utf8(field.to_vec()).ok();
    Some(Entry { device: text(device)?, mountpoint: path(mountpoint), fs_type: text(fs_type)?, source: path(source) })
}

/// Space, tab, newline and backslash are written as `\` and three octal digits.
fn unescape(mut field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    while let Some((byte, rest)) = field.split_first() {
        let digits =
            rest.get(..3).filter(|digits| *byte == b'\\' && digits.iter().all(|c| (b'0'..=b'7').contains(c)));
        match digits {
            Some(digits) => {
                bytes.push(digits.iter().fold(0u8, |value, digit| value.wrapping_shl(3) | (digit - b'0')));
                field = &rest[3..];
            }
            None => {
                bytes.push(*byte);
                field = rest;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_lines_with_and_without_optional_fields() {
        let line = b"36 35 0:45 / /mnt/a\\040b\\134\\377 ro,nosuid shared:1 master:2 - fuse shoal rw,user_id=0";
        let entry = parse(line).unwrap();
        assert_eq!((entry.device.as_str(), entry.fs_type.as_str(), entry.is_fuse()), ("0:45", "fuse", true));
        assert_eq!(entry.mountpoint.into_os_string().into_vec(), b"/mnt/a b\\\xff");
        assert_eq!(entry.source, Path::new("shoal"));

        let entry = parse(b"21 1 253:0 / / rw - ext4 /dev/root rw").unwrap();
        assert_eq!(entry.mountpoint, Path::new("/"));
        assert!(!entry.is_fuse());
        assert!(parse(b"").is_none());
        assert!(parse(b"21 1 253:0 / / rw").is_none());
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(top(Path::new("/")).unwrap().is_some());
        assert_eq!(top(Path::new("/no/such/mountpoint")).unwrap(), None);
    }
}
