//! Registry credentials that a program knows: asked by commands and by the daemon, once for many reads, and in nobody's way.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
};

use tempfile::TempDir;

use crate::{
    credentials::{BASIC, RIGHT, WRONG, registry, registry_double::Auth},
    support::{Built, Daemon, assert_same, can_mount, tree, wait},
};

/// `docker-credential-stories`, which notes what it is asked for, waits while it is told to, and says what it is told to.
struct Helper {
    folder: TempDir,
}

impl Helper {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (here, script) = (folder.path().display(), folder.path().join("script"));
        let text = format!(
            "#!/bin/sh\nread registry\necho \"$1 $registry\" >> {here}/asked\n\
             while [ -e {here}/wait ]; do sleep 0.05; done\ncat {here}/answer\n"
        );
        fs::write(&script, text).expect("a script");
        // By another process: what this one has open for writing cannot be run.
        let program = folder.path().join("docker-credential-stories");
        let copied = Command::new("install").arg("-m755").args([&script, &program]).status().expect("install runs");
        assert!(copied.success());
        Self { folder }
    }

    fn says(&self, answer: &str) {
        fs::write(self.folder.path().join("answer"), answer).expect("an answer");
    }

    fn knows(&self, password: &str) {
        self.says(&format!(r#"{{"ServerURL": "", "Username": "user", "Secret": "{password}"}}"#));
    }

    fn hangs(&self, hangs: bool) {
        let wait = self.folder.path().join("wait");
        if hangs { fs::write(wait, "").expect("a file") } else { fs::remove_file(wait).expect("it was there") }
    }

    /// What it was asked so far, a line for each time.
    fn asked(&self) -> String {
        fs::read_to_string(self.folder.path().join("asked")).unwrap_or_default()
    }

    /// Where it is found, before all that was found before.
    fn path(&self) -> String {
        format!("{}:{}", self.folder.path().display(), std::env::var("PATH").unwrap_or_default())
    }

    /// An auth file with this content.
    fn authfile(&self, text: &str) -> PathBuf {
        let path = self.folder.path().join("auth.json");
        fs::write(&path, text).expect("a file");
        path
    }

    fn image(&self, arguments: &[&str], authfile: &Path) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command.env("PATH", self.path()).env("SHOAL_LOG", "trace").arg("image").args(arguments);
        command.arg("--authfile").arg(authfile).output().expect("shoal runs")
    }
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), output.stderr.as_slice()].concat()).into_owned()
}

#[test]
fn a_credential_helper_opens_a_registry() {
    if !can_mount("credential helpers") {
        return;
    }
    let source = tree(73, 12, 30_000);
    let built = Built::new(source.path(), "zstd");
    let (bootstrap, blobs) = (built.bootstrap(), built.blobs());
    let (bootstrap, blobs) = (bootstrap.to_str().expect("UTF-8"), blobs.to_str().expect("UTF-8"));
    for auth in [Auth::Basic(BASIC), Auth::Token { basic: BASIC, uses: 1000, polite: true }] {
        let (registry, helper, folder) = (registry(auth), Helper::new(), tempfile::tempdir().expect("a folder"));
        let host = registry.host();
        let reference = format!("{host}/app:1");
        let asks = |count: usize| format!("get {host}\n").repeat(count);
        let named = helper.authfile(&format!(r#"{{"credHelpers": {{"{host}": "stories"}}}}"#));
        let push = ["push", "--bootstrap", bootstrap, "--blob-dir", blobs, &reference];

        // One that fails is named, and its words are not repeated.
        helper.says(WRONG);
        let failed = helper.image(&push, &named);
        let log = words(&failed);
        assert!(!failed.status.success() && log.contains("\"stories\"") && !log.contains(WRONG), "{log}");
        helper.knows(WRONG);
        let refused = helper.image(&push, &named);
        assert!(!refused.status.success() && words(&refused).contains("refused"), "{}", words(&refused));
        helper.knows(RIGHT);
        let before = helper.asked();
        let pushed = helper.image(&push, &named);
        assert!(pushed.status.success() && !words(&pushed).contains(RIGHT), "{}", words(&pushed));
        assert_eq!(helper.asked(), before.clone() + &asks(1), "all of a push asks once");

        // A daemon: nothing but who reads that registry waits for it, and a store of all registries is asked once as well.
        let store = helper.authfile(r#"{"auths": {}, "credsStore": "stories"}"#);
        let path = format!("PATH={}", helper.path());
        let settings = [format!("registry.authfile={store:?}"), path, "SHOAL_LOG=trace".to_owned()];
        let mut node = Daemon::start("node", folder.path(), &settings);
        helper.hangs(true);
        let before = helper.asked();
        thread::scope(|scope| {
            let mounting = scope.spawn(|| node.try_mount(&reference));
            wait("the helper is asked", || helper.asked() != before);
            assert_eq!(node.status()["mounts"].as_array().map(Vec::len), Some(0), "the daemon answers");
            assert!(!mounting.is_finished());
            helper.hangs(false);
            let mounted = mounting.join().expect("it ends");
            assert!(mounted.status.success(), "{}\n{}", words(&mounted), node.log());
        });
        assert_same(source.path(), &node.mountpoint());
        assert_eq!(helper.asked(), before + &asks(1), "all reads of a mount ask once");
        node.stop();
        for secret in [RIGHT, &BASIC["Basic ".len()..]] {
            assert!(!node.log().contains(secret), "{secret}");
        }
    }
}
