use std::fs;

use super::*;
use crate::builder::{BuildOptions, Builder};

/// The only blob of an image with `chunks` different chunks.
fn blob(dir: &Path, chunks: u8, compressor: Compressor) -> PathBuf {
    fs::create_dir(dir.join("source")).unwrap();
    let content: Vec<u8> = (0..chunks).flat_map(|number| vec![number; 0x1000]).collect();
    fs::write(dir.join("source/file"), content).unwrap();
    let options = BuildOptions { chunk_size: 0x1000, compressor, ..BuildOptions::default() };
    let report = Builder::new(options).build(&dir.join("source"), &dir.join("boot"), &dir.join("blobs")).unwrap();
    dir.join("blobs").join(report.blob.unwrap().to_string())
}

#[test]
fn the_table_file_says_what_the_blob_says() {
    // One chunk: the table does not shrink. 200: it does.
    for (chunks, compressor) in [(1, Compressor::Zstd), (200, Compressor::Zstd), (200, Compressor::None)] {
        let dir = tempfile::tempdir().unwrap();
        let path = blob(dir.path(), chunks, compressor);
        let table = ChunkTable::read(&path).unwrap();
        assert_eq!(table.len(), u32::from(chunks));
        assert_eq!(table.range().compressor == Compressor::None, chunks == 1 || compressor == Compressor::None);
        let meta = Bytes::from(chunk_table_file(&path).unwrap());
        assert_eq!(meta.len() % 4096, 0);
        assert_eq!(ChunkTable::parse(&meta).unwrap(), table);
        assert_eq!(
            meta[meta.len() - 4096..],
            fs::read(&path).unwrap()[fs::metadata(&path).unwrap().len() as usize - 4096..]
        );
    }
}

/// Made elsewhere: the builder writes the second form for batches only.
#[test]
fn a_table_of_the_second_form_needs_no_batches() {
    let chunk = |index: u64| ChunkInfo {
        encoded_offset: 300 * index,
        encoded_len: 300,
        decoded_offset: 0x1000 * index,
        decoded_len: 0x1000,
        compressed: true,
        crc32: Some(7),
        batch: None,
    };
    for bits in [features::ALIGNED | features::CHUNK_INFO_V2, features::ALIGNED] {
        let v2 = bits & features::CHUNK_INFO_V2 != 0;
        let chunks: Vec<_> = (0..90).map(chunk).collect();
        let table =
            EncodedTable::new(chunks.iter().copied(), &Contexts::default(), bits, 27_000, (Compressor::Lz4, None))
                .unwrap();
        assert_eq!(table.decoded.len(), 90 * if v2 { 24 } else { 16 });
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(path.path(), [&[0; 27_000], table.stored(), &table.header_block()].concat()).unwrap();
        let read = ChunkTable::read(path.path()).unwrap();
        let crc32 = if v2 { Some(7) } else { None };
        assert!(read.chunks().eq(chunks.into_iter().map(|chunk| ChunkInfo { crc32, ..chunk })));
        assert_eq!(read.range().compressor, Compressor::Lz4);
    }
}

#[test]
fn the_table_is_found_in_front_of_other_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = blob(dir.path(), 50, Compressor::Zstd);
    let expected = ChunkTable::read(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let mut member = |name: &str, data: &[u8], size: u64| {
        bytes.extend_from_slice(data);
        let mut header = tar::Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_size(size);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
    };
    member("blob.meta", b"", expected.range().encoded_size + 4096);
    member("image.boot", &[7; 5000], 5000);
    member("rafs.blob.toc", &[8; 256], 256);
    fs::write(&path, bytes).unwrap();
    assert_eq!(ChunkTable::read(&path).unwrap(), expected);
}

#[test]
fn files_without_a_table_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    for bytes in [vec![], vec![0; 100], vec![0; 4096], vec![0xAA; 20_000]] {
        fs::write(&path, bytes).unwrap();
        assert!(matches!(ChunkTable::read(&path), Err(ChunkTableError::Invalid { .. })));
    }
    assert!(matches!(ChunkTable::read(dir.path()), Err(ChunkTableError::Io { .. })));
}

#[test]
fn every_changed_byte_of_a_header_is_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let path = blob(dir.path(), 30, Compressor::Zstd);
    let meta = chunk_table_file(&path).unwrap();
    for position in meta.len() - 4096..meta.len() - 4096 + 64 {
        for bit in 0..8 {
            let mut changed = meta.clone();
            changed[position] ^= 1 << bit;
            // Refused, or read as something; the limits of the format hold either way.
            if let Ok(table) = ChunkTable::parse(&changed.into()) {
                assert_eq!(table.len(), 30);
            }
        }
    }
    for len in (0..meta.len()).step_by(512) {
        assert!(ChunkTable::parse(&Bytes::copy_from_slice(&meta[..len])).is_err());
    }
}
