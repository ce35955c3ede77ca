//! Whether a node that has no peers is slower than a plain lazy mount: the same image from the same registry, each time from nothing, by
//! `shoal mount` and by a daemon that knows nobody, in turns.
//!
//! ```text
//! mount  until the first file can be looked up: of the plain mount the start of the process is part, the daemon runs already
//! all    then every file is read, one after the other
//! touch  or, mounted anew, the first page of some files in an order without pattern, as a container that starts touches them
//! ```
//!
//! Nothing of the image is on the node, nor in the page cache, but what the registry reads: its disk is not what is compared.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use shoal::{
    api,
    command::Failure,
    processes::{DockerRegistryProcess, NodeProcess},
};
use shoal_proto::control::{EvictRequest, MountMode, MountRequest, UnmountRequest};
use shoal_rafs::{BuildOptions, Builder};

use crate::{
    figures::{median, spread},
    machine::drop_caches,
    mounts::reads::{all, files, opens},
    write_tree,
};

/// Longest time until something is mounted.
const PATIENCE: Duration = Duration::from_secs(60);

/// The figures of all rounds.
#[derive(Debug, Default)]
pub struct Report {
    files: usize,
    bytes: u64,
    plain: Rounds,
    daemon: Rounds,
}

/// Seconds, one of each kind a round.
#[derive(Debug, Default)]
struct Rounds {
    mount: Vec<f64>,
    all: Vec<f64>,
    touch: Vec<f64>,
}

/// The keys are a contract with scripts.
#[derive(Debug, Serialize)]
pub struct Medians {
    rounds: usize,
    files: usize,
    bytes: u64,
    plain: Kinds,
    daemon: Kinds,
    /// The daemon's by those of the plain mount.
    ratio: Kinds,
}

#[derive(Debug, Serialize)]
struct Kinds {
    mount_seconds: f64,
    all_seconds: f64,
    touch_seconds: f64,
}

impl Report {
    /// What to publish.
    pub fn medians(&self) -> Medians {
        let of = |rounds: &Rounds| Kinds {
            mount_seconds: median(&rounds.mount),
            all_seconds: median(&rounds.all),
            touch_seconds: median(&rounds.touch),
        };
        let (plain, daemon) = (of(&self.plain), of(&self.daemon));
        let ratio = Kinds {
            mount_seconds: daemon.mount_seconds / plain.mount_seconds,
            all_seconds: daemon.all_seconds / plain.all_seconds,
            touch_seconds: daemon.touch_seconds / plain.touch_seconds,
        };
        Medians { rounds: self.plain.all.len(), files: self.files, bytes: self.bytes, plain, daemon, ratio }
    }

    /// For people: medians with their spread, and the ratio.
    pub fn table(&self) -> String {
        let mut lines =
            vec![format!("{} files, {:.0} MiB; seconds, median (least to most)", self.files, mib(self.bytes))];
        let (plain, daemon) = (&self.plain, &self.daemon);
        let kinds = [
            ("mount", &plain.mount, &daemon.mount),
            ("all", &plain.all, &daemon.all),
            ("touch", &plain.touch, &daemon.touch),
        ];
        for (name, plain, daemon) in kinds {
            let cell = |values: &[f64]| {
                let (least, most) = spread(values);
                format!("{:.3} ({least:.3} to {most:.3})", median(values))
            };
            let ratio = median(daemon) / median(plain);
            lines.push(format!("{name:<6} plain {:<26} daemon {:<26} {ratio:.3} x", cell(plain), cell(daemon)));
        }
        lines.join("\n")
    }
}

