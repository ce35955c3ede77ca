//! Conversions and copies through Debian's `docker-registry`, and what breaks on the way.

use std::{
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::{
    docker_registry::{password, start},
    source::*,
    *,
};
use crate::oci::{Authfile, ConvertError, ConvertOptions, Credentials, RegistryError, check_image, convert, copy};

fn reference(host: &str, name: &str) -> Reference {
    format!("{host}/{name}").parse().unwrap()
}

fn small_chunks() -> ConvertOptions {
    ConvertOptions { build: BuildOptions { chunk_size: 0x1_0000, ..Default::default() }, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tag_for_both_kinds_of_client() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let (from, to) = (reference(&server.host, "source/app:v1"), reference(&server.host, "lazy/app:v1"));
    let registry = client();
    let [amd64, ..] = index(&registry, &from).await;
    let options = ConvertOptions { merge_index: true, with_referrer: true, ..small_chunks() };
    let report = convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    assert!(report.copied.mounted_bytes > 0, "the registry has the source's blobs: {report:#?}");
    assert_eq!(report.copied.sent_bytes, 0);
    let found = check_image(&registry, &to, Some(&from), &[]).await.unwrap();
    assert!(found.ok && found.images.len() == 2, "{found:#?}");
    let again = convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    assert_eq!((again.manifest, again.sent_bytes, again.copied.mounted_bytes), (report.manifest, 0, 0));

    // This registry lists no referrers: the list is an index under a tag.
    let list = reference(&server.host, &format!("lazy/app:sha256-{}", amd64.id));
    let (id, _) = registry.resolve(&list).await.unwrap();
    let list = registry.manifest(to.source(), id).await.unwrap();
    let list: Value = serde_json::from_slice(&list).unwrap();
    assert_eq!(list["manifests"][0]["digest"], format!("sha256:{}", report.images[0].manifest));

    skopeo_takes_the_oci_image(&server.host, amd64.id);
}

/// A client that knows nothing of Nydus gets the manifest that was there before.
fn skopeo_takes_the_oci_image(host: &str, expected: ObjectId) {
    let dir = TempDir::new().unwrap();
    let target = format!("oci:{}/out:v1", dir.path().display());
    let copied = Command::new("skopeo")
        .args([
            "--insecure-policy",
            "--override-arch",
            "amd64",
            "copy",
            "--src-tls-verify=false",
            "--preserve-digests",
        ])
        .args([format!("docker://{host}/lazy/app:v1"), target.clone()])
        .stdout(Stdio::null())
        .output();
    let Ok(copied) = copied else { return println!("skipped: skopeo is not installed") };
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    let layout = crate::oci::Layout::new(dir.path().join("out"));
    assert_eq!(layout.entries().unwrap()[0].manifest.id, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_copied_between_repositories_and_layouts() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let registry = client();
    let dir = TempDir::new().unwrap();
    let (one, two) = (reference(&server.host, "one:v1"), reference(&server.host, "two:v1"));
    let layout: Reference = format!("oci:{}/layout:v1", dir.path().display()).parse().unwrap();
    index(&registry, &layout).await;
    let up = copy(&registry, &layout, &one, None, |_, _| {}).await.unwrap();
    assert!(up.blobs.sent_bytes > 0);
    let across = copy(&registry, &one, &two, None, |_, _| {}).await.unwrap();
    assert_eq!((across.blobs.mounted_bytes, across.blobs.sent_bytes), (up.blobs.sent_bytes, 0));
    let back: Reference = format!("oci:{}/back:v1", dir.path().display()).parse().unwrap();
    let down = copy(&registry, &two, &back, None, |_, _| {}).await.unwrap();
    assert_eq!([up.manifest, across.manifest], [across.manifest, down.manifest]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_needed_and_never_told() {
    let Some(server) = start(password, "").await else { return };
    let with = |password: &str| {
        let mut auth = Authfile::default();
        auth.insert(&server.host, Credentials { username: "user".to_owned(), password: password.to_owned() });
        Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap()
    };
    let right = with("secret");
    let (from, to) = (reference(&server.host, "app:v1"), reference(&server.host, "lazy:v1"));
    image(&right, &from, &layers()).await;
    let error = convert(&with("wrong-secret"), &from, &to, &small_chunks(), |_| {}).await.unwrap_err();
    let shown = format!("{} {error:?}", crate::chain(&error));
    assert!(matches!(error, ConvertError::Registry(RegistryError::Unauthorized { given: true, .. })), "{shown}");
    assert!(!shown.contains("wrong-secret"), "{shown}");
    convert(&right, &from, &to, &small_chunks(), |_| {}).await.unwrap();
    assert!(check_image(&right, &to, Some(&from), &[]).await.unwrap().ok);
}

/// Passes connections on to a registry, and cuts all of them when it has passed so many bytes to it.
struct Cutter {
    host: String,
    left: Arc<AtomicI64>,
    task: JoinHandle<()>,
}

impl Cutter {
    async fn start(to: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let left = Arc::new(AtomicI64::new(0));
        let budget = Arc::clone(&left);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&to).await else { continue };
                tokio::spawn(pass(client, server, Arc::clone(&budget)));
            }
        });
        Self { host, left, task }
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends, and closes both ends, when either side closes or the budget is used up.
async fn pass(client: TcpStream, server: TcpStream, budget: Arc<AtomicI64>) -> std::io::Result<()> {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let up = async {
        let mut buffer = vec![0; 4096];
        loop {
            let read = from_client.read(&mut buffer).await?;
            if read == 0 || budget.fetch_sub(read as i64, Ordering::Relaxed) < read as i64 {
                return Ok(());
            }
            to_server.write_all(&buffer[..read]).await?;
        }
    };
    let down = tokio::io::copy(&mut from_server, &mut to_client);
    tokio::select! {
        up = up => up,
        down = down => down.map(drop),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_is_cut_leaves_no_tag_and_is_finished_later() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let dir = TempDir::new().unwrap();
    let from: Reference = format!("oci:{}/layout:v1", dir.path().display()).parse().unwrap();
    let registry = Registry::new(RegistryOptions { retries: 0, ..options() }).unwrap();
    image(&registry, &from, &layers()).await;
    let cutter = Cutter::start(server.host.clone()).await;
    let (through, direct) = (reference(&cutter.host, "app:v1"), reference(&server.host, "app:v1"));
    let options = ConvertOptions { state: Some(dir.path().join("state")), memory_bytes: 1, ..small_chunks() };
    let mut cuts = 0;
    // A little further each time: in the first blob, in later ones, in the bootstrap layer, before the manifest.
    for budget in [2_000, 100_000, 330_000, 600_000, 640_000] {
        cutter.left.store(budget, Ordering::Relaxed);
        match convert(&registry, &from, &through, &options, |_| {}).await {
            Ok(_) => break,
            Err(error) => assert!(matches!(error, ConvertError::Registry(_)), "{error:?}"),
        }
        cuts += 1;
        let resolved = registry.resolve(&direct).await;
        assert!(matches!(resolved, Err(RegistryError::NotFound { .. })), "{resolved:?}");
    }
    assert!(cuts >= 2, "only {cuts} cuts");
    cutter.left.store(i64::MAX, Ordering::Relaxed);
    let report = convert(&registry, &from, &through, &options, |_| {}).await.unwrap();
    assert!(report.images[0].layers.iter().any(|layer| layer.reused), "{report:#?}");
    assert!(check_image(&registry, &direct, Some(&from), &[]).await.unwrap().ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_cut_is_finished_by_itself() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let cutter = Cutter::start(server.host.clone()).await;
    cutter.left.store(1_000_000, Ordering::Relaxed);
    let left = Arc::clone(&cutter.left);
    let mended = tokio::spawn(async move {
        while left.load(Ordering::Relaxed) >= 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        left.store(i64::MAX, Ordering::Relaxed);
    });
    let bytes = Bytes::from(noise(6, 3_000_000));
    let through = reference(&cutter.host, "app:v1");
    let (id, existed) = client().upload_bytes(through.source(), bytes.clone()).await.unwrap();
    mended.await.unwrap();
    assert!(!existed);
    assert!(client().blob(reference(&server.host, "app:v1").source(), id, 1 << 22).await.unwrap() == bytes);
}
