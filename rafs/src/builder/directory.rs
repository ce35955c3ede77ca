//! Packs the entries of a directory into blocks.

use zerocopy::IntoBytes;

use crate::layout::{BLOCK, DIRENT, Dirent};

/// A name to be packed; names come in byte order, `.` and `..` among them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// Cuts the names into blocks: each takes as many as fit.
fn blocks<'a, 'n>(names: &'a [Name<'n>]) -> impl Iterator<Item = &'a [Name<'n>]> {
    let mut rest = names;
    std::iter::from_fn(move || {
        let mut len = 0;
        let fits = |name: &&Name<'_>| {
            len += DIRENT + name.name.len() as u64;
            len <= BLOCK
        };
        let (block, others) = rest.split_at(rest.iter().take_while(fits).count());
        rest = others;
        (!block.is_empty()).then_some(block)
    })
}

/// Bytes of the packed directory: whole blocks, then what the last one uses.
pub(super) fn packed_size(names: &[Name<'_>]) -> u64 {
    let used = |block: &[Name<'_>]| block.iter().map(|name| DIRENT + name.name.len() as u64).sum::<u64>();
    blocks(names).fold(0, |size: u64, block| size.next_multiple_of(BLOCK) + used(block))
}

/// The packed directory, [`packed_size`] bytes.
pub(super) fn pack(names: &[Name<'_>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(packed_size(names) as usize);
    for block in blocks(names) {
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        let mut name_offset = block.len() * DIRENT as usize;
        for name in block {
            let dirent = Dirent {
                nid: name.nid.into(),
                // Below the block size.
                name_offset: (name_offset as u16).into(),
                file_type: name.file_type,
                reserved: 0,
            };
            bytes.extend_from_slice(dirent.as_bytes());
            name_offset += name.name.len();
        }
        block.iter().for_each(|name| bytes.extend_from_slice(name.name));
    }
    bytes
}
