//! `cargo run --release --example seeds` writes starting points for the fuzz targets into `seeds/`, taken from freshly
//! built images: every kind of node, full and partial directory blocks, xattrs, hard links, a compressed and a plain chunk
//! table, one with batches, one of a gzip layer, an image over a tar, an encrypted image, an image without a blob. Archives are those
//! of GNU tar in its formats, plain and compressed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use shoal_rafs::{
    BlobDirReader, Bootstrap, BuildOptions, Builder, CipherKey, Compressor, Encryption, chunk_table_file,
    chunk_table_file_with, unpack,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let dir = tempfile::tempdir()?;
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("empty"))?;
    image(&source, dir.path(), &corpus, "no-blob", BuildOptions::default())?;
    for number in 0..70 {
        fs::write(source.join(format!("{number:0100}")), [number; 10])?;
    }
    fs::write(source.join("large"), (0..=255).collect::<Vec<u8>>().repeat(0x123))?;
    fs::hard_link(source.join("large"), source.join("second-name"))?;
    symlink("large", source.join("link"))?;
    symlink("t".repeat(4095), source.join("long-link"))?;
    let xattrs = xattr::set(source.join("large"), "user.name", b"value");
    xattrs.or_else(|error| if error.kind() == std::io::ErrorKind::Unsupported { Ok(()) } else { Err(error) })?;
    for compressor in [Compressor::None, Compressor::Zstd] {
        let options = BuildOptions { compressor, chunk_size: 0x1000, ..BuildOptions::default() };
        image(&source, dir.path(), &corpus, &compressor.to_string(), options)?;
    }
    let batched = BuildOptions { chunk_size: 0x1000, batch_size: Some(0x1000), ..BuildOptions::default() };
    image(&source, dir.path(), &corpus, "batched", batched)?;
    let mut key = [7; 32];
    key[0] = 0;
    let encryption = Encryption::Key(CipherKey::new(key, [9; 16])?);
    image(&source, dir.path(), &corpus, "encrypted", BuildOptions { encryption, ..batched })?;
    archives(dir.path(), &corpus)?;
    gzip_layer(&source, dir.path(), &corpus)?;
    tarfs(&source, dir.path(), &corpus)?;
    // Two entries of a table of contents: flags, name, digest, three numbers.
    let entry = |name: &[u8], place: u64| {
        let numbers: Vec<u8> = [place, 100, 4096].iter().flat_map(|number: &u64| number.to_le_bytes()).collect();
        let name = [name, &vec![0; 16 - name.len()]].concat();
        [&[1, 0, 0, 0, 0, 0, 0, 0][..], &name, &[7; 32], &numbers, &[0; 48]].concat()
    };
    fs::create_dir_all(corpus.join("toc"))?;
    fs::write(corpus.join("toc/two"), [entry(b"image.blob", 0), entry(b"image.boot", 612)].concat())?;
    Ok(())
}

