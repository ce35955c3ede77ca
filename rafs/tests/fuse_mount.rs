//! Images mounted with FUSE, read by the kernel and by programs that know nothing of them.
#![cfg(feature = "mount")]

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use shoal_rafs::{
    Blob, BlobDir, BlobDirReader, BuildOptions, ChunkTable, ImageFile, Metadata, Mount, MountOptions, Unmounted,
};

#[path = "support/bed.rs"]
mod bed;
#[path = "support/scripted_source.rs"]
mod scripted_source;
mod support;

use bed::{Bed, errno};
use scripted_source::Answer;
use support::{assert_same, facts, noise};

#[test]
fn a_mount_is_the_tree_that_the_image_was_made_of() {
    let Some(mut bed) = Bed::new() else { return };
    support::nasty_tree(&bed.path("source"));
    fs::write(bed.source("large"), noise(3, (3 << 20) + 17)).unwrap();
    File::create(bed.source("sparse")).unwrap().set_len(5 << 20).unwrap();
    fs::create_dir(bed.source("crowd")).unwrap();
    for number in 0..2000 {
        fs::write(bed.source("crowd").join(format!("{number}")), format!("{number}")).unwrap();
    }
    let expected = facts(&bed.path("source"));
    for chunk_size in [0x1000, 0x10_0000] {
        bed.build(chunk_size);
        let mount = bed.mount_blobs();
        // From the source, then from the kernel's caches.
        assert_same(&expected, &facts(&bed.path("mnt")));
        assert_same(&expected, &facts(&bed.path("mnt")));
        assert_eq!(fs::metadata(bed.path("mnt")).unwrap().ino(), 1);
        let statistics = rustix::fs::statfs(bed.path("mnt")).unwrap();
        assert_eq!(statistics.f_files, bed.built().image.inode_count());
        assert!(mount.stats().reads > 0);
        assert_eq!(mount.stats().errors, 0);
        assert_eq!(mount.unmount().unwrap(), Unmounted::Gone);
        assert_eq!(fs::read_dir(bed.path("mnt")).unwrap().count(), 0);
    }
}

#[test]
fn a_bootstrap_that_is_read_in_place_is_the_same_tree() {
    let Some(mut bed) = Bed::new() else { return };
    support::nasty_tree(&bed.path("source"));
    fs::create_dir(bed.source("crowd")).unwrap();
    for number in 0..5000 {
        fs::write(bed.source("crowd").join(format!("{number}")), format!("{}", number % 7)).unwrap();
    }
    let expected = facts(&bed.path("source"));
    let built = bed.build(0x1000);
    let (image, paths) = ImageFile::open_in_place(&built.boot, Some(&built.blobs)).unwrap();
    assert!(matches!(image, Metadata::InPlace(_)));
    let source = Arc::new(BlobDir::new(BlobDirReader::lazily(&image, &paths).unwrap(), 2).unwrap());
    let mount = Mount::new(image, source, &bed.path("mnt"), MountOptions::default()).unwrap();
    assert_same(&expected, &facts(&bed.path("mnt")));
    // Two who list a directory at the same time disturb each other's positions.
    let (one, mut other) = (fs::read_dir(bed.mounted("crowd")).unwrap(), fs::read_dir(bed.mounted("crowd")).unwrap());
    let pairs = one.inspect(|_| drop(other.next()));
    assert_eq!(pairs.map(|entry| entry.unwrap().file_name()).collect::<std::collections::HashSet<_>>().len(), 5000);
    assert_eq!(mount.stats().errors, 0);
}

#[test]
fn an_image_with_batches_is_mounted_like_any_other() {
    let Some(mut bed) = Bed::new() else { return };
    support::nasty_tree(&bed.path("source"));
    let options = BuildOptions { chunk_size: 0x4000, batch_size: Some(0x4000), ..BuildOptions::default() };
    let built = bed.build_with(options);
    let pieces = |blob: &Blob| ChunkTable::read(&built.blobs.join(blob.id.to_string())).unwrap();
    assert!(pieces(&built.image.blobs()[0]).batch(5).is_some());
    let mount = bed.mount_blobs();
    assert_same(&facts(&bed.path("source")), &facts(&bed.path("mnt")));
    assert_eq!(mount.stats().errors, 0);
}

