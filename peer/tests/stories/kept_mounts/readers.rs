//! Threads that read a mount over and over, each in its own way, and compare what they see with the source.
//!
//! In a process of their own: a thread that waits for a mapped page may hold the lock of its process' memory, and then the
//! process cannot be forked, also not to start the daemon that would answer.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    fs::{Advice, MemfdFlags, fadvise, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::support::{files, noise, wait};

/// Where the process that reads is told what to compare.
const SOURCE: &str = "SHOAL_TEST_SOURCE";
const MOUNT: &str = "SHOAL_TEST_MOUNT";
/// Set where reads may end with errors; what they give must be right all the same.
const ERRORS: &str = "SHOAL_TEST_ERRORS";
/// A folder whose files nobody reads before they are asked for.
pub(crate) const FRESH: &str = "fresh";
/// What it says when all its threads have read more.
const WENT_ON: &str = "went on";

/// The process that reads, until it is told to stop by the end of its standard input.
pub(crate) struct Readers {
    process: Child,
    said: BufReader<ChildStdout>,
}

impl Readers {
    pub(crate) fn start(source: &Path, mount: &Path) -> Self {
        Self::start_with(source, mount, false)
    }

    /// The same, with readers that go on after `errors` where there may be some.
    pub(crate) fn start_with(source: &Path, mount: &Path, errors: bool) -> Self {
        let mut command = Command::new(env::current_exe().expect("this program"));
        command.args(["--exact", "kept_mounts::readers::read_in_a_process_of_its_own", "--nocapture"]);
        if errors {
            command.env(ERRORS, "1");
        }
        command.env(SOURCE, source).env(MOUNT, mount).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("it starts");
        let said = BufReader::new(process.stdout.take().expect("a pipe"));
        Self { process, said }
    }

    /// Begins to read the files of a folder below [`FRESH`], for the first time, all at once. What ends with an error is read again.
    pub(crate) fn begin(&mut self, folder: &str) {
        self.tell(&format!("{FRESH}/{folder}\n"));
    }

    fn tell(&mut self, line: &str) {
        let stdin = self.process.stdin.as_mut().expect("a pipe");
        stdin.write_all(line.as_bytes()).expect("a reader has failed, see above");
    }

    /// Waits until each of the threads has seen several files more.
    pub(crate) fn go_on(&mut self) {
        self.tell("\n");
        let mut line = String::new();
        // The test program has something to say, too.
        while !line.ends_with(&format!("{WENT_ON}\n")) {
            let read = self.said.read_line(&mut line).expect("a pipe");
            assert_ne!(read, 0, "a reader has failed, see above");
        }
    }

    /// Ends them; none must have seen an error or a wrong byte.
    pub(crate) fn end(mut self) {
        drop(self.process.stdin.take());
        assert!(self.process.wait().expect("it ends").success(), "a reader has failed, see above");
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        // It ends when it is answered, or when its mount has gone, for which it is too early.
        let _ = self.process.kill();
    }
}

/// That process. Without being told what to compare it does nothing.
#[test]
fn read_in_a_process_of_its_own() {
    let (Some(source), Some(mount)) = (env::var_os(SOURCE), env::var_os(MOUNT)) else { return };
    let mut threads = Threads::start(source.as_ref(), mount.as_ref());
    for line in io::stdin().lines() {
        let line = line.expect("a pipe");
        if !line.is_empty() {
            threads.begin(source.as_ref(), mount.as_ref(), &line);
            continue;
        }
        threads.go_on();
        writeln!(io::stdout(), "{WENT_ON}").expect("a pipe");
    }
    let looks: u64 = threads.threads.iter().map(|(looks, _)| looks.load(Relaxed)).sum();
    threads.end();
    let seen = SEEN.lock().expect("nobody panicked with it");
    let (longest, errors) = (LONGEST.load(Relaxed), seen.values().sum::<u64>());
    eprintln!("readers looked at {looks} files, at one for up to {longest} ms, and saw {errors} errors: {seen:?}");
}

/// Errors that were seen, by what the system said.
static SEEN: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());
/// Milliseconds that the longest look took, its failure included.
static LONGEST: AtomicU64 = AtomicU64::new(0);

/// Threads of each way.
const EACH: usize = 2;

/// A way of reading one file: whether it is the same in the mount as in the source.
type Way = fn(&Path, &Path) -> io::Result<bool>;

const WAYS: [(&str, Way); 5] =
    [("read", whole), ("pread", parts), ("random preads", random), ("stat and readdir", names), ("mmap", mapped)];

/// They read until they are told to stop.
struct Threads {
    stop: Arc<AtomicBool>,
    threads: Vec<(Arc<AtomicU64>, JoinHandle<()>)>,
    /// They end by themselves.
    fresh: Vec<JoinHandle<()>>,
}

impl Threads {
    fn start(source: &Path, mount: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = WAYS.iter().cycle().take(EACH * WAYS.len()).map(|(name, way)| {
            let (looks, stop) = (Arc::new(AtomicU64::new(0)), stop.clone());
            let (source, mount, count) = (source.to_owned(), mount.to_owned(), looks.clone());
            (looks, thread::spawn(move || go_round(name, *way, &source, &mount, &count, &stop)))
        });
        Self { threads: threads.collect(), stop, fresh: Vec::new() }
    }

    /// Reads each file below a folder of the mount, until that succeeds.
    fn begin(&mut self, source: &Path, mount: &Path, folder: &str) {
        for file in files(&source.join(folder)) {
            let (source, mount) = (source.join(folder).join(&file), mount.join(folder).join(file));
            self.fresh.push(thread::spawn(move || while !look("a fresh read", whole, &source, &mount) {}));
        }
    }

