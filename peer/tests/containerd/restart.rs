//! The daemon is restarted, also by force: snapshots and mounts are there again, and containers start from them.

use std::{fs, path::PathBuf};

use crate::{
    bed::Bed,
    image::Layers,
    support::{metric, wait},
};

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

#[test]
fn a_snapshot_whose_record_is_damaged_is_set_aside_and_the_others_are_served() {
    let Some(mut bed) = Bed::start("damaged record of a snapshot") else { return };
    let layers = Layers::new();
    layers.push_lazy(&bed.registry.layout(), "1");
    layers.push_ordinary(&bed.registry.layout(), "plain");
    let (lazy, plain) = (bed.registry.reference("1"), bed.registry.reference("plain"));
    bed.daemon.ctl(&["rpull", &lazy]);
    bed.ctr(&["images", "pull", "--plain-http", "--snapshotter", "shoal", &plain]);
    for id in ["kept", "hurt"] {
        bed.ctr(&["containers", "create", "--snapshotter", "shoal", &plain, id, "/bin/sleep", "600"]);
    }
    bed.daemon.stop();
    let of = |id: &str| -> PathBuf {
        let is_its = |dir: &PathBuf| {
            fs::read_to_string(dir.join("snapshot.json")).is_ok_and(|record| record.contains(&format!("/{id}\"")))
        };
        bed.directories().into_iter().find(is_its).expect("its directory")
    };
    let (hurt, record) = (of("hurt"), of("hurt").join("snapshot.json"));
    fs::write(hurt.join("fs/precious"), "precious").expect("a file");
    let good = fs::read(&record).expect("the record");
    fs::write(&record, &good[..good.len() / 2]).expect("a damaged record");

    bed.daemon.start_again();
    bed.wait_for_snapshotter();
    assert_eq!(metric(&bed.daemon, "shoal_snapshots_set_aside"), 1.0, "{}", bed.daemon.log());
    assert_eq!(bed.run(&lazy, "aside-lazy", "sha256sum /data"), Layers::data_digest());
    bed.ctr(&["tasks", "start", "--detach", "kept"]);
    assert_eq!(bed.exec("kept", "cat /etc/motd"), "upper\n");
    let said = bed.ctr_fails(&["snapshots", "--snapshotter", "shoal", "mounts", "/mnt", "hurt"]);
    assert!(said.contains("not found"), "{said}");
    bed.collect_garbage();
    assert_eq!(fs::read_to_string(hurt.join("fs/precious")).expect("it is still there"), "precious");

    // Mended by somebody, it is what it was.
    bed.daemon.stop();
    fs::write(&record, good).expect("the record");
    bed.daemon.start_again();
    bed.wait_for_snapshotter();
    assert_eq!(metric(&bed.daemon, "shoal_snapshots_set_aside"), 0.0);
    bed.ctr(&["snapshots", "--snapshotter", "shoal", "mounts", "/mnt", "hurt"]);
    bed.end("kept");
}