/// Measures `rounds` rounds with the `shoal` binary given, of an image of `count` files of `len` bytes.
///
/// # Errors
/// Needs root, FUSE and docker-registry; or a command failed.
pub async fn run(shoal: &Path, count: usize, len: usize, rounds: usize) -> Result<Report, Failure> {
    let folder = tempfile::Builder::new().prefix("shoal-alone-").tempdir()?;
    let at = |name: &str| folder.path().join(name);
    eprintln!("alone: building an image of {count} files");
    let (tree, boot, blobs) = (at("tree"), at("boot"), at("blobs"));
    fs::create_dir_all(&tree)?;
    write_tree(&tree, count, len);
    Builder::new(BuildOptions::default()).build(&tree, &boot, &blobs)?;
    let registry = DockerRegistryProcess::start(folder.path(), "")?;
    let reference = format!("{}/app:1", registry.address());
    let mut push = Command::new(shoal);
    push.args(["image", "push", "--bootstrap"]).arg(&boot).arg("--blob-dir").arg(&blobs).arg(&reference);
    if !push.stdout(Stdio::null()).status()?.success() {
        return Err("shoal image push failed".into());
    }
    let names = files(&tree)?;
    let root = at("mnt");
    fs::create_dir_all(&root)?;
    let bench = Bench { shoal, reference, names, root, storage: registry.storage().to_owned() };
    let node = start_daemon(shoal, folder.path(), registry.address()).await?;
    let mut report = Report { files: count, bytes: (count * len) as u64, ..Report::default() };
    for round in 0..rounds {
        // Neither is always the first.
        for plain in [round % 2 == 0, round % 2 != 0] {
            let (name, kinds) = if plain { ("plain", &mut report.plain) } else { ("daemon", &mut report.daemon) };
            let way = if plain { None } else { Some(&node) };
            let (mount, all) = bench.round(way, all).await?;
            let opened = |root: &Path, names: &[PathBuf]| {
                opens(root, names, round as u64).map(|milliseconds| milliseconds.iter().sum::<f64>() / 1e3)
            };
            let (_, touch) = bench.round(way, opened).await?;
            eprintln!(
                "alone: round {} of {rounds}: {name} mount {mount:.3} s, all {all:.3} s, touch {touch:.3} s",
                round + 1
            );
            kinds.mount.push(mount);
            kinds.all.push(all);
            kinds.touch.push(touch);
        }
    }
    Ok(report)
}

/// What both ways have in common.
struct Bench<'a> {
    shoal: &'a Path,
    reference: String,
    names: Vec<PathBuf>,
    /// Where the image is mounted.
    root: PathBuf,
    /// Where the registry keeps it.
    storage: PathBuf,
}

impl Bench<'_> {
    /// Mounts from nothing and reads: by the node, or plainly. Gives the seconds of both.
    async fn round(
        &self,
        node: Option<&NodeProcess>,
        read: impl Fn(&Path, &[PathBuf]) -> Result<f64, Failure>,
    ) -> Result<(f64, f64), Failure> {
        drop_caches()?;
        all(&self.storage, &files(&self.storage)?)?;
        let started = Instant::now();
        let Some(node) = node else {
            let mut mount = Command::new(self.shoal);
            mount.arg("mount").arg(&self.reference).arg(&self.root).stdin(Stdio::null());
            let plain = Plain(mount.spawn()?);
            while !self.root.join(&self.names[0]).exists() {
                if started.elapsed() > PATIENCE {
                    return Err("shoal mount takes too long".into());
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            let mounted = started.elapsed().as_secs_f64();
            let seconds = read(&self.root, &self.names)?;
            drop(plain);
            return Ok((mounted, seconds));
        };
        let mut client = node.client().await?;
        let (reference, mountpoint) = (self.reference.clone(), self.root.display().to_string());
        let request = MountRequest {
            reference: reference.clone(),
            mountpoint: mountpoint.clone(),
            mode: MountMode::Fuse.into(),
            decode: false,
        };
        client.mount(request).await.map_err(|s| api::said(&s))?;
        fs::metadata(self.root.join(&self.names[0]))?;
        let mounted = started.elapsed().as_secs_f64();
        let seconds = read(&self.root, &self.names)?;
        client.unmount(UnmountRequest { mountpoint }).await.map_err(|s| api::said(&s))?;
        let evicted = client.evict(EvictRequest { reference }).await.map_err(|s| api::said(&s))?.into_inner();
        if evicted.held > 0 {
            Err("the image is in use and cannot be forgotten".into())
        } else {
            Ok((mounted, seconds))
        }
    }
}

/// A `shoal mount`, which unmounts and ends when this is dropped.
struct Plain(Child);

impl Drop for Plain {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.0.id() as i32) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

async fn start_daemon(shoal: &Path, folder: &Path, registry: SocketAddr) -> Result<NodeProcess, Failure> {
    let settings = [
        ("control.listen", vec!["/ip4/127.0.0.1/tcp/0".to_owned()].into()),
        ("data.listen", "127.0.0.1:0".into()),
        ("http.enabled", false.into()),
        ("registry.plain_http", vec![registry.to_string()].into()),
    ];
    let mut node = NodeProcess::start("node", folder, Command::new(shoal), &settings)?;
    node.ready().await?;
    Ok(node)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_of_medians() {
        let rounds = |all: [f64; 3]| Rounds { mount: vec![1.0; 3], all: all.into(), touch: vec![2.0; 3] };
        let report = Report { plain: rounds([1.0, 4.0, 2.0]), daemon: rounds([3.0, 1.0, 9.0]), ..Report::default() };
        let medians = report.medians();
        assert_eq!((medians.rounds, medians.ratio.all_seconds, medians.ratio.touch_seconds), (3, 1.5, 1.0));
        assert!(report.table().contains("1.500 x"), "{}", report.table());
    }
}
