//! The life of a FUSE mount: how it ends, what its readers see then, what a dead one leaves behind.
#![cfg(feature = "mount")]

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use shoal_rafs::{BlobDir, Mount, MountError, MountOptions, Unmounted};

#[path = "support/bed.rs"]
mod bed;
#[path = "support/scripted_source.rs"]
mod scripted_source;
mod support;

use bed::{Bed, LIMIT, errno, in_time};
use scripted_source::{Answer, ScriptedSource};
use support::noise;

/// A process cannot even be killed while a thread of it waits for an answer that only the process itself can give.
struct CloseAtEnd(Arc<ScriptedSource>);

impl Drop for CloseAtEnd {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[test]
fn unmounting_waits_for_no_reader() {
    for answered in [true, false] {
        let Some(mut bed) = Bed::new() else { return };
        fs::write(bed.source("data"), noise(5, 4096)).unwrap();
        bed.build(0x1000);
        let source = bed.scripted(|_| Answer::Keep);
        let _last = CloseAtEnd(source.clone());
        let mount = Arc::new(bed.mount(source.clone()).unwrap());
        let mut file = File::open(bed.mounted("data")).unwrap();
        let reader = thread::spawn(move || {
            let mut content = Vec::new();
            file.read_to_end(&mut content).map(|_| content)
        });
        let waiting = source.clone();
        in_time(move || waiting.wait_for_kept());
        let unmounting = mount.clone();
        assert_eq!(in_time(move || unmounting.unmount()).unwrap(), Unmounted::Detached);
        assert_eq!(fs::read_dir(bed.path("mnt")).unwrap().count(), 0);
        // Again, and with something else in its place, it finds nothing to do.
        let successor = bed.mount_blobs();
        assert_eq!(mount.unmount().unwrap(), Unmounted::Detached);
        assert!(fs::read(bed.mounted("data")).unwrap() == noise(5, 4096));

        // The reader is still there, and gets what the source gives.
        assert!(!reader.is_finished());
        if answered {
            source.release()
        } else {
            source.close()
        }
        let content = in_time(|| reader.join().unwrap());
        match answered {
            true => assert!(content.unwrap() == noise(5, 4096)),
            false => assert_eq!(errno(&content.unwrap_err()), Some(Errno::IO)),
        }
        let ending = mount.clone();
        in_time(move || ending.wait());
        assert_eq!(mount.unmount().unwrap(), Unmounted::Gone);
        drop(mount);
        assert!(fs::read(bed.mounted("data")).unwrap() == noise(5, 4096));
        assert_eq!(successor.unmount().unwrap(), Unmounted::Gone);
    }
}

#[test]
fn unmounted_from_outside() {
    let Some(mut bed) = Bed::new() else { return };
    bed.build(0x1000);
    let mount = Arc::new(bed.mount_blobs());
    let waiting = mount.clone();
    let (sender, receiver) = channel();
    thread::spawn(move || {
        waiting.wait();
        sender.send(())
    });
    unmount(bed.path("mnt"), UnmountFlags::empty()).unwrap();
    receiver.recv_timeout(LIMIT).unwrap();
    assert_eq!(mount.unmount().unwrap(), Unmounted::Gone);
}

#[test]
fn dropping_unmounts() {
    let Some(mut bed) = Bed::new() else { return };
    fs::write(bed.source("file"), b"x").unwrap();
    bed.build(0x1000);
    drop(bed.mount_blobs());
    assert_eq!(fs::read_dir(bed.path("mnt")).unwrap().count(), 0);
}

#[test]
fn unusable_mountpoints_are_named() {
    let Some(mut bed) = Bed::new() else { return };
    fs::write(bed.source("file"), b"x").unwrap();
    let image = bed.build(0x1000).image.clone();
    let mount = |path: &Path| {
        let source = bed.scripted(|_| Answer::Now);
        Mount::new(image.clone(), source, path, MountOptions::default())
    };
    assert!(matches!(mount(&bed.path("missing")), Err(MountError::Mountpoint { .. })));
    assert!(matches!(mount(&bed.source("file")), Err(MountError::NotADirectory { .. })));
    let _mount = bed.mount_blobs();
    assert!(matches!(mount(&bed.path("mnt")), Err(MountError::Occupied { .. })));
}

const CHILD: &str = "SHOAL_TEST_MOUNT";

/// The other process of `a_dead_mount_makes_way`: mounts what the variable says and waits to be killed.
#[test]
fn mount_in_a_process_of_its_own() {
    let Some(work) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let image = shoal_rafs::Bootstrap::open(&work.join("image-4096/boot")).unwrap();
    let source = Arc::new(BlobDir::open(image.clone(), &work.join("image-4096/blobs"), 2).unwrap());
    let mount = Mount::new(image, source, &work.join("mnt"), MountOptions::default()).unwrap();
    fs::write(work.join("ready"), b"").unwrap();
    mount.wait();
}

#[test]
fn a_dead_mount_makes_way() {
    let Some(mut bed) = Bed::new() else { return };
    fs::write(bed.source("file"), b"x").unwrap();
    bed.build(0x1000);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "mount_in_a_process_of_its_own"])
        .env(CHILD, bed.path(""))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let ready = bed.path("ready");
    in_time(move || {
        while !ready.exists() {
            thread::sleep(Duration::from_millis(5));
        }
    });
    assert_eq!(fs::read(bed.mounted("file")).unwrap(), b"x");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(rustix::fs::statfs(bed.path("mnt")).unwrap_err(), Errno::NOTCONN);
    let mount = bed.mount_blobs();
    assert_eq!(fs::read(bed.mounted("file")).unwrap(), b"x");
    assert_eq!(mount.unmount().unwrap(), Unmounted::Gone);
    assert_eq!(fs::read_dir(bed.path("mnt")).unwrap().count(), 0);
}
