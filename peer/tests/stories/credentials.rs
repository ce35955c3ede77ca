//! Private registries: what opens them is in no log, at the most talkative level, whatever succeeds or fails.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use sha2::{Digest, Sha256};

#[path = "../../../rafs/src/oci/tests/registry_double.rs"]
#[allow(dead_code, reason = "shared with the tests of the registry client, which break it at every stage")]
pub(crate) mod registry_double;

use self::registry_double::{Auth, RegistryDouble};
use crate::support::{Built, Daemon, assert_same, can_mount, tree, wait};

pub(crate) const RIGHT: &str = "correct horse";
pub(crate) const WRONG: &str = "battery staple";
/// Base64 of `user:` and either of them.
const ENCODED: [&str; 2] = ["dXNlcjpjb3JyZWN0IGhvcnNl", "dXNlcjpiYXR0ZXJ5IHN0YXBsZQ"];
pub(crate) const BASIC: &str = "Basic dXNlcjpjb3JyZWN0IGhvcnNl";

pub(crate) fn registry(auth: Auth) -> RegistryDouble {
    RegistryDouble::start(auth, |bytes| hex::encode(Sha256::digest(bytes)))
}

/// An auth file that has this password for the registry.
fn authfile(folder: &Path, registry: &RegistryDouble, password: &str) -> PathBuf {
    let path = folder.join("auth.json");
    let text = format!(r#"{{"auths": {{"{}": {{"username": "user", "password": "{password}"}}}}}}"#, registry.host());
    // In one step, as those do it who replace such files while they are read.
    fs::write(folder.join("auth.new"), text).expect("a file");
    fs::rename(folder.join("auth.new"), &path).expect("a name");
    path
}

/// Runs `shoal image` and has it log all that it can.
fn image(arguments: &[&str], authfile: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.env("SHOAL_LOG", "trace").arg("image").args(arguments).arg("--authfile").arg(authfile);
    command.output().expect("shoal runs")
}

#[test]
fn what_opens_a_registry_is_in_no_log() {
    if !can_mount("credentials") {
        return;
    }
    let source = tree(71, 12, 30_000);
    let built = Built::new(source.path(), "zstd");
    let (bootstrap, blobs) = (built.bootstrap(), built.blobs());
    let (bootstrap, blobs) = (bootstrap.to_str().expect("UTF-8"), blobs.to_str().expect("UTF-8"));
    for auth in [Auth::Basic(BASIC), Auth::Token { basic: BASIC, uses: 4, polite: true }] {
        let (registry, folder) = (registry(auth.clone()), tempfile::tempdir().expect("a folder"));
        let (one, two) = (format!("{}/app:1", registry.host()), format!("{}/other:1", registry.host()));
        let mut logs = Vec::new();
        let mut run = |arguments: &[&str], authfile: &Path, succeeds: bool| {
            let output = image(arguments, authfile);
            let log = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert_eq!(output.status.success(), succeeds, "{arguments:?}: {log}");
            logs.push(log);
        };
        let push = ["push", "--bootstrap", bootstrap, "--blob-dir", blobs, &one];
        run(&push, &authfile(folder.path(), &registry, WRONG), false);
        let right = authfile(folder.path(), &registry, RIGHT);
        run(&push, &right, true);
        run(&["copy", &one, &two], &right, true);
        run(&["check", &two], &right, true);
        run(&["check", &two, "--json"], &authfile(folder.path(), &registry, WRONG), false);

        // A daemon, which finds out by itself that its auth file has been mended.
        let settings = [format!("registry.authfile={right:?}"), "SHOAL_LOG=trace".to_owned()];
        let mut node = Daemon::start("node", folder.path(), &settings);
        assert!(!node.try_mount(&one).status.success(), "{}", node.log());
        authfile(folder.path(), &registry, RIGHT);
        wait("the new file is read", || node.try_mount(&one).status.success());
        assert_same(source.path(), &node.mountpoint());
        node.stop();
        logs.push(node.log());

        assert!(logs.iter().any(|log| log.contains("TRACE")), "they do not say enough to show anything");
        let tokens = registry.tokens();
        assert!(tokens.is_empty() == matches!(auth, Auth::Basic(_)), "{tokens:?}");
        let secrets = [RIGHT, WRONG].into_iter().chain(ENCODED).chain(tokens.iter().map(String::as_str));
        for secret in secrets {
            for log in &logs {
                let line = log.lines().find(|line| line.contains(secret));
                assert_eq!(line, None, "{secret}");
            }
        }
    }
}
