//! A lazy image: pulled without its blobs, run, written to, shared by containers, removed.

use crate::{
    bed::Bed,
    image::{DATA_BYTES, Layers},
    support::{drop_caches, wait},
};

#[test]
fn a_lazy_image_runs_and_leaves_nothing_behind() {
    let Some(bed) = Bed::start("lazy image") else { return };
    let layers = Layers::new();
    let blob_bytes = layers.push_lazy(&bed.registry.layout(), "1");
    let image = bed.registry.reference("1");
    let pulled = String::from_utf8(bed.daemon.ctl(&["rpull", &image]).stdout).expect("text");
    assert_eq!(pulled.lines().next(), Some(image.as_str()));
    let sent = bed.registry.sent_bytes();
    assert!(blob_bytes > DATA_BYTES as u64 && sent < 100_000, "{sent} of {blob_bytes} bytes were sent");
    assert_eq!((bed.snapshots().len(), bed.mounts().len()), (3, 1), "two blob layers and one with the bootstrap");

    let seen = bed.run(&image, "first", "cat /etc/motd; ls /etc; sha256sum /data; stat -c %a:%u /bin/su-id /");
    assert_eq!(seen, format!("upper\nmotd\n{}4755:0\n755:0\n", Layers::data_digest()));

    bed.start_waiting(&image, "a");
    bed.start_waiting(&image, "b");
    assert_eq!(bed.mounts().len(), 1, "both use the same mount");
    bed.exec("a", "echo new > /etc/new; echo changed >> /etc/motd; rm /data");
    assert_eq!(
        bed.exec("a", "cat /etc/new /etc/motd; ls /"),
        "new\nupper\nchanged\nbin\ndev\netc\nproc\nrun\nsys\ntmp\n"
    );
    assert_eq!(bed.exec("b", "cat /etc/motd; sha256sum /data"), format!("upper\n{}", Layers::data_digest()));
    let usage = bed.ctr(&["snapshots", "--snapshotter", "shoal", "usage", "-b", "a"]);
    let inodes: Option<u64> = usage.split_whitespace().last().and_then(|count| count.parse().ok());
    assert!(inodes >= Some(4), "the root, /etc and two files: {usage}");
    // A set-user-id program keeps its meaning, though the lazy mount below has none.
    let flags = bed.exec("b", "mount | /bin/busybox grep ' on / '");
    assert!(flags.contains("overlay") && !flags.contains("nosuid"), "{flags}");

    // The image can go while a container runs; what it needs stays until it ends.
    bed.end("a");
    bed.remove_image(&image);
    drop_caches();
    assert_eq!(bed.exec("b", "sha256sum /data"), Layers::data_digest());
    bed.end("b");
    bed.collect_garbage();
    wait("nothing is left", || bed.snapshots().is_empty() && bed.mounts().is_empty() && bed.directories().is_empty());
}

#[test]
fn a_change_is_committed_as_a_layer_over_the_lazy_image() {
    let Some(bed) = Bed::start("commit over a lazy image") else { return };
    Layers::new().push_lazy(&bed.registry.layout(), "1");
    let image = bed.registry.reference("1");
    bed.daemon.ctl(&["rpull", &image]);
    bed.start_waiting(&image, "changed");
    bed.exec("changed", "echo changed > /etc/motd; rm /data");
    let top = bed
        .snapshots()
        .into_iter()
        .find(|name| bed.ctr(&["snapshots", "--snapshotter", "shoal", "info", name]).contains("nydus-bootstrap"));
    let top = top.expect("the bootstrap layer");
    bed.end("changed");

    let snapshots = |arguments: &[&str]| bed.ctr(&[&["snapshots", "--snapshotter", "shoal"], arguments].concat());
    let mounted = tempfile::tempdir().expect("a temporary folder");
    let target = mounted.path().to_str().expect("UTF-8");
    let make = |mounts: &str| {
        let made = std::process::Command::new("sh").args(["-c", mounts]).status().expect("mount runs");
        assert!(made.success(), "{mounts}");
    };
    let unmount = || rustix::mount::unmount(mounted.path(), rustix::mount::UnmountFlags::empty()).expect("unmounted");
    snapshots(&["prepare", "work", &top]);
    make(&snapshots(&["mounts", target, "work"]));
    std::fs::write(mounted.path().join("etc/motd"), "committed\n").expect("a write");
    std::fs::remove_file(mounted.path().join("data")).expect("a removal");
    unmount();
    snapshots(&["commit", "layer", "work"]);
    for (arguments, error) in [
        (&["mounts", target, "layer"][..], "committed and has no mounts"),
        (&["prepare", "layer", &top], "already exists"),
        (&["prepare", "other", "nobody"], "not found"),
        (&["rm", &top], "cannot remove snapshot with child"),
    ] {
        let said = bed.ctr_fails(&[&["snapshots", "--snapshotter", "shoal"], arguments].concat());
        assert!(said.contains(error), "{arguments:?}: {said}");
    }

    // `ctr` keeps no hold of views: once something was removed, containerd's garbage collection may be first.
    let view = |key: &str, parent: &str| {
        let mut mounts = Vec::new();
        wait("a view that is not collected", || {
            bed.try_ctr(&["snapshots", "--snapshotter", "shoal", "view", key, parent]);
            let said = bed.try_ctr(&["snapshots", "--snapshotter", "shoal", "mounts", target, key]);
            mounts = said.stdout;
            said.status.success()
        });
        make(&String::from_utf8_lossy(&mounts));
    };
    view("look", "layer");
    let motd = std::fs::read_to_string(mounted.path().join("etc/motd")).expect("a read");
    assert_eq!((motd.as_str(), mounted.path().join("data").exists()), ("committed\n", false));
    assert!(std::fs::write(mounted.path().join("new"), "").is_err(), "a view is read-only");
    unmount();
    // A view of the lazy image itself, which is an overlay of one tree.
    view("image", &top);
    assert_eq!(std::fs::read(mounted.path().join("data")).expect("a read").len(), DATA_BYTES);
    unmount();
    for view in ["look", "image"] {
        let removed = bed.try_ctr(&["snapshots", "--snapshotter", "shoal", "rm", view]);
        let said = String::from_utf8_lossy(&removed.stderr);
        assert!(removed.status.success() || said.contains("not found"), "{said}");
    }
    // And if it was first, it may not have come to the snapshotter yet.
    let removed = (0..100).any(|_| {
        let removed = bed.try_ctr(&["snapshots", "--snapshotter", "shoal", "rm", "layer"]);
        let said = String::from_utf8_lossy(&removed.stderr);
        assert!(removed.status.success() || said.contains("cannot remove snapshot with child"), "{said}");
        if !removed.status.success() {
            bed.collect_garbage();
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        removed.status.success()
    });
    assert!(removed, "its views are gone");
    assert!(!bed.snapshots().iter().any(|name| ["look", "image", "layer"].contains(&name.as_str())));
}

#[test]
fn a_container_is_not_given_a_mount_that_has_gone() {
    let Some(bed) = Bed::start("a mount goes before a container starts") else { return };
    Layers::new().push_lazy(&bed.registry.layout(), "1");
    let image = bed.registry.reference("1");
    bed.daemon.ctl(&["rpull", &image]);
    for round in 0..3 {
        let [mounted] = &bed.mounts()[..] else { panic!("one mount") };
        rustix::mount::unmount(mounted.as_str(), rustix::mount::UnmountFlags::DETACH).expect("it can be unmounted");
        // At once: nobody has had the time to look.
        assert_eq!(bed.run(&image, &format!("gone-{round}"), "sha256sum /data"), Layers::data_digest());
    }
}
