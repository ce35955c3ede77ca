//! How fast is an image built, per compressor, against the bytes of its source? And of small files, alone and in batches?

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shoal_benches::write_tree;
use shoal_rafs::{BuildOptions, Builder, Compressor};
use tempfile::TempDir;

const FILES: usize = 64;
const LEN: usize = 1 << 20;
const SMALL_FILES: usize = 8192;
const SMALL_LEN: usize = 4 << 10;

fn build(c: &mut Criterion) {
    let source = tempfile::tempdir().expect("a folder");
    write_tree(source.path(), FILES, LEN);
    let mut group = c.benchmark_group("build");
    group.sample_size(10).throughput(Throughput::Bytes((FILES * LEN) as u64));
    for (name, compressor) in [("none", Compressor::None), ("lz4", Compressor::Lz4), ("zstd", Compressor::Zstd)] {
        let options = BuildOptions { compressor, ..BuildOptions::default() };
        group.bench_function(name, |b| b.iter_with_large_drop(|| image(source.path(), options, FILES as u64)));
    }
    group.finish();
}

fn build_small(c: &mut Criterion) {
    let source = tempfile::tempdir().expect("a folder");
    write_tree(source.path(), SMALL_FILES, SMALL_LEN);
    let mut group = c.benchmark_group("build_small_files");
    group.sample_size(10).throughput(Throughput::Bytes((SMALL_FILES * SMALL_LEN) as u64));
    for (name, batch_size) in [("zstd", None), ("zstd_batches", Some(1 << 20))] {
        let options = BuildOptions { batch_size, ..BuildOptions::default() };
        group.bench_function(name, |b| b.iter_with_large_drop(|| image(source.path(), options, SMALL_FILES as u64)));
    }
    group.finish();
}

/// Builds an image of at least `chunks` chunks; the folder it is in is dropped by the bench.
fn image(source: &Path, options: BuildOptions, chunks: u64) -> TempDir {
    let out = tempfile::tempdir().expect("a folder");
    let built = Builder::new(options).build(source, &out.path().join("bootstrap"), &out.path().join("blobs"));
    assert!(built.expect("an image").unique_chunks >= chunks);
    out
}

criterion_group!(benches, build, build_small);
criterion_main!(benches);
