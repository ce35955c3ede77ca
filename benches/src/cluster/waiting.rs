//! What a read that a process waits for costs while its node fetches another image at full rate, next to what it costs alone.
//!
//! One seed peer that has two images, and one node behind a link of a fifth of the rate. The node mounts the first image and reads pages
//! of it, each in a piece that was never fetched: first with nothing else to do, then while all of the second one is being prefetched.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use shoal::{api, command::Failure};
use shoal_proto::control::{MountMode, MountRequest, PrefetchRequest, StatusRequest};
use shoal_sim::Scenario;

use super::{
    Run,
    image::{Image, Workshop},
    network::{self, Network},
    nodes::{Node, Nodes},
    raise_descriptors, work_folder,
};
use crate::figures::percentile;

/// Bytes of a read.
const PAGE: usize = 4096;
/// How many times as fast as the node's link the seed peer's is.
const SEED_RATE: f64 = 5.0;
/// What is prefetched meanwhile.
const BULK: &str = "bulk";
/// Time between two reads.
const PAUSE: Duration = Duration::from_millis(20);
/// What the bulk has to come in before reads are measured beside it: nothing about the path is unknown any more.
const WARM_UP: Duration = Duration::from_secs(3);
/// Reads that the 99th percentile is worth telling of.
const ENOUGH: usize = 100;

/// The keys are a contract with scripts.
#[derive(Debug, Serialize)]
pub struct Waiting {
    link_mbit: f64,
    piece_bytes: u64,
    unloaded_ms: Latencies,
    loaded_ms: Latencies,
    /// Loaded by unloaded.
    p99_ratio: f64,
    /// What came in while reads were measured beside it.
    prefetch_mbit: f64,
}

/// Of single reads.
#[derive(Debug, Clone, Copy, Serialize)]
struct Latencies {
    reads: usize,
    p50: f64,
    p99: f64,
    max: f64,
}

impl Latencies {
    fn of(milliseconds: &[f64]) -> Self {
        let at = |percent| percentile(milliseconds, percent);
        Self { reads: milliseconds.len(), p50: at(50), p99: at(99), max: at(100) }
    }
}

impl Waiting {
    /// For people.
    pub fn table(&self) -> String {
        let row = |name: &str, Latencies { reads, p50, p99, max }: Latencies| {
            format!("{name:<10}{reads:>6}  p50 {p50:>7.1} ms  p99 {p99:>7.1} ms  most {max:>7.1} ms\n")
        };
        format!(
            "a cold read of 4 KiB, pieces of {} KiB, a link of {} Mbit/s\n{}{}p99 {:.2} x beside a prefetch of {:.1} Mbit/s",
            self.piece_bytes >> 10,
            self.link_mbit,
            row("unloaded", self.unloaded_ms),
            row("loaded", self.loaded_ms),
            self.p99_ratio,
            self.prefetch_mbit,
        )
    }
}

