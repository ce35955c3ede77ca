//! Which parts of which files are read, in the order of their first access: what a later build lays out first.
//!
//! Written as text, a line for each chunk of a file that was read: the number of the chunk in the file, a tab, the path
//! from the root. In a path a backslash is `\\`, a newline `\n`; other bytes are as they are. What the kernel reads ahead
//! of a program counts as read; what it has in its cache is not seen again.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bootstrap::{Bootstrap, BootstrapError, ChunkRef, Metadata, Nid};
use crate::prefetch::{PrefetchListError, lines};
use crate::source::ChunkId;

/// Reads of one mounted image. Memory is bounded by the number of chunks that its files have.
#[derive(Debug)]
pub struct Trace {
    image: Metadata,
    /// Locked for a look.
    reads: Mutex<Reads>,
}

#[derive(Debug, Default)]
struct Reads {
    seen: HashSet<(Nid, u64)>,
    order: Vec<(Nid, u64)>,
}

/// A line of a trace, without its end: number of the chunk, and path.
pub(crate) fn parse_line(line: &[u8]) -> Result<(u64, Vec<u8>), String> {
    let tab = line.iter().position(|byte| *byte == b'\t').ok_or("no tab behind the number of a chunk")?;
    let number = std::str::from_utf8(&line[..tab]).ok().and_then(|number| number.parse().ok());
    let number = number.ok_or_else(|| format!("{:?} is no number", String::from_utf8_lossy(&line[..tab])))?;
    let mut path = Vec::with_capacity(line.len() - tab);
    let mut bytes = line[tab + 1..].iter();
    while let Some(byte) = bytes.next() {
        path.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'\\') => b'\\',
                Some(b'n') => b'\n',
                _ => return Err("a backslash that means nothing".into()),
            },
            byte => *byte,
        });
    }
    Ok((number, path))
}

/// The chunks of an image that a written trace tells of, in its order; one that several files have may come several times.
///
/// # Errors
/// The trace cannot be read, or a line of it means no chunk of this image.
pub fn traced_chunks(image: &Bootstrap, trace: impl Read) -> Result<Vec<ChunkId>, PrefetchListError> {
    lines(trace, |line| {
        let (number, path) = parse_line(line)?;
        let chunk = chunk_of(image, &path, number);
        let problem = || format!("the image has no chunk {number} of {}", String::from_utf8_lossy(&path));
        Ok(chunk.ok_or_else(problem)?.id)
    })
}

fn chunk_of(image: &Bootstrap, path: &[u8], number: u64) -> Option<ChunkRef> {
    let mut names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
    // A bootstrap is verified: what cannot be read there is not there.
    let file = names.try_fold(image.root(), |nid, name| image.inode(nid).ok()?.lookup(name).ok()?)?;
    image.inode(file).ok()?.chunk(number)
}

/// Why a trace could not be written.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The image is wrong.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The output could not be written.
    #[error("cannot write the trace")]
    Write(#[from] io::Error),
}

impl Trace {
    /// A trace of an image, empty at first.
    pub fn new(image: impl Into<Metadata>) -> Self {
        Self { image: image.into(), reads: Mutex::default() }
    }

    /// Notes that `len` bytes of a file were asked for from `offset` on.
    pub fn read(&self, nid: Nid, offset: u64, len: u64) {
        let look = self.image.look();
        let Ok(inode) = look.inode(nid) else { return };
        let chunk_size = u64::from(self.image.chunk_size());
        if offset >= inode.size() {
            return;
        }
        let end = offset.saturating_add(len).min(inode.size()).div_ceil(chunk_size).min(inode.chunk_count());
        let mut reads = self.lock();
        for chunk in offset / chunk_size..end {
            if reads.seen.insert((nid, chunk)) {
                reads.order.push((nid, chunk));
            }
        }
    }

    /// Writes what was read so far. Of a file with several names the first in the order of the tree is told.
    pub fn write(&self, mut output: impl Write) -> Result<(), TraceError> {
        let order = self.lock().order.clone();
        let paths = self.image.paths(&order.iter().map(|(nid, _)| *nid).collect())?;
        for (nid, chunk) in order {
            let Some(path) = paths.get(&nid) else { continue };
            write!(output, "{chunk}\t")?;
            for byte in path {
                match byte {
                    b'\\' => output.write_all(b"\\\\")?,
                    b'\n' => output.write_all(b"\\n")?,
                    byte => output.write_all(&[*byte])?,
                }
            }
            output.write_all(b"\n")?;
        }
        Ok(output.flush()?)
    }

    fn lock(&self) -> MutexGuard<'_, Reads> {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::bootstrap::Bootstrap;
    use crate::builder::{BuildOptions, Builder};

    #[test]
    fn chunks_are_told_in_the_order_of_their_first_read() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir_all(source.join("d")).unwrap();
        fs::write(source.join("d/large"), [1; 0x3800]).unwrap();
        fs::write(source.join("odd\n\\name"), b"x").unwrap();
        fs::hard_link(source.join("d/large"), source.join("z")).unwrap();
        let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
        Builder::new(options).build(&source, &dir.path().join("boot"), &dir.path().join("blobs")).unwrap();
        let image = Bootstrap::open(&dir.path().join("boot")).unwrap();
        let root = image.inode(image.root()).unwrap();
        let (large, odd) = (root.lookup(b"z").unwrap().unwrap(), root.lookup(b"odd\n\\name").unwrap().unwrap());
        let trace = Trace::new(image.clone());
        for (nid, offset, len) in [
            // Behind its end, but in its only chunk.
            (odd, 10, 10),
            (large, 0x1fff, 2),
            (odd, 0, 4096),
            (large, 0, 0x1000),
            (large, 0x3000, u64::MAX),
            (large, 0x2000, 1),
            (large, u64::MAX, 1),
            (image.root(), 0, 10),
        ] {
            trace.read(nid, offset, len);
        }
        let mut text = Vec::new();
        trace.write(&mut text).unwrap();
        let expected = "1\t/z\n2\t/z\n0\t/odd\\n\\\\name\n0\t/z\n3\t/z\n";
        assert_eq!(std::str::from_utf8(&text).unwrap(), expected);

        let chunk = |nid, number| image.inode(nid).unwrap().chunk(number).unwrap().id;
        let read = [(large, 1), (large, 2), (odd, 0), (large, 0), (large, 3)].map(|(nid, number)| chunk(nid, number));
        assert_eq!(traced_chunks(&image, &text[..]).unwrap(), read, "what was written is found again");
        for (wrong, line) in [("0\t/z\n4\t/z", 2), ("0\t/d", 1), ("0\t/z/z", 1), ("\n0\t/none", 2), ("0 /z", 1)] {
            let error = traced_chunks(&image, wrong.as_bytes()).unwrap_err();
            assert!(
                matches!(error, PrefetchListError::Line { line: found, .. } if found == line),
                "{wrong:?}: {error}"
            );
        }
    }
}
