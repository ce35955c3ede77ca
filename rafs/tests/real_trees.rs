//! Real trees survive every combination of compressor, chunk size and batches: as the image tells them, as GNU tar unpacks them, and
//! as the kernel mounts them. The tree is this machine's Python, or those that `SHOAL_TREES` names, separated by colons, such as
//! `/usr` or the root of another system.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use shoal_rafs::{BuildOptions, Compressor, unpack};

#[path = "support/erofs.rs"]
mod erofs;
mod support;

use support::{Facts, assert_same};

/// The library of a Python, of which machines have many files and little that is large.
const LIBRARY: &str = "/usr/lib";

fn trees() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("SHOAL_TREES") {
        let named = named.into_vec();
        return named.split(|&byte| byte == b':').map(|path| OsStr::from_bytes(path).into()).collect();
    }
    let python = |name: &OsStr| name.as_bytes().starts_with(b"python3.");
    let entries = fs::read_dir(LIBRARY).into_iter().flatten().filter_map(Result::ok);
    entries.filter(|entry| python(&entry.file_name())).map(|entry| entry.path()).take(1).collect()
}

/// What is in the tree; links from elsewhere are none of its.
fn facts(tree: &Path) -> BTreeMap<PathBuf, Facts> {
    let mut facts = support::facts(tree);
    facts.values_mut().filter(|facts| facts.names.len() == 1).for_each(|facts| facts.names.clear());
    facts
}

/// Each chunk size with each compressor, every other one with batches.
fn cases() -> impl Iterator<Item = BuildOptions> {
    let sizes = [0x1000, 0x1_0000, 0x10_0000, 0x100_0000];
    let compressors = [Compressor::None, Compressor::Lz4, Compressor::Zstd];
    let all = sizes.into_iter().flat_map(move |chunk_size| compressors.map(|compressor| (chunk_size, compressor)));
    all.enumerate().map(|(number, (chunk_size, compressor))| BuildOptions {
        chunk_size,
        compressor,
        batch_size: (number % 2 == 0).then_some(chunk_size.min(0x10_0000)),
        ..BuildOptions::default()
    })
}

#[test]
fn a_real_tree_comes_out_as_it_went_in() {
    if !erofs::available() {
        return;
    }
    let trees = trees();
    if trees.is_empty() {
        println!("skipped: real_trees (needs a Python in {LIBRARY}, or SHOAL_TREES)");
    }
    for tree in trees {
        let expected = facts(&tree);
        for options in cases() {
            let dir = tempfile::tempdir().unwrap();
            round_trip(&tree, &expected, dir.path(), options);
        }
    }
}

fn round_trip(tree: &Path, expected: &BTreeMap<PathBuf, Facts>, work: &Path, options: BuildOptions) {
    let (image, reader, devices) = erofs::expanded(tree, work, options);
    assert_same(expected, &support::image::facts(&image, &reader));
    let (tar, unpacked) = (work.join("tar"), work.join("unpacked"));
    unpack(&image, &reader, File::create_new(&tar).unwrap()).unwrap();
    fs::create_dir(&unpacked).unwrap();
    let mut command = Command::new("tar");
    command.args(["--xattrs", "--xattrs-include=*", "--same-owner", "--numeric-owner", "-xpf"]);
    assert!(command.arg(&tar).arg("-C").arg(&unpacked).status().unwrap().success(), "{options:?}");
    // A socket cannot be in a tar.
    let sockets = |facts: &Facts| facts.mode & 0o170_000 == 0o140_000;
    let without: BTreeMap<_, _> = expected
        .iter()
        .filter(|(_, facts)| !sockets(facts))
        .map(|(path, facts)| (path.clone(), facts.clone()))
        .collect();
    assert_same(&without, &support::facts(&unpacked));
    erofs::mounted(&work.join("boot"), &devices, &work.join("mnt"), expected);
}
