//! Mounts that go on in another process: who serves them is killed with requests in flight, this process takes over.
#![cfg(feature = "mount")]

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use shoal_rafs::{
    BlobDirReader, Bootstrap, KeptMount, Mount, MountError, MountKeeper, MountOptions, SessionRecord, Unmounted,
};

#[path = "support/bed.rs"]
mod bed;
#[path = "support/scripted_source.rs"]
mod scripted_source;
mod support;

use bed::{Bed, errno, in_time};
use scripted_source::{Answer, ScriptedSource};
use support::noise;

/// Where a process that serves a mount is told to work, and by whom the mount was served before, if by anybody.
const CHILD: &str = "SHOAL_TEST_MOUNT";
const RESUMES: &str = "SHOAL_TEST_RESUMES";

/// Keeps connections open, and writes down where another process finds the last of them.
#[derive(Debug)]
struct Notes {
    file: PathBuf,
    kept: Mutex<Vec<KeptMount>>,
}

impl Notes {
    fn new(file: PathBuf) -> Arc<Self> {
        Arc::new(Self { file, kept: Mutex::default() })
    }
}

impl MountKeeper for Notes {
    fn keep(&self, mount: KeptMount) {
        let place =
            (std::process::id(), mount.connection.as_raw_fd(), &mount.device, &mount.mountpoint, &mount.session);
        let written = self.file.with_extension("new");
        fs::write(&written, serde_json::to_vec(&place).unwrap()).unwrap();
        fs::rename(written, &self.file).unwrap();
        self.kept.lock().unwrap().push(mount);
    }

    fn holds(&self, device: &str) -> bool {
        self.kept.lock().unwrap().iter().any(|mount| mount.device == device)
    }

    fn forget(&self, device: &str) {
        self.kept.lock().unwrap().retain(|mount| mount.device != device);
    }
}

/// A copy of what the notes in `file` describe.
fn copy(file: &Path) -> KeptMount {
    type Place = (u32, i32, String, PathBuf, SessionRecord);
    let (pid, number, device, mountpoint, session): Place = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let pid = Pid::from_raw(pid as i32).unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let connection: OwnedFd = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).unwrap();
    KeptMount { device, mountpoint, connection, session }
}

/// The other process: mounts, or goes on with a mount, and answers no read.
#[test]
fn serve_in_a_process_of_its_own() {
    let Some(work) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let image = Bootstrap::open(&work.join("image-4096/boot")).unwrap();
    let reader = BlobDirReader::open(&image, &work.join("image-4096/blobs")).unwrap();
    let source = ScriptedSource::new(&image, &reader, 1, |_| Answer::Keep);
    let options = MountOptions { keeper: Some(Notes::new(work.join("kept"))), ..MountOptions::default() };
    let mount = match std::env::var_os(RESUMES) {
        None => Mount::new(image, source.clone(), &work.join("mnt"), options).unwrap(),
        Some(notes) => Mount::resume(image, source.clone(), copy(Path::new(&notes)), options).unwrap(),
    };
    source.wait_for_kept();
    fs::write(work.join("waiting"), b"").unwrap();
    mount.wait();
}

/// A process that serves a mount, killed at the latest when the test ends.
struct Server(Child);

impl Server {
    /// Starts it and waits until the connection can be copied.
    fn start(bed: &Bed, resumes: Option<&Path>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "serve_in_a_process_of_its_own"]).env(CHILD, bed.path("")).stdout(Stdio::null());
        if let Some(notes) = resumes {
            command.env(RESUMES, notes);
        }
        let server = Self(command.spawn().unwrap());
        wait_for(bed.path("kept"));
        server
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for(file: PathBuf) {
    in_time(move || {
        while !file.exists() {
            thread::sleep(Duration::from_millis(5));
        }
    });
}

/// A bed with an image of two files.
fn bed() -> Option<Bed> {
    let mut bed = Bed::new()?;
    fs::write(bed.source("data"), noise(5, 3 * 4096)).unwrap();
    fs::write(bed.source("other"), noise(6, 4096)).unwrap();
    bed.build(0x1000);
    Some(bed)
}

fn blobs(bed: &Bed) -> Arc<shoal_rafs::BlobDir> {
    let built = bed.built();
    Arc::new(shoal_rafs::BlobDir::open(built.image.clone(), &built.blobs, 2).unwrap())
}

type Reading = thread::JoinHandle<std::io::Result<Vec<u8>>>;

/// Opens the file, and reads it once the other process has the mount.
fn read(bed: &Bed, name: &str) -> Reading {
    let mut file = File::open(bed.mounted(name)).unwrap();
    thread::spawn(move || {
        let mut content = Vec::new();
        file.read_to_end(&mut content).map(|_| content)
    })
}

/// Whether the kernel of this machine sends requests again, by what was agreed with it.
fn resends(kept: &KeptMount) -> bool {
    serde_json::to_value(&kept.session).unwrap()["agreement"]["resend"].as_bool().unwrap()
}

fn without_resend(kept: KeptMount) -> KeptMount {
    let mut session = serde_json::to_value(&kept.session).unwrap();
    session["agreement"]["resend"] = false.into();
    KeptMount { session: serde_json::from_value(session).unwrap(), ..kept }
}

