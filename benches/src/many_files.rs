//! What it costs to mount an image of very many files: time until it can be used, and memory of whoever serves it, before and after all
//! of its names were looked at.
//!
//! The files are small and share a few thousand contents, so that there is much to be said of names and little of chunks.

use std::{
    fs,
    io::{self, BufWriter, Write},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::mount::{UnmountFlags, unmount};
use serde::Serialize;
use shoal::{
    api,
    command::Failure,
    processes::{NodeProcess, RegistryProcess},
};
use shoal_proto::control::{MountMode, MountRequest, PrefetchRequest, UnmountRequest};
use shoal_rafs::{BuildOptions, Builder};

use crate::{
    machine::{finish, memory_kib},
    tar_header,
};

/// Files in a folder.
const FOLDER: usize = 1000;
/// Different contents, and thereby chunks.
const CONTENTS: usize = 5000;
/// Paths that are looked at by chance.
const STATS: usize = 1000;
/// Longest time until something is mounted.
const PATIENCE: Duration = Duration::from_secs(120);

/// The figures.
#[derive(Debug, Serialize)]
pub struct Report {
    files: usize,
    bootstrap_bytes: u64,
    /// `shoal mount --bootstrap`: all of the process counts.
    files_alone: Served,
    /// A daemon that mounts it for the first time: it has all of the bootstrap fetched, verified and kept.
    daemon_first: Served,
    /// The next daemon over the same store.
    daemon_again: Served,
    /// The same, mounted by the kernel.
    native: Served,
}

#[derive(Debug, Serialize)]
struct Served {
    mount_ms: f64,
    /// Resident memory in KiB of who serves it, of that what is its own, once mounted; and after all was listed.
    rss_kib: u64,
    anonymous_kib: u64,
    listed_anonymous_kib: u64,
    /// `ls` of a folder of a thousand, for the first time.
    list_ms: f64,
    /// Each of some paths by chance, for the first time.
    stat_us: f64,
    /// Seconds of a `find -ls` of everything.
    find_seconds: f64,
}

/// Measures an image of `files` files with the `shoal` binary given.
///
/// # Errors
/// Needs root, FUSE and EROFS; or a command failed.
pub async fn run(shoal: &Path, files: usize) -> Result<Report, Failure> {
    let folder = tempfile::Builder::new().prefix("shoal-many-files-").tempdir()?;
    let at = |name: &str| folder.path().join(name);
    eprintln!("many-files: building an image of {files} files");
    let (boot, blobs, layout) = (at("boot"), at("blobs"), at("layout"));
    build(files, &boot, &blobs)?;
    let mut push = Command::new(shoal);
    push.args(["image", "push", "--bootstrap"]).arg(&boot).arg("--blob-dir").arg(&blobs);
    finish(push.arg(format!("oci:{}:many", layout.display())))?;
    let registry =
        RegistryProcess::start(Command::new(shoal), &layout, (Ipv4Addr::LOCALHOST, 0).into(), folder.path())?;
    let reference = format!("{}/app:many", registry.address());

    let alone = from_files(shoal, &boot, &blobs, &at("alone"), files)?;
    let daemon_first = by_daemon(shoal, folder.path(), &reference, MountMode::Fuse, files).await?;
    let daemon_again = by_daemon(shoal, folder.path(), &reference, MountMode::Fuse, files).await?;
    let native = by_daemon(shoal, folder.path(), &reference, MountMode::Native, files).await?;
    Ok(Report {
        files,
        bootstrap_bytes: fs::metadata(&boot)?.len(),
        files_alone: alone,
        daemon_first,
        daemon_again,
        native,
    })
}

/// From a tar that is made as it is read.
fn build(files: usize, boot: &Path, blobs: &Path) -> Result<(), Failure> {
    let (reader, writer) = io::pipe()?;
    let write = move || -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, writer);
        for number in 0..files {
            let content = format!("content number {:8}\n", number % CONTENTS);
            let mut block = [0; 1024];
            block[..512].copy_from_slice(&tar_header(&path(number), content.len()));
            block[512..512 + content.len()].copy_from_slice(content.as_bytes());
            out.write_all(&block)?;
        }
        out.write_all(&[0; 1024])
    };
    let written = std::thread::spawn(write);
    Builder::new(BuildOptions::default()).build_tar(reader, Path::new("tar"), boot, blobs)?;
    written.join().map_err(|_| "the tar was not written")??;
    Ok(())
}

fn path(number: usize) -> String {
    format!("d{:04}/file-number-{number}", number / FOLDER)
}

