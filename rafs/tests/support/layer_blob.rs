//! Makes a blob as registries have it (bootstrap inside, tar headers, table of contents) out of a plain image, byte by byte
//! as the format note has it and with nothing of the crate's own layout code.

#![allow(dead_code, unreachable_pub, missing_docs)] // each test program uses its part

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use shoal_rafs::{Bootstrap, chunk_table_file};

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Entries of 24 bytes in the chunk table.
    pub v2: bool,
    /// Table of contents, digests of chunks, and the bootstrap compressed.
    pub toc: bool,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn add(bytes: &mut [u8], at: usize, bits: u32) {
    let old = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    put(bytes, at, &(old | bits).to_le_bytes());
}

fn tar_header(name: &str, size: usize) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_size(size as u64);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn toc_entry(flags: u32, name: &str, sha256: &[u8], numbers: [usize; 3]) -> Vec<u8> {
    let mut entry = vec![0; 128];
    put(&mut entry, 0, &flags.to_le_bytes());
    put(&mut entry, 8, name.as_bytes());
    put(&mut entry, 24, sha256);
    for (number, value) in numbers.into_iter().enumerate() {
        put(&mut entry, 56 + 8 * number, &(value as u64).to_le_bytes());
    }
    entry
}

/// The first form of chunk table entries as the second.
fn second_form(table: &[u8]) -> Vec<u8> {
    let entries = table.chunks_exact(16).flat_map(|entry| {
        let (decoded, encoded) = (u64_at(entry, 0), u64_at(entry, 8));
        let decoded_len = (decoded >> 44 | (decoded >> 8 & 0xF) << 20) + 1;
        let encoded_len = (encoded >> 44 | (encoded >> 40 & 0xF) << 20) + 1;
        let flags = u64::from(decoded_len != encoded_len);
        let block = (decoded & 0xFFF_FFFF_F000) >> 12;
        [flags << 56 | (decoded_len - 1) << 32 | block, encoded_len << 40 | encoded & 0xFF_FFFF_FFFF, 0]
    });
    entries.flat_map(u64::to_le_bytes).collect()
}

/// Makes the blob in `dir`, named by its sha256. The image has one blob.
pub fn layer_blob(boot: &Path, blobs: &Path, dir: &Path, shape: Shape) -> PathBuf {
    let image = Bootstrap::open(boot).unwrap();
    let described = &image.blobs()[0];
    let file = blobs.join(described.id.to_string());
    let meta = chunk_table_file(&file).unwrap();
    let mut table = meta[..described.chunk_table.decoded_size as usize].to_vec();
    let mut header = meta[meta.len() - 4096..].to_vec();
    let first_form = described.features & 4 == 0;
    if shape.v2 && first_form {
        table = second_form(&table);
    }
    let data_len = described.chunk_table.offset as usize;
    let mut out = fs::read(file).unwrap()[..data_len].to_vec();
    out.extend(tar_header("image.blob", data_len));
    let mut toc = toc_entry(1, "image.blob", &Sha256::digest(&out), [0, data_len, described.decoded_size as usize]);

    let bits = 0x1000_0002 | if shape.v2 { 4 } else { 0 } | if shape.toc { 0x2000_0020 } else { 0 };
    let table_offset = out.len();
    add(&mut header, 4, bits);
    put(&mut header, 8, &[0; 4]);
    let sizes = [table_offset, table.len(), table.len()];
    for (number, size) in sizes.into_iter().enumerate() {
        put(&mut header, 16 + 8 * number, &(size as u64).to_le_bytes());
    }
    toc.extend(toc_entry(1, "blob.meta", &Sha256::digest(&table), [table_offset, table.len(), table.len()]));
    toc.extend(toc_entry(1, "blob.meta.header", &Sha256::digest(&header), [table_offset + table.len(), 4096, 4096]));
    out.extend(&table);
    out.extend(&header);
    out.extend(tar_header("blob.meta", table.len() + 4096));
    if shape.toc {
        let digests: Vec<u8> = image.chunks(0).flat_map(|chunk| chunk.digest.bytes).collect();
        toc.extend(toc_entry(1, "blob.digest", &Sha256::digest(&digests), [out.len(), digests.len(), digests.len()]));
        out.extend(&digests);
        out.extend(tar_header("blob.digest", digests.len()));
    }

    let mut bootstrap = fs::read(boot).unwrap();
    let entry = u64_at(&bootstrap, 1152 + 8) as usize;
    put(&mut bootstrap, 1408, &[b'x'; 64]);
    put(&mut bootstrap, entry, &[b'x'; 64]);
    add(&mut bootstrap, entry + 84, bits);
    put(&mut bootstrap, entry + 88, &(out.len() as u64).to_le_bytes());
    put(&mut bootstrap, entry + 108, &[0; 4]);
    for (number, size) in sizes.into_iter().enumerate() {
        put(&mut bootstrap, entry + 112 + 8 * number, &(size as u64).to_le_bytes());
    }
    if shape.toc {
        add(&mut bootstrap, 1152, 0x100);
    }
    let stored = if shape.toc { zstd::bulk::compress(&bootstrap, 3).unwrap() } else { bootstrap.clone() };
    toc.extend(toc_entry(
        if shape.toc { 2 } else { 1 },
        "image.boot",
        &Sha256::digest(&bootstrap),
        [out.len(), stored.len(), bootstrap.len()],
    ));
    out.extend(&stored);
    out.extend(tar_header("image.boot", stored.len()));
    if shape.toc {
        out.extend(&toc);
        out.extend(tar_header("rafs.blob.toc", toc.len()));
    }
    let id: String = Sha256::digest(&out).iter().map(|byte| format!("{byte:02x}")).collect();
    fs::create_dir_all(dir).unwrap();
    let path = dir.join(id);
    fs::write(&path, out).unwrap();
    path
}
