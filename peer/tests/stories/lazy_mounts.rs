//! Native mounts of incomplete images: the kernel's EROFS driver reads files that the daemon fills as they are read. Whoever dies,
//! whatever fails, no reader is ever given a wrong byte; who may see an error and who may not is said by each story.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::{Signal, kill_process},
};
use shoal_keeper::{Group, holder_socket};
use tempfile::TempDir;

use crate::{
    kept_mounts::{listener, readers::Readers},
    native_mounts::kind,
    support::{Daemon, Registry, assert_same, can_mount, drop_caches, metric, noise, tree, wait},
};

/// How often daemon and keeper are killed in turn.
const KILLS: usize = 20;

/// A file of the image.
const LAST: &str = "last/one";

/// A tree, its image in a registry, and a daemon that may mount it natively before it is complete.
struct Bed {
    daemon: Daemon,
    registry: Registry,
    source: TempDir,
    folder: TempDir,
    encoded: u64,
}

impl Bed {
    fn new(test: &str, settings: &[&str]) -> Option<Self> {
        if !can_mount(test) {
            return None;
        }
        if let Err(error) = raises_events() {
            println!("skipped: {test} (needs pre-content events: {error})");
            return None;
        }
        let source = tree(41, 20, 300_000);
        fs::write(source.path().join("large"), noise(42, 5_000_000)).expect("a file");
        fs::create_dir(source.path().join("last")).expect("a folder");
        fs::write(source.path().join(LAST), noise(43, 3_000_000)).expect("a file");
        let mut registry = Registry::start();
        let encoded = registry.publish(source.path(), "1");
        registry.switch_on();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let all = ["mounts.native_lazy=true", "mounts.keeper=on", "mounts.keeper_patience=30s", "read.ahead_bytes=0"];
        let settings: Vec<String> = all.iter().chain(settings).map(ToString::to_string).collect();
        let daemon = Daemon::start("node", folder.path(), &settings);
        Some(Self { daemon, registry, source, folder, encoded })
    }

    /// Mounts it natively, incomplete.
    fn mount(&self) -> PathBuf {
        let (reference, mountpoint) = (self.registry.reference("1"), self.daemon.mountpoint());
        self.daemon.ctl(&["mount", "--mode", "native", &reference, mountpoint.to_str().expect("UTF-8")]);
        assert_eq!(kind(&mountpoint), "erofs", "{}", self.daemon.log());
        mountpoint
    }

    fn source(&self, name: &str) -> Vec<u8> {
        fs::read(self.source.path().join(name)).expect("the source")
    }

    /// Readers of the mount, who leave one file out, so that it does not become complete and all that is not in the kernel's
    /// cache is asked for again and again. With `errors` they go on after one.
    fn readers(&self, errors: bool) -> Readers {
        fs::remove_file(self.source.path().join(LAST)).expect("the file");
        Readers::start_with(self.source.path(), &self.daemon.mountpoint(), errors)
    }

    /// Ends them. All of the image is what it was.
    fn end(&self, readers: Readers) {
        readers.end();
        assert_ne!(marks(self.daemon.pid()), 0, "the kernel has nobody to ask");
        // Since this daemon was started.
        let asked = self.daemon.status()["mounts"][0]["reads"].as_u64();
        assert!(asked > Some(20), "{asked:?}");
        fs::write(self.source.path().join(LAST), noise(43, 3_000_000)).expect("a file");
        drop_caches();
        assert_same(self.source.path(), &self.daemon.mountpoint());
        assert!(!self.daemon.log().contains("may have shown zeros"), "{}", self.daemon.log());
    }