#[test]
fn diff_and_tar_find_no_difference() {
    let Some(mut bed) = Bed::new() else { return };
    support::nasty_tree(&bed.path("source"));
    bed.build(0x10_0000);
    let _mount = bed.mount_blobs();
    // diff(1) calls any two devices different, and tar(1) leaves sockets out.
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(Command::new("diff")
        .args(["-r", "--no-dereference", "-x", "nodes"])
        .args([bed.path("source"), bed.path("mnt")]));
    let archive = bed.path("archive.tar");
    let attributes = ["--xattrs", "--xattrs-include=*", "--exclude=./nodes/socket"];
    run(Command::new("tar").args(attributes).arg("-cf").arg(&archive).arg("-C").arg(bed.path("mnt")).arg("."));
    run(Command::new("tar").args(attributes).arg("-df").arg(&archive).arg("-C").arg(bed.path("source")).arg("."));
}

#[test]
fn files_can_be_mapped_and_run() {
    let Some(mut bed) = Bed::new() else { return };
    let content = noise(1, (2 << 20) + 100);
    fs::write(bed.source("data"), &content).unwrap();
    fs::copy("/bin/cat", bed.source("cat")).unwrap();
    bed.build(0x10_0000);
    let _mount = bed.mount_blobs();
    let output = Command::new(bed.mounted("cat")).arg(bed.mounted("data")).output().unwrap();
    assert!(output.status.success() && output.stdout == content);

    drop(File::open(bed.mounted("data")).unwrap());
    rustix::fs::fadvise(File::open(bed.mounted("data")).unwrap(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let file = File::open(bed.mounted("data")).unwrap();
    let (len, flags) = (content.len(), rustix::mm::MapFlags::PRIVATE);
    // SAFETY: a new mapping of `len` bytes, of a file that nothing changes, which is not unmapped before the end.
    let mapped = unsafe {
        let address = rustix::mm::mmap(std::ptr::null_mut(), len, rustix::mm::ProtFlags::READ, flags, &file, 0);
        std::slice::from_raw_parts(address.unwrap().cast::<u8>().cast_const(), len)
    };
    // Backwards, so that every page faults.
    for start in (0..len).step_by(4096).rev() {
        let end = len.min(start + 4096);
        assert!(mapped[start..end] == content[start..end], "page at {start}");
    }
    // SAFETY: mapped above, and not used any more.
    unsafe { rustix::mm::munmap(mapped.as_ptr().cast_mut().cast(), len).unwrap() };
}

#[test]
fn random_reads_are_right_while_chunks_come_late_and_out_of_order() {
    let Some(mut bed) = Bed::new() else { return };
    let content = Arc::new(noise(9, 3_000_000));
    fs::write(bed.source("data"), &*content).unwrap();
    bed.build(0x1_0000);
    let source = bed.scripted(|id| match noise(id.index.into(), 1)[0] {
        late @ 0..200 => Answer::After(Duration::from_micros(u64::from(late) * 50)),
        _ => Answer::Now,
    });
    let mount = bed.mount(source).unwrap();
    let reader = |thread: u64| {
        let (content, path) = (content.clone(), bed.mounted("data"));
        thread::spawn(move || {
            let file = File::open(path).unwrap();
            for draw in 0..100u64 {
                let bytes: [u8; 8] = noise(thread << 32 | draw, 8).try_into().unwrap();
                let draw = u64::from_le_bytes(bytes);
                let (offset, len) = (draw as usize % 3_100_000, (draw >> 32) as usize % 300_000);
                let mut buffer = vec![0; len];
                let mut filled = 0;
                loop {
                    match file.read_at(&mut buffer[filled..], (offset + filled) as u64).unwrap() {
                        0 => break,
                        count => filled += count,
                    }
                }
                let start = offset.min(content.len());
                let expected = &content[start..(offset + len).clamp(start, content.len())];
                assert!(buffer[..filled] == *expected, "{len} bytes at {offset}");
            }
        })
    };
    let readers: Vec<_> = (0..4).map(reader).collect();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    assert_eq!(mount.stats().errors, 0);
}

#[test]
fn a_thousand_small_reads_at_once() {
    let Some(mut bed) = Bed::new() else { return };
    for number in 0..1000 {
        fs::write(bed.source(&format!("{number}")), noise(number, 4000)).unwrap();
    }
    bed.build(0x1000);
    let mount = bed.mount(bed.scripted(|_| Answer::After(Duration::from_millis(1)))).unwrap();
    let reader = |number| {
        let path = bed.mounted(&format!("{number}"));
        thread::Builder::new().stack_size(64 << 10).spawn(move || fs::read(path).unwrap() == noise(number, 4000))
    };
    let readers: Vec<_> = (0..1000).map(|number| reader(number).unwrap()).collect();
    assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
    assert_eq!(mount.stats().bytes, 4_000_000);
}

#[test]
fn what_the_kernel_has_read_it_keeps() {
    let Some(mut bed) = Bed::new() else { return };
    fs::write(bed.source("data"), noise(1, 500_000)).unwrap();
    bed.build(0x10_0000);
    let mount = bed.mount_blobs();
    fs::read(bed.mounted("data")).unwrap();
    let before = mount.stats();
    assert_eq!(before.bytes, 500_000);
    fs::read(bed.mounted("data")).unwrap();
    assert_eq!(mount.stats(), before);
    // Requests become as large as chunks, if the kernel lets us say so.
    let device = fs::metadata(bed.path("mnt")).unwrap().dev();
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", rustix::fs::major(device), rustix::fs::minor(device));
    assert_eq!(fs::read_to_string(path).unwrap().trim(), "1024");
}

#[test]
fn a_damaged_chunk_fails_its_own_reads_only() {
    let Some(mut bed) = Bed::new() else { return };
    let content = noise(2, 0x8000);
    fs::write(bed.source("data"), &content).unwrap();
    fs::write(bed.source("other"), b"other").unwrap();
    let blob = bed.build(0x1000).report.blob.unwrap().to_string();
    let blob = File::options().write(true).open(bed.built().blobs.join(blob)).unwrap();
    let table = bed.built().image.piece_table(0, None).unwrap();
    // `data` comes first: its chunk number 3.
    let place = table.piece(3).unwrap().encoded().start;
    blob.write_all_at(&[!content[0x3000]], place).unwrap();

    let mount = bed.mount_blobs();
    let file = File::open(bed.mounted("data")).unwrap();
    let mut page = vec![0; 0x1000];
    for number in 0..8 {
        let start = number * 0x1000;
        match file.read_exact_at(&mut page, start as u64) {
            Ok(()) => assert!(number != 3 && page == content[start..start + 0x1000], "page {number}"),
            Err(error) => assert_eq!((number, errno(&error)), (3, Some(Errno::IO))),
        }
    }
    assert_eq!(fs::read(bed.mounted("other")).unwrap(), b"other");
    assert!(mount.stats().errors > 0);

    // Failures are not remembered.
    blob.write_all_at(&content[0x3000..0x3001], place).unwrap();
    assert!(fs::read(bed.mounted("data")).unwrap() == content);
}

#[test]
fn a_source_that_fails_is_eio() {
    let Some(mut bed) = Bed::new() else { return };
    fs::write(bed.source("data"), noise(2, 0x8000)).unwrap();
    bed.build(0x1000);
    let _mount = bed.mount(bed.scripted(|_| Answer::Fail)).unwrap();
    assert_eq!(errno(&fs::read(bed.mounted("data")).unwrap_err()), Some(Errno::IO));
}

#[test]
fn xattrs_are_sized_and_acls_count() {
    let Some(mut bed) = Bed::new() else { return };
    support::nasty_tree(&bed.path("source"));
    bed.build(0x1000);
    let _mount = bed.mount_blobs();
    let path = bed.mounted("attributes/xattrs");
    let mut room = [0u8; 1];
    let get = |name, room: &mut [u8]| rustix::fs::getxattr(&path, name, room);
    assert_eq!(get("user.large", &mut room), Err(Errno::RANGE));
    assert_eq!(rustix::fs::getxattr_query(&path, "user.large"), Ok(1500));
    assert_eq!(get("user.none", &mut room), Err(Errno::NODATA));
    assert_eq!(rustix::fs::listxattr(&path, &mut room), Err(Errno::RANGE));
    if xattr::get(bed.source("attributes/xattrs"), "system.posix_acl_access").unwrap().is_none() {
        return;
    }
    // The ACL lets user 1000 read, and nobody else but the owner and his group.
    let may_read = |user| Command::new("cat").arg(&path).uid(user).gid(user).output().unwrap().status.success();
    assert!(may_read(1000));
    assert!(!may_read(1002));
}

#[test]
fn nothing_can_be_changed() {
    let Some(mut bed) = Bed::new() else { return };
    fs::write(bed.source("file"), b"x").unwrap();
    bed.build(0x1000);
    let _mount = bed.mount_blobs();
    let file = bed.mounted("file");
    let attempts = [
        File::options().write(true).open(&file).map(drop),
        File::create(bed.mounted("new")).map(drop),
        fs::create_dir(bed.mounted("new")),
        fs::remove_file(&file),
        fs::rename(&file, bed.mounted("new")),
        fs::hard_link(&file, bed.mounted("new")),
        fs::set_permissions(&file, fs::Permissions::from_mode(0o777)),
        xattr::set(&file, "user.x", b""),
    ];
    for (number, attempt) in attempts.iter().enumerate() {
        assert_eq!(attempt.as_ref().err().and_then(errno), Some(Errno::ROFS), "attempt {number}");
    }
}

#[test]
fn an_overlay_above_can_be_changed() {
    let Some(mut bed) = Bed::new() else { return };
    fs::create_dir(bed.source("dir")).unwrap();
    for name in ["change", "delete", "keep", "dir/inside"] {
        fs::write(bed.source(name), noise(4, 10_000)).unwrap();
    }
    fs::hard_link(bed.source("keep"), bed.source("link")).unwrap();
    xattr::set(bed.source("change"), "user.kept", b"yes").unwrap();
    bed.build(0x1000);
    let _mount = bed.mount_blobs();
    for name in ["upper", "work", "merged"] {
        fs::create_dir(bed.path(name)).unwrap();
    }
    let merged = |name: &str| bed.path("merged").join(name);
    let join = |key: &[u8], name| [key, bed.path(name).as_os_str().as_bytes()].concat();
    let data = [join(b"lowerdir=", "mnt"), join(b"upperdir=", "upper"), join(b"workdir=", "work")].join(&b","[..]);
    let data = std::ffi::CString::new(data).unwrap();
    mount("overlay", bed.path("merged"), "overlay", MountFlags::empty(), data.as_c_str()).expect("overlayfs");

    let before = fs::metadata(merged("change")).unwrap();
    let file = File::options().write(true).open(merged("change")).unwrap();
    file.write_all_at(b"changed", 5000).unwrap();
    let mut expected = noise(4, 10_000);
    expected[5000..5007].copy_from_slice(b"changed");
    assert!(fs::read(merged("change")).unwrap() == expected);
    assert_eq!(fs::metadata(merged("change")).unwrap().ino(), before.ino());
    assert_eq!(xattr::get(merged("change"), "user.kept").unwrap().unwrap(), b"yes");
    fs::remove_file(merged("delete")).unwrap();
    fs::remove_dir_all(merged("dir")).unwrap();
    fs::create_dir(merged("dir")).unwrap();
    fs::write(merged("new"), b"new").unwrap();
    let mut names: Vec<_> = fs::read_dir(merged("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["change", "dir", "keep", "link", "new"]);
    assert_eq!(fs::read_dir(merged("dir")).unwrap().count(), 0);
    drop(file);
    unmount(bed.path("merged"), UnmountFlags::empty()).unwrap();
    assert_same(&facts(&bed.path("source")), &facts(&bed.path("mnt")));
}
