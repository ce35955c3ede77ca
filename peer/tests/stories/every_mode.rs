//! What must be true in each way of mounting: a tree is what it was made of, and no reader is given a wrong byte while what it
//! reads comes late, wrong, or not at all.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::fs::XattrFlags;

use crate::{
    kept_mounts::readers::Readers,
    modes::{Mode, unmount_below},
    support::{Daemon, Registry, assert_same, drop_caches, noise, tree},
    wrong_bytes::{Liar, impostor},
};

mod ill_registry;

use ill_registry::{Health, IllRegistry};

/// Sizes around blocks and chunks, every kind of file, links, names, owners, times, attributes.
fn kinds(root: &Path) {
    let at = |name: &str| root.join(name);
    let run = |program: &str, arguments: &[&str]| {
        let status = Command::new(program).current_dir(root).args(arguments).status().expect("it runs");
        assert!(status.success(), "{program} {arguments:?}");
    };
    for len in [0, 1, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 17] {
        fs::write(at(&format!("noise-{len}")), noise(len as u64, len)).expect("a file");
    }
    File::create(at("sparse")).and_then(|file| file.set_len(3 << 20)).expect("a file");
    fs::create_dir_all(at("crowd/empty")).expect("a folder");
    for number in 0..1500 {
        fs::write(at(&format!("crowd/{number}")), format!("{}", number % 7)).expect("a file");
    }
    for name in ["new\nline", "sp ace", "ümlaut", "-", ".hidden", &"n".repeat(255)] {
        fs::write(at(name), name).expect("a file");
    }
    run("ln", &["-s", "crowd/1", "link"]);
    run("ln", &["-s", &"x".repeat(3000), "long-link"]);
    run("ln", &["noise-4097", "hard"]);
    run("mkfifo", &["fifo"]);
    run("mknod", &["device", "b", "7", "300"]);
    run("chown", &["-h", "1234:4321", "noise-1", "link", "crowd"]);
    run("chmod", &["4751", "noise-1"]);
    run("touch", &["-h", "-d", "1960-02-03 04:05:06.7", "noise-0", "link"]);
    let value = noise(9, 500);
    rustix::fs::setxattr(at("noise-1"), "user.binary", &value, XattrFlags::CREATE).expect("an attribute");
}

/// What find(1) sees of everything below a folder, and the attribute of one file.
fn seen(root: &Path) -> String {
    let output =
        Command::new("find").arg(root).args(["-printf", "%P %y %m %U %G %T@ %l\\0"]).output().expect("find runs");
    assert!(output.status.success());
    let mut lines: Vec<_> = output.stdout.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    lines.sort();
    let mut value = vec![0; 1000];
    let len = rustix::fs::getxattr(root.join("noise-1"), "user.binary", &mut value[..]).expect("an attribute");
    format!("{}\n{:?}", lines.join("\n"), &value[..len])
}

fn a_tree_is_what_it_was_made_of(mode: Mode) {
    if !mode.is_possible(&format!("a tree of all kinds ({mode:?})")) {
        return;
    }
    let source = tempfile::tempdir().expect("a temporary folder");
    kinds(source.path());
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let daemon = Daemon::start("node", folder.path(), &mode.settings());
    let mountpoint = mode.mount(&daemon, &registry.reference("1"));
    for _ in 0..2 {
        assert_eq!(seen(source.path()), seen(&mountpoint));
        assert_same(source.path(), &mountpoint);
        let mut diff = Command::new("diff");
        diff.args(["-r", "--no-dereference", "-x", "device", "-x", "fifo"]);
        let compared = diff.args([source.path(), &mountpoint]).output().expect("diff runs");
        assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
        drop_caches();
    }
    drop(daemon);
    unmount_below(folder.path());
}

fn no_wrong_byte_whatever_comes(mode: Mode) {
    if !mode.is_possible(&format!("chunks come late, wrong or not at all ({mode:?})")) {
        return;
    }
    let source = tree(81, 60, 400_000);
    fs::write(source.path().join("large"), noise(82, 12_000_000)).expect("a file");
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let honest = registry.reference("1");
    let (address, name) = honest.split_once('/').expect("a host and a name");
    let ill = IllRegistry::start(address.parse().expect("an address"));
    // And a seed peer that gives nothing but wrong bytes, until it is banned.
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (data, control, liar) = runtime.block_on(impostor(Arc::new(Liar)));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut settings = mode.settings_without_ahead();
    settings.extend([
        format!("control.bootstrap_peers=[\"{liar}\"]"),
        "read.deadline=3s".into(),
        "limits.download=8 MiB".into(),
    ]);
    let daemon = Daemon::start("node", folder.path(), &settings);
    daemon.wait_for_home();
    let reference = format!("{}/{name}", ill.address());
    let mountpoint = match mode {
        // What a complete mount is made of comes before it is there. It takes several attempts.
        Mode::Native => {
            ill.set(Health::Ill);
            let mut attempts = (0..20).map(|_| daemon.try_ctl(&["prefetch", &reference]));
            let came = attempts.any(|attempt| attempt.status.success());
            ill.set(Health::Well);
            println!("Native: all of it came while the registry was ill: {came}");
            mode.mount(&daemon, &reference)
        }
        Mode::Fuse | Mode::Lazy => mode.mount(&daemon, &reference),
    };
    let mut readers = Readers::start_with(source.path(), &mountpoint, mode != Mode::Native);
    for round in 0..5 {
        // Once longer than a read may take, so that readers are told.
        let (health, time) = if round == 1 { (Health::Down, 7000) } else { (Health::Ill, 1000) };
        ill.set(health);
        thread::sleep(Duration::from_millis(time));
        ill.set(Health::Well);
        readers.go_on();
        drop_caches();
    }
    readers.end();
    let faults = ill.faults();
    println!("{mode:?}: {faults:?}");
    assert!(faults.late > 0 && faults.failed > 0 && faults.wrong > 0, "{faults:?}");
    assert_same(source.path(), &mountpoint);
    let rejected = daemon.status()["total"]["rejected_chunks"].as_u64().expect("a figure");
    assert!(rejected > 0, "{}", daemon.log());
    drop(daemon);
    unmount_below(folder.path());
    runtime.block_on(async {
        control.stop().await;
        data.stop().await;
    });
}

#[test]
fn a_tree_over_fuse() {
    a_tree_is_what_it_was_made_of(Mode::Fuse);
}

#[test]
fn a_tree_natively_and_lazily() {
    a_tree_is_what_it_was_made_of(Mode::Lazy);
}

#[test]
fn a_tree_natively() {
    a_tree_is_what_it_was_made_of(Mode::Native);
}

#[test]
fn no_wrong_byte_over_fuse() {
    no_wrong_byte_whatever_comes(Mode::Fuse);
}

#[test]
fn no_wrong_byte_natively_and_lazily() {
    no_wrong_byte_whatever_comes(Mode::Lazy);
}

#[test]
fn no_wrong_byte_natively() {
    no_wrong_byte_whatever_comes(Mode::Native);
}
