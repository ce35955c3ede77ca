//! Inodes as the kernel sees them: numbers and attributes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};

use crate::bootstrap::{Inode, Kind, Nid};

/// Set in the number of an inode whose nid has a meaning of its own in FUSE. No nid has it: a nid is an offset in the
/// bootstrap divided by 32.
const MOVED: u64 = 1 << 63;

/// Between nids and FUSE inode numbers, one to one: the root is 1, all others keep their nid. So numbers are the same in
/// every mount of an image, and all names of a hard link have the same one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Numbers {
    root: Nid,
}

impl Numbers {
    pub(super) fn new(root: Nid) -> Self {
        Self { root }
    }

    pub(super) fn ino(self, nid: Nid) -> INodeNo {
        if nid == self.root {
            return INodeNo::ROOT;
        }
        // 0 is "no such entry", 1 is the root.
        INodeNo(if nid.0 <= 1 { nid.0 | MOVED } else { nid.0 })
    }

    pub(super) fn nid(self, ino: INodeNo) -> Nid {
        if ino == INodeNo::ROOT { self.root } else { Nid(ino.0 & !MOVED) }
    }
}

/// Everything that stat(2) tells. RAFS has one time: it stands for all of them.
pub(super) fn attributes(inode: &Inode<'_>, ino: INodeNo) -> FileAttr {
    let size = match inode.kind() {
        Kind::File | Kind::Directory | Kind::Symlink => inode.size(),
        _ => 0,
    };
    let time = system_time(inode.mtime());
    FileAttr {
        ino,
        size,
        blocks: size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: UNIX_EPOCH,
        kind: file_type(inode.kind()),
        perm: (inode.mode() & 0o7777) as u16,
        nlink: inode.nlink(),
        uid: inode.uid(),
        gid: inode.gid(),
        // FUSE has the same 32-bit form as RAFS; the kernel decodes it.
        rdev: inode.rdev(),
        blksize: 4096,
        flags: 0,
    }
}

/// Attributes that say, with a time to live, that a name does not exist.
pub(super) fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
    }
}

/// A time before 1970 has negative seconds and, as in `struct timespec`, nanoseconds that count upwards.
fn system_time((seconds, nanoseconds): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    time.and_then(|time| time.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_one_to_one_for_any_root() {
        for root in [0, 1, 2, 128, u64::MAX >> 5] {
            let numbers = Numbers::new(Nid(root));
            let nids = [0, 1, 2, 3, 127, 128, 129, u64::MAX >> 5];
            let inos: Vec<_> = nids.iter().map(|nid| numbers.ino(Nid(*nid))).collect();
            for (position, (nid, ino)) in nids.iter().zip(&inos).enumerate() {
                assert_eq!(numbers.nid(*ino), Nid(*nid), "nid {nid}, root {root}");
                assert_ne!(ino.0, 0, "nid {nid}, root {root}");
                assert!(!inos[..position].contains(ino), "nid {nid}, root {root}");
            }
            assert_eq!(numbers.ino(Nid(root)), INodeNo::ROOT);
        }
    }

    #[test]
    fn times_before_1970_and_at_the_ends_of_the_range() {
        assert_eq!(system_time((5, 7)), UNIX_EPOCH + Duration::new(5, 7));
        assert_eq!(system_time((-2, 800_000_000)), UNIX_EPOCH - Duration::from_millis(1200));
        assert_eq!(system_time((i64::MIN, 0)), UNIX_EPOCH - Duration::from_secs(1 << 63));
        assert!(system_time((i64::MAX, 999_999_999)) > UNIX_EPOCH);
    }
}
