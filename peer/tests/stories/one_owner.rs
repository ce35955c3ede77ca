//! Two daemons, one data directory: the second refuses to start and says who holds it.

use std::process::Command;

use crate::support::Daemon;

#[test]
fn the_second_daemon_says_who_holds_the_directory() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let daemon = Daemon::start("first", folder.path(), &[]);
    let mut second = Command::new(env!("CARGO_BIN_EXE_shoal"));
    second.arg("daemon").arg("--data-dir").arg(folder.path().join("first/data"));
    second.arg("--socket").arg(folder.path().join("second.sock"));
    let output = second.output().expect("shoal runs");
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("in use by") && error.contains(&daemon.pid().to_string()), "{error}");
    // The first is none the worse for it.
    assert_eq!(daemon.status()["role"], "node");
}