    /// A writable tree over the mount.
    fn overlay(&self) -> PathBuf {
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| self.folder.path().join(name));
        for folder in [&upper, &work, &merged] {
            fs::create_dir_all(folder).expect("a folder");
        }
        let (lower, upper, work) = (self.daemon.mountpoint(), upper.display(), work.display());
        let data = format!("lowerdir={},upperdir={upper},workdir={work}", lower.display());
        let data = std::ffi::CString::new(data).expect("no zeros");
        mount("overlay", &merged, "overlay", MountFlags::empty(), data.as_c_str()).expect("an overlay");
        merged
    }

    /// Names of the decoded forms, those that are being filled included.
    fn decoded(&self) -> Vec<String> {
        let files = fs::read_dir(self.daemon.data_dir().join("decoded")).expect("decoded forms");
        files.map(|entry| entry.expect("a file").file_name().into_string().expect("UTF-8")).collect()
    }

    fn kill_keeper(&self) {
        kill_listener(&self.daemon.keeper_socket());
    }

    /// The third that has the group.
    fn kill_holder(&self) {
        kill_listener(&holder_socket(&self.daemon.keeper_socket()));
    }
}

/// Kills whoever listens there.
pub(crate) fn kill_listener(socket: &Path) {
    // It may be on its way just now.
    if let Some(process) = listener(socket) {
        let _ = kill_process(process, Signal::KILL);
        // Until then it would still take a connection.
        wait("it is gone", || listener(socket) != Some(process));
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let below = self.folder.path().to_str().expect("UTF-8");
        let mountpoints = mounts.lines().rev().filter_map(|line| line.split(' ').nth(1));
        for mountpoint in mountpoints.filter(|at| at.starts_with(below)) {
            let _ = unmount(mountpoint, UnmountFlags::DETACH);
        }
    }
}

/// Whether the kernel gives events, and the file system of temporary files takes marks for them.
pub(crate) fn raises_events() -> io::Result<()> {
    Group::new()?.mark(tempfile::tempfile()?.as_fd())
}

/// Files that some group of a process has marks on.
fn marks(pid: u32) -> usize {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("its descriptors").filter_map(Result::ok);
    // Some are closed meanwhile.
    let infos = infos.filter_map(|info| fs::read_to_string(info.path()).ok());
    infos.map(|info| info.lines().filter(|line| line.starts_with("fanotify ino:")).count()).sum()
}

