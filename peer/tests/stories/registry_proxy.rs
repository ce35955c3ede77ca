//! A registry that is read through a proxy which keeps what it has, as nodes of a Dragonfly cluster have one.

use std::{fs, path::Path, time::Duration};

#[path = "../../../rafs/src/oci/tests/proxy_double.rs"]
#[allow(dead_code, reason = "shared with the tests of the registry client, which use more of it")]
pub(crate) mod proxy_double;

use self::proxy_double::{Mood, ProxyDouble};
use crate::support::{Daemon, Registry, assert_same, can_mount, metric, tree, wait};

fn assert_same_files(source: &Path, mount: &Path, folder: &str) {
    assert_same(&source.join(folder), &mount.join(folder));
}

/// The proxy is used, dies, comes back and lies, under one mount: no read fails, and no byte is wrong.
#[test]
fn a_node_reads_through_a_proxy_that_dies_and_lies() {
    if !can_mount("registry_proxy") {
        return;
    }
    let source = tree(61, 60, 100_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let mut proxy = ProxyDouble::start();
    let folder = tempfile::tempdir().expect("a folder");
    let settings = [
        format!("registry.proxy.url=\"{}\"", proxy.url()),
        format!("registry.proxy.ping_url=\"{}/ping\"", proxy.url()),
        "registry.proxy.check_interval=\"200ms\"".to_owned(),
        "registry.proxy.headers={ X-Dragonfly-Tag = \"shoal\" }".to_owned(),
        "read.ahead_bytes=0".to_owned(),
    ];
    let mut node = Daemon::start("node", folder.path(), &settings);
    node.mount(&registry.reference("1"));
    let mount = node.mountpoint();
    let read = |folder: &str| assert_same_files(source.path(), &mount, folder);
    read("d0");
    let asked = proxy.asked();
    assert!(asked.len() > 2, "manifest, bootstrap and chunks: {asked:?}");
    for asked in &asked {
        assert_eq!(asked.header("x-dragonfly-use-p2p"), Some("true"));
        assert_eq!(asked.header("x-dragonfly-tag"), Some("shoal"));
    }
    assert!(asked.iter().any(|asked| asked.line.contains("/blobs/") && asked.header("range").is_some()), "{asked:?}");
    let direct = registry.requests() - asked.len() as u64;
    assert_eq!(direct, 1, "the tag");
    assert_eq!(metric(&node, "shoal_registry_proxy_reads_total"), asked.len() as f64);
    assert_eq!(metric(&node, "shoal_registry_proxy_used"), 1.0);

    proxy.die();
    read("d1");
    assert_eq!(metric(&node, "shoal_registry_proxy_used"), 0.0);
    assert!(metric(&node, "shoal_registry_proxy_failed_reads_total") >= 1.0);

    // Whether it works again is found out because something is read.
    proxy.revive();
    let mut more = (20..40).map(|n| format!("d{}/f{n}", n / 10));
    wait("the proxy is used again", || {
        let name = more.next().expect("it takes fewer reads");
        assert_eq!(
            fs::read(mount.join(&name)).expect("a read"),
            fs::read(source.path().join(&name)).expect("a file")
        );
        std::thread::sleep(Duration::from_millis(200));
        metric(&node, "shoal_registry_proxy_used") == 1.0
    });
    let before = proxy.asked().len();
    read("d4");
    assert!(proxy.asked().len() > before);

    proxy.set(Mood::Lie);
    read("d5");
    let rejected = node.status()["total"]["rejected_chunks"].as_u64().expect("a figure");
    assert!(rejected >= 1, "{}", node.log());
    assert_eq!(metric(&node, "shoal_registry_proxy_used"), 0.0);
    assert_same(source.path(), &mount);
    node.stop();
}
