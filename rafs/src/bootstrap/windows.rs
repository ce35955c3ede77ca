//! Parts of a bootstrap's file, read when they are looked at.
//!
//! The kernel's page cache is the cache, and the only one: it is bounded by whoever owns the memory, shared with the kernel's
//! own EROFS driver, and given back when others need it. A map would be the same pages, but a file that is cut under a map,
//! or a disk that fails under it, ends the process with SIGBUS; read(2) says so in an error, which is one read's. What is
//! paid for that is a copy of 4 KiB for each inode that the kernel asks for once.
//!
//! What was read lives as long as the [`Windows`], so that it can be lent out: they are made for one look, and dropped.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire};
use std::sync::{Arc, OnceLock};

use super::BootstrapError;
use super::error::At;

/// Bytes of a window: a block, in which an inode lies with its xattrs and its neighbours.
const WINDOW: u64 = 4096;
/// Windows in the first shelf; each further one has twice as many.
const FIRST_SHELF: usize = 4;
/// Shelves: with room for more windows than a look that ends could fill.
const SHELVES: usize = 24;
/// Windows that are looked into before the file is read again: a directory's block, and that of the inodes that it names.
const RECENT: usize = 2;

/// A file, and what was read of it. Grows with each part that is looked at.
#[derive(Debug)]
pub(super) struct Windows {
    file: Arc<File>,
    /// Bytes of the file when it was opened.
    size: u64,
    shelves: [Shelf; SHELVES],
    count: AtomicUsize,
}

/// Windows never move, so what they hold can be lent for as long as all of them live.
type Shelf = OnceLock<Box<[OnceLock<Window>]>>;

#[derive(Debug)]
struct Window {
    start: u64,
    bytes: Box<[u8]>,
}

impl Windows {
    /// Nothing is read yet. `size` bytes are taken to be there.
    pub(super) fn new(file: Arc<File>, size: u64) -> Self {
        Self { file, size, shelves: [const { OnceLock::new() }; SHELVES], count: AtomicUsize::new(0) }
    }

    /// The same file, with nothing read.
    pub(super) fn again(&self) -> Self {
        Self::new(Arc::clone(&self.file), self.size)
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// `len` bytes, which lie in the file as it was when it was opened.
    ///
    /// # Errors
    /// [`BootstrapError::Read`], also when the file has become shorter.
    pub(super) fn slice(&self, at: At, len: usize) -> Result<&[u8], BootstrapError> {
        if let Some(bytes) = self.recent(at.offset, len) {
            return Ok(bytes);
        }
        let start = at.offset / WINDOW * WINDOW;
        let end = (at.offset + len as u64).next_multiple_of(WINDOW).min(self.size);
        let mut bytes = vec![0; (end - start) as usize].into_boxed_slice();
        let failed = |source| BootstrapError::Read { structure: at.structure, offset: at.offset, source };
        self.file.read_exact_at(&mut bytes, start).map_err(failed)?;
        let kept = self.keep(Window { start, bytes });
        kept.and_then(|window| window.get(at.offset, len)).ok_or_else(|| at.invalid("too much was looked at at once"))
    }

    fn recent(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let count = self.count.load(Acquire);
        (count.saturating_sub(RECENT)..count).rev().find_map(|number| self.place(number)?.get()?.get(offset, len))
    }

    fn keep(&self, window: Window) -> Option<&Window> {
        let place = self.place(self.count.fetch_add(1, AcqRel))?;
        Some(place.get_or_init(|| window))
    }

    fn place(&self, number: usize) -> Option<&OnceLock<Window>> {
        let shelf = ((number + FIRST_SHELF) / FIRST_SHELF).ilog2();
        let len = FIRST_SHELF << shelf;
        let slots = self.shelves.get(shelf as usize)?;
        let slots = slots.get_or_init(|| std::iter::repeat_with(OnceLock::new).take(len).collect());
        slots.get(number + FIRST_SHELF - len)
    }
}

impl Window {
    fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let start = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        self.bytes.get(start..start.checked_add(len)?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_lent_stays_whatever_else_is_read() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..100_000u32).map(|at| (at / 3 % 251) as u8).collect();
        file.write_all(&content).unwrap();
        let windows = Windows::new(Arc::new(file), content.len() as u64);
        // Within a block, over its border, over several, and the end that is no whole block.
        let places = [(0, 10), (4000, 200), (4090, 4096), (50_000, 20_000), (99_990, 10), (98_304, 1696)];
        let rounds = (0..200).flat_map(|_| places);
        let lent: Vec<_> = rounds
            .map(|(offset, len)| (offset, len, windows.slice(At::new("test", offset as u64), len).unwrap()))
            .collect();
        assert!(lent.iter().all(|(offset, len, bytes)| *bytes == &content[*offset..offset + len]));
        assert!(windows.again().recent(0, 1).is_none());
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        let windows = Windows::new(Arc::new(file), 10_000);
        assert!(windows.slice(At::new("test", 9_000), 1_000).is_ok());
        windows.file.set_len(8_192).unwrap();
        let error = windows.again().slice(At::new("test", 9_000), 1_000).unwrap_err();
        assert!(matches!(error, BootstrapError::Read { offset: 9_000, .. }), "{error}");
    }
}