fn is_io_error(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

#[test]
fn what_is_read_is_fetched_and_when_all_is_there_nobody_is_asked() {
    let Some(bed) = Bed::new("an incomplete image is read natively", &[]) else { return };
    let mountpoint = bed.mount();
    let status = bed.daemon.status();
    assert_eq!(status["mounts"][0]["native"], true);
    assert!(fs::read(mountpoint.join("d0/f3")).expect("a file") == bed.source("d0/f3"));
    let sent = bed.registry.sent_bytes();
    assert!(sent < bed.encoded / 4, "{sent} of {} bytes for a file of 300,000", bed.encoded);
    assert!(bed.decoded().iter().any(|name| name.starts_with(".filling-")));

    let merged = bed.overlay();
    assert!(fs::read(merged.join("d1/f13")).expect("a file") == bed.source("d1/f13"));
    fs::write(merged.join("d1/f14"), "over it").expect("it can be written");
    let mut appended = File::options().append(true).open(merged.join("large")).expect("it is copied up");
    io::Write::write_all(&mut appended, b"more").expect("it can be written");
    assert!(fs::read(merged.join("large")).expect("a file") == [bed.source("large"), b"more".to_vec()].concat());

    assert_same(bed.source.path(), &mountpoint);
    wait("all is filled", || bed.decoded().iter().all(|name| !name.starts_with(".filling-")));
    assert_eq!(bed.decoded().len(), 1);
    // Nothing asks any more, or there would be nobody to answer.
    wait("its mark has gone", || marks(bed.daemon.pid()) == 0);
    bed.daemon.kill();
    bed.kill_keeper();
    drop_caches();
    assert_same(bed.source.path(), &mountpoint);
}

#[test]
fn what_nobody_has_is_an_error_and_not_zeros() {
    let Some(mut bed) = Bed::new("a lazy native mount without a registry", &["read.deadline=1s"]) else { return };
    let mountpoint = bed.mount();
    assert!(fs::read(mountpoint.join("d0/f1")).expect("a file") == bed.source("d0/f1"));
    bed.registry.switch_off();
    let error = fs::read(mountpoint.join("d0/f2")).expect_err("nobody has it");
    assert!(is_io_error(&error), "{error}");
    drop_caches();
    assert!(fs::read(mountpoint.join("d0/f1")).expect("it is here") == bed.source("d0/f1"));
    bed.registry.switch_on();
    assert_same(bed.source.path(), &mountpoint);
}

#[test]
fn no_reader_sees_an_error_when_the_daemon_is_killed() {
    let Some(mut bed) = Bed::new("the daemon of a lazy native mount is killed", &[]) else { return };
    bed.mount();
    let mut readers = bed.readers(false);
    for delay in noise(6, KILLS / 2) {
        readers.go_on();
        thread::sleep(Duration::from_millis(u64::from(delay)));
        bed.daemon.kill();
        drop_caches();
        bed.daemon.start_again();
    }
    readers.go_on();
    bed.end(readers);
}

#[test]
fn no_reader_sees_a_wrong_byte_whoever_of_the_two_is_killed() {
    let Some(mut bed) = Bed::new("daemon and keeper of a lazy native mount are killed", &[]) else { return };
    bed.mount();
    let mut readers = bed.readers(true);
    for (turn, delay) in noise(7, KILLS).into_iter().enumerate() {
        readers.go_on();
        thread::sleep(Duration::from_millis(u64::from(delay)));
        if turn % 2 == 0 {
            bed.kill_keeper();
            drop_caches();
        } else {
            wait("a keeper guards it", || guarded(&bed.daemon));
            bed.daemon.kill();
            drop_caches();
            bed.daemon.start_again();
        }
    }
    readers.go_on();
    bed.end(readers);
}

/// Whether the daemon's keeper has a group.
fn guarded(daemon: &Daemon) -> bool {
    let keeper = shoal_keeper::Client::connect(&daemon.keeper_socket());
    keeper.and_then(|mut keeper| keeper.group()).is_ok_and(|group| group.is_some())
}

#[test]
fn when_both_are_killed_at_once_readers_wait_and_are_not_given_zeros() {
    let Some(mut bed) = Bed::new("daemon and keeper of a lazy native mount are killed at once", &[]) else { return };
    let mountpoint = bed.mount();
    assert!(fs::read(mountpoint.join("d0/f1")).expect("a file") == bed.source("d0/f1"));
    let open = File::open(mountpoint.join("large")).expect("a file");
    bed.daemon.kill();
    bed.kill_keeper();
    let path = mountpoint.join("d1/f12");
    let reader = thread::spawn(move || fs::read(path));
    thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished(), "nobody has what it reads");
    bed.daemon.start_again();
    assert!(reader.join().expect("it ends").expect("it is answered") == bed.source("d1/f12"));
    let mut bytes = Vec::new();
    (&open).read_to_end(&mut bytes).expect("it is answered");
    assert!(bytes == bed.source("large"));
    assert!(!bed.daemon.log().contains("may have shown zeros"), "{}", bed.daemon.log());
    assert_same(bed.source.path(), &mountpoint);
}

#[test]
fn a_holder_that_dies_is_replaced_and_ends_with_the_last_mount() {
    let Some(mut bed) = Bed::new("the holder of a lazy native mount is killed", &[]) else { return };
    let mountpoint = bed.mount();
    let socket = holder_socket(&bed.daemon.keeper_socket());
    let held = || matches!(shoal_keeper::held(&bed.daemon.keeper_socket()), Ok(Some(_)));
    wait("a holder has the group", held);
    let first = listener(&socket).expect("a holder");
    kill_process(first, Signal::KILL).expect("it can be killed");
    wait("another has it", || held() && listener(&socket) != Some(first));
    assert_same(bed.source.path(), &mountpoint);
    bed.daemon.umount(&mountpoint);
    bed.daemon.stop();
    wait("it ends", || listener(&socket).is_none());
}

