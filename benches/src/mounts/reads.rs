//! What is read and timed: whole trees, first pages, a large file.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use rustix::fs::{Advice, fadvise};
use shoal::command::Failure;

/// Files that are opened at random.
const OPENS: usize = 300;
/// Who read at the same time.
const READERS: usize = 4;
/// Reads at random places of the large file.
pub(super) const RANDOM_READS: usize = 2000;
const PAGE: usize = 4096;
const BUFFER: usize = 1 << 20;

/// The figures of one round of one way; none where it makes no sense.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) cold_all_seconds: Option<f64>,
    pub(super) cold_open_ms: Vec<f64>,
    pub(super) cold_open_bytes_fetched: Option<f64>,
    pub(super) local_all_seconds: Option<f64>,
    pub(super) parallel_all_seconds: Option<f64>,
    pub(super) hot_all_seconds: Option<f64>,
    pub(super) find_seconds: Option<f64>,
    pub(super) seq_read_mib_s: Option<f64>,
    pub(super) hot_seq_read_mib_s: Option<f64>,
    pub(super) rand_read_iops: Option<f64>,
}

impl Figures {
    pub(super) fn in_one_line(&self) -> String {
        let figures = [
            ("cold", self.cold_all_seconds, "s"),
            ("local", self.local_all_seconds, "s"),
            ("by 4", self.parallel_all_seconds, "s"),
            ("hot", self.hot_all_seconds, "s"),
            ("find", self.find_seconds, "s"),
            ("sequential", self.seq_read_mib_s, "MiB/s"),
            ("hot", self.hot_seq_read_mib_s, "MiB/s"),
            ("random", self.rand_read_iops, "reads/s"),
        ];
        let words = figures.iter().filter_map(|(name, value, unit)| Some(format!("{name} {:.3} {unit}", (*value)?)));
        words.collect::<Vec<_>>().join(", ")
    }
}

/// Regular files below a folder, relative to it, sorted.
pub(crate) fn files(root: &Path) -> Result<Vec<PathBuf>, Failure> {
    let (mut found, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(|error| format!("cannot list {}: {error}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path().strip_prefix(root)?.to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Seconds to read all files one after the other.
pub(crate) fn all(root: &Path, names: &[PathBuf]) -> Result<f64, Failure> {
    let mut buffer = vec![0; BUFFER];
    let started = Instant::now();
    for name in names {
        let mut file = File::open(root.join(name))?;
        while file.read(&mut buffer)? > 0 {}
    }
    Ok(started.elapsed().as_secs_f64())
}

/// Seconds to read all files by several who take turns in choosing one.
pub(super) fn parallel(root: &Path, names: &[PathBuf]) -> Result<f64, Failure> {
    let started = Instant::now();
    let share = |first: usize| -> Vec<_> { names.iter().skip(first).step_by(READERS).cloned().collect() };
    let read = |first| all(root, &share(first)).map(drop).map_err(|error| error.to_string());
    thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|first| scope.spawn(move || read(first))).collect();
        readers.into_iter().try_for_each(|reader| reader.join().map_err(|_| "a reader panicked".to_owned())?)
    })?;
    Ok(started.elapsed().as_secs_f64())
}

/// Milliseconds to open a file and read its first page, for each of some files by chance.
pub(crate) fn opens(root: &Path, names: &[PathBuf], seed: u64) -> Result<Vec<f64>, Failure> {
    let mut random = Random(seed);
    let mut page = [0; PAGE];
    let open = |_| {
        let path = root.join(&names[random.below(names.len())]);
        let started = Instant::now();
        let _ = File::open(path)?.read(&mut page)?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    (0..OPENS).map(open).collect()
}

/// Seconds of a `find -ls`.
pub(super) fn find(root: &Path) -> Result<f64, Failure> {
    let started = Instant::now();
    let status = Command::new("find").arg(root).arg("-ls").stdout(Stdio::null()).status()?;
    if status.success() { Ok(started.elapsed().as_secs_f64()) } else { Err(format!("find: {status}").into()) }
}

/// MiB/s of reading a file from its start to its end.
pub(super) fn sequential(path: &Path) -> Result<f64, Failure> {
    let len = path.metadata()?.len();
    let (folder, name) = (path.parent().unwrap_or(path), [PathBuf::from(path.file_name().unwrap_or_default())]);
    Ok(len as f64 / f64::from(1 << 20) / all(folder, &name)?)
}

/// Reads a second of single pages at random places of a file, of which the kernel is told that they are random.
pub(super) fn random(path: &Path, seed: u64) -> Result<f64, Failure> {
    let file = File::open(path)?;
    fadvise(&file, 0, None, Advice::Random)?;
    let (pages, mut random) = (file.metadata()?.len() as usize / PAGE, Random(seed));
    let mut page = [0; PAGE];
    let started = Instant::now();
    for _ in 0..RANDOM_READS {
        file.read_exact_at(&mut page, (random.below(pages) * PAGE) as u64)?;
    }
    Ok(RANDOM_READS as f64 / started.elapsed().as_secs_f64())
}

/// The same places for the same seed: splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }
}
