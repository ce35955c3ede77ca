//! A container that reads from a lazy image goes on when the daemon is killed or replaced, and another container starts.

use std::{
    net::TcpListener,
    path::Path,
    process::Output,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use shoal_keeper::Client;

use crate::{
    bed::{Bed, in_container},
    image::Layers,
    support::{drop_caches, noise, wait},
};

/// Within this a start succeeds, whatever happens to the daemon meanwhile; it is tried again and again, as a kubelet does.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Reads the image's file until it is told to stop, and writes down what it saw, once for each time it differs.
const LOOP: &str =
    "until [ -e /tmp/stop ]; do sha256sum /data > /tmp/now 2>&1; cat /tmp/now >> /tmp/seen; done; sleep 600";

/// Containers outlive the daemon.
fn settings() -> [String; 3] {
    ["mounts.keeper=on", "mounts.keeper_patience=60s", "mounts.on_stop=leave"].map(str::to_owned)
}

/// A container that reads, and has read.
struct Loop {
    image: String,
    /// Of the container: runc's state is everyone's, so each test has another one.
    id: &'static str,
}

impl Loop {
    fn start(bed: &Bed, id: &'static str) -> Self {
        Layers::new().push_lazy(&bed.registry.layout(), "1");
        let image = bed.registry.reference("1");
        bed.daemon.ctl(&["rpull", &image]);
        bed.ctr(&["run", "--detach", "--snapshotter", "shoal", &image, id, "/bin/sh", "-c", LOOP]);
        let started = Self { image, id };
        wait("the container reads", || bed.try_ctr(&["tasks", "ls"]).status.success() && started.count(bed) > 0);
        started
    }

    fn count(&self, bed: &Bed) -> usize {
        // It may not have come to its first line yet.
        bed.exec(self.id, "cat /tmp/seen 2> /dev/null || true").lines().count()
    }

    fn goes_on(&self, bed: &Bed) {
        let before = self.count(bed);
        drop_caches();
        wait("the container reads on", || self.count(bed) > before + 2);
    }

    /// It must have seen no error and no wrong byte.
    fn end(self, bed: &Bed) {
        bed.exec(self.id, "echo > /tmp/stop");
        let seen = bed.exec(self.id, "cat /tmp/seen");
        assert!(seen.lines().all(|line| Layers::data_digest().trim_end() == line), "{seen}");
        bed.end(self.id);
        bed.remove_image(&self.image);
    }
}

/// Starts a container that reads, again and again until that succeeds; gives what it prints, and how long that took.
fn start_another(containerd: &Path, image: &str, name: &str) -> (Output, Duration) {
    let begun = Instant::now();
    for attempt in 0.. {
        // What a failed attempt leaves must not be in the way of the next.
        let id = format!("{name}-{attempt}");
        let arguments = ["--rm", "--snapshotter", "shoal", image, &id, "/bin/sha256sum", "/data"];
        let output = in_container(containerd, &["run"], &arguments);
        if output.status.success() {
            return (output, begun.elapsed());
        }
        let said = [output.stderr, output.stdout].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        assert!(begun.elapsed() < 6 * START_LIMIT, "{name} does not start: {said}");
        thread::sleep(Duration::from_millis(100));
    }
    unreachable!("the attempts are not counted to an end")
}

#[test]
fn another_container_starts_although_the_daemon_is_killed_and_fails_to_start_twice() {
    let Some(mut bed) = Bed::start_with("a container starts while the daemon is killed", &settings()) else { return };
    let reading = Loop::start(&bed, "loop-kill");
    let mounts = bed.mounts();
    let occupied = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = occupied.local_addr().expect("its address");
    // Once before a daemon has looked for mounts, once when it serves them already.
    let failures = [String::from("cluster.public_key=no-key"), format!("http.listen={address}")];
    for (round, delay) in noise(9, 4).into_iter().enumerate() {
        drop_caches();
        let containerd = bed.socket();
        let (image, name) = (reading.image.clone(), format!("started{round}"));
        let starting = thread::spawn(move || start_another(&containerd, &image, &name));
        // At any point of the start, which takes half a second: 0 to 510 ms.
        thread::sleep(Duration::from_millis(2 * u64::from(delay)));
        bed.daemon.kill();
        drop_caches();
        // Every second round the next daemon does not start at once.
        for failure in failures.iter().take(if round % 2 == 1 { 2 } else { 0 }) {
            bed.daemon.fail_to_start(std::slice::from_ref(failure));
        }
        bed.daemon.start_again();
        let (started, took) = starting.join().expect("it starts");
        println!(
            "round {round}: killed after {} ms, the container has started and read after {took:.2?}",
            2 * u32::from(delay)
        );
        assert_eq!(String::from_utf8_lossy(&started.stdout), Layers::data_digest());
        assert!(took <= START_LIMIT, "it has taken {took:?}");
        assert_eq!(bed.mounts(), mounts, "it is the same mount all along");
        reading.goes_on(&bed);
    }
    reading.end(&bed);
}

#[test]
fn containers_read_and_start_over_upgrades() {
    let Some(bed) = Bed::start_with("containers over upgrades", &settings()) else { return };
    let reading = Loop::start(&bed, "loop-upgrade");
    let (mounts, done) = (bed.mounts(), AtomicBool::new(false));
    thread::scope(|scope| {
        let starting = scope.spawn(|| {
            let mut started = 0;
            while !done.load(Relaxed) {
                // Once: somebody always listens, so nobody has to try again.
                assert_eq!(
                    bed.run(&reading.image, &format!("over{started}"), "sha256sum /data"),
                    Layers::data_digest()
                );
                started += 1;
            }
            started
        });
        for _ in 0..3 {
            reading.goes_on(&bed);
            bed.daemon.ctl(&["upgrade"]);
            assert_eq!(bed.mounts(), mounts);
        }
        reading.goes_on(&bed);
        done.store(true, Relaxed);
        assert!(starting.join().expect("all of them start") > 2);
    });
    reading.end(&bed);
}

#[test]
fn a_container_reads_on_while_the_daemon_is_killed_and_restarted() {
    let Some(mut bed) = Bed::start_with("containers go on", &settings()) else { return };
    let reading = Loop::start(&bed, "loop");
    let image = reading.image.clone();
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
        reading.goes_on(&bed);
        assert_eq!(bed.run(&image, "another", "sha256sum /data"), Layers::data_digest());
    }

    reading.end(&bed);
    wait("nothing is left", || bed.directories().is_empty() && bed.mounts().is_empty());
    let mut keeper = Client::connect(&bed.daemon.keeper_socket()).expect("the keeper");
    assert!(keeper.kept().expect("what it has").is_empty());
}
