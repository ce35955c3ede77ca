//! A source tree with everything that an image can hold, and a comparison of two trees on disk.

#![allow(dead_code, unreachable_pub, missing_docs)] // each test program uses its part

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use filetime::FileTime;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

pub mod archive;
pub mod image;

pub const CHUNK: usize = 0x1000;

/// Whether devices, owners and trusted xattrs can be made.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Fills `root` with files of interesting sizes, names, kinds, owners, times and attributes.
pub fn nasty_tree(root: &Path) {
    fs::create_dir_all(root).unwrap();
    files(root);
    names(root);
    links(root);
    attributes(root);
    if is_root() {
        nodes(root);
    }
    // Last, because everything above touches directories.
    times(root);
}

fn files(root: &Path) {
    let dir = root.join("sizes");
    fs::create_dir(&dir).unwrap();
    // Around the limits of blocks and chunks, where off-by-one errors live.
    for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5, 40 * CHUNK + 17] {
        fs::write(dir.join(format!("noise-{len}")), noise(len as u64, len)).unwrap();
        fs::write(dir.join(format!("text-{len}")), &b"the same words again ".repeat(len / 21 + 1)[..len]).unwrap();
    }
    fs::write(dir.join("zeroes"), vec![0; 10 * CHUNK]).unwrap();
    fs::write(dir.join("copy"), noise(1, CHUNK).repeat(3)).unwrap();
    fs::write(dir.join("copy-again"), noise(1, CHUNK).repeat(2)).unwrap();
}

