//! Limits are kept, readers go first under them, and they can be changed while they count.
//!
//! What is asserted is a ceiling: never more bytes than the rate allows for the time that has passed, a second's worth and a
//! piece more. A machine that is slow stays below it.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::support::{Daemon, Registry, assert_same, can_mount, json, total_bytes, tree, wait};

const FILES: usize = 80;
/// Bytes of a file, which is one piece.
const PIECE: u64 = 100_000;
/// Bytes per second.
const RATE: u64 = 256 << 10;
/// Headers of answers, and objects.
const EXTRA: u64 = 64 << 10;

/// Samples what has passed until it is `enough`; it is never more than the rate allows.
fn assert_kept(rate: u64, most: u64, enough: u64, passed: impl Fn() -> u64) {
    let start = Instant::now();
    let before = passed();
    wait("enough has passed", || {
        let passed = passed() - before;
        let allowed = rate as f64 * (start.elapsed().as_secs_f64() + 1.0) + most as f64;
        assert!(passed as f64 <= allowed, "{passed} bytes where {allowed} are allowed");
        passed >= enough
    });
}

fn pieces(daemon: &Daemon, key: &str) -> u64 {
    daemon.status()["mounts"][0][key].as_u64().expect("a figure")
}

/// Reads files from all over the tree while a prefetch is under way, which is not over then.
fn assert_readers_go_first(source: &Path, daemon: &Daemon) {
    for name in ["d0/f3", "d1/f18", "d3/f36"] {
        let read = fs::read(daemon.mountpoint().join(name)).expect("it can be read");
        assert!(read == fs::read(source.join(name)).expect("the source"), "{name} differs");
    }
    assert!(pieces(daemon, "present_pieces") < pieces(daemon, "pieces"), "readers waited for the prefetch");
}

/// An image in a registry, a seed peer that has all of it, and a node that has mounted it.
struct Bed {
    source: TempDir,
    registry: Registry,
    seed: Daemon,
    node: Daemon,
    _folder: TempDir,
}

impl Bed {
    fn new(settings: &[&str]) -> Self {
        let source = tree(11, FILES, PIECE as usize);
        let mut registry = Registry::start();
        registry.publish(source.path(), "1");
        registry.switch_on();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut settings: Vec<String> = settings.iter().map(ToString::to_string).collect();
        settings.push("read.ahead_bytes=0".into());
        let seed = Daemon::start("seed", folder.path(), &[settings.clone(), vec!["role=seed".into()]].concat());
        seed.ctl(&["prefetch", &registry.reference("1")]);
        let node = Daemon::start("node", folder.path(), &[settings, vec![seed.join()]].concat());
        node.wait_for_home();
        node.mount(&registry.reference("1"));
        Self { source, registry, seed, node, _folder: folder }
    }
}

/// Bytes that went from one to the other over their connection.
fn payload(daemon: &Daemon, key: &str) -> u64 {
    daemon.peers().iter().map(|peer| peer[key].as_u64().expect("a figure")).sum()
}

/// A prefetch over a limited way: within the limit, behind readers, and quick once the limit is lifted.
fn prefetch_within(bed: &Bed, limited: &Daemon, limit: &str, passed: impl Fn() -> u64) {
    limited.ctl(&["set", &format!("limits.{limit}={RATE}")]);
    thread::scope(|scope| {
        let prefetch = scope.spawn(|| bed.node.ctl(&["prefetch", &bed.registry.reference("1")]));
        assert_kept(RATE, PIECE + EXTRA, 4 * RATE, passed);
        assert_readers_go_first(bed.source.path(), &bed.node);
        limited.ctl(&["set", &format!("limits.{limit}=1KiB")]);
        thread::sleep(Duration::from_millis(100));
        assert!(!prefetch.is_finished(), "the lower limit counts");
        limited.ctl(&["set", &format!("limits.{limit}=0")]);
        prefetch.join().expect("it ends");
    });
    assert_same(bed.source.path(), &bed.node.mountpoint());
    let status = bed.node.status();
    assert_eq!(total_bytes(&status, "registry"), 0, "a limited peer is no reason to read the registry: {status}");
    assert_eq!(status["mounts"][0]["read_errors"], 0);
}

fn limited_transfer(transport: &str, limit: &str, of_seed: bool) {
    if !can_mount(&format!("limits_{limit}_{transport}")) {
        return;
    }
    let mut bed = Bed::new(&[&format!("data.transport={transport}")]);
    if of_seed {
        prefetch_within(&bed, &bed.seed, limit, || payload(&bed.seed, "sent_bytes"));
    } else {
        prefetch_within(&bed, &bed.node, limit, || payload(&bed.node, "received_bytes"));
    }
    let connected = bed.node.peers();
    let transports = connected.iter().filter(|peer| peer["connected"] == true).map(|peer| &peer["transport"]);
    assert!(transports.into_iter().all(|found| found == transport), "{connected:?}");
    bed.node.stop();
    bed.seed.stop();
}

#[test]
fn an_upload_limit_is_kept_over_tcp() {
    limited_transfer("tcp", "upload", true);
}

#[test]
fn an_upload_limit_for_each_peer_is_kept_over_quic() {
    limited_transfer("quic", "upload_per_peer", true);
}

#[test]
fn a_download_limit_is_kept_over_tcp() {
    limited_transfer("tcp", "download", false);
}

#[test]
fn a_download_limit_for_each_peer_is_kept_over_tcp() {
    limited_transfer("tcp", "download_per_peer", false);
}

