//! Mounts of the kernel's own EROFS driver, and what they are made of.

#![allow(unreachable_pub, missing_docs)] // each test program uses its part

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use shoal_rafs::{BlobDirReader, Bootstrap, BuildOptions, Builder, expand_blob};

use crate::support;

pub struct Mounted<'a>(pub &'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        unmount(self.0, UnmountFlags::DETACH).unwrap();
    }
}

pub fn available() -> bool {
    let known =
        fs::read_to_string("/proc/filesystems").unwrap_or_default().lines().any(|line| line.trim() == "erofs");
    if !support::is_root() || !known {
        println!("skipped: the kernel EROFS mount needs root and erofs in /proc/filesystems");
        return false;
    }
    true
}

/// Builds an image of `source` in `work`: its bootstrap is `boot`. Gives it, and its blobs, expanded.
pub fn expanded(source: &Path, work: &Path, options: BuildOptions) -> (Bootstrap, BlobDirReader, Vec<PathBuf>) {
    fs::create_dir_all(work.join("mnt")).unwrap();
    let boot = work.join("boot");
    let report = Builder::new(options).build(source, &boot, &work.join("blobs")).unwrap();
    assert_eq!(report.notes, [""; 0]);
    let image = Bootstrap::open(&boot).unwrap();
    let reader = BlobDirReader::open(&image, &work.join("blobs")).unwrap();
    let blobs = (0..image.blobs().len() as u32).map(|blob| {
        let path = work.join(format!("device-{blob}"));
        expand_blob(&image, &reader, blob, &File::create_new(&path).unwrap()).unwrap();
        path
    });
    let blobs = blobs.collect();
    (image, reader, blobs)
}

/// Mounts a bootstrap with these devices, and compares.
pub fn mounted(boot: &Path, devices: &[PathBuf], target: &Path, expected: &BTreeMap<PathBuf, support::Facts>) {
    let devices = devices.iter().map(|path| [b"device=", path.as_os_str().as_bytes()].concat()).collect::<Vec<_>>();
    let data = CString::new(devices.join(&b","[..])).unwrap();
    fs::create_dir_all(target).unwrap();
    mount(boot, target, "erofs", MountFlags::RDONLY, data.as_c_str()).expect("mount(2) of type erofs");
    let _mounted = Mounted(target);
    support::assert_same(expected, &support::facts(target));
}
