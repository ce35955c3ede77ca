//! A source of chunks that does what a test tells it: late, wrong or never, always from threads of its own.

#![allow(dead_code, unreachable_pub)] // each test program uses its part

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use shoal_proto::{BlobId, Priority};
use shoal_rafs::{BlobDirReader, Bootstrap, ChunkError, ChunkId, ChunkReply, ChunkSource};

pub enum Answer {
    /// From the calling thread, before the call returns.
    Now,
    /// From another thread.
    After(Duration),
    /// From another thread, an error.
    Fail,
    /// When the test says so.
    Keep,
}

type Job = (Duration, Result<Bytes, ChunkError>, ChunkReply);

pub struct ScriptedSource {
    chunks: BTreeMap<ChunkId, Bytes>,
    script: Box<dyn Fn(ChunkId) -> Answer + Send + Sync>,
    jobs: Mutex<Option<Sender<Job>>>,
    workers: Vec<JoinHandle<()>>,
    kept: Mutex<Kept>,
    changed: Condvar,
}

#[derive(Default)]
struct Kept {
    replies: Vec<(ChunkId, ChunkReply)>,
    closed: bool,
}

impl ScriptedSource {
    /// Holds every chunk of an image in memory. `workers` threads answer, so at most that many answers are late at
    /// once.
    pub fn new(
        image: &Bootstrap,
        reader: &BlobDirReader,
        workers: usize,
        script: impl Fn(ChunkId) -> Answer + Send + Sync + 'static,
    ) -> Arc<Self> {
        let tables = (0..image.blobs().len() as u32).map(|blob| (blob, image.piece_table(blob, None).unwrap()));
        let ids = tables.flat_map(|(blob, table)| {
            let indexes: Vec<_> = table.pieces().map(|(_, piece)| piece.chunks()[0].index).collect();
            indexes.into_iter().map(move |index| ChunkId { blob, index })
        });
        let (sender, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let worker = |_| {
            let receiver = receiver.clone();
            thread::spawn(move || work(&receiver))
        };
        Arc::new(Self {
            chunks: ids.map(|id| (id, reader.read(id).unwrap())).collect(),
            script: Box::new(script),
            jobs: Mutex::new(Some(sender)),
            workers: (0..workers).map(worker).collect(),
            kept: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Waits until at least one read is kept.
    pub fn wait_for_kept(&self) {
        drop(self.changed.wait_while(self.kept(), |kept| kept.replies.is_empty()).unwrap());
    }

    /// Answers all that was kept.
    pub fn release(&self) {
        let replies = std::mem::take(&mut self.kept().replies);
        for (id, reply) in replies {
            reply(Ok(self.chunks[&id].clone()));
        }
    }

    /// Drops all that was kept, and what would be kept from now on, without an answer.
    pub fn close(&self) {
        let mut kept = self.kept();
        kept.closed = true;
        let replies = std::mem::take(&mut kept.replies);
        drop(kept);
        drop(replies);
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap()
    }

    fn send(&self, job: Job) {
        self.jobs.lock().unwrap().as_ref().unwrap().send(job).unwrap();
    }
}

impl ChunkSource for ScriptedSource {
    fn read(&self, chunk: ChunkId, _: Priority, reply: ChunkReply) {
        let bytes = self.chunks[&chunk].clone();
        match (self.script)(chunk) {
            Answer::Now => reply(Ok(bytes)),
            Answer::After(delay) => self.send((delay, Ok(bytes), reply)),
            Answer::Fail => {
                let blob = BlobId::new([0; 32]);
                let error = ChunkError { blob, index: chunk.index, reason: "injected".into() };
                self.send((Duration::ZERO, Err(error), reply));
            }
            Answer::Keep => {
                let mut kept = self.kept();
                if !kept.closed {
                    kept.replies.push((chunk, reply));
                    self.changed.notify_all();
                }
            }
        }
    }
}

impl Drop for ScriptedSource {
    fn drop(&mut self) {
        self.jobs.lock().unwrap().take();
        for worker in self.workers.drain(..) {
            worker.join().unwrap();
        }
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap().recv();
        let Ok((delay, outcome, reply)) = job else { return };
        thread::sleep(delay);
        reply(outcome);
    }
}
