use std::fs;
use std::sync::mpsc::channel;
use std::time::Duration;

use super::*;
use crate::builder::{BuildOptions, Builder};

const LONG: Duration = Duration::from_secs(60);

/// An image of one file with 20 different chunks.
fn image(dir: &Path) -> (Bootstrap, Vec<u8>) {
    let content: Vec<u8> = (0..20u8).flat_map(|number| vec![number; 0x1000]).collect();
    fs::create_dir(dir.join("source")).unwrap();
    fs::write(dir.join("source/file"), &content).unwrap();
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    Builder::new(options).build(&dir.join("source"), &dir.join("boot"), &dir.join("blobs")).unwrap();
    (Bootstrap::open(&dir.join("boot")).unwrap(), content)
}

fn chunk(index: u32) -> ChunkId {
    ChunkId { blob: 0, index }
}

#[test]
fn every_read_gets_the_right_bytes_once() {
    let dir = tempfile::tempdir().unwrap();
    let (image, content) = image(dir.path());
    let source = BlobDir::open(image, &dir.path().join("blobs"), 3).unwrap();
    let (sender, receiver) = channel();
    for round in 0..10 {
        for index in 0..20 {
            let sender = sender.clone();
            let priority = if round % 2 == 0 { Priority::Prefetch } else { Priority::OnDemand };
            source.read(chunk(index), priority, Box::new(move |outcome| sender.send((index, outcome)).unwrap()));
        }
    }
    drop(sender);
    for _ in 0..200 {
        let (index, outcome) = receiver.recv_timeout(LONG).unwrap();
        let start = index as usize * 0x1000;
        assert_eq!(outcome.unwrap(), content[start..start + 0x1000]);
    }
    assert!(receiver.recv_timeout(LONG).is_err(), "more replies than reads");
}

#[test]
fn chunks_that_the_image_does_not_name_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = image(dir.path());
    let source = BlobDir::open(image, &dir.path().join("blobs"), 1).unwrap();
    for id in [chunk(20), chunk(u32::MAX), ChunkId { blob: 1, index: 0 }] {
        let (sender, receiver) = channel();
        source.read(id, Priority::OnDemand, Box::new(move |outcome| sender.send(outcome).unwrap()));
        assert_eq!(receiver.recv_timeout(LONG).unwrap().unwrap_err().index, id.index);
    }
}

#[test]
fn a_mended_blob_serves_again() {
    let dir = tempfile::tempdir().unwrap();
    let (image, content) = image(dir.path());
    let path = dir.path().join("blobs").join(image.blobs()[0].id.to_string());
    let stored = fs::read(&path).unwrap();
    let source = BlobDir::open(image, &dir.path().join("blobs"), 1).unwrap();
    let read = || {
        let (sender, receiver) = channel();
        source.read(chunk(3), Priority::OnDemand, Box::new(move |outcome| sender.send(outcome).unwrap()));
        receiver.recv_timeout(LONG).unwrap()
    };
    // Written over, not replaced: the source keeps the file open.
    fs::write(&path, vec![0; stored.len()]).unwrap();
    let error = read().unwrap_err();
    assert_eq!((error.blob, error.index), (source.shared.reader.table(0).unwrap().blob(), 3));
    fs::write(&path, &stored).unwrap();
    assert_eq!(read().unwrap(), content[3 * 0x1000..4 * 0x1000]);
}

#[test]
fn dropping_answers_everyone_who_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = image(dir.path());
    let source = BlobDir::open(image, &dir.path().join("blobs"), 1).unwrap();
    let (sender, receiver) = channel();
    let (held, hold) = channel::<()>();
    let (started, start) = channel();
    // The only worker is kept busy by its first reply.
    let first = move |_| {
        started.send(()).unwrap();
        hold.recv().unwrap();
    };
    source.read(chunk(0), Priority::OnDemand, Box::new(first));
    start.recv_timeout(LONG).unwrap();
    for index in 1..20 {
        let sender = sender.clone();
        source.read(chunk(index), Priority::Prefetch, Box::new(move |outcome| sender.send(outcome.is_ok()).unwrap()));
    }
    drop(sender);
    let closing = thread::spawn(move || drop(source));
    let outcomes: Vec<_> = (0..19).map(|_| receiver.recv_timeout(LONG).unwrap()).collect();
    assert_eq!(outcomes, [false; 19]);
    held.send(()).unwrap();
    closing.join().unwrap();
}

#[test]
fn a_reply_may_own_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = image(dir.path());
    let source = Arc::new(BlobDir::open(image, &dir.path().join("blobs"), 1).unwrap());
    let (sender, receiver) = channel();
    let (given, give) = channel::<Arc<BlobDir>>();
    let reply = move |_| {
        drop(give.recv().unwrap());
        sender.send(()).unwrap();
    };
    source.read(chunk(0), Priority::OnDemand, Box::new(reply));
    given.send(source).unwrap();
    receiver.recv_timeout(LONG).unwrap();
}

#[test]
fn on_demand_goes_before_prefetch_and_lifts_it() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = image(dir.path());
    let source = BlobDir::open(image, &dir.path().join("blobs"), 1).unwrap();
    let (held, hold) = channel::<()>();
    let (started, start) = channel();
    let first = move |_| {
        started.send(()).unwrap();
        hold.recv().unwrap();
    };
    source.read(chunk(0), Priority::OnDemand, Box::new(first));
    start.recv_timeout(LONG).unwrap();
    let (sender, receiver) = channel();
    let read = |index, priority| {
        let sender = sender.clone();
        source.read(chunk(index), priority, Box::new(move |_| sender.send(index).unwrap()));
    };
    read(1, Priority::Prefetch);
    read(2, Priority::Prefetch);
    read(3, Priority::OnDemand);
    read(2, Priority::OnDemand);
    held.send(()).unwrap();
    let order: Vec<_> = (0..4).map(|_| receiver.recv_timeout(LONG).unwrap()).collect();
    assert_eq!(order, [3, 2, 2, 1]);
}
