use std::sync::mpsc::{Receiver, channel};

use proptest::prelude::*;
use shoal_proto::BlobId;

use super::*;
use crate::bootstrap::Bootstrap;
use crate::builder::{BuildOptions, Builder};
use crate::codec::Compressor;
use crate::source::ChunkReply;

const CHUNK: usize = 0x1000;

/// An image of one file `f`, its bootstrap and its content.
fn image(len: usize) -> (Bootstrap, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..len).map(|at| (at / 7 % 251) as u8).collect();
    std::fs::create_dir(dir.path().join("source")).unwrap();
    std::fs::write(dir.path().join("source/f"), &content).unwrap();
    let options = BuildOptions { compressor: Compressor::None, chunk_size: CHUNK as u32, ..BuildOptions::default() };
    let boot = dir.path().join("boot");
    Builder::new(options).build(&dir.path().join("source"), &boot, dir.path()).unwrap();
    (Bootstrap::open(&boot).unwrap(), content)
}

fn file(image: &Bootstrap) -> Inode<'_> {
    let root = image.inode(image.root()).unwrap();
    image.inode(root.lookup(b"f").unwrap().unwrap()).unwrap()
}

/// Keeps what it is asked for, so that a test answers in any order, or never.
#[derive(Default)]
struct Kept(Mutex<Vec<(ChunkId, ChunkReply)>>);

impl ChunkSource for Kept {
    fn read(&self, chunk: ChunkId, priority: Priority, reply: ChunkReply) {
        assert_eq!(priority, Priority::OnDemand);
        self.0.lock().unwrap().push((chunk, reply));
    }
}

/// Starts a read; what comes out is sent through the channel.
fn start(source: &Kept, inode: &Inode<'_>, offset: u64, len: u64) -> Receiver<Result<Vec<u8>, ReadError>> {
    let (sender, receiver) = channel();
    read(source, inode, offset, len, move |outcome| sender.send(outcome.map(<[u8]>::to_vec)).unwrap());
    receiver
}

/// The bytes of a chunk, found by its place in the file.
fn chunk_bytes(inode: &Inode<'_>, content: &[u8], id: ChunkId) -> Bytes {
    let number = inode.chunks().position(|chunk| chunk.id == id).unwrap();
    Bytes::copy_from_slice(content.chunks(CHUNK).nth(number).unwrap())
}

fn error(id: ChunkId) -> ChunkError {
    ChunkError { blob: BlobId::new([7; 32]), index: id.index, reason: "injected".into() }
}

proptest! {
    #[test]
    fn reads_are_slices_of_the_file_in_whatever_order_chunks_come(
        len in 0usize..6 * CHUNK,
        offset in 0usize..7 * CHUNK,
        size in 0usize..7 * CHUNK,
        order in any::<[u8; 8]>(),
    ) {
        let (image, content) = image(len);
        let source = Kept::default();
        let outcome = start(&source, &file(&image), offset as u64, size as u64);
        let mut asked = std::mem::take(&mut *source.0.lock().unwrap());
        prop_assert!(asked.len() <= size.div_ceil(CHUNK) + 1);
        while !asked.is_empty() {
            prop_assert!(outcome.try_recv().is_err(), "answered before the last chunk came");
            let next = usize::from(order[asked.len() % order.len()]) % asked.len();
            let (id, reply) = asked.swap_remove(next);
            reply(Ok(chunk_bytes(&file(&image), &content, id)));
        }
        let expected = &content[offset.min(len)..(offset + size).min(len).max(offset.min(len))];
        prop_assert_eq!(outcome.try_recv().unwrap().unwrap(), expected);
        prop_assert!(outcome.try_recv().is_err(), "answered twice");
    }
}

#[test]
fn the_first_error_answers_and_the_rest_is_ignored() {
    let (image, content) = image(3 * CHUNK);
    let source = Kept::default();
    let outcome = start(&source, &file(&image), 0, 3 * CHUNK as u64);
    let mut asked = std::mem::take(&mut *source.0.lock().unwrap()).into_iter();
    let mut answer = |fail: bool| {
        let (id, reply) = asked.next().unwrap();
        reply(if fail { Err(error(id)) } else { Ok(chunk_bytes(&file(&image), &content, id)) });
    };
    answer(false);
    answer(true);
    assert!(matches!(outcome.try_recv().unwrap(), Err(ReadError::Chunk(error)) if error.index == 1));
    answer(true);
    assert!(outcome.try_recv().is_err());
}

#[test]
fn a_chunk_that_is_too_short_is_an_error() {
    for len in [CHUNK, 2 * CHUNK] {
        let (image, _) = image(len);
        let source = Kept::default();
        let outcome = start(&source, &file(&image), 0, len as u64);
        for (_, reply) in std::mem::take(&mut *source.0.lock().unwrap()) {
            reply(Ok(Bytes::from_static(b"short")));
        }
        let text = outcome.try_recv().unwrap().unwrap_err().to_string();
        assert_eq!(text, "ChunkId { blob: 0, index: 0 } gave 5 bytes, 4096 are needed");
    }
}

#[test]
fn a_source_that_goes_away_is_an_error() {
    for len in [CHUNK, 3 * CHUNK] {
        let (image, content) = image(len);
        let source = Kept::default();
        let outcome = start(&source, &file(&image), 0, len as u64);
        let mut asked = std::mem::take(&mut *source.0.lock().unwrap());
        if asked.len() > 1 {
            let (id, reply) = asked.swap_remove(1);
            reply(Ok(chunk_bytes(&file(&image), &content, id)));
        }
        drop(asked);
        assert!(matches!(outcome.try_recv().unwrap(), Err(ReadError::Unanswered)));
    }
}

#[test]
fn what_is_no_file_has_no_bytes() {
    let (image, _) = image(1);
    let outcome = start(&Kept::default(), &image.inode(image.root()).unwrap(), 0, 10);
    assert_eq!(outcome.try_recv().unwrap().unwrap(), b"");
}
