//! How fast do encoded bytes become trusted chunks, next to what it is made of: blake3 and zstd alone?

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shoal_benches::{half_compressible, write_tree};
use shoal_rafs::{Bootstrap, BuildOptions, Builder, Compressor};

const LEN: usize = 1 << 20;

fn decode(c: &mut Criterion) {
    let plain = half_compressible(LEN);
    let packed = zstd::bulk::compress(&plain, 3).expect("it compresses");
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Bytes(LEN as u64));
    group.bench_function("limit: blake3", |b| b.iter(|| blake3::hash(&plain)));
    group.bench_function("limit: zstd", |b| {
        b.iter(|| zstd::bulk::decompress(&packed, LEN).expect("it decompresses"));
    });
    for (name, compressor) in [("none", Compressor::None), ("lz4", Compressor::Lz4), ("zstd", Compressor::Zstd)] {
        let folder = tempfile::tempdir().expect("a folder");
        let source = folder.path().join("source");
        std::fs::create_dir(&source).expect("a folder");
        write_tree(&source, 1, LEN);
        let (bootstrap, blobs) = (folder.path().join("bootstrap"), folder.path().join("blobs"));
        let built = Builder::new(BuildOptions { compressor, ..BuildOptions::default() });
        let blob = built.build(&source, &bootstrap, &blobs).expect("an image").blob.expect("a blob");
        let image = Bootstrap::parse(std::fs::read(bootstrap).expect("the bootstrap").into()).expect("a bootstrap");
        let table = image.piece_table(0, None).expect("its pieces");
        let range = table.piece(0).expect("a piece").encoded();
        let stored = std::fs::read(blobs.join(blob.to_string())).expect("the blob");
        let encoded = &stored[range.start as usize..range.end as usize];
        group.bench_function(name, |b| b.iter(|| table.decode(0, encoded).expect("it verifies")));
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
