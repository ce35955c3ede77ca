//! Packs the entries of a directory into blocks.

use zerocopy::IntoBytes;

use crate::layout::{DIRENT, Dirent};

/// A name to be packed; names come in byte order, `.` and `..` among them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// Cuts the names into blocks of so many bytes: each takes as many as fit.
fn blocks<'a, 'n>(names: &'a [Name<'n>], block: u64) -> impl Iterator<Item = &'a [Name<'n>]> {
    let mut rest = names;
    std::iter::from_fn(move || {
        let mut len = 0;
        let fits = |name: &&Name<'_>| {
            len += DIRENT + name.name.len() as u64;
            len <= block
        };
        let (first, others) = rest.split_at(rest.iter().take_while(fits).count());
        rest = others;
        (!first.is_empty()).then_some(first)
    })
}

/// Bytes of the packed directory: whole blocks of so many bytes, then what the last one uses.
pub(super) fn packed_size(names: &[Name<'_>], block: u64) -> u64 {
    let used = |names: &[Name<'_>]| names.iter().map(|name| DIRENT + name.name.len() as u64).sum::<u64>();
    blocks(names, block).fold(0, |size: u64, names| size.next_multiple_of(block) + used(names))
}

/// The packed directory, [`packed_size`] bytes.
pub(super) fn pack(names: &[Name<'_>], block: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(packed_size(names, block) as usize);
    for names in blocks(names, block) {
        bytes.resize(bytes.len().next_multiple_of(block as usize), 0);
        let mut name_offset = names.len() * DIRENT as usize;
        for name in names {
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
        names.iter().for_each(|name| bytes.extend_from_slice(name.name));
    }
    bytes
}
