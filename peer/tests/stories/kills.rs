//! kill -9 of the daemon, of its keeper, of the keeper's holder, and of any two of them at once, at times that nobody has chosen, while a mount is read in every way.
//! No reader is ever given a wrong byte; what it is given instead is printed. Each time some files are read that nobody has read
//! before, from just before the kill and from just behind it on: of these nothing is on this machine, or a hole in a file.
//!
//! ```sh
//! SHOAL_SEED=1 make test        # the same times again
//! cargo test --release --test stories -- --ignored --nocapture kills::fifty    # or SHOAL_KILLS=200
//! ```

use std::{
    env, fs, thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use shoal_keeper::{held, holder_socket};

use crate::{
    kept_mounts::readers::{FRESH, Readers},
    lazy_mounts::kill_listener,
    modes::{Mode, unmount_below},
    support::{Daemon, Registry, assert_same, drop_caches, noise, tree, wait},
};

/// A file that the readers leave out, so that the image does not become complete by reading.
const LAST: &str = "last/one";

/// Files that are read for the first time before a kill, and behind it.
const FRESH_FILES: usize = 4;

/// Who is killed together: daemon, keeper, holder. All three at once is a story of its own, which ends otherwise.
const VICTIMS: [[bool; 3]; 6] = [
    [true, true, false],
    [true, false, false],
    [false, true, false],
    [false, false, true],
    [true, false, true],
    [false, true, true],
];

/// A number from the environment.
fn from_environment(key: &str) -> Option<u64> {
    env::var(key).ok()?.parse().ok()
}

fn kill_under_readers(mode: Mode, kills: usize) {
    if !mode.is_possible(&format!("daemon and keeper of a mount ({mode:?}) are killed")) {
        return;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    let seed = from_environment("SHOAL_SEED").unwrap_or(now);
    println!("{mode:?}: {kills} kills, SHOAL_SEED={seed}");
    let source = tree(51, 20, 300_000);
    fs::write(source.path().join("large"), noise(52, 5_000_000)).expect("a file");
    fs::create_dir(source.path().join("last")).expect("a folder");
    fs::write(source.path().join(LAST), noise(53, 1_000_000)).expect("a file");
    for (number, folder) in
        (0..kills).flat_map(|turn| [format!("{turn}-before"), format!("{turn}-behind")]).enumerate()
    {
        let folder = source.path().join(FRESH).join(folder);
        fs::create_dir_all(&folder).expect("a folder");
        for file in 0..FRESH_FILES {
            let content = noise((100 + number * FRESH_FILES + file) as u64, 60_000);
            fs::write(folder.join(format!("{file}")), content).expect("a file");
        }
    }
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &mode.settings_without_ahead());
    let mountpoint = mode.mount(&daemon, &registry.reference("1"));
    fs::remove_file(source.path().join(LAST)).expect("the file");
    let mut readers = Readers::start_with(source.path(), &mountpoint, mode != Mode::Native);

    let mut chance = noise(seed, 4 * kills).into_iter();
    let mut next = || chance.next().expect("four for each kill");
    for turn in 0..kills {
        readers.go_on();
        readers.begin(&format!("{turn}-before"));
        // Up to 65 ms, at any point of a read; half of the fresh ones take that long.
        thread::sleep(Duration::from_micros(u64::from(next()) << 8 | u64::from(next())));
        // Each as often; the first may be any.
        let [kills_daemon, kills_keeper, kills_holder] =
            VICTIMS[(turn as u64).wrapping_add(seed) as usize % VICTIMS.len()];
        if kills_daemon {
            daemon.kill();
        }
        if kills_keeper {
            kill_listener(&daemon.keeper_socket());
        }
        if kills_holder {
            kill_listener(&holder_socket(&daemon.keeper_socket()));
        }
        readers.begin(&format!("{turn}-behind"));
        drop_caches();
        if kills_daemon {
            thread::sleep(Duration::from_millis(u64::from(next())));
            daemon.start_again();
        }
        // A daemon that is killed before it has another keeper is the case of both; it shall be one of the daemon alone.
        wait("a keeper is there", || shoal_keeper::Client::connect(&daemon.keeper_socket()).is_ok());
        if mode == Mode::Lazy {
            wait("a holder has the group", || matches!(held(&daemon.keeper_socket()), Ok(Some(_))));
        }
        wait("it is mounted", || daemon.status()["mounts"].as_array().is_some_and(|mounts| mounts.len() == 1));
    }
    readers.go_on();
    readers.end();
    fs::write(source.path().join(LAST), noise(53, 1_000_000)).expect("a file");
    drop_caches();
    assert_same(source.path(), &mountpoint);
    assert!(!daemon.log().contains("may have shown zeros"), "{}", daemon.log());
    drop(daemon);
    unmount_below(folder.path());
}

#[test]
fn six_over_fuse() {
    kill_under_readers(Mode::Fuse, 6);
}

#[test]
fn six_natively_and_lazily() {
    kill_under_readers(Mode::Lazy, 6);
}

#[test]
fn six_natively() {
    kill_under_readers(Mode::Native, 6);
}

#[test]
#[ignore = "takes minutes"]
fn fifty_in_each_mode() {
    let kills = from_environment("SHOAL_KILLS").unwrap_or(50) as usize;
    [Mode::Fuse, Mode::Lazy, Mode::Native].into_iter().for_each(|mode| kill_under_readers(mode, kills));
}
