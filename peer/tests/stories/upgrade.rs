//! Another version of the daemon takes the place of the one that runs, while readers go on. None of them sees an error or a wrong
//! byte, whatever is wrong with the new program.

use std::{
    fs,
    io::Write,
    net::{SocketAddr, TcpListener},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    kept_mounts::readers::Readers,
    mirror::client::get,
    registry_server::free_address,
    support::{Daemon, Registry, assert_same, can_mount, drop_caches, json, tree, wait},
};

/// A daemon of a program that lies in a folder of its own, with an image mounted.
struct Bed {
    daemon: Daemon,
    _registry: Registry,
    source: TempDir,
    folder: TempDir,
}

impl Bed {
    fn new(test: &str, settings: &[&str]) -> Option<Self> {
        if !can_mount(test) {
            return None;
        }
        let source = tree(17, 20, 300_000);
        let mut registry = Registry::start();
        registry.publish(source.path(), "1");
        registry.switch_on();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let authfile = folder.path().join("config.json");
        fs::write(&authfile, "{}").expect("a file");
        let authfile = format!("registry.authfile={authfile:?}");
        let settings = [settings, &["mounts.keeper_patience=60s", &authfile]].concat();
        let settings: Vec<_> = settings.into_iter().map(str::to_owned).collect();
        let daemon = Daemon::start("node", folder.path(), &settings);
        daemon.mount(&registry.reference("1"));
        Some(Self { daemon, _registry: registry, source, folder })
    }

    fn readers(&self) -> Readers {
        Readers::start(self.source.path(), &self.daemon.mountpoint())
    }

    fn device(&self) -> u64 {
        fs::metadata(self.daemon.mountpoint()).expect("the mount").dev()
    }

    /// A program that is the daemon's, under another name.
    fn copy(&self, name: &str) -> PathBuf {
        self.copy_of(env!("CARGO_BIN_EXE_shoal").as_ref(), name)
    }

    /// Made by another process: what this one has open for writing, any of its children may have for a moment, too, and then it
    /// cannot be run.
    fn copy_of(&self, program: &Path, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        let copied = Command::new("cp").arg(program).arg(&path).status().expect("cp runs");
        assert!(copied.success());
        path
    }

    /// A shell script, in which `$SHOAL` is the daemon's program.
    fn script(&self, name: &str, mode: &str, text: &str) -> PathBuf {
        self.script_for("/bin/sh".as_ref(), name, mode, text)
    }

    /// Also made by another process.
    fn script_for(&self, shell: &Path, name: &str, mode: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        let mut install = Command::new("install");
        install.args(["-m", mode, "/dev/stdin"]).arg(&path).stdin(Stdio::piped());
        let mut install = install.spawn().expect("install runs");
        let text = format!("#!{}\nSHOAL={}\n{text}\n", shell.display(), env!("CARGO_BIN_EXE_shoal"));
        install.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("a script");
        assert!(install.wait().expect("it ends").success());
        path
    }

    fn upgrade(&self, arguments: &[&str]) -> Value {
        json(&self.daemon.ctl(&[&["upgrade", "--json"], arguments].concat()))
    }

    fn try_upgrade(&self, binary: &Path) -> Output {
        self.daemon.try_ctl(&["upgrade", "--binary", binary.to_str().expect("UTF-8")])
    }

