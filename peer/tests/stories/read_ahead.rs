//! What lies behind what is read is fetched before it is asked for: in few requests where somebody goes on, and within a bound
//! where nobody does.

use std::fs;

use crate::{
    modes::{Mode, unmount_below},
    support::{Daemon, Registry, assert_same, noise, wait},
};

/// Files of one folder, and bytes of each, which do not compress.
const FILES: usize = 1500;
const LEN: usize = 3000;
/// A sixteenth of what the configuration has: the first window of a reader.
const FIRST: u64 = 64 << 10;

fn who_goes_on_needs_few_requests_and_who_stops_fetches_little(mode: Mode) {
    if !mode.is_possible(&format!("read_ahead ({mode:?})")) {
        return;
    }
    let source = tempfile::tempdir().expect("a temporary folder");
    for number in 0..FILES {
        let name = source.path().join(format!("{number:04}"));
        fs::write(name, noise(100_000 + number as u64, LEN)).expect("a file");
    }
    let mut registry = Registry::start();
    let encoded = registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let daemon = Daemon::start("node", folder.path(), &mode.settings());
    mode.mount(&daemon, &registry.reference("1"));

    let (sent, asked) = (registry.sent_bytes(), registry.requests());
    let present = || daemon.status()["mounts"][0]["present_pieces"].as_u64().expect("a figure");
    let read = fs::read(daemon.mountpoint().join("0000")).expect("a file");
    assert!(read == fs::read(source.path().join("0000")).expect("the source"));
    let window = FIRST / LEN as u64;
    wait("what lies behind it is here", || present() > window / 2);
    // A window and a half, and headers.
    let fetched = registry.sent_bytes() - sent;
    assert!(present() < window * 3 / 2 + 2 && fetched < FIRST * 2, "{} pieces, {fetched} bytes", present());

    assert_same(source.path(), &daemon.mountpoint());
    let (fetched, asked) = (registry.sent_bytes() - sent, registry.requests() - asked);
    assert!(fetched < encoded * 11 / 10, "{fetched} of {encoded} bytes");
    // Some for each window, of at most 256 pieces a request; not one for each file.
    assert!(asked < FILES as u64 / 20, "{asked} requests");
    drop(daemon);
    unmount_below(folder.path());
}

#[test]
fn over_fuse() {
    who_goes_on_needs_few_requests_and_who_stops_fetches_little(Mode::Fuse);
}

#[test]
fn natively_and_lazily() {
    who_goes_on_needs_few_requests_and_who_stops_fetches_little(Mode::Lazy);
}
