//! A real registry behind a relay that counts what it sends, and an ordinary image in it.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shoal_rafs::oci::{Authfile, Credentials, Registry, RegistryOptions, Source};
use tempfile::TempDir;

use super::client::get;
use crate::support::{noise, wait};

/// Whom a private registry lets in.
pub(crate) const USER: &str = "user";
pub(crate) const PASSWORD: &str = "secret";

/// An address that nobody listens on now; a race for it is lost by one of us, and then the test says so.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address")
}

/// Where a mirror shall listen, and the setting that says so.
pub(crate) fn mirror_settings() -> (SocketAddr, Vec<String>) {
    let address = free_address();
    (address, vec![format!("mirror.listen=\"{address}\"")])
}

/// Debian's `docker-registry`.
pub(crate) struct RegistryServer {
    child: Child,
    /// Of the relay.
    pub(crate) host: String,
    private: bool,
    sent: Arc<AtomicU64>,
    _folder: TempDir,
}

impl Drop for RegistryServer {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl RegistryServer {
    /// None, with a line that says why, where it is not installed. With a user and a password it lets nobody else in.
    pub(crate) fn start(test: &str, user: Option<(&str, &str)>) -> Option<Self> {
        if Command::new("docker-registry").arg("version").stdout(Stdio::null()).status().is_err() {
            println!("skipped: {test} (needs docker-registry)");
            return None;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let address = free_address();
        let passwords = folder.path().join("htpasswd");
        let auth = match user {
            None => String::new(),
            Some(_) => {
                // bcrypt of "secret", cost 4.
                let line = "user:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";
                fs::write(&passwords, line).expect("a file");
                format!("auth: {{htpasswd: {{realm: here, path: {}}}}}\n", passwords.display())
            }
        };
        let config = folder.path().join("config.yml");
        let storage = folder.path().join("storage");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\n{auth}http:\n  addr: {address}\n",
            storage.display(),
        );
        fs::write(&config, text).expect("a file");
        let mut command = Command::new("docker-registry");
        command.args(["serve".as_ref(), config.as_os_str()]).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("it starts");
        wait("the registry listens", || TcpStream::connect(address).is_ok());
        let sent = Arc::new(AtomicU64::new(0));
        let host = relay(address, sent.clone()).to_string();
        Some(Self { child, host, private: user.is_some(), sent, _folder: folder })
    }

    /// What it has sent so far, headers and all.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    fn client(&self) -> Registry {
        let mut auth = Authfile::default();
        if self.private {
            auth.insert(&self.host, Credentials { username: USER.into(), password: PASSWORD.into() });
        }
        Registry::new(RegistryOptions { auth: auth.into(), ..RegistryOptions::default() }).expect("a client")
    }
}

/// Passes connections on to `server`, and counts what comes back.
fn relay(server: SocketAddr, sent: Arc<AtomicU64>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let Ok(upstream) = TcpStream::connect(server) else { continue };
            let (Ok(from_client), Ok(to_upstream)) = (client.try_clone(), upstream.try_clone()) else { continue };
            thread::spawn(move || pass(from_client, to_upstream, |_| ()));
            let sent = sent.clone();
            thread::spawn(move || pass(upstream, client, |bytes| _ = sent.fetch_add(bytes, Relaxed)));
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream, count: impl Fn(u64)) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read) = from.read(&mut buffer)
        && read > 0
    {
        count(read as u64);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // The other side may have gone.
    let _ = to.shutdown(Shutdown::Write);
}

/// An image of three layers: one that is smaller than a piece, and two of several, the last piece of which is a short one.
pub(crate) struct OrdinaryImage {
    repository: String,
    tag: String,
    pub(crate) manifest: Vec<u8>,
    pub(crate) manifest_id: String,
    blobs: Vec<(String, Vec<u8>)>,
}

impl OrdinaryImage {
    pub(crate) fn push(registry: &RegistryServer, repository: &str, tag: &str) -> Self {
        let layers = [(1, 300_000), (2, 4_200_001), (3, 9_999_999)].map(|(seed, len)| noise(seed, len));
        let config = json!({ "architecture": "amd64", "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": [] } });
        let mut blobs: Vec<_> = [config.to_string().into_bytes()].into_iter().chain(layers).map(named).collect();
        let described = |(id, bytes): &(String, Vec<u8>), kind: &str| json!({ "mediaType": kind, "digest": format!("sha256:{id}"), "size": bytes.len() });
        let layer = "application/vnd.oci.image.layer.v1.tar";
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": described(&blobs[0], "application/vnd.oci.image.config.v1+json"),
            "layers": blobs[1..].iter().map(|blob| described(blob, layer)).collect::<Vec<Value>>(),
        });
        let (manifest_id, manifest) = named(manifest.to_string().into_bytes());
        let source = Source::new(&registry.host, repository).expect("a name");
        let client = registry.client();
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            for (_, bytes) in &blobs {
                client.upload_bytes(&source, bytes.clone().into()).await.expect("it takes the blob");
            }
            let reference = format!("{}/{repository}:{tag}", registry.host).parse().expect("a reference");
            client
                .put_manifest(&reference, manifest_type, manifest.clone().into())
                .await
                .expect("it takes the manifest");
        });
        blobs.sort_by_key(|(_, bytes)| bytes.len());
        Self { repository: repository.into(), tag: tag.into(), manifest, manifest_id, blobs }
    }

    /// Bytes of all blobs and the manifest.
    pub(crate) fn bytes(&self) -> u64 {
        (self.manifest.len() + self.blobs.iter().map(|(_, bytes)| bytes.len()).sum::<usize>()) as u64
    }

    /// The largest layer, with its digest.
    pub(crate) fn largest(&self) -> (&str, &Vec<u8>) {
        self.blobs.last().map(|(id, bytes)| (id.as_str(), bytes)).expect("there are some")
    }

    /// Pulls it as clients do, tag first, and compares every byte; says `log` where it differs.
    pub(crate) fn pull(&self, mirror: SocketAddr, host: &str, shown: Option<&str>, log: &dyn Fn() -> String) {
        let headers: Vec<_> = shown.map(|shown| ("Authorization", shown)).into_iter().collect();
        let manifest = get(mirror, &format!("/v2/{}/manifests/{}?ns={host}", self.repository, self.tag), &headers);
        assert_eq!(manifest.status, 200, "{}: {}", String::from_utf8_lossy(&manifest.body), log());
        assert_eq!(manifest.header("docker-content-digest"), Some(&*format!("sha256:{}", self.manifest_id)));
        assert_eq!(manifest.header("content-type"), Some("application/vnd.oci.image.manifest.v1+json"));
        assert!(manifest.body == self.manifest);
        for (id, bytes) in &self.blobs {
            let blob = get(mirror, &format!("/v2/{}/blobs/sha256:{id}?ns={host}", self.repository), &headers);
            assert_eq!((blob.status, blob.body.len()), (200, bytes.len()), "sha256:{id}: {}", log());
            assert!(blob.body == *bytes, "sha256:{id} differs");
        }
    }
}

fn named(bytes: Vec<u8>) -> (String, Vec<u8>) {
    (hex::encode(Sha256::digest(&bytes)), bytes)
}
