//! What the nodes are for: each mounts the image, has all of it prefetched, and reads every file; every byte is compared.

use std::{
    fs::File,
    io::{self, Read},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use rustix::fs::{Advice, fadvise};
use shoal::{api, command::Failure};
use shoal_proto::control::{MountMode, MountRequest, PrefetchRequest};
use tokio::task::JoinHandle;

use super::{Run, image::Image, is_interrupted, nodes::Nodes, seconds};

/// Bytes compared at a time.
const STEP: usize = 1 << 20;

/// How a node's reading ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// From the start of all until its last byte.
    pub(super) seconds: f64,
    /// From the start of all until its first byte.
    pub(super) first_seconds: f64,
    pub(super) read_errors: u64,
    pub(super) wrong_bytes: u64,
    /// Why it could not even begin.
    pub(super) error: Option<String>,
}

impl Outcome {
    pub(super) fn failed(&self) -> bool {
        self.read_errors > 0 || self.wrong_bytes > 0 || self.error.is_some()
    }
}

/// The readers of all nodes, at work.
pub(super) struct Readers {
    started: Instant,
    tasks: Vec<JoinHandle<Outcome>>,
}

/// What the reader of one node needs.
struct Reader {
    socket: api::ControlClient<tonic::transport::Channel>,
    reference: String,
    mountpoint: PathBuf,
    source: PathBuf,
    files: Vec<PathBuf>,
    threads: usize,
    started: Instant,
    interrupted: Arc<AtomicBool>,
}

impl Readers {
    /// Starts them all at once.
    pub(super) async fn start(
        run: &Run<'_>,
        nodes: &Nodes,
        image: &Image,
        registry: SocketAddr,
    ) -> Result<Self, Failure> {
        let mut sockets = Vec::new();
        for node in nodes.readers() {
            sockets.push(node.process.client().await?);
        }
        let started = Instant::now();
        let readers = nodes.readers().zip(sockets).map(|(node, socket)| Reader {
            socket,
            reference: format!("{registry}/app:{}", image.tag),
            mountpoint: node.process.mountpoint(),
            source: image.source.clone(),
            files: image.files.clone(),
            threads: run.scenario.workload.on_demand,
            started,
            interrupted: run.interrupted.clone(),
        });
        let tasks = readers.map(|reader| tokio::spawn(reader.run())).collect();
        Ok(Self { started, tasks })
    }

    /// When they started.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// How each ended, in the order of the nodes.
    pub(super) async fn finish(self) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for task in self.tasks {
            let lost =
                |error: tokio::task::JoinError| Outcome { error: Some(error.to_string()), ..Outcome::default() };
            outcomes.push(task.await.unwrap_or_else(lost));
        }
        outcomes
    }
}

impl Reader {
    async fn run(mut self) -> Outcome {
        let (reference, mountpoint) = (self.reference.clone(), self.mountpoint.display().to_string());
        let request = MountRequest { reference, mountpoint, mode: MountMode::Fuse.into(), decode: false };
        if let Err(status) = self.socket.mount(request).await {
            return Outcome { error: Some(status.message().to_owned()), ..Outcome::default() };
        }
        let prefetch = tokio::spawn(prefetch(self.socket.clone(), self.reference.clone()));
        if self.threads == 0 {
            // Nobody waits for single pieces in this scenario; what a prefetch could not get, the reads will show.
            let _ = prefetch.await;
        }
        let read = tokio::task::spawn_blocking(move || self.read());
        read.await.unwrap_or_else(|error| Outcome { error: Some(error.to_string()), ..Outcome::default() })
    }

    /// Reads all files, in order, with as many threads as the scenario has reads waiting at a time.
    fn read(&self) -> Outcome {
        let (next, errors, wrong, first) =
            (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(u64::MAX));
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    while let Some(name) = self.files.get(next.fetch_add(1, Relaxed)) {
                        if is_interrupted(&self.interrupted) {
                            return;
                        }
                        let compared = compare(&self.source.join(name), &self.mountpoint.join(name), || {
                            first.fetch_min(self.started.elapsed().as_micros() as u64, Relaxed);
                        });
                        match compared {
                            Ok(different) => wrong.fetch_add(different, Relaxed),
                            Err(_) => errors.fetch_add(1, Relaxed),
                        };
                    }
                });
            }
        });
        Outcome {
            seconds: seconds(self.started),
            first_seconds: first.into_inner() as f64 / 1e6,
            read_errors: errors.into_inner(),
            wrong_bytes: wrong.into_inner(),
            error: None,
        }
    }
}

async fn prefetch(mut socket: api::ControlClient<tonic::transport::Channel>, reference: String) {
    let Ok(reply) = socket.prefetch(PrefetchRequest { reference }).await else { return };
    let mut progress = reply.into_inner();
    while let Ok(Some(_)) = progress.message().await {}
}

/// How many bytes of `mounted` are not those of `source`. What was read does not stay in the page cache, of which a
/// machine full of nodes has too little.
fn compare(source: &Path, mounted: &Path, first: impl FnOnce()) -> io::Result<u64> {
    let (mut a, mut b) = (File::open(source)?, File::open(mounted)?);
    let (mut left, mut right) = (vec![0; STEP], vec![0; STEP]);
    let (mut wrong, mut first) = (0, Some(first));
    loop {
        let (n, m) = (fill(&mut a, &mut left)?, fill(&mut b, &mut right)?);
        if let Some(first) = first.take() {
            first();
        }
        if left[..n] != right[..m] {
            let differing = left[..n].iter().zip(&right[..m]).filter(|(a, b)| a != b).count();
            wrong += differing as u64 + n.abs_diff(m) as u64;
        }
        if n == 0 && m == 0 {
            // Only advice.
            let _ = fadvise(&b, 0, None, Advice::DontNeed);
            return Ok(wrong);
        }
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_different_byte_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(dir.path().join(name), bytes).unwrap();
            dir.path().join(name)
        };
        let mut bytes = vec![7; 3 * STEP + 5];
        let source = write("source", &bytes);
        assert_eq!(compare(&source, &source, || {}).unwrap(), 0);
        bytes[2 * STEP] = 8;
        bytes[9] = 8;
        assert_eq!(compare(&source, &write("changed", &bytes), || {}).unwrap(), 2);
        assert_eq!(compare(&source, &write("shorter", &bytes[..STEP]), || {}).unwrap(), 1 + 2 * STEP as u64 + 5);
        assert!(compare(&source, &dir.path().join("missing"), || {}).is_err());
    }
}