#[test]
fn after_all_three_have_been_killed_at_once_it_is_mounted_anew() {
    let Some(mut bed) = Bed::new("daemon, keeper and holder of a lazy native mount are killed", &[]) else { return };
    let mountpoint = bed.mount();
    assert!(fs::read(mountpoint.join("d0/f1")).expect("a file") == bed.source("d0/f1"));
    // What the story does not forbid, and no test may rely on, is that this is read as zeros meanwhile.
    let open = File::open(mountpoint.join("large")).expect("a file");
    // The keeper would start another holder.
    bed.daemon.kill();
    bed.kill_keeper();
    bed.kill_holder();
    bed.daemon.start_again();
    assert!(bed.daemon.log().contains("may have shown zeros"), "{}", bed.daemon.log());
    assert_eq!(kind(&mountpoint), "erofs");
    // Files of the mount that was replaced are nobody's.
    bed.daemon.umount(&mountpoint);
    assert!(bed.decoded().is_empty(), "{:?}", bed.decoded());
    bed.mount();
    assert_same(bed.source.path(), &mountpoint);
    // Who had it open all along asks again.
    let mut bytes = Vec::new();
    (&open).read_to_end(&mut bytes).expect("it is answered");
    assert!(bytes == bed.source("large"));
}

#[test]
fn a_mount_that_was_taken_away_is_served_for_those_that_have_it() {
    let Some(mut bed) = Bed::new("a lazy native mount below an overlay is unmounted", &["read.deadline=1s"]) else {
        return;
    };
    let mountpoint = bed.mount();
    let merged = bed.overlay();
    bed.daemon.umount(&mountpoint);
    assert_eq!(kind(&mountpoint), "");
    assert!(bed.decoded().is_empty(), "{:?}", bed.decoded());
    assert!(fs::read(merged.join("d0/f5")).expect("a file") == bed.source("d0/f5"));
    // Another mount of it has files of its own.
    bed.mount();
    assert!(fs::read(mountpoint.join("d1/f15")).expect("a file") == bed.source("d1/f15"));
    // The next daemon knows nothing of the first one.
    bed.daemon.kill();
    bed.daemon.start_again();
    let error = fs::read(merged.join("d0/f6")).expect_err("nobody knows what it is");
    assert!(is_io_error(&error), "{error}");
    assert_same(bed.source.path(), &mountpoint);
}

#[test]
fn a_restart_in_good_order_is_not_noticed_and_nothing_is_left_in_the_end() {
    let Some(mut bed) = Bed::new("the daemon of a lazy native mount is restarted", &[]) else { return };
    let mountpoint = bed.mount();
    let mut readers = bed.readers(false);
    for _ in 0..3 {
        readers.go_on();
        bed.daemon.stop();
        drop_caches();
        bed.daemon.start_again();
    }
    readers.go_on();
    bed.end(readers);
    bed.daemon.umount(&mountpoint);
    bed.daemon.stop();
    wait("the keeper ends", || listener(&bed.daemon.keeper_socket()).is_none());
}

#[test]
fn an_image_that_has_become_complete_is_filled_to_the_end() {
    let Some(mut bed) = Bed::new("a lazy native mount is completed", &["mounts.graduate_after=10ms"]) else { return };
    let mountpoint = bed.mount();
    let reference = bed.registry.reference("1");
    bed.daemon.ctl(&["prefetch", &reference]);
    wait("it is filled", || bed.decoded().len() == 1 && !bed.decoded()[0].starts_with('.'));
    bed.registry.switch_off();
    drop_caches();
    assert_same(bed.source.path(), &mountpoint);
}

