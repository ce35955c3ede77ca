use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;
use crate::{BuildOptions, Builder, chunk_table_file};

fn tables(bytes: &[u8]) -> BTreeMap<BlobId, Bytes> {
    [1, 2].map(|id| (BlobId::new([id; 32]), Bytes::copy_from_slice(bytes))).into()
}

fn written(bootstrap: &[u8]) -> (Vec<u8>, WrittenLayer) {
    let mut out = Vec::new();
    let layer = write_bootstrap_layer(bootstrap, &tables(b"table"), None, &mut out).unwrap();
    (out, layer)
}

fn tar_gz(entries: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    for (path, kind, bytes) in entries {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(*kind);
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        tar.append(&header, *bytes).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

fn read(bytes: &[u8]) -> Result<BootstrapLayer, LayerError> {
    read_bootstrap_layer(bytes, &LayerLimits { bootstrap: 1 << 20, chunk_tables: 1 << 20 })
}

#[test]
fn what_is_written_is_read_and_always_the_same() {
    let (first, layer) = written(b"bootstrap");
    assert_eq!((&first, layer), (&written(b"bootstrap").0, written(b"bootstrap").1));
    assert_eq!(layer.size, first.len() as u64);
    assert_eq!(layer.id, ObjectId::new(Sha256::digest(&first).into()));
    let mut tar = Vec::new();
    MultiGzDecoder::new(&first[..]).read_to_end(&mut tar).unwrap();
    assert_eq!(layer.diff_id, ObjectId::new(Sha256::digest(&tar).into()));
    let back = read(&first).unwrap();
    let (bootstrap, diff_id) = (Bytes::from("bootstrap"), layer.diff_id);
    assert_eq!(back, BootstrapLayer { bootstrap, chunk_tables: tables(b"table"), backend: None, diff_id });
    let mut archive = tar::Archive::new(&tar[..]);
    let modes: Vec<(String, u32)> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap()))
        .collect();
    assert_eq!(modes[0], ("image/".to_owned(), 0o755));
    assert_eq!(modes.last(), Some(&("image/image.boot".to_owned(), 0o444)));
}

#[test]
fn layers_of_other_writers_are_read() {
    let table = format!("image/{}.blob.meta", BlobId::new([3; 32]));
    let layer = read(&tar_gz(&[
        ("./", EntryType::Directory, b""),
        ("./image/", EntryType::Directory, b""),
        ("PaxHeaders.0/image.boot", EntryType::XHeader, b"30 mtime=1700000000.123456789\n"),
        ("./image/image.boot", EntryType::Regular, b"boot"),
        (&table, EntryType::Regular, b"table"),
        ("image/backend.json", EntryType::Regular, b"{}"),
    ]));
    let layer = layer.unwrap();
    assert_eq!(layer.bootstrap, "boot");
    assert_eq!(layer.chunk_tables[&BlobId::new([3; 32])], "table");
}

#[test]
fn a_table_of_which_the_header_alone_is_left_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let (source, boot, blobs) = (dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), b"content").unwrap();
    let report = Builder::new(BuildOptions::default()).build(&source, &boot, &blobs).unwrap();
    let table = chunk_table_file(&blobs.join(report.blob.unwrap().to_string())).unwrap();
    let header = &table[table.len() - 4096..];
    let [whole, alone, broken] = [1, 2, 3].map(|byte| BlobId::new([byte; 32]));
    let path = |blob: BlobId| format!("image/{blob}.blob.meta");
    // What is wrong in another way is for whoever reads it to find.
    let files = [(path(whole), &table[..]), (path(alone), header), (path(broken), &header[1..])];
    let files = files.each_ref().map(|(path, bytes)| (&path[..], EntryType::Regular, *bytes));
    let boot = [("image/image.boot", EntryType::Regular, &b"boot"[..])];
    let tables = read(&tar_gz(&[&boot[..], &files].concat())).unwrap().chunk_tables;
    assert_eq!(tables.keys().collect::<Vec<_>>(), [&whole, &broken]);
}

#[test]
fn what_does_not_belong_there_is_refused() {
    for path in ["image/../image.boot", "/image/image.boot", "image/x", "image/00.blob.meta", "etc/passwd", ""] {
        let layer = tar_gz(&[(path, EntryType::Regular, b"x")]);
        assert!(matches!(read(&layer), Err(LayerError::Unexpected { what: "file", .. })), "{path}");
    }
    for kind in [EntryType::Symlink, EntryType::Link, EntryType::GNULongName, EntryType::GNUSparse, EntryType::Char] {
        let layer = tar_gz(&[("image/image.boot", kind, b"")]);
        assert!(matches!(read(&layer), Err(LayerError::Unexpected { what: "special file", .. })), "{kind:?}");
    }
    let twice = [("image/image.boot", EntryType::Regular, &b"x"[..]); 2];
    assert!(matches!(read(&tar_gz(&twice)), Err(LayerError::Twice { .. })));
    assert!(matches!(read(&tar_gz(&[])), Err(LayerError::Missing)));
    let many = [("image", EntryType::Directory, &b""[..]); MAX_ENTRIES + 1];
    assert!(matches!(read(&tar_gz(&many)), Err(LayerError::TooMany)));
}

#[test]
fn bombs_stay_small() {
    let zeros = vec![0; (1 << 20) + 1];
    let bootstrap = tar_gz(&[("image/image.boot", EntryType::Regular, &zeros)]);
    assert!(bootstrap.len() < zeros.len() / 100, "it compresses well");
    assert!(matches!(read(&bootstrap), Err(LayerError::TooLarge { limit: 0x10_0000, .. })));
    let half = &zeros[..zeros.len() / 2 + 1];
    let names = [4, 5].map(|id| format!("image/{}.blob.meta", BlobId::new([id; 32])));
    let tables = tar_gz(&[(&names[0], EntryType::Regular, half), (&names[1], EntryType::Regular, half)]);
    assert!(matches!(read(&tables), Err(LayerError::TooLarge { .. })));
    let mut padded = tar_gz(&[("image/image.boot", EntryType::Regular, b"x")]);
    let mut more = GzEncoder::new(Vec::new(), Compression::fast());
    more.write_all(&zeros).unwrap();
    padded.extend(more.finish().unwrap());
    assert!(matches!(read(&padded), Err(LayerError::TooLarge { limit: MAX_PADDING, .. })));
    let pax = tar_gz(&[("pax", EntryType::XHeader, &zeros)]);
    assert!(matches!(read(&pax), Err(LayerError::TooLarge { limit: MAX_IGNORED, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_layer_never_panics(at in 0usize..2000, flip in 1u8.., cut in 0usize..2000) {
        let (mut bytes, _) = written(&[7; 3000]);
        let length = bytes.len();
        bytes[at % length] ^= flip;
        let _ = read(&bytes);
        prop_assert!(read(&bytes[..cut % length]).is_err());
    }

    #[test]
    fn a_damaged_tar_never_panics(at in 0usize..4096, flip in 1u8..) {
        let mut tar = Vec::new();
        MultiGzDecoder::new(&written(&[7; 3000]).0[..]).read_to_end(&mut tar).unwrap();
        tar[at] ^= flip;
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&tar).unwrap();
        let _ = read(&gzip.finish().unwrap());
    }
}
