//! Fixtures for the benches: each bench below `benches/` answers one question and states its throughput. And
//! [`cluster`], which measures real daemons behind shaped links, [`calibration`] of the simulator by it, [`cold_start`], which
//! measures containers, [`conversion`], [`image_check`], [`mounts`], and [`many_files`].

pub mod alone;
pub mod calibration;
pub mod cluster;
pub mod cold_start;
pub mod conversion;
mod figures;
pub mod image_check;
mod machine;
pub mod many_files;
pub mod mounts;
pub mod run;

use std::path::Path;

/// Bytes that compress to about half: words of noise, each written twice.
pub fn half_compressible(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        let start = bytes.len();
        for _ in 0..4 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.extend_from_within(start..start + 32);
    }
    bytes.truncate(len);
    bytes
}

/// Writes a tree of `files` files of `len` bytes each, all different.
///
/// # Panics
/// When the folder cannot be written.
pub fn write_tree(folder: &Path, files: usize, len: usize) {
    for n in 0..files {
        let mut bytes = half_compressible(len);
        for (at, byte) in (n as u64).to_le_bytes().into_iter().enumerate() {
            bytes.iter_mut().skip(at).step_by(4096).for_each(|place| *place ^= byte);
        }
        std::fs::write(folder.join(format!("f{n}")), bytes).expect("the tree can be written");
    }
}

/// A header of POSIX tar: a file that anybody may read.
fn tar_header(name: &str, size: usize) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{size:011o}\0"));
    put(136, "14000000000\0");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
