//! Ordinary images are pulled through the nodes' mirrors, as `hosts.toml` says, and through the registry where there is none.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
};

use tempfile::TempDir;

use crate::{
    bed::Bed,
    image::Layers,
    registry_server::relay_that_stalls,
    support::{Daemon, metric, shoal},
};

/// Nodes that pull, one after the other: there is one containerd.
const NODES: usize = 4;

fn mirror_settings() -> (SocketAddr, String) {
    // Free now; a race for it is lost by one of us, and then the test says so.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    (address, format!("mirror.listen=\"{address}\""))
}

/// Has containerd ask `mirror` before the registry of `image`.
fn configure(image: &str, mirror: SocketAddr) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let host = image.split('/').next().expect("a host");
    let mirror = mirror.to_string();
    let arguments = ["mirror", "configure", "--registry", host, "--mirror", &mirror, "--certs-dir"];
    shoal(&arguments, &[folder.path()]);
    folder
}

fn pull(bed: &Bed, hosts: &Path, image: &str) {
    let hosts = hosts.to_str().expect("UTF-8");
    bed.ctr(&["images", "pull", "--hosts-dir", hosts, "--snapshotter", "native", image]);
}

#[test]
fn nodes_pull_an_ordinary_image_and_the_registry_sends_it_once() {
    let Some(bed) = Bed::start("mirror") else { return };
    Layers::new().push_ordinary(&bed.registry.layout(), "plain");
    let image = bed.registry.reference("plain");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let seed = Daemon::start("seed", folder.path(), &["role=seed".into()]);
    let node = |n| {
        let (address, setting) = mirror_settings();
        (Daemon::start(&format!("puller{n}"), folder.path(), &[seed.join(), setting]), address)
    };
    let nodes: Vec<_> = (0..NODES).map(node).collect();
    nodes.iter().for_each(|(node, _)| node.wait_for_home());

    let before = bed.registry.sent_bytes();
    for (node, mirror) in &nodes {
        let hosts = configure(&image, *mirror);
        pull(&bed, hosts.path(), &image);
        let from_mirror = metric(node, "shoal_mirror_sent_bytes_total");
        assert!(from_mirror > crate::image::DATA_BYTES as f64, "{from_mirror} bytes: {}", node.log());
        // Or the next pull finds all of it here.
        bed.remove_image(&image);
    }
    let sent = bed.registry.sent_bytes() - before;
    let content = metric(&nodes[0].0, "shoal_mirror_sent_bytes_total");
    assert!(sent as f64 <= content * 1.1, "the registry sent {sent} bytes of an image of {content}");
}

#[test]
fn without_its_mirror_containerd_pulls_from_the_registry() {
    let (mirror, setting) = mirror_settings();
    let Some(mut bed) = Bed::start_with("mirror", &[setting]) else { return };
    Layers::new().push_ordinary(&bed.registry.layout(), "plain");
    let image = bed.registry.reference("plain");
    let hosts = configure(&image, mirror);

    pull(&bed, hosts.path(), &image);
    assert!(metric(&bed.daemon, "shoal_mirror_sent_bytes_total") > crate::image::DATA_BYTES as f64);
    bed.remove_image(&image);

    bed.daemon.stop();
    let sent = bed.registry.sent_bytes();
    pull(&bed, hosts.path(), &image);
    assert!(bed.registry.sent_bytes() - sent > crate::image::DATA_BYTES as u64);
    bed.daemon.start_again();
}

/// The registry gives containerd what it asks for, and lets the daemon wait.
#[test]
fn past_a_mirror_that_is_slow_containerd_pulls_from_the_registry() {
    let (mirror, setting) = mirror_settings();
    let Some(bed) = Bed::start_with("slow mirror", &[setting, "mirror.patience=1s".into()]) else { return };
    Layers::new().push_ordinary(&bed.registry.layout(), "plain");
    let image = bed.registry.reference("plain");
    let (server, name) = image.split_once('/').expect("a host");
    let image = format!("{}/{name}", relay_that_stalls(server, "user-agent: shoal/"));
    let hosts = configure(&image, mirror);
    pull(&bed, hosts.path(), &image);
    assert!(metric(&bed.daemon, "shoal_mirror_requests_total{status=\"504\"}") >= 1.0, "{}", bed.daemon.log());
    assert!(bed.registry.sent_bytes() > crate::image::DATA_BYTES as u64);
}
