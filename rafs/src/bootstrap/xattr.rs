//! Extended attributes behind an inode.

use zerocopy::FromBytes;

use super::BootstrapError;
use super::error::At;
use crate::layout::{self, XATTR_HEADER, XattrEntry};

/// One attribute; the name on disk lacks its prefix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Xattr<'a> {
    prefix: &'static [u8],
    suffix: &'a [u8],
    pub(crate) value: &'a [u8],
}

impl Xattr<'_> {
    pub(crate) fn name(&self) -> Vec<u8> {
        [self.prefix, self.suffix].concat()
    }

    pub(crate) fn is_named(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix) == Some(self.suffix)
    }
}

/// Iterates over the attributes of one inode. Ends after the first error.
#[derive(Debug)]
pub(crate) struct Xattrs<'a> {
    offset: u64,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Xattrs<'a> {
    /// `bytes` start with the header of the attributes, or are empty.
    pub(super) fn new(offset: u64, bytes: &'a [u8]) -> Self {
        Self { offset, bytes, position: 0 }
    }

    fn advance(&mut self) -> Result<Option<Xattr<'a>>, BootstrapError> {
        if self.position == 0 && !self.bytes.is_empty() {
            let at = At::new("xattr header", self.offset);
            at.require(self.bytes.get(4) == Some(&0), || "it names shared xattrs".into())?;
            self.position = XATTR_HEADER as usize;
        }
        let at = At::new("xattr", self.offset + self.position as u64);
        let rest = self.bytes.get(self.position..).unwrap_or(&[]);
        if rest.is_empty() {
            return Ok(None);
        }
        let Ok((entry, body)) = XattrEntry::ref_from_prefix(rest) else {
            return Err(at.invalid("it ends behind the xattrs of its inode"));
        };
        let (name_len, value_len) = (usize::from(entry.name_len), usize::from(entry.value_len.get()));
        let len = (size_of::<XattrEntry>() + name_len + value_len).next_multiple_of(4);
        at.require(len <= rest.len(), || format!("its {len} bytes end behind the xattrs of its inode"))?;
        let prefix = layout::XATTR_PREFIXES.into_iter().find(|(index, _)| *index == entry.name_index);
        let (index, prefix) = prefix.ok_or_else(|| at.invalid(format!("unknown prefix {}", entry.name_index)))?;
        let (suffix, value) = (&body[..name_len], &body[name_len..name_len + value_len]);
        at.require(suffix.is_empty() == layout::is_whole_xattr_name(index), || {
            format!("a name of {name_len} bytes behind prefix {index}")
        })?;
        at.require(!suffix.contains(&0), || "its name has a NUL".into())?;
        at.require(prefix.len() + name_len <= layout::MAX_NAME, || format!("a name of {name_len} bytes"))?;
        self.position += len;
        Ok(Some(Xattr { prefix, suffix, value }))
    }
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Result<Xattr<'a>, BootstrapError>;

    fn next(&mut self) -> Option<Self::Item> {
        let xattr = self.advance().transpose();
        if !matches!(xattr, Some(Ok(_))) {
            self.bytes = &[];
        }
        xattr
    }
}
