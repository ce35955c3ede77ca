//! Blobs that are not in the registry, and registries that are read through mirrors.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    process::Child,
};

use tempfile::TempDir;

#[path = "../../../rafs/src/oci/tests/nginx.rs"]
mod nginx;

use crate::{
    registry_server::free_address,
    support::{Built, Daemon, Registry, assert_same, can_mount, shoal, tree, wait},
};

/// nginx with a folder that can be read and written.
struct Nginx {
    child: Child,
    folder: TempDir,
    address: String,
}

impl Nginx {
    /// `None`, and a line saying so, where it is not installed.
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let address = free_address().to_string();
        let Some(mut command) = nginx::command(folder.path(), &address) else {
            println!("skipped: blob_backend (nginx is not installed)");
            return None;
        };
        let server = Self { child: command.spawn().expect("it starts"), folder, address };
        wait("nginx listens", || TcpStream::connect(&server.address).is_ok());
        Some(server)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("access.log")).expect("its log")
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn push(built: &Built, layout: &Path, tag: &str, place: &str) {
    let reference = format!("oci:{}:{tag}", layout.display());
    shoal(
        &["image", "push", "--blob-backend", place, "--bootstrap"],
        &[&built.bootstrap(), Path::new("--blob-dir"), &built.blobs(), Path::new(&reference)],
    );
    shoal(&["image", "check", "--blob-backend", place, &reference], &[]);
}

/// The seed peer knows where the blobs are. The node does not, and need not.
#[test]
fn a_seed_peer_reads_blobs_from_a_web_server_for_all() {
    if !can_mount("blob_backend") {
        return;
    }
    let Some(server) = Nginx::start() else { return };
    let source = tree(11, 40, 50_000);
    let built = Built::new(source.path(), "zstd");
    let mut registry = Registry::start();
    let place = format!("http://{}/blobs/", server.address);
    push(&built, &registry.layout(), "1", &place);
    let blob = built.blob();
    assert!(!registry.layout().join("blobs/sha256").join(&blob).exists(), "the registry has no blob");
    assert!(server.folder.path().join("root/blobs").join(&blob).exists());
    registry.switch_on();

    let folder = tempfile::tempdir().expect("a folder");
    let backends = format!("registry.backends=[{{ place = \"{place}\", images = [\"{}\"] }}]", "*");
    let mut seed = Daemon::start("seed", folder.path(), &["role=seed".into(), backends]);
    let mut node = Daemon::start("node", folder.path(), &[seed.join()]);
    node.wait_for_home();
    node.mount(&registry.reference("1"));
    assert_same(source.path(), &node.mountpoint());
    let log = server.log();
    assert!(log.lines().any(|line| line.contains(&format!("GET /blobs/{blob} ")) && line.contains(" 206 ")), "{log}");
    node.stop();
    seed.stop();
}

/// An image names the place itself: a node that has the place for no image in particular follows, for one that has not it is
/// as if the blob were nowhere.
#[test]
fn an_image_says_where_its_blobs_are() {
    if !can_mount("blob_backend_of_an_image") {
        return;
    }
    let source = tree(12, 10, 50_000);
    let built = Built::new(source.path(), "zstd");
    let mut registry = Registry::start();
    let folder = tempfile::tempdir().expect("a folder");
    let place = format!("file://{}/blobs", folder.path().display());
    push(&built, &registry.layout(), "1", &place);
    registry.switch_on();
    let backends = format!("registry.backends=[{{ place = \"{place}\" }}]");
    let mut node = Daemon::start("node", folder.path(), &[backends]);
    node.mount(&registry.reference("1"));
    assert_same(source.path(), &node.mountpoint());
    node.stop();
    let mut other = Daemon::start("other", folder.path(), &["read.deadline=\"2s\"".into()]);
    other.mount(&registry.reference("1"));
    let error = fs::read(other.mountpoint().join("d0/f0")).expect_err("nobody has it");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
    other.stop();
}

/// A registry that does not answer is read through the second of its mirrors.
#[test]
fn mirrors_are_asked_before_a_registry() {
    if !can_mount("registry_mirrors") {
        return;
    }
    let source = tree(13, 10, 50_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let reference = registry.reference("1");
    let (host, name) = reference.split_once('/').expect("a host");
    let folder = tempfile::tempdir().expect("a folder");
    let closed = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    let mirrors =
        format!("registry.mirrors=[{{ registry = \"registry.invalid\", hosts = [\"{closed}\", \"{host}\"] }}]");
    let mut node = Daemon::start("node", folder.path(), &[mirrors]);
    node.mount(&format!("registry.invalid/{name}"));
    assert_same(source.path(), &node.mountpoint());
    node.stop();
}
