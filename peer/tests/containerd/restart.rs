//! The daemon is restarted, also by force: snapshots and mounts are there again, and containers start from them.

use crate::{bed::Bed, image::Layers, support::wait};

#[test]
fn snapshots_survive_a_stop_and_a_kill() {
    let Some(mut bed) = Bed::start("daemon restarted") else { return };
    let layers = Layers::new();
    layers.push_lazy(&bed.registry.layout(), "1");
    layers.push_ordinary(&bed.registry.layout(), "plain");
    let (lazy, plain) = (bed.registry.reference("1"), bed.registry.reference("plain"));
    bed.daemon.ctl(&["rpull", &lazy]);
    bed.ctr(&["images", "pull", "--plain-http", "--snapshotter", "shoal", &plain]);
    bed.ctr(&["containers", "create", "--snapshotter", "shoal", &plain, "kept", "/bin/sleep", "600"]);
    let (snapshots, mounts) = (bed.snapshots(), bed.mounts());

    bed.daemon.stop();
    let said = bed.ctr_fails(&["snapshots", "--snapshotter", "shoal", "mounts", "/mnt", "kept"]);
    assert!(said.contains("connect"), "{said}");
    bed.daemon.start_again();
    bed.wait_for_snapshotter();
    assert_eq!((bed.snapshots(), bed.mounts()), (snapshots.clone(), mounts.clone()));
    assert_eq!(bed.run(&lazy, "after-stop", "sha256sum /data"), Layers::data_digest());
    bed.ctr(&["tasks", "start", "--detach", "kept"]);
    bed.exec("kept", "echo kept > /etc/kept");

    bed.daemon.kill();
    bed.daemon.start_again();
    bed.wait_for_snapshotter();
    assert_eq!((bed.snapshots(), bed.mounts()), (snapshots, mounts));
    assert_eq!(bed.run(&lazy, "after-kill", "sha256sum /data"), Layers::data_digest());
    assert_eq!(bed.exec("kept", "cat /etc/kept"), "kept\n", "an ordinary container does not notice");
    bed.end("kept");
    bed.remove_image(&lazy);
    bed.remove_image(&plain);
    bed.collect_garbage();
    wait("nothing is left", || bed.directories().is_empty() && bed.mounts().is_empty());
}
