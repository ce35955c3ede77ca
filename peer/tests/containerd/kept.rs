//! A container that reads from a lazy image goes on when the daemon is killed, and the next container starts.

use shoal_keeper::Client;

use crate::{
    bed::Bed,
    image::Layers,
    support::{drop_caches, wait},
};

/// Reads the image's file until it is told to stop, and writes down what it saw, once for each time it differs.
const LOOP: &str =
    "until [ -e /tmp/stop ]; do sha256sum /data > /tmp/now 2>&1; cat /tmp/now >> /tmp/seen; done; sleep 600";

#[test]
fn a_container_reads_on_while_the_daemon_is_killed_and_restarted() {
    let settings = ["mounts.keeper=on", "mounts.keeper_patience=60s", "mounts.on_stop=leave"].map(str::to_owned);
    let Some(mut bed) = Bed::start_with("containers go on", &settings) else { return };
    Layers::new().push_lazy(&bed.registry.layout(), "1");
    let image = bed.registry.reference("1");
    bed.daemon.ctl(&["rpull", &image]);
    bed.ctr(&["run", "--detach", "--snapshotter", "shoal", &image, "loop", "/bin/sh", "-c", LOOP]);
    // The loop may not have come to its first line yet.
    let count = |bed: &Bed| bed.exec("loop", "cat /tmp/seen 2> /dev/null || true").lines().count();
    let reads_on = |bed: &Bed| {
        let before = count(bed);
        drop_caches();
        wait("the container reads on", || count(bed) > before + 2);
    };

    wait("the container reads", || bed.try_ctr(&["tasks", "ls"]).status.success() && count(&bed) > 0);
    let (snapshots, mounts) = (bed.snapshots(), bed.mounts());
    for killed in [true, false, true] {
        drop_caches();
        if killed {
            bed.daemon.kill()
        } else {
            bed.daemon.stop()
        }
        bed.daemon.start_again();
        bed.wait_for_snapshotter();
        assert_eq!((bed.snapshots(), bed.mounts()), (snapshots.clone(), mounts.clone()));
        reads_on(&bed);
        assert_eq!(bed.run(&image, "another", "sha256sum /data"), Layers::data_digest());
    }

    bed.exec("loop", "echo > /tmp/stop");
    let seen = bed.exec("loop", "cat /tmp/seen");
    assert!(seen.lines().all(|line| Layers::data_digest().trim_end() == line), "{seen}");
    bed.end("loop");
    bed.remove_image(&image);
    wait("nothing is left", || bed.directories().is_empty() && bed.mounts().is_empty());
    let mut keeper = Client::connect(&bed.daemon.keeper_socket()).expect("the keeper");
    assert!(keeper.kept().expect("what it has").is_empty());
}