#[test]
fn a_download_limit_is_kept_over_quic() {
    limited_transfer("quic", "download", false);
}

/// One node, whose reads of the registry are limited in bytes, or in their number.
#[test]
fn limits_of_the_registry_are_kept() {
    if !can_mount("limits_registry") {
        return;
    }
    let source = tree(12, FILES, PIECE as usize);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut node = Daemon::start("node", folder.path(), &["read.ahead_bytes=0".into()]);
    node.mount(&registry.reference("1"));
    node.ctl(&["set", &format!("limits.registry={RATE}"), "registry.concurrency=2"]);
    thread::scope(|scope| {
        let prefetch = scope.spawn(|| node.ctl(&["prefetch", &registry.reference("1")]));
        assert_kept(RATE, PIECE + EXTRA, 4 * RATE, || registry.sent_bytes());
        assert_readers_go_first(source.path(), &node);
        node.ctl(&["set", "limits.registry_requests=1"]);
        // Two that were under way.
        assert_kept(1, 1 + 2, 4, || registry.requests());
        node.ctl(&["set", "limits.registry_requests=0", "limits.registry=0"]);
        prefetch.join().expect("it ends");
    });
    assert_same(source.path(), &node.mountpoint());
    node.stop();
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback can be listened on");
    listener.local_addr().expect("its address").port()
}

/// Without a seed peer a node reads the registry itself, within its budget, and stops to when the seed peer is back.
#[test]
fn a_lost_seed_costs_the_registry_no_more_than_the_budget() {
    if !can_mount("limits_seed_lost") {
        return;
    }
    let source = tree(13, FILES, PIECE as usize);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    // The node finds it again where it was.
    let address = format!("control.listen=[\"/ip4/127.0.0.1/tcp/{}\"]", free_port());
    let common = ["read.ahead_bytes=0".to_owned(), "control.lease=\"2s\"".to_owned()];
    let seed_settings = [&common[..], &["role=seed".to_owned(), address]].concat();
    let mut seed = Daemon::start("seed", folder.path(), &seed_settings);
    let budget = [format!("limits.registry={RATE}"), "limits.registry_requests=20".to_owned()];
    let mut node = Daemon::start("node", folder.path(), &[&common[..], &budget, &[seed.join()]].concat());
    node.wait_for_home();
    node.mount(&registry.reference("1"));
    let read = |names: std::ops::Range<usize>| {
        for name in names.map(|n| PathBuf::from(format!("d{}/f{n}", n / 10))) {
            let read = fs::read(node.mountpoint().join(&name)).expect("it can be read");
            assert!(read == fs::read(source.path().join(&name)).expect("the source"), "{}", name.display());
        }
    };
    read(0..5);
    assert_eq!(total_bytes(&node.status(), "registry"), 0);

    seed.kill();
    thread::scope(|scope| {
        let reading = scope.spawn(|| read(5..20));
        assert_kept(RATE, PIECE + EXTRA, 10 * PIECE, || registry.sent_bytes());
        reading.join().expect("every read succeeds");
    });
    let alone = total_bytes(&node.status(), "registry");
    assert!(alone >= 10 * PIECE, "{alone}");

    seed.start_again();
    node.wait_for_home();
    read(20..FILES);
    assert_eq!(total_bytes(&node.status(), "registry"), alone, "the home reads it again");
    node.stop();
    seed.stop();
}

#[test]
fn settings_are_shown_changed_and_refused_with_a_reason() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &["limits.upload=5".into()]);
    let value = |key: &str| String::from_utf8(daemon.ctl(&["get", key]).stdout).expect("UTF-8").trim().to_owned();
    assert_eq!((value("limits.upload"), value("zone")), ("5".into(), "\"default\"".into()));
    let set = daemon.ctl(&["set", "limits.upload=2 MiB", "registry.concurrency=9"]);
    assert_eq!(String::from_utf8_lossy(&set.stdout), "limits.upload = 2097152\nregistry.concurrency = 9\n");
    assert_eq!(value("limits.upload"), "2097152");
    let limits = json(&daemon.ctl(&["get", "limits", "--json"]));
    let limits = limits["settings"].as_array().expect("a list");
    let of = |key: &str| limits.iter().find(|setting| setting["key"] == key).expect("it is listed").clone();
    assert_eq!(
        (&of("limits.upload")["value"], &of("limits.upload")["adjustable"]),
        (&"2097152".into(), &true.into())
    );
    assert_eq!(of("limits.answer_bytes")["adjustable"], false);

    let refused = |settings: &[&str], code, reason: &str| {
        let output = daemon.try_ctl(&[&["set"], settings].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && error.contains(reason), "{settings:?}: {error}");
    };
    refused(&["limits.upload=7", "zone=b"], 1, "zone is read when the daemon starts");
    refused(&["limits.upload=7", "limits.uplaod=1"], 1, "did you mean \"limits.upload\"?");
    refused(&["limits.upload=fast"], 1, "bytes, as a number or a text");
    refused(&["limits.upload"], 2, "expected KEY=VALUE");
    refused(&[], 2, "KEY=VALUE");
    assert_eq!(value("limits.upload"), "2097152", "all or none");
    assert!(!daemon.try_ctl(&["get", "limits.nothing"]).status.success());

    daemon.stop();
    daemon.start_again();
    let now = String::from_utf8(daemon.ctl(&["get", "limits.upload"]).stdout).expect("UTF-8");
    assert_eq!(now.trim(), "5", "what was set is forgotten");
    daemon.stop();
}