    /// Waits until each of them has seen several files more.
    fn go_on(&self) {
        let before: Vec<_> = self.threads.iter().map(|(looks, _)| looks.load(Relaxed)).collect();
        wait("all readers go on", || {
            // Who has ended has seen something wrong: `end` says what.
            let mut all = self.threads.iter().zip(&before);
            all.all(|((looks, thread), before)| looks.load(Relaxed) >= before + 4 || thread.is_finished())
        });
        assert!(self.threads.iter().all(|(_, thread)| !thread.is_finished()), "a reader has failed, see above");
    }

    /// Ends them; none must have seen an error or a wrong byte.
    fn end(self) {
        self.stop.store(true, Relaxed);
        for (_, thread) in self.threads {
            thread.join().expect("a reader saw nothing wrong");
        }
        self.fresh.into_iter().for_each(|thread| thread.join().expect("a reader saw nothing wrong"));
    }
}

fn go_round(name: &str, way: Way, source: &Path, mount: &Path, looks: &AtomicU64, stop: &AtomicBool) {
    let mut all = files(source);
    all.retain(|file| !file.starts_with(FRESH));
    for file in all.iter().cycle() {
        if stop.load(Relaxed) {
            return;
        }
        look(name, way, &source.join(file), &mount.join(file));
        looks.fetch_add(1, Relaxed);
    }
}

/// Compares a file; false if that ended with an error, where there may be some.
fn look(name: &str, way: Way, source: &Path, mount: &Path) -> bool {
    let began = Instant::now();
    let outcome = way(source, mount);
    LONGEST.fetch_max(began.elapsed().as_millis() as u64, Relaxed);
    match outcome {
        Ok(same) => assert!(same, "{name}: {} is not what it was", mount.display()),
        Err(error) if env::var_os(ERRORS).is_some() => {
            *SEEN.lock().expect("nobody panics with it").entry(error.to_string()).or_default() += 1;
            thread::sleep(Duration::from_millis(1));
            return false;
        }
        Err(error) => panic!("{name}: {}: {error}", mount.display()),
    }
    true
}

/// Opens a file so that what is read of it comes from the daemon.
fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(file)
}

fn whole(source: &Path, mount: &Path) -> io::Result<bool> {
    let mut bytes = Vec::new();
    open(mount)?.read_to_end(&mut bytes)?;
    Ok(bytes == fs::read(source)?)
}

/// Every seventh block, through a descriptor that stays open.
fn parts(source: &Path, mount: &Path) -> io::Result<bool> {
    let (file, expected) = (open(mount)?, fs::read(source)?);
    fadvise(&file, 0, None, Advice::Random)?;
    let mut block = [0; 4096];
    for at in (0..expected.len()).step_by(7 * block.len()) {
        let here = file.read_at(&mut block, at as u64)?;
        if block[..here] != expected[at..(at + block.len()).min(expected.len())] {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Ranges of any place and length, also behind the end.
fn random(source: &Path, mount: &Path) -> io::Result<bool> {
    static SEED: AtomicU64 = AtomicU64::new(1);
    let (file, expected) = (open(mount)?, fs::read(source)?);
    let numbers = noise(SEED.fetch_add(1, Relaxed), 16 * 16);
    let mut buffer = vec![0; 200_000];
    for number in numbers.chunks_exact(16) {
        let (at, len) = number.split_at(8);
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes")) as usize;
        let (at, len) = (number(at) % (expected.len() + 100), number(len) % buffer.len());
        let here = file.read_at(&mut buffer[..len], at as u64)?;
        let rest = expected.get(at..).unwrap_or_default();
        if buffer[..here] != rest[..here.min(rest.len())] || (here == 0) != (len == 0 || rest.is_empty()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What the folder of the file lists, and the file's attributes.
fn names(source: &Path, mount: &Path) -> io::Result<bool> {
    let listed = |file: &Path| -> io::Result<Vec<PathBuf>> {
        let folder = fs::read_dir(file.parent().unwrap_or(file))?;
        let mut names = folder.map(|entry| Ok(entry?.file_name().into())).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    let (a, b) = (fs::metadata(source)?, fs::metadata(mount)?);
    let same = (a.len(), a.mode(), a.nlink(), a.uid()) == (b.len(), b.mode(), b.nlink(), b.uid());
    Ok(same && listed(source)? == listed(mount)?)
}

/// Through a mapping. A system call copies it, which fails where touching the memory would be a SIGBUS, the end of all tests.
fn mapped(source: &Path, mount: &Path) -> io::Result<bool> {
    let (file, expected) = (open(mount)?, fs::read(source)?);
    if expected.is_empty() {
        return Ok(true);
    }
    let copy = File::from(memfd_create("mapped", MemfdFlags::CLOEXEC)?);
    // SAFETY: the file never changes or shrinks, and the mapping is used before it is unmapped, only.
    let copied = unsafe {
        let at = mmap(std::ptr::null_mut(), expected.len(), ProtFlags::READ, MapFlags::PRIVATE, &file, 0)?;
        let copied = copy.write_all_at(std::slice::from_raw_parts(at.cast::<u8>(), expected.len()), 0);
        munmap(at, expected.len())?;
        copied
    };
    copied?;
    let mut bytes = vec![0; expected.len()];
    copy.read_exact_at(&mut bytes, 0)?;
    Ok(bytes == expected)
}
