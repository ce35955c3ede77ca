//! How fast is an image built, per compressor, against the bytes of its source?

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shoal_benches::write_tree;
use shoal_rafs::{BuildOptions, Builder, Compressor};

const FILES: usize = 64;
const LEN: usize = 1 << 20;

fn build(c: &mut Criterion) {
    let source = tempfile::tempdir().expect("a folder");
    write_tree(source.path(), FILES, LEN);
    let mut group = c.benchmark_group("build");
    group.sample_size(10).throughput(Throughput::Bytes((FILES * LEN) as u64));
    for (name, compressor) in [("none", Compressor::None), ("lz4", Compressor::Lz4), ("zstd", Compressor::Zstd)] {
        let options = BuildOptions { compressor, ..BuildOptions::default() };
        group.bench_function(name, |b| {
            b.iter_with_large_drop(|| {
                let out = tempfile::tempdir().expect("a folder");
                let built = Builder::new(options).build(
                    source.path(),
                    &out.path().join("bootstrap"),
                    &out.path().join("blobs"),
                );
                assert!(built.expect("an image").unique_chunks >= FILES as u64);
                out
            });
        });
    }
    group.finish();
}

criterion_group!(benches, build);
criterion_main!(benches);
