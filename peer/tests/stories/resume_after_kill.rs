//! kill -9 in the middle of a download, ten times: what the store says afterwards is true, the mount comes back by itself,
//! and in the end no byte is wrong.

use std::{fs, time::Duration};

use crate::support::{Daemon, Registry, assert_same, can_mount, files, noise, total_bytes, tree};

#[test]
fn a_killed_node_goes_on_with_what_it_had() {
    if !can_mount("resume_after_kill") {
        return;
    }
    // 64 MB in 60 files: long enough to be killed ten times on the way.
    let source = tree(2, 60, 1_100_000);
    let mut registry = Registry::start();
    let encoded = registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &[]);
    daemon.mount(&registry.reference("1"));
    let names = files(source.path());
    let delays = noise(3, 10);

    for delay in delays {
        let durable = pieces(&daemon);
        let stopped = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for name in &names {
                    // Reads end with an error when the daemon goes; what they return before must be right.
                    if let Ok(bytes) = fs::read(daemon.mountpoint().join(name)) {
                        assert!(bytes == fs::read(source.path().join(name)).expect("the source"), "{name:?}");
                    }
                    if stopped.load(std::sync::atomic::Ordering::Relaxed) {
                        return;
                    }
                }
            });
            // 0 to 255 ms: from before the first chunk to well into the download.
            std::thread::sleep(Duration::from_millis(delay.into()));
            stopped.store(true, std::sync::atomic::Ordering::Relaxed);
            daemon.kill();
        });
        daemon.start_again();
        assert!(pieces(&daemon) >= durable, "durable pieces stay");
        let status = daemon.status();
        let mount = &status["mounts"][0];
        assert_eq!(mount["mountpoint"].as_str(), daemon.mountpoint().to_str(), "mounted again: {status}");
        assert_eq!(mount["present_pieces"], status["store"]["pieces"]);
        assert_eq!(status["total"]["rejected_chunks"], 0);
    }

    let here = daemon.status()["store"]["bytes"].as_u64().expect("a figure");
    assert_same(source.path(), &daemon.mountpoint());
    let status = daemon.status();
    let fetched = total_bytes(&status, "registry");
    assert!(
        here + fetched <= encoded,
        "only what is missing is fetched: {here} here, {fetched} fetched of {encoded}"
    );
    assert_eq!(status["mounts"][0]["present_pieces"], status["mounts"][0]["pieces"]);
    daemon.stop();
}

fn pieces(daemon: &Daemon) -> u64 {
    daemon.status()["store"]["pieces"].as_u64().expect("a figure")
}