#[test]
fn a_read_in_flight_is_answered_by_the_next_process() {
    let Some(bed) = bed() else { return };
    let server = Server::start(&bed, None);
    let kept = copy(&bed.path("kept"));
    if !resends(&kept) {
        println!("skipped: requests are sent again since Linux 6.9");
        return;
    }
    let reader = read(&bed, "data");
    let open = File::open(bed.path("mnt")).unwrap();
    wait_for(bed.path("waiting"));
    server.kill();
    assert!(!reader.is_finished());
    assert!(kept.is_mounted().unwrap());

    let mount = Mount::resume(bed.built().image.clone(), blobs(&bed), kept, MountOptions::default()).unwrap();
    assert!(in_time(|| reader.join().unwrap()).unwrap() == noise(5, 3 * 4096));
    assert!(fs::read(bed.mounted("other")).unwrap() == noise(6, 4096));
    let names = rustix::fs::Dir::new(open).unwrap().filter(|entry| entry.is_ok()).count();
    assert_eq!(names, 4, "a directory that was open before");
    assert_eq!(mount.unmount().unwrap(), Unmounted::Gone);
    assert_eq!(fs::read_dir(bed.path("mnt")).unwrap().count(), 0);
}

#[test]
fn where_the_kernel_cannot_repeat_reads_in_flight_fail_and_the_mount_goes_on() {
    let Some(bed) = bed() else { return };
    let first = Server::start(&bed, None);
    let notes = Notes::new(bed.path("resumes"));
    notes.keep(without_resend(copy(&bed.path("kept"))));
    first.kill();
    fs::remove_file(bed.path("kept")).unwrap();
    let second = Server::start(&bed, Some(&bed.path("resumes")));
    // Past the page cache, which asks again for pages that it did not get.
    let direct =
        File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(bed.mounted("data")).unwrap();
    // The file comes back open: closing the first file of a mount waits for an answer, too.
    let direct = thread::spawn(move || (direct.read_exact_at(&mut [0; 4096], 0), direct));
    wait_for(bed.path("waiting"));
    let reader = read(&bed, "data");
    second.kill();
    let (outcome, direct) = in_time(|| direct.join().unwrap());
    assert_eq!(errno(&outcome.unwrap_err()), Some(Errno::CONNABORTED));

    let kept = notes.kept.lock().unwrap().pop().unwrap();
    let mount = Mount::resume(bed.built().image.clone(), blobs(&bed), kept, MountOptions::default()).unwrap();
    assert!(in_time(|| reader.join().unwrap()).unwrap() == noise(5, 3 * 4096));
    drop((direct, mount));
    assert_eq!(fs::read_dir(bed.path("mnt")).unwrap().count(), 0);
}

#[test]
fn another_image_and_a_mount_that_has_gone_are_refused() {
    let Some(mut bed) = bed() else { return };
    let image = bed.built().image.clone();
    let server = Server::start(&bed, None);
    let (kept, again) = (copy(&bed.path("kept")), copy(&bed.path("kept")));
    server.kill();
    let source = blobs(&bed);
    fs::write(bed.source("more"), b"x").unwrap();
    bed.build(0x1000);
    let other = bed.built().image.clone();
    let refused = Mount::resume(other, blobs(&bed), kept, MountOptions::default());
    assert!(matches!(refused, Err(MountError::Resume { .. })));
    assert!(again.is_mounted().unwrap());
    rustix::mount::unmount(bed.path("mnt"), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(!again.is_mounted().unwrap());
    let refused = Mount::resume(image, source, again, MountOptions::default());
    assert!(matches!(refused, Err(MountError::Resume { .. })));
}

#[test]
fn what_is_discarded_is_no_mount_any_more() {
    let Some(bed) = bed() else { return };
    let server = Server::start(&bed, None);
    let kept = copy(&bed.path("kept"));
    server.kill();
    kept.discard().unwrap();
    assert_eq!(fs::read_dir(bed.path("mnt")).unwrap().count(), 0);
}

/// A process that leaves does not fail reads any more that its successor could answer.
#[test]
fn reads_that_fail_while_leaving_are_left_to_the_next() {
    let Some(bed) = bed() else { return };
    let notes = Notes::new(bed.path("kept"));
    let source = bed.scripted(|_| Answer::Keep);
    let options = MountOptions { keeper: Some(notes.clone()), threads: 2, ..MountOptions::default() };
    let mount = Mount::new(bed.built().image.clone(), source.clone(), &bed.path("mnt"), options).unwrap();
    let reader = read(&bed, "data");
    let waiting = source.clone();
    in_time(move || waiting.wait_for_kept());
    mount.leave();
    source.close();
    // Answered by the threads that are still there, in their turn: by then the read that failed would have.
    assert_eq!(fs::metadata(bed.mounted("other")).unwrap().len(), 4096);
    assert!(!reader.is_finished());
    rustix::mount::unmount(bed.path("mnt"), rustix::mount::UnmountFlags::FORCE | rustix::mount::UnmountFlags::DETACH)
        .unwrap();
    assert!(in_time(|| reader.join().unwrap()).is_err());
}

#[test]
fn what_is_unmounted_is_kept_no_longer() {
    let Some(bed) = bed() else { return };
    for in_use in [true, false] {
        let notes = Notes::new(bed.path("kept"));
        let options = MountOptions { keeper: Some(notes.clone()), ..MountOptions::default() };
        let mount = Mount::new(bed.built().image.clone(), blobs(&bed), &bed.path("mnt"), options).unwrap();
        let open = in_use.then(|| File::open(bed.mounted("data")).unwrap());
        assert!(mount.is_kept());
        let expected = if in_use { Unmounted::Detached } else { Unmounted::Gone };
        assert_eq!(mount.unmount().unwrap(), expected);
        assert!(notes.kept.lock().unwrap().is_empty());
        if let Some(mut open) = open {
            let mut content = Vec::new();
            open.read_to_end(&mut content).unwrap();
            assert!(content == noise(5, 3 * 4096), "this process goes on serving it");
        }
    }
}
