//! How fast does a lazily mounted file read next to the same file on the file system below (ext4 in the published
//! figures)? Blobs are local: what is measured is the mount, not a network.
//!
//! - *cold*: neither the file nor the blob behind it is in the page cache; every byte comes from the disk.
//! - *local*: the blob is in the page cache, the mounted file is not: decode, verify, FUSE. (ext4 has no such state.)
//! - *warm*: the file is in the page cache.
//!
//! Random reads are 4 KiB each and cold; a chunk has 1 MiB, so each reads, decodes and verifies 256 times what it gives.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{
    Bencher, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use rustix::fs::{Advice, fadvise};
use shoal_benches::write_tree;
use shoal_rafs::{BlobDir, Bootstrap, BuildOptions, Builder, Compressor, Mount, MountOptions};

const LEN: usize = 256 << 20;
const BLOCK: usize = 1 << 20;
const RANDOM: usize = 4096;
const RANDOM_READS: usize = 256;

/// A file to read, and the files whose pages have to go before a read of it is cold.
struct Subject {
    name: String,
    file: PathBuf,
    below: Vec<PathBuf>,
}

fn evict(path: &Path) {
    let file = File::open(path).expect("it opens");
    file.sync_all().expect("it syncs");
    fadvise(&file, 0, None, Advice::DontNeed).expect("its pages can go");
}

fn sequential(path: &Path) {
    let file = File::open(path).expect("it opens");
    let (mut block, mut at) = (vec![0; BLOCK], 0);
    while at < LEN {
        file.read_exact_at(&mut block, at as u64).expect("it reads");
        at += BLOCK;
    }
}

fn random(path: &Path) {
    let file = File::open(path).expect("it opens");
    fadvise(&file, 0, None, Advice::Random).expect("advice is taken");
    let (mut block, mut state) = ([0; RANDOM], 1usize);
    for _ in 0..RANDOM_READS {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 33) % (LEN / RANDOM) * RANDOM;
        file.read_exact_at(&mut block, at as u64).expect("it reads");
    }
}

/// Times `read`, with `before` in front of each but not counted.
fn timed(b: &mut Bencher<'_>, before: impl Fn(), read: impl Fn()) {
    b.iter_custom(|times| {
        let once = |_| {
            before();
            let start = Instant::now();
            read();
            start.elapsed()
        };
        (0..times).map(once).sum::<Duration>()
    });
}

fn measure(group: &mut BenchmarkGroup<'_, WallTime>, subject: &Subject) {
    let Subject { name, file, below } = subject;
    let cold = || std::iter::once(file).chain(below).for_each(|path| evict(path));
    group.throughput(Throughput::Bytes(LEN as u64));
    group.bench_function(format!("sequential, cold: {name}"), |b| timed(b, cold, || sequential(file)));
    if !below.is_empty() {
        group.bench_function(format!("sequential, local: {name}"), |b| {
            timed(b, || evict(file), || sequential(file));
        });
    }
    group.bench_function(format!("sequential, warm: {name}"), |b| timed(b, || (), || sequential(file)));
    group.throughput(Throughput::Elements(RANDOM_READS as u64));
    group.bench_function(format!("random 4 KiB, cold: {name}"), |b| timed(b, cold, || random(file)));
}

fn fuse(c: &mut Criterion) {
    // On a disk, unlike /tmp on many machines.
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let source = folder.path().join("source");
    std::fs::create_dir(&source).expect("a folder");
    write_tree(&source, 1, LEN);
    let mut group = c.benchmark_group("fuse");
    group.sample_size(10);
    measure(
        &mut group,
        &Subject { name: "the file system below".into(), file: source.join("f0"), below: Vec::new() },
    );
    for (name, compressor) in [("none", Compressor::None), ("zstd", Compressor::Zstd)] {
        let (bootstrap, blobs) = (folder.path().join(name), folder.path().join(format!("{name}.blobs")));
        let builder = Builder::new(BuildOptions { compressor, ..BuildOptions::default() });
        let blob = builder.build(&source, &bootstrap, &blobs).expect("an image").blob.expect("a blob");
        let image = Bootstrap::open(&bootstrap).expect("a bootstrap");
        let chunks = Arc::new(BlobDir::open(image.clone(), &blobs, 0).expect("the blobs"));
        let mountpoint = folder.path().join(format!("{name}.mnt"));
        std::fs::create_dir(&mountpoint).expect("a folder");
        let mount = match Mount::new(image, chunks, &mountpoint, MountOptions::default()) {
            Ok(mount) => mount,
            Err(error) => {
                println!("skipped: FUSE: {error}");
                break;
            }
        };
        let below = vec![blobs.join(blob.to_string())];
        measure(&mut group, &Subject { name: format!("FUSE, {name}"), file: mountpoint.join("f0"), below });
        mount.unmount().expect("it unmounts");
    }
    group.finish();
}

criterion_group!(benches, fuse);
criterion_main!(benches);
