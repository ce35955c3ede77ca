//! An ordinary image is pulled through the node's mirror, as `hosts.toml` says, and from the registry where there is none, or a slow one.
//! How many nodes do so at once is told in `many_nodes.rs`.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
};

use tempfile::TempDir;

use crate::{
    bed::Bed,
    image::Layers,
    registry_server::relay_that_stalls,
    support::{metric, shoal},
};

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