fn names(root: &Path) {
    let dir = root.join("names");
    fs::create_dir_all(dir.join("empty")).unwrap();
    let long = vec![b'n'; 255];
    let odd: [&[u8]; 12] = [
        b"!before-dot",
        b"-",
        b"+",
        b"...",
        b"..a",
        b".hidden",
        b"new\nline",
        b"\xff\xfe",
        b"\x01",
        b"sp ace",
        "ümlaut".as_bytes(),
        &long,
    ];
    for name in odd {
        fs::write(dir.join(OsStr::from_bytes(name)), name).unwrap();
    }
    // Several blocks of entries, full ones and a partial one.
    let many = root.join("many");
    fs::create_dir(&many).unwrap();
    for number in 0..700 {
        fs::write(many.join(format!("{number}-{}", "x".repeat(number % 200))), format!("{number}")).unwrap();
    }
    // One name per size of the last block, so that tails of all lengths occur.
    for count in [1, 14, 15, 16, 17, 31] {
        let dir = root.join(format!("tail-{count}"));
        fs::create_dir(&dir).unwrap();
        for number in 0..count {
            fs::write(dir.join(format!("{number:02}-{}", "y".repeat(245))), b"").unwrap();
        }
    }
    let mut deep = root.join("deep");
    for level in 0..60 {
        deep.push(format!("level-{level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), b"bottom").unwrap();
}

fn links(root: &Path) {
    let dir = root.join("links");
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("first"), noise(77, 2 * CHUNK)).unwrap();
    fs::hard_link(dir.join("first"), dir.join("second")).unwrap();
    fs::hard_link(dir.join("first"), dir.join("sub/third")).unwrap();
    symlink("first", dir.join("to-first")).unwrap();
    symlink("nowhere/at/all", dir.join("broken")).unwrap();
    symlink(OsStr::from_bytes(b"\xff\xfe"), dir.join("odd")).unwrap();
    for len in [101, 3900, 4000, 4095] {
        symlink("t".repeat(len), dir.join(format!("long-{len}"))).unwrap();
    }
}

fn attributes(root: &Path) {
    let dir = root.join("attributes");
    fs::create_dir(&dir).unwrap();
    for mode in [0o000, 0o644, 0o755, 0o4755, 0o2711, 0o1777] {
        let path = dir.join(format!("mode-{mode:o}"));
        fs::write(&path, b"").unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    let path = dir.join("xattrs");
    fs::write(&path, noise(5, CHUNK + 1)).unwrap();
    xattr::set(&path, "user.empty", b"").unwrap();
    for number in 0..9 {
        xattr::set(&path, format!("user.number-{number}"), &noise(number, 7 * number as usize)).unwrap();
    }
    xattr::set(&path, "user.large", &noise(9, 1500)).unwrap();
    // A directory whose entries would fit behind its inode, were it not for the xattr.
    let crowded = dir.join("crowded");
    fs::create_dir(&crowded).unwrap();
    xattr::set(&crowded, "user.large", &noise(10, 2500)).unwrap();
    for number in 0..30 {
        fs::write(crowded.join(format!("{number:02}-{}", "z".repeat(60))), b"").unwrap();
    }
    if !is_root() {
        return;
    }
    for (number, (uid, gid)) in
        [(0, 0), (1000, 1001), (70_000, 80_000), (u32::MAX - 1, u32::MAX - 1)].iter().enumerate()
    {
        let path = dir.join(format!("owner-{number}"));
        fs::write(&path, b"").unwrap();
        chown(path, Some(*uid), Some(*gid)).unwrap();
    }
    xattr::set(&path, "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(&path, "security.capability", &capability()).unwrap();
    // Version 2, then tag, permissions, id: owner rw, user 1000 r, group r, mask r, other none.
    let acl: Vec<u8> = [2u32.to_le_bytes().to_vec()]
        .into_iter()
        .chain(
            [(1u16, 6u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)]
                .map(|(tag, bits, id)| [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat()),
        )
        .flatten()
        .collect();
    // Not every file system keeps ACLs.
    let _ = xattr::set(&path, "system.posix_acl_access", &acl);
    let _ = xattr::set(&crowded, "system.posix_acl_default", &acl);
    symlink("x", dir.join("link-with-xattr")).unwrap();
    xattr::set(dir.join("link-with-xattr"), "trusted.on-link", b"yes").unwrap();
    lchown(dir.join("link-with-xattr"), Some(5), Some(6)).unwrap();
}

/// cap_net_raw, effective and permitted.
fn capability() -> Vec<u8> {
    [0x0200_0001u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn nodes(root: &Path) {
    let dir = root.join("nodes");
    fs::create_dir(&dir).unwrap();
    let mode = Mode::from_raw_mode(0o640);
    for (name, kind, major, minor) in [
        ("null", FileType::CharacterDevice, 1, 3),
        ("disk", FileType::BlockDevice, 8, 17),
        ("large-minor", FileType::BlockDevice, 259, 0x12345),
        ("whiteout", FileType::CharacterDevice, 0, 0),
        ("fifo", FileType::Fifo, 0, 0),
        ("socket", FileType::Socket, 0, 0),
    ] {
        mknodat(CWD, dir.join(name), kind, mode, makedev(major, minor)).unwrap();
    }
}

fn times(root: &Path) {
    let sizes = root.join("sizes");
    let times =
        [(0, 0), (1, 1), (1_700_000_000, 123_456_789), (-1, 0), (-2, 500_000_000), (5_000_000_000, 999_999_999)];
    for (name, (seconds, nanoseconds)) in
        ["noise-0", "noise-1", "text-0", "text-1", "zeroes", "copy"].iter().zip(times)
    {
        let time = FileTime::from_unix_time(seconds, nanoseconds);
        filetime::set_file_times(sizes.join(name), FileTime::zero(), time).unwrap();
    }
    filetime::set_symlink_file_times(root.join("links/broken"), FileTime::zero(), FileTime::from_unix_time(7, 8))
        .unwrap();
    filetime::set_file_mtime(root.join("names/empty"), FileTime::from_unix_time(9, 10)).unwrap();
}

/// Everything about one name that an image keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub rdev: u64,
    /// Size and BLAKE3 of a file.
    pub content: Option<(u64, [u8; 32])>,
    pub target: Option<Vec<u8>>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The other names of a file, sorted; only for files with several.
    pub names: Vec<PathBuf>,
}

/// All facts of a tree by relative path; the root is the empty path.
pub fn facts(root: &Path) -> BTreeMap<PathBuf, Facts> {
    let mut facts = BTreeMap::new();
    let mut inodes: BTreeMap<(u64, u64), Vec<PathBuf>> = BTreeMap::new();
    let mut paths = vec![PathBuf::new()];
    while let Some(relative) = paths.pop() {
        // Not `join` for the root: it would add a slash.
        let path = if relative.as_os_str().is_empty() { root.to_owned() } else { root.join(&relative) };
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        if kind.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|entry| relative.join(entry.unwrap().file_name())));
        }
        if kind.is_file() && metadata.nlink() > 1 {
            inodes.entry((metadata.dev(), metadata.ino())).or_default().push(relative.clone());
        }
        facts.insert(relative, fact(&path, &metadata));
    }
    for mut names in inodes.into_values() {
        names.sort();
        for name in &names {
            facts.get_mut(name).unwrap().names.clone_from(&names);
        }
    }
    facts
}

fn fact(path: &Path, metadata: &fs::Metadata) -> Facts {
    let kind = metadata.file_type();
    let device = kind.is_char_device() || kind.is_block_device();
    let xattrs = xattr::list(path).map(Iterator::collect::<Vec<OsString>>).unwrap_or_default();
    let xattrs = xattrs.into_iter().map(|name| {
        let value = xattr::get(path, &name).unwrap().unwrap();
        (name.into_vec(), value)
    });
    Facts {
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        rdev: if device { metadata.rdev() } else { 0 },
        content: kind.is_file().then(|| {
            let mut hasher = blake3::Hasher::new();
            let len = std::io::copy(&mut File::open(path).unwrap(), &mut hasher).unwrap();
            (len, *hasher.finalize().as_bytes())
        }),
        target: kind.is_symlink().then(|| fs::read_link(path).unwrap().into_os_string().into_vec()),
        xattrs: xattrs.collect(),
        names: Vec::new(),
    }
}

/// Fails with the first difference only: whole trees are no help on a screen.
pub fn assert_same(expected: &BTreeMap<PathBuf, Facts>, found: &BTreeMap<PathBuf, Facts>) {
    let text = |facts: &Facts| {
        let xattrs: Vec<_> =
            facts.xattrs.iter().map(|(name, value)| (OsStr::from_bytes(name), value.len())).collect();
        format!("{:?} xattrs {xattrs:?}", Facts { xattrs: BTreeMap::new(), ..facts.clone() })
    };
    for (path, facts) in expected {
        let found = found.get(path);
        let (expected, other) = (text(facts), found.map_or("nothing".into(), text));
        assert!(found == Some(facts), "{}:\nexpected {expected}\nfound    {other}", path.display());
    }
    let extra: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(extra.is_empty(), "not in the source: {extra:?}");
}
