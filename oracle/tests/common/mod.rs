//! What both directions need: the other builder and daemon as programs, and the facts of a tree as the other reader tells them.

#![allow(dead_code, unreachable_pub)] // each test program uses its part

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use shoal_oracle::read::{Image, Node};

mod daemon;
#[path = "../../../rafs/tests/support/mod.rs"]
pub mod support;

use support::{Facts, assert_same};

/// Runs the other builder, or `PEER_BUILDER` in its place, with `input` on its standard input.
pub fn peer_with_input(arguments: &[&str], input: &str) {
    let program = std::env::var_os("PEER_BUILDER").unwrap_or_else(|| env!("CARGO_BIN_EXE_peer-image").into());
    let mut child =
        Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{arguments:?}");
}

pub fn peer(arguments: &[&str]) {
    peer_with_input(arguments, "");
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The only file of a folder, or the one that is not `known`.
pub fn new_file(dir: &Path, known: &[PathBuf]) -> PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| !known.contains(path));
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

/// That an image is a tree for all of theirs: the reader; the daemon, where it can mount; and the check of the builder, if it is the
/// original, which alone has one.
pub fn assert_theirs_agree(expected: &BTreeMap<PathBuf, Facts>, bootstrap: &Path, blobs: &Path) {
    assert_same(expected, &peer_facts(bootstrap, blobs));
    if let Some(mounted) = daemon::Mounted::new(bootstrap, blobs) {
        let mut found = support::facts(mounted.root());
        // It shows the time of the mount in the place of none, which is what 0 means to it.
        for (path, facts) in expected.iter().filter(|(_, facts)| facts.mtime.0 == 0) {
            found.get_mut(path).unwrap().mtime = facts.mtime;
        }
        assert_same(expected, &found);
    }
    if std::env::var_os("PEER_BUILDER").is_some() {
        peer(&["check", text(bootstrap), "--blob-dir", text(blobs)]);
    }
}

/// The facts of a tree as the other reader tells them.
pub fn peer_facts(bootstrap: &Path, blobs: &Path) -> BTreeMap<PathBuf, Facts> {
    let nodes = Image::open(bootstrap, blobs).unwrap().nodes().unwrap();
    let mut names: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    for node in &nodes {
        names.entry(node.ino).or_default().push(node.path.clone());
    }
    names.values_mut().for_each(|names| names.sort());
    nodes.into_iter().map(|node| (node.path.clone(), fact(node, &names))).collect()
}

fn fact(node: Node, names: &BTreeMap<u64, Vec<PathBuf>>) -> Facts {
    let names = &names[&node.ino];
    let rdev = node.rdev;
    Facts {
        mode: node.mode,
        uid: node.uid,
        gid: node.gid,
        mtime: node.mtime,
        rdev: rustix::fs::makedev((rdev & 0xF_FF00) >> 8, (rdev & 0xFF) | ((rdev >> 12) & 0xF_FF00)),
        names: if node.content.is_some() && names.len() > 1 { names.clone() } else { Vec::new() },
        content: node.content.map(|content| (content.len() as u64, *blake3::hash(&content).as_bytes())),
        target: node.target,
        xattrs: node.xattrs.into_iter().collect(),
    }
}
