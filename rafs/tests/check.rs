//! What the check finds that reading does not depend on: bytes without an owner or with two, order, counts, promises to
//! the kernel.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use shoal_rafs::{BuildOptions, CheckReport, Compressor, check};

mod support;

use support::image::{Built, build, walk};

const CHUNK: usize = 0x1000;

fn image(dir: &Path) -> Built {
    let source = dir.join("source");
    fs::create_dir_all(source.join("directory")).unwrap();
    fs::write(source.join("run"), support::noise(1, 3 * CHUNK)).unwrap();
    fs::write(source.join("again"), support::noise(2, CHUNK).repeat(2)).unwrap();
    fs::write(source.join("directory/small"), b"small").unwrap();
    for name in ["first", "second"] {
        symlink(name.repeat(4095 / name.len()) + &"x".repeat(4095 % name.len()), source.join(name)).unwrap();
    }
    xattr::set(source.join("run"), "user.name", b"value").unwrap();
    let options = BuildOptions { compressor: Compressor::None, chunk_size: CHUNK as u32, ..BuildOptions::default() };
    build(&source, dir, options)
}

/// Where the inode of a name lies.
fn inode(built: &Built, name: &str) -> usize {
    let nid = walk(&built.image)[Path::new(name)];
    built.image.super_blocks().meta_offset as usize + nid.0 as usize * 32
}

fn changed(built: &Built, change: impl FnOnce(&mut [u8])) -> CheckReport {
    let mut bytes = built.image.as_bytes().to_vec();
    change(&mut bytes);
    check(bytes.into(), None)
}

fn only_problem(report: &CheckReport) -> String {
    let problems: Vec<_> =
        report.problems.iter().map(|problem| format!("{}: {}", problem.place, problem.problem)).collect();
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems[0].clone()
}

#[test]
fn a_sound_image_has_no_problem_and_no_unused_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path());
    let report = changed(&built, |_| {});
    assert!(report.ok && report.unused_chunks == 0, "{:?}", report.problems);
}

#[test]
fn every_byte_has_one_owner_or_is_zero() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path());
    // Behind the device table, and behind the chunk table.
    for position in [2000, built.image.as_bytes().len() - 1] {
        let problem = only_problem(&changed(&built, |bytes| bytes[position] = 1));
        assert!(problem.starts_with(&format!("padding at byte {position}")), "{problem}");
    }
    let (first, second) = (inode(&built, "first"), inode(&built, "second"));
    let report = changed(&built, |bytes| bytes.copy_within(first + 16..first + 20, second + 16));
    let places: Vec<_> = report.problems.iter().map(|problem| problem.problem.as_str()).collect();
    // The block of the second target is nobody's any more.
    assert_eq!(places.len(), 2, "{places:?}");
    assert!(places.iter().any(|problem| problem.contains("overlaps the data blocks")), "{places:?}");
    assert!(places.iter().any(|problem| problem.contains("nothing in the tree leads there")), "{places:?}");
}

#[test]
fn records_are_in_the_order_of_their_digests() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path());
    let table = built.image.super_blocks().chunk_table_offset as usize;
    let problem = only_problem(&changed(&built, |bytes| {
        let (first, rest) = bytes[table..].split_at_mut(80);
        first.swap_with_slice(&mut rest[..80]);
    }));
    assert!(problem.contains("order of their digests"), "{problem}");
}

#[test]
fn counts_and_flags_of_the_super_blocks_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path());
    let blocks = only_problem(&changed(&built, |bytes| bytes[1024 + 36] ^= 1));
    assert!(blocks.contains("blocks, the blobs have"), "{blocks}");
    let xattrs = only_problem(&changed(&built, |bytes| bytes[1152] &= !0x20));
    assert!(xattrs.contains("there are no xattrs"), "{xattrs}");
    let mapped = only_problem(&changed(&built, |bytes| bytes[1408 + 68..1408 + 72].copy_from_slice(&[1, 0, 0, 0])));
    assert!(mapped.contains("mapped at block 1"), "{mapped}");
}

#[test]
fn a_file_that_is_no_run_must_not_claim_to_be_one() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path());
    // Both chunks of `again` are the same one; log2(size) - 12 is 1.
    let problem = only_problem(&changed(&built, |bytes| bytes[inode(&built, "again") + 16] |= 1));
    assert!(problem.contains("follow each other"), "{problem}");
}