    /// Why this program does not take the daemon's place.
    fn refuses(&self, binary: &Path) -> String {
        let output = self.try_upgrade(binary);
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).expect("text")
    }

    fn instance(&self) -> String {
        self.daemon.status()["instance"].as_str().expect("a text").to_owned()
    }

    /// The program that the daemon runs.
    fn program(&self) -> PathBuf {
        fs::read_link(format!("/proc/{}/exe", self.daemon.pid())).expect("it runs")
    }

    fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.daemon.pid())).expect("it runs").count()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn readers_do_not_notice_upgrades() {
    let Some(bed) = Bed::new("readers go on over upgrades", &["mounts.keeper=on"]) else { return };
    let (device, pid, mut readers) = (bed.device(), bed.daemon.pid(), bed.readers());
    let [second, third] = ["second", "third"].map(|name| bed.copy(name));
    let mut files = Vec::new();
    for binary in [Some(&second), Some(&third), None, Some(&second)] {
        readers.go_on();
        drop_caches();
        let instance = bed.instance();
        let upgraded = match binary {
            Some(binary) => bed.upgrade(&["--binary", text(binary)]),
            None => bed.upgrade(&[]),
        };
        assert_eq!(
            (&upgraded["old_pid"], &upgraded["new_pid"]),
            (&pid.into(), &pid.into()),
            "it is the same process"
        );
        assert_eq!(upgraded["new_version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(upgraded["mounts"], 1);
        assert_ne!(bed.instance(), instance);
        let expected = binary.unwrap_or(&third);
        assert_eq!(&bed.program(), expected);
        files.push(bed.open_files());
    }
    readers.go_on();
    assert_eq!(bed.device(), device, "it is the same mount all along");
    readers.end();
    assert_same(bed.source.path(), &bed.daemon.mountpoint());
    // Connections come and go, but what is left is closed.
    assert!(files.last() < files.first().map(|first| first + 16).as_ref(), "open files: {files:?}");
    // As a package replaces it: what is there now is run.
    fs::rename(bed.copy("fourth"), &second).expect("a rename");
    assert_eq!(bed.upgrade(&[])["binary"], text(&second));
    assert_eq!(bed.program(), second);
    assert_eq!(bed.device(), device);
}

#[test]
fn a_program_that_cannot_take_its_place_leaves_the_daemon_as_it_is() {
    let Some(bed) = Bed::new("programs that cannot be upgraded to", &["mounts.keeper=on"]) else { return };
    let (instance, mut readers) = (bed.instance(), bed.readers());
    let none = bed.folder.path().join("none");
    let mut said = vec![bed.refuses(&none)];
    for (name, mode, script) in [
        ("closed", "644", "exit 0"),
        ("open", "777", "exit 0"),
        ("broken", "755", "echo it is broken >&2; exit 1"),
        ("silent", "755", "exit 0"),
        ("other", "755", r#"echo '{"version":"9","upgrade":[1,2],"keeper":[9],"sessions":[1],"index":[1]}'"#),
        ("replaced", "755", r#"touch -d @1 "$0"; exec "$SHOAL" "$@""#),
    ] {
        said.push(bed.refuses(&bed.script(name, mode, script)));
    }
    let reasons = [
        "No such file",
        "not executable",
        "others than root and the daemon's user may have written it",
        "refuses the present configuration: it is broken",
        "does not say what it understands",
        "(version 9) cannot go on",
        "replaced while it was examined",
    ];
    for (said, reason) in said.iter().zip(reasons) {
        assert!(said.contains(reason), "{said} instead of {reason}");
    }
    // The configuration of the daemon that runs would not start it again.
    fs::write(bed.folder.path().join("config.json"), "{ no JSON").expect("a file");
    let refused = bed.refuses(&bed.copy("fine"));
    assert!(refused.contains("refuses the present configuration") && refused.contains("config.json"), "{refused}");
    readers.go_on();
    assert_eq!(bed.instance(), instance);
    readers.end();
    fs::write(bed.folder.path().join("config.json"), "{}").expect("a file");
    bed.upgrade(&[]);
    assert_ne!(bed.instance(), instance);
}

#[test]
fn a_program_that_does_not_start_makes_way_for_the_one_before() {
    let Some(bed) = Bed::new("a new version that does not start", &["mounts.keeper=on"]) else { return };
    let (device, pid, mut readers) = (bed.device(), bed.daemon.pid(), bed.readers());
    let own = bed.program();
    let occupied = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = occupied.local_addr().expect("its address");
    // It does not start when it serves the mounts already.
    let starts = format!(
        r#"case "$*" in *--check-config*) exec "$SHOAL" "$@";; esac; exec "$SHOAL" "$@" --set http.listen={address}"#
    );
    let failing = bed.script("failing", "755", &starts);
    // It does not even run: what would run it has gone since it was examined.
    let shell = bed.copy_of("/bin/sh".as_ref(), "sh");
    let once = format!(r#"rm -f {}; exec "$SHOAL" "$@""#, shell.display());
    let vanishing = bed.script_for(&shell, "vanishing", "755", &once);
    for (binary, reason) in [(&failing, "does not start"), (&vanishing, "does not run")] {
        readers.go_on();
        drop_caches();
        let instance = bed.instance();
        let said = bed.refuses(binary);
        assert!(said.contains("serves again") && said.contains(reason), "{said}");
        assert_eq!((bed.program(), bed.daemon.pid()), (own.clone(), pid));
        assert_ne!(bed.instance(), instance, "it has started once more");
        let status = bed.daemon.status();
        assert!(status["upgrade_failure"].as_str().expect("a text").contains(reason), "{status}");
        assert_eq!(bed.device(), device);
    }
    readers.go_on();
    bed.upgrade(&[]);
    assert_eq!(bed.daemon.status()["upgrade_failure"], "");
    readers.go_on();
    assert_eq!(bed.device(), device);
    readers.end();
}

#[test]
fn a_program_that_is_killed_while_it_starts_leaves_the_mounts_to_whoever_is_started_next() {
    let Some(mut bed) = Bed::new("a new version that is killed", &["mounts.keeper=on"]) else { return };
    let (device, mut readers) = (bed.device(), bed.readers());
    // With signal 9 nothing of the process can go on: who supervises it starts the daemon again. Before it has opened anything,
    // and at times that are before, in and behind the moment in which it takes the mounts over.
    for delay in ["0", "0.1", "0.2", "0.4"] {
        readers.go_on();
        drop_caches();
        let kill = format!(
            r#"case "$*" in *--check-config*) exec "$SHOAL" "$@";; esac
            if [ {delay} = 0 ]; then kill -9 $$; fi
            (sleep {delay}; kill -9 $$) & exec "$SHOAL" "$@""#
        );
        let binary = bed.script(&format!("killed-{delay}"), "755", &kill);
        let asked = bed.daemon.try_ctl(&["upgrade", "--wait", "1s", "--binary", text(&binary)]);
        println!("killed after {delay} s: {}", String::from_utf8_lossy(&asked.stderr).trim());
        bed.daemon.start_again();
        assert_eq!(bed.device(), device, "it is the same mount all along");
    }
    readers.go_on();
    bed.upgrade(&[]);
    readers.go_on();
    assert_eq!(bed.device(), device);
    readers.end();
    assert_same(bed.source.path(), &bed.daemon.mountpoint());
}

#[test]
fn a_mount_without_a_keeper_gets_one_or_is_not_risked() {
    // There is none, but one is used where there is.
    let Some(bed) = Bed::new("upgrade without a keeper", &["mounts.keeper=auto"]) else { return };
    let (device, mut readers) = (bed.device(), bed.readers());
    readers.go_on();
    // A supervisor may end what this daemon has started.
    let refused = bed.daemon.try_ctl(&["upgrade", "--exit"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains("1 mounts would not outlive the daemon"), "{said}");
    bed.upgrade(&[]);
    readers.go_on();
    assert_eq!(bed.device(), device);
    readers.end();
}

#[test]
fn a_daemon_that_is_asked_to_end_does_and_the_next_one_goes_on() {
    let settings = ["mounts.keeper=on", "mounts.on_stop=unmount"];
    let Some(mut bed) = Bed::new("upgrade by a supervisor", &settings) else { return };
    let (device, instance, mut readers) = (bed.device(), bed.instance(), bed.readers());
    readers.go_on();
    let mut asking = Command::new(env!("CARGO_BIN_EXE_shoal"));
    asking.arg("ctl").arg("--socket").arg(bed.daemon.socket()).args(["upgrade", "--exit", "--json"]);
    let asking = asking.stdout(Stdio::piped()).spawn().expect("shoal ctl runs");
    bed.daemon.start_again();
    let upgraded = asking.wait_with_output().expect("it ends");
    assert!(upgraded.status.success());
    assert_eq!(json(&upgraded)["new_pid"], bed.daemon.pid());
    assert_ne!(bed.instance(), instance);
    readers.go_on();
    assert_eq!(bed.device(), device, "it was not unmounted");
    readers.end();

    // Nobody starts another one.
    let gone = bed.daemon.try_ctl(&["upgrade", "--exit", "--wait", "100ms"]);
    let said = String::from_utf8_lossy(&gone.stderr);
    assert!(gone.status.code() == Some(1) && said.contains("no new daemon answers"), "{said}");
    bed.daemon.start_again();
    assert_eq!(bed.device(), device);
}

#[test]
fn whoever_calls_during_an_upgrade_waits_for_the_new_daemon() {
    let Some(bed) = Bed::new("calls during upgrades", &["mounts.keeper=on"]) else { return };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let calls = scope.spawn(|| {
            let mut answered = 0;
            while !done.load(Relaxed) {
                let output = bed.daemon.try_ctl(&["status"]);
                let said = String::from_utf8_lossy(&output.stderr);
                // The old daemon may cut a connection off that it has taken; but somebody always listens.
                assert!(!said.contains("refused") && !said.contains("No such file"), "{said}");
                answered += usize::from(output.status.success());
            }
            answered
        });
        for _ in 0..3 {
            bed.upgrade(&[]);
        }
        done.store(true, Relaxed);
        assert!(calls.join().expect("none was refused") > 3);
    });
    // Two at once would not know of each other.
    let upgrades: Vec<_> = thread::scope(|scope| {
        let both = [0, 1].map(|_| scope.spawn(|| bed.daemon.try_ctl(&["upgrade"])));
        both.into_iter().map(|one| one.join().expect("it ends")).collect()
    });
    assert!(upgrades.iter().any(|one| one.status.success()));
    wait("the daemon answers", || bed.daemon.try_ctl(&["status"]).status.success());
    assert_same(bed.source.path(), &bed.daemon.mountpoint());
}

#[test]
fn a_configuration_is_checked_without_a_daemon() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let check = |settings: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command.args(["daemon", "--check-config", "--data-dir"]).arg(&data);
        command.args(settings.iter().flat_map(|setting| ["--set", setting]));
        command.output().expect("shoal runs")
    };
    assert!(check(&[]).status.success());
    assert!(!data.exists(), "nothing is made");
    for (setting, part) in [
        ("capacity=0", "capacity"),
        ("registry.authfile=/nowhere", "/nowhere"),
        ("control.listen=[\"nowhere\"]", "multiaddress"),
        ("cluster.public_key=no-key", "key"),
        ("data.listen=0.0.0.0:1", "loopback"),
    ] {
        let output = check(&[setting]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(part), "{setting}: {said}");
    }
}

#[test]
fn who_asks_the_mirror_during_an_upgrade_waits_for_the_next_daemon() {
    let mirror: SocketAddr = free_address();
    let listen = format!("mirror.listen=\"{mirror}\"");
    let Some(bed) = Bed::new("the mirror over upgrades", &["mounts.keeper=on", &listen]) else { return };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut asked = 0;
            while !done.load(Relaxed) {
                // It would panic if nobody listened.
                assert_eq!(get(mirror, "/v2/", &[]).status, 200);
                asked += 1;
            }
            asked
        });
        for _ in 0..3 {
            bed.upgrade(&[]);
        }
        done.store(true, Relaxed);
        assert!(asking.join().expect("each is answered") > 3);
    });
}