#[test]
fn after_a_reboot_it_is_mounted_again_and_what_was_left_of_its_files_counts_for_nothing() {
    let Some(mut bed) = Bed::new("a lazy native mount comes back", &[]) else { return };
    let mountpoint = bed.daemon.mountpoint();
    bed.daemon.mount(&bed.registry.reference("1"));
    assert_eq!(kind(&mountpoint), "erofs", "so it is in the mode auto");
    assert!(fs::read(mountpoint.join("d0/f1")).expect("a file") == bed.source("d0/f1"));
    bed.daemon.kill();
    unmount(&mountpoint, UnmountFlags::DETACH).expect("it is mounted");
    bed.kill_keeper();
    bed.kill_holder();
    let decoded = bed.daemon.data_dir().join("decoded");
    let left = bed.decoded().into_iter().find(|name| name.starts_with(".filling-")).expect("what was filled");
    let file = File::options().write(true).open(decoded.join(left)).expect("a file");
    file.write_all_at(&noise(1, 100_000), 0).expect("it can be written");
    bed.daemon.start_again();
    assert_eq!(kind(&mountpoint), "erofs");
    assert_same(bed.source.path(), &mountpoint);
}

#[test]
fn without_a_keeper_it_is_not_done() {
    let Some(mut bed) = Bed::new("a lazy native mount without a keeper", &[]) else { return };
    bed.daemon.stop();
    bed.daemon.set("mounts.keeper=off");
    bed.daemon.start_again();
    let (reference, mountpoint) = (bed.registry.reference("1"), bed.daemon.mountpoint());
    let path = mountpoint.to_str().expect("UTF-8");
    let refused = bed.daemon.try_ctl(&["mount", "--mode", "native", &reference, path]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(bed.daemon.log().contains("takes a keeper"), "{}", bed.daemon.log());
    bed.daemon.mount(&reference);
    assert_eq!(kind(&mountpoint), "fuse.shoal");
    assert_same(bed.source.path(), Path::new(path));
}

#[test]
fn reads_are_counted_by_mode_and_still_are_when_the_mount_has_gone() {
    let Some(bed) = Bed::new("figures of lazy native mounts", &[]) else { return };
    let mountpoint = bed.mount();
    let over_fuse = bed.folder.path().join("fuse");
    fs::create_dir(&over_fuse).expect("a folder");
    let figure = |name: &str, mode: &str, more: &str| {
        metric(&bed.daemon, &format!("shoal_read{name}{{mode=\"{mode}\"{more}}}"))
    };
    assert_eq!((figure("s_total", "lazy", ""), figure("s_total", "fuse", "")), (0.0, 0.0));
    assert!(fs::read(mountpoint.join("large")).expect("a file") == bed.source("large"));
    let (reference, path) = (bed.registry.reference("1"), over_fuse.to_str().expect("UTF-8"));
    bed.daemon.ctl(&["mount", "--mode", "fuse", &reference, path]);
    assert!(fs::read(over_fuse.join("d0/f1")).expect("a file") == bed.source("d0/f1"));
    bed.daemon.umount(&over_fuse);
    for (mode, bytes) in [("lazy", 5_000_000.0), ("fuse", 300_000.0)] {
        let of = |name: &str| figure(name, mode, "");
        assert!(of("s_total") >= 1.0 && of("_bytes_total") >= bytes, "{mode}: {}", of("_bytes_total"));
        assert_eq!(of("_errors_total"), 0.0);
        // Noise does not shrink: what was read was fetched, in chunks of up to a mebibyte.
        assert!((bytes..bytes + 2e6).contains(&of("_fetched_bytes_total")), "{}", of("_fetched_bytes_total"));
        assert_eq!(of("_amplification"), of("_fetched_bytes_total") / of("_bytes_total"));
        let all = figure("_seconds_bucket", mode, ",le=\"+Inf\"");
        assert_eq!((all, of("_seconds_count")), (of("s_total"), all));
        let most = figure("_seconds_bucket", mode, ",le=\"67.108864\"");
        assert!(most == all && of("_seconds_sum") > 0.0, "{most} of {all} in {} s", of("_seconds_sum"));
    }
    bed.daemon.umount(&mountpoint);
}