/// A small tree as GNU tar writes it: names and targets longer than a header holds, a hard link, a pipe, holes, attributes.
fn archives(work: &Path, corpus: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (source, corpus) = (work.join("small"), corpus.join("tar_source"));
    fs::create_dir_all(source.join("d"))?;
    fs::create_dir_all(&corpus)?;
    fs::write(source.join("d/a"), b"some words ".repeat(30))?;
    fs::hard_link(source.join("d/a"), source.join("d/b"))?;
    symlink("a", source.join("d/link"))?;
    symlink("t".repeat(120), source.join("long-link"))?;
    fs::write(source.join("n".repeat(120)), "x")?;
    let sparse = fs::File::create(source.join("sparse"))?;
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", 20_000)?;
    run(Command::new("mkfifo").arg(source.join("pipe")))?;
    // Not every file system keeps them.
    let _ = xattr::set(source.join("d/a"), "user.name", b"value");
    for (name, options) in [
        ("ustar", &["--format=ustar", "--exclude=n*", "--exclude=long-link"][..]),
        ("gnu", &["--format=gnu", "--sparse"]),
        ("pax", &["--format=posix", "--xattrs", "--pax-option=delete=atime,delete=ctime"]),
        ("pax-sparse-0.1", &["--format=posix", "--sparse", "--sparse-version=0.1"]),
        ("pax-sparse-1.0", &["--format=posix", "--sparse", "--sparse-version=1.0"]),
        ("gzip", &["--format=gnu", "--gzip"]),
        ("zstd", &["--format=gnu", "--zstd"]),
    ] {
        let mut tar = Command::new("tar");
        tar.args([
            "--sort=name",
            "--mtime=@1700000000",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--blocking-factor=1",
        ]);
        run(tar.args(options).arg("-cf").arg(corpus.join(name)).arg("-C").arg(&source).arg("."))?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<(), Box<dyn std::error::Error>> {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}

/// The tree as a layer in gzip of two members, and an index over it.
fn gzip_layer(source: &Path, work: &Path, corpus: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (boot, blobs, index) = (work.join("boot"), work.join("blobs"), work.join("index"));
    Builder::new(BuildOptions::default()).build(source, &boot, &blobs)?;
    let image = Bootstrap::open(&boot)?;
    let mut tar = Vec::new();
    unpack(&image, &BlobDirReader::open(&image, &blobs)?, &mut tar)?;
    let mut layer = Vec::new();
    for part in tar.chunks(tar.len().div_ceil(2)) {
        let mut encoder = flate2::write::GzEncoder::new(layer, flate2::Compression::default());
        std::io::Write::write_all(&mut encoder, part)?;
        layer = encoder.finish()?;
    }
    fs::create_dir_all(corpus.join("gzip_layer"))?;
    fs::write(corpus.join("gzip_layer/two-members"), &layer)?;
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    let report = Builder::new(options).build_reference(layer.as_slice(), Path::new("layer"), &boot, &index)?;
    let meta = report.meta.ok_or("the tree has no content")?;
    pair(&fs::read(boot)?, &chunk_table_file(&index.join(meta.to_string()))?, corpus, "gzip-layer")
}

/// The tree as a tar, and bootstraps over it: with digests, and with what upstream writes in their place.
fn tarfs(source: &Path, work: &Path, corpus: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (boot, blobs) = (work.join("boot"), work.join("blobs"));
    Builder::new(BuildOptions::default()).build(source, &boot, &blobs)?;
    let image = Bootstrap::open(&boot)?;
    let mut tar = Vec::new();
    unpack(&image, &BlobDirReader::open(&image, &blobs)?, &mut tar)?;
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    Builder::new(options).build_tarfs(tar.as_slice(), Path::new("tar"), &boot, &blobs)?;
    let mut bytes = fs::read(&boot)?;
    fs::write(corpus.join("bootstrap_load/tarfs"), &bytes)?;
    // Offset and size of the chunk table.
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default()) as usize;
    let (start, len) = (number(1176), number(1184));
    bytes[start..start + len].fill(0);
    bytes[1184..1192].copy_from_slice(&80u64.to_le_bytes());
    fs::write(corpus.join("bootstrap_load/tarfs-without-digests"), &bytes)?;
    Ok(())
}

/// A bootstrap and the chunk table of its blob, as `piece_table` takes them.
fn pair(bootstrap: &[u8], meta: &[u8], corpus: &Path, name: &str) -> Result<(), Box<dyn std::error::Error>> {
    fs::create_dir_all(corpus.join("piece_table"))?;
    let both = [&(bootstrap.len() as u32).to_le_bytes()[..], bootstrap, meta].concat();
    fs::write(corpus.join("piece_table").join(name), both)?;
    Ok(())
}

/// Builds one image and puts its bootstrap and its chunk table into the corpora.
fn image(
    source: &Path,
    work: &Path,
    corpus: &Path,
    name: &str,
    options: BuildOptions,
) -> Result<(), Box<dyn std::error::Error>> {
    let (boot, blobs) = (work.join("boot"), work.join("blobs"));
    let report = Builder::new(options).build(source, &boot, &blobs)?;
    let image = Bootstrap::open(&boot)?;
    fs::create_dir_all(corpus.join("bootstrap_load"))?;
    fs::copy(&boot, corpus.join("bootstrap_load").join(name))?;
    fs::create_dir_all(corpus.join("blob_meta"))?;
    if let Some(blob) = report.blob {
        let cipher = image.blobs().first().and_then(|blob| blob.cipher.as_ref());
        let meta = chunk_table_file_with(&blobs.join(blob.to_string()), cipher)?;
        fs::write(corpus.join("blob_meta").join(name), &meta)?;
        pair(&fs::read(boot)?, &meta, corpus, name)?;
    }
    Ok(())
}
