//! Against real keepers, in threads, and connections that are ends of a socket: it lives as long as somebody has it open.

use std::{
    path::Path,
    thread::{self, JoinHandle},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use shoal_keeper::{Ended, Keeper};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

fn options(mode: KeeperMode, folder: &Path) -> HandoverOptions {
    HandoverOptions { mode, socket: folder.join("sock"), patience: PATIENCE, log: folder.join("log") }
}

fn keeper(folder: &Path) -> JoinHandle<Ended> {
    let keeper = Keeper::bind(&folder.join("sock"), PATIENCE).unwrap();
    thread::spawn(move || keeper.run().unwrap())
}

/// What another daemon would see of the keeper.
fn kept(folder: &Path) -> Vec<String> {
    let mut client = Client::connect(&folder.join("sock")).unwrap();
    client.kept().unwrap().into_iter().map(|(mount, _)| mount.device).collect()
}

fn end(folder: &Path, keeper: JoinHandle<Ended>) {
    release(Client::connect(&folder.join("sock")).unwrap()).unwrap();
    assert_eq!(keeper.join().unwrap(), Ended::Stopped);
}

/// A mount that is nowhere.
fn mount(device: &str) -> KeptMount {
    let (connection, _) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let agreement = r#"{"version":[7,41],"max_readahead":131072,"flags":0,"resend":true}"#;
    let session = format!(r#"{{"version":1,"bootstrap":"00","agreement":{agreement}}}"#);
    let session = serde_json::from_str(&session).unwrap();
    KeptMount { device: device.into(), mountpoint: "/nowhere".into(), connection, session }
}

#[test]
fn a_keeper_that_comes_later_gets_everything_and_the_next_one_again() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let handover = Handover::open(options(KeeperMode::Auto, folder)).unwrap();
    handover.keep(mount("0:7"));
    assert!(!handover.holds("0:7"));

    let first = keeper(folder);
    handover.check();
    handover.keep(mount("0:8"));
    assert!(handover.holds("0:7") && handover.holds("0:8") && !handover.holds("0:9"));
    assert_eq!(kept(folder), ["0:7", "0:8"]);
    handover.forget("0:8");
    assert_eq!((kept(folder), handover.holds("0:8")), (vec!["0:7".to_owned()], false));

    end(folder, first);
    assert!(!handover.holds("0:7"));
    let second = keeper(folder);
    handover.check();
    assert!(handover.holds("0:7"));
    assert_eq!(kept(folder), ["0:7"]);

    handover.close();
    handover.check();
    assert!(!handover.holds("0:7"), "it looks for no keeper once it is closed");
    assert_eq!(kept(folder), ["0:7"], "and leaves what is kept");
    end(folder, second);
}

#[test]
fn what_is_not_mounted_or_not_understood_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let keeper = keeper(folder);
    let handover = Handover::open(options(KeeperMode::Auto, folder)).unwrap();
    handover.keep(mount("0:7"));
    let mut stranger = Client::connect(&folder.join("sock")).unwrap();
    let strange = Mount { device: "0:8".into(), mountpoint: "/".into(), record: b"{}".to_vec() };
    stranger.keep(strange, mount("0:8").connection.as_fd()).unwrap();
    assert_eq!(kept(folder), ["0:7", "0:8"]);
    assert!(handover.kept().is_empty());
    assert!(kept(folder).is_empty());
    drop(stranger);
    end(folder, keeper);
}

#[test]
fn switched_off_lets_go_of_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    assert!(Handover::open(options(KeeperMode::Off, folder)).is_none());
    let keeper = keeper(folder);
    let earlier = Handover::open(options(KeeperMode::Auto, folder)).unwrap();
    earlier.keep(mount("0:7"));
    assert!(Handover::open(options(KeeperMode::Off, folder)).is_none());
    assert_eq!(keeper.join().unwrap(), Ended::Stopped);
    assert!(!earlier.holds("0:7"));
}