/// Measures with a node's link of `mbit` Mbit/s and two images of `mib` MiB in pieces of `piece_kib` KiB, by the `shoal` binary given.
///
/// # Errors
/// The machine cannot do it, a process fails, or a byte is wrong.
pub async fn waiting(shoal: &Path, mbit: f64, mib: f64, piece_kib: u64) -> Result<Waiting, Failure> {
    network::check_tools()?;
    raise_descriptors();
    let scenario = scenario(mbit, mib, piece_kib)?;
    let folder = work_folder()?;
    // What is read ahead of one read would be what the next one stands behind, and the next one would find it.
    let also = vec![("read.ahead_bytes", 0.into())];
    let interrupted = Arc::new(AtomicBool::new(false));
    let run = Run { scenario: &scenario, shoal, folder: folder.path().to_owned(), interrupted, also };
    eprintln!("waiting: building two images");
    let mut workshop = Workshop::new(&scenario, folder.path())?;
    workshop.earlier(BULK).await?;
    let image = workshop.image().await?;
    let network = Network::create(&scenario)?;
    let registry = run.registry(&network, &workshop)?;
    let nodes = Nodes::start(&run, &network).await?;
    let reference = |tag: &str| format!("{}/app:{tag}", registry.address());
    eprintln!("waiting: the seed peer fetches both");
    for seed in nodes.seeds() {
        prefetch(seed, reference(&image.tag)).await?;
        prefetch(seed, reference(BULK)).await?;
    }
    let node = nodes.readers().next().ok_or("no node")?;
    let mountpoint = node.process.mountpoint().display().to_string();
    let request =
        MountRequest { reference: reference(&image.tag), mountpoint, mode: MountMode::Fuse.into(), decode: false };
    node.process.client().await?.mount(request).await.map_err(|s| api::said(&s))?;
    let mut places = Places::of(&image, node.process.mountpoint(), workshop.chunk_bytes())?;

    eprintln!("waiting: reading with nothing else to do");
    let half = places.left() / 2;
    let unloaded = places.read(half, &AtomicBool::new(false))?;
    eprintln!("waiting: reading beside a prefetch");
    let over = Arc::new(AtomicBool::new(false));
    let loading = async {
        let ended = prefetch(node, reference(BULK)).await;
        over.store(true, Relaxed);
        ended
    };
    let measuring = async {
        tokio::time::sleep(WARM_UP).await;
        let (started, before) = (Instant::now(), received(node).await?);
        let over = over.clone();
        let reading = move || places.read(half, &over).map_err(|error| error.to_string());
        let loaded = tokio::task::spawn_blocking(reading).await??;
        let (seconds, bytes) = (started.elapsed().as_secs_f64(), received(node).await? - before);
        let own = loaded.len() as u64 * (piece_kib << 10);
        Ok::<_, Failure>((loaded, bytes.saturating_sub(own) as f64 * 8.0 / 1e6 / seconds))
    };
    let (ended, measured) = tokio::join!(loading, measuring);
    ended?;
    let (loaded, prefetch_mbit) = measured?;
    if loaded.len() < ENOUGH {
        return Err(format!("{} reads before the prefetch ended: a larger image is needed", loaded.len()).into());
    }
    nodes.stop();
    let (unloaded_ms, loaded_ms) = (Latencies::of(&unloaded), Latencies::of(&loaded));
    let p99_ratio = loaded_ms.p99 / unloaded_ms.p99;
    Ok(Waiting { link_mbit: mbit, piece_bytes: piece_kib << 10, unloaded_ms, loaded_ms, p99_ratio, prefetch_mbit })
}

fn scenario(mbit: f64, mib: f64, piece_kib: u64) -> Result<Scenario, Failure> {
    let node = |role: &str, mbit: f64| {
        format!("[[nodes]]\nzone = \"a\"\nrole = \"{role}\"\ncount = 1\nup_mbit = {mbit}\ndown_mbit = {mbit}\n")
    };
    let text = format!(
        "name = \"waiting\"\nseed = 1\n[registry]\negress_mbit = 1000\nlatency_ms = 1\n\
         [image]\nencoded_mib = {mib}\npiece_kib = {piece_kib}\ndecoded_ratio = 2.0\n\
         shares = {{ with = \"{BULK}\", fraction = 0.0 }}\n[[zones]]\nname = \"a\"\n{}{}\
         [workload]\nkind = \"flash-crowd\"\nread = \"all\"\n",
        node("seed", SEED_RATE * mbit),
        node("node", mbit),
    );
    Ok(Scenario::parse(&text)?)
}

async fn prefetch(node: &Node, reference: String) -> Result<(), Failure> {
    let mut client = node.process.client().await?;
    let mut progress = client.prefetch(PrefetchRequest { reference }).await.map_err(|s| api::said(&s))?.into_inner();
    while progress.message().await.map_err(|s| api::said(&s))?.is_some() {}
    Ok(())
}