fn from_files(shoal: &Path, boot: &Path, blobs: &Path, root: &Path, files: usize) -> Result<Served, Failure> {
    fs::create_dir_all(root)?;
    let started = Instant::now();
    let mut mount = Command::new(shoal);
    mount.args(["mount", "--bootstrap"]).arg(boot).arg("--blob-dir").arg(blobs).arg(root);
    let process = Ends(mount.stdin(Stdio::null()).spawn()?, root.to_owned());
    while !root.join("d0000").exists() {
        if started.elapsed() > PATIENCE {
            return Err("shoal mount takes too long".into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    look(started.elapsed(), process.0.id(), root, files)
}

/// Dropped, it ends, and its mount.
struct Ends(Child, PathBuf);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = unmount(&self.1, UnmountFlags::DETACH);
        let _ = self.0.wait();
    }
}

async fn by_daemon(
    shoal: &Path,
    folder: &Path,
    reference: &str,
    mode: MountMode,
    files: usize,
) -> Result<Served, Failure> {
    let settings = [
        ("control.listen", vec!["/ip4/127.0.0.1/tcp/0".to_owned()].into()),
        ("data.listen", "127.0.0.1:0".into()),
        ("http.enabled", false.into()),
        ("mounts.graduate_after", "0s".into()),
    ];
    let mut node = NodeProcess::start("node", folder, Command::new(shoal), &settings)?;
    node.ready().await?;
    let mut client = node.client().await?;
    if mode == MountMode::Native {
        let request = PrefetchRequest { reference: reference.to_owned() };
        let mut progress = client.prefetch(request).await.map_err(|s| api::said(&s))?.into_inner();
        while progress.message().await.map_err(|s| api::said(&s))?.is_some() {}
        // Decoded once, which is not what mounting costs.
        mount(&mut client, &node, reference, mode).await?;
        take_away(&mut client, &node).await?;
    }
    let started = Instant::now();
    mount(&mut client, &node, reference, mode).await?;
    let mounted = started.elapsed();
    let served = look(mounted, node.id(), &node.mountpoint(), files)?;
    take_away(&mut client, &node).await?;
    Ok(served)
}

type Client = api::ControlClient<tonic::transport::Channel>;

async fn mount(client: &mut Client, node: &NodeProcess, reference: &str, mode: MountMode) -> Result<(), Failure> {
    let (reference, mountpoint) = (reference.to_owned(), node.mountpoint().display().to_string());
    let request = MountRequest { reference, mountpoint, mode: mode.into(), decode: false };
    client.mount(request).await.map_err(|s| api::said(&s))?;
    Ok(())
}

async fn take_away(client: &mut Client, node: &NodeProcess) -> Result<(), Failure> {
    let request = UnmountRequest { mountpoint: node.mountpoint().display().to_string() };
    client.unmount(request).await.map_err(|s| api::said(&s))?;
    Ok(())
}

fn look(mounted: Duration, pid: u32, root: &Path, files: usize) -> Result<Served, Failure> {
    let (rss_kib, anonymous_kib) = (memory_kib(pid, "VmRSS:")?, memory_kib(pid, "RssAnon:")?);
    let started = Instant::now();
    let listed = fs::read_dir(root.join(format!("d{:04}", files / FOLDER / 2)))?.count();
    let list = started.elapsed();
    assert!(listed > 0, "a folder lists nothing");
    let mut number = 0usize;
    let started = Instant::now();
    for _ in 0..STATS {
        // By chance enough: a prime that leads through all folders.
        number = (number + 479_001_599) % files;
        fs::metadata(root.join(path(number)))?;
    }
    let stat_us = started.elapsed().as_secs_f64() * 1e6 / STATS as f64;
    let started = Instant::now();
    finish(Command::new("find").arg(root).arg("-ls"))?;
    let find_seconds = started.elapsed().as_secs_f64();
    Ok(Served {
        mount_ms: mounted.as_secs_f64() * 1e3,
        rss_kib,
        anonymous_kib,
        listed_anonymous_kib: memory_kib(pid, "RssAnon:")?,
        list_ms: list.as_secs_f64() * 1e3,
        stat_us,
        find_seconds,
    })
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let mut lines = vec![
            format!("{} files, bootstrap of {:.0} MiB", self.files, self.bootstrap_bytes as f64 / f64::from(1 << 20)),
            format!(
                "{:<14}{:>11}{:>11}{:>13}{:>15}{:>10}{:>10}{:>9}",
                "", "mount, ms", "RSS, KiB", "own, KiB", "listed, KiB", "ls, ms", "stat, us", "find, s"
            ),
        ];
        let ways = [
            ("from files", &self.files_alone),
            ("daemon, first", &self.daemon_first),
            ("daemon, again", &self.daemon_again),
            ("native", &self.native),
        ];
        lines.extend(ways.map(|(name, served)| {
            format!(
                "{name:<14}{:>11.1}{:>11}{:>13}{:>15}{:>10.2}{:>10.1}{:>9.2}",
                served.mount_ms,
                served.rss_kib,
                served.anonymous_kib,
                served.listed_anonymous_kib,
                served.list_ms,
                served.stat_us,
                served.find_seconds
            )
        }));
        lines.join("\n")
    }
}