/// Bytes of pieces that a node has received so far.
async fn received(node: &Node) -> Result<u64, Failure> {
    let status = node.process.client().await?.status(StatusRequest {}).await.map_err(|s| api::said(&s))?;
    let by = status.into_inner().total.unwrap_or_default().bytes.unwrap_or_default();
    Ok(by.peer + by.seed + by.registry)
}

/// A page in each chunk of an image, in an order without pattern; each is read once.
struct Places {
    root: PathBuf,
    source: PathBuf,
    places: Vec<(PathBuf, u64)>,
}

impl Places {
    fn of(image: &Image, root: PathBuf, chunk: u64) -> Result<Self, Failure> {
        let mut places = Vec::new();
        for name in &image.files {
            let length = image.source.join(name).metadata()?.len();
            places.extend((0..length).step_by(chunk as usize).map(|at| (name.clone(), at)));
        }
        // A step that has no divisor in common with the number leads to all of them, far from each other.
        let count = places.len();
        let step = (count / 3..count).find(|&step| gcd(step, count) == 1).unwrap_or(1);
        let places = (0..count).map(|n| places[n * step % count].clone()).collect();
        Ok(Self { root, source: image.source.clone(), places })
    }

    fn left(&self) -> usize {
        self.places.len()
    }

    /// Milliseconds that each of some reads took; fewer when it is `over` before.
    fn read(&mut self, reads: usize, over: &AtomicBool) -> Result<Vec<f64>, Failure> {
        let mut taken = Vec::new();
        for (name, at) in self.places.drain(..reads.min(self.places.len())) {
            if over.load(Relaxed) {
                break;
            }
            let file = File::open(self.root.join(&name))?;
            fadvise(&file, 0, None, Advice::Random)?;
            let (mut page, mut right) = ([0; PAGE], [0; PAGE]);
            let started = Instant::now();
            file.read_exact_at(&mut page, at)?;
            taken.push(started.elapsed().as_secs_f64() * 1e3);
            File::open(self.source.join(&name))?.read_exact_at(&mut right, at)?;
            if page != right {
                return Err(format!("wrong bytes in {} at {at}", name.display()).into());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(taken)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_chunk_is_read_once_and_neighbours_are_not_read_in_turn() {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<_> = (0..5).map(|n| PathBuf::from(format!("f{n}"))).collect();
        names.iter().for_each(|name| std::fs::write(folder.path().join(name), [7; 4 * PAGE]).unwrap());
        let (tag, source) = ("image".to_owned(), folder.path().to_owned());
        let image = Image { tag, source: source.clone(), files: names, encoded_bytes: 0 };
        let mut places = Places::of(&image, source, PAGE as u64).unwrap();
        let all: BTreeSet<_> = places.places.iter().cloned().collect();
        assert_eq!((all.len(), places.left()), (20, 20));
        let follows = |a: &(PathBuf, u64), b: &(PathBuf, u64)| a.0 == b.0 && a.1 + PAGE as u64 == b.1;
        assert!(places.places.windows(2).all(|two| !follows(&two[0], &two[1])));
        assert_eq!(places.read(3, &AtomicBool::new(false)).unwrap().len(), 3);
        assert!(places.read(3, &AtomicBool::new(true)).unwrap().is_empty());
    }

    #[test]
    fn the_scenario_is_one_seed_peer_and_one_node_with_two_images() {
        let scenario = scenario(100.0, 300.0, 512).unwrap();
        assert_eq!((scenario.nodes.len(), scenario.readers()), (2, 1));
        assert_eq!(scenario.image.shares.map(|shares| shares.fraction), Some(0.0));
    }

    #[test]
    fn the_ratio_is_that_of_the_99th_percentiles() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        let Latencies { reads, p50, p99, max } = Latencies::of(&hundred);
        assert_eq!((reads, p50, p99, max), (100, 51.0, 100.0, 100.0));
    }
}
