//! Ordinary images through the mirror: those of a real registry, public and private, and of one that lies; with honest nodes
//! and with one that lies. The client is a plain one, which compares what it gets with what was pushed. How containerd fares
//! is told in its own program.

mod bed;
pub(crate) mod client;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    thread,
};

use bytes::Bytes;
use shoal::data::{AnswerSender, PeerContext, Service};
use shoal_proto::{Asked, HashList, ObjectKind, Request};
use shoal_rafs::{digest, oci::Layout};

use self::{
    bed::{OrdinaryImage, mirror_settings},
    client::{Answer, get, get_with, head},
};
use crate::{
    registry_proxy::proxy_double::{Mood, ProxyDouble},
    registry_server::{PASSWORD, RegistryServer, USER, relay_that_stalls},
    support::{Daemon, Registry, json, metric, noise, wait},
    wrong_bytes::{impostor, wait_for_ban},
};

/// Nodes that pull at the same time.
const NODES: usize = 8;

fn registry_bytes(daemon: &Daemon) -> u64 {
    let total = &daemon.status()["total"];
    ["bytes", "objects"].iter().map(|kind| total[kind]["registry"].as_u64().expect("a figure")).sum()
}

/// Starts a node with a mirror; gives where that listens.
fn start(name: &str, folder: &std::path::Path, settings: &[String]) -> (Daemon, std::net::SocketAddr) {
    let (address, mirror) = mirror_settings();
    (Daemon::start(name, folder, &[&mirror, settings].concat()), address)
}

#[test]
fn eight_nodes_pull_an_image_and_the_registry_sends_it_once() {
    let Some(registry) = RegistryServer::start("mirror", None) else { return };
    let image = OrdinaryImage::push(&registry, "team/app", "1");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let seed = Daemon::start("seed", folder.path(), &["role=seed".into()]);
    let join = seed.join();
    let mut nodes: Vec<_> =
        (0..NODES).map(|n| start(&format!("node{n}"), folder.path(), std::slice::from_ref(&join))).collect();
    nodes.iter().for_each(|(node, _)| node.wait_for_home());

    let before = registry.sent_bytes();
    thread::scope(|scope| {
        for (node, mirror) in &nodes {
            let (image, registry) = (&image, &registry);
            scope.spawn(move || image.pull(*mirror, &registry.host, None, &|| node.log()));
        }
    });
    let sent = registry.sent_bytes() - before;
    let all = image.bytes();
    assert!(sent * 10 <= all * 11, "the registry sent {sent} bytes of an image of {all}");
    assert!(sent >= all, "{sent} bytes of {all}: the counter does not see it");
    for (node, _) in &nodes {
        assert_eq!(registry_bytes(node), 0, "{}", node.log());
    }

    let (node, mirror) = &mut nodes[0];
    let (layer, content) = image.largest();
    let path = format!("/v2/team/app/blobs/sha256:{layer}?ns={}", registry.host);
    let (total, sent) = (content.len(), registry.sent_bytes());
    let part = get(*mirror, &path, &[("Range", "bytes=1048570-3145735")]);
    assert_eq!((part.status, part.header("content-range")), (206, Some(&*format!("bytes 1048570-3145735/{total}"))));
    assert!(part.body == content[1_048_570..3_145_736], "a range that spans pieces");
    let behind = get(*mirror, &path, &[("Range", &format!("bytes={total}-"))]);
    assert_eq!((behind.status, behind.header("content-range")), (416, Some(&*format!("bytes */{total}"))));
    let described = head(*mirror, &path);
    assert_eq!((described.status, described.header("content-length")), (200, Some(&*total.to_string())));
    assert_eq!(described.header("docker-content-digest"), Some(&*format!("sha256:{layer}")));

    // What was verified once is known after a restart, without a word of the seed peer.
    drop(seed);
    node.stop();
    node.start_again();
    let again = get(*mirror, &path, &[("Range", "bytes=1048570-3145735")]);
    assert!(again.status == 206 && again.body == part.body, "{}", node.log());
    assert!(get(*mirror, &path, &[]).body == *content);
    let asked = registry.sent_bytes() - sent;
    assert!(asked < 64 << 10, "{asked} bytes for what is here");
}

#[test]
fn requests_that_mean_nothing_here_are_refused_in_words() {
    let Some(registry) = RegistryServer::start("mirror", None) else { return };
    let image = OrdinaryImage::push(&registry, "team/app", "1");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let only = [format!("mirror.registries=[\"{}\"]", registry.host)];
    let (_node, mirror) = start("node", folder.path(), &only);
    let (host, id) = (&registry.host, &image.manifest_id);
    let absent = "a".repeat(64);
    for (path, status, code) in [
        ("/v2/team/app/manifests/1".to_owned(), 404, "NAME_UNKNOWN"),
        ("/v2/team/app/manifests/1?ns=elsewhere.example".to_owned(), 404, "NAME_UNKNOWN"),
        ("/v2/team/app/manifests/1?ns=oci:%2Fetc".to_owned(), 400, "NAME_INVALID"),
        (format!("/v2/team/app/manifests/2?ns={host}"), 404, "MANIFEST_UNKNOWN"),
        (format!("/v2/team/app/blobs/sha256:{absent}?ns={host}"), 404, "BLOB_UNKNOWN"),
        (format!("/v2/team/app/blobs/sha512:{absent}?ns={host}"), 400, "DIGEST_INVALID"),
        (format!("/v2/Team/app/manifests/1?ns={host}"), 400, "NAME_INVALID"),
        (format!("/v2/team/app/tags/list?ns={host}"), 404, "NAME_UNKNOWN"),
    ] {
        let answer = get(mirror, &path, &[]);
        let error: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
        assert_eq!((answer.status, error["errors"][0]["code"].as_str()), (status, Some(code)), "{path}");
    }
    assert_eq!(get_with(mirror, "POST", "/v2/team/app/blobs/uploads/", &[]).status, 404);
    assert_eq!(get_with(mirror, "DELETE", &format!("/v2/team/app/manifests/1?ns={host}"), &[]).status, 405);
    assert_eq!(get(mirror, "/v2/", &[]).status, 200);
    assert_eq!(get(mirror, "/v2", &[]).status, 200);

    // As nydusd asks: with the registry in a header, or of a proxy.
    let path = format!("/v2/team/app/manifests/sha256:{id}");
    let headers = [("X-Dragonfly-Registry", format!("http://{host}")), ("X-Dragonfly-Use-P2P", "true".into())];
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    for answer in [get(mirror, &path, &headers), get(mirror, &format!("http://{host}{path}"), &[])] {
        assert!(answer.status == 200 && answer.body == image.manifest, "{answer:?}");
    }
}

#[test]
fn a_private_image_is_given_only_to_those_whom_the_registry_lets_in() {
    let Some(registry) = RegistryServer::start("mirror", Some((USER, PASSWORD))) else { return };
    let image = OrdinaryImage::push(&registry, "team/app", "1");
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Of the two, as the header has them.
    let basic = "dXNlcjpzZWNyZXQ=";
    let authfile = folder.path().join("auth.json");
    let document = serde_json::json!({ "auths": { registry.host.clone(): { "auth": basic } } });
    fs::write(&authfile, document.to_string()).expect("a file");
    let credentials = format!("registry.authfile={authfile:?}");
    let seed = Daemon::start("seed", folder.path(), &["role=seed".into(), credentials]);
    // The node has no credentials of its own: those of the client are for asking the registry, and the bytes come from the seed.
    let (node, mirror) = start("node", folder.path(), &[seed.join()]);
    node.wait_for_home();

    let good = format!("Basic {basic}");
    image.pull(mirror, &registry.host, Some(&good), &|| node.log());
    assert!(seed.status()["total"]["bytes"]["registry"].as_u64().expect("a figure") > 0);

    let wrong = "Basic dXNlcjpndWVzcw==";
    let cached = image.largest().0;
    for path in [
        format!("/v2/team/app/manifests/1?ns={}", registry.host),
        format!("/v2/team/app/manifests/sha256:{}?ns={}", image.manifest_id, registry.host),
        format!("/v2/team/app/blobs/sha256:{cached}?ns={}", registry.host),
    ] {
        for headers in [&[][..], &[("Authorization", wrong)][..]] {
            let refused = get(mirror, &path, headers);
            assert_eq!(refused.status, 401, "{path}");
            let challenge = refused.header("www-authenticate").expect("a challenge");
            assert!(challenge.starts_with("Basic"), "{challenge}");
            assert!(refused.body.len() < 1000 && refused.body.starts_with(b"{\"errors\""));
        }
        assert_eq!(get(mirror, &path, &[("Authorization", &good)]).status, 200, "{path}");
    }
    for log in [node.log(), seed.log()] {
        assert!(!log.contains(basic) && !log.contains(PASSWORD), "{log}");
    }
}

/// A registry over a layout, with an image whose largest layer is wrong, and the bytes that it should have.
fn lying_registry() -> (Registry, String, Vec<u8>) {
    let mut registry = Registry::start();
    let layout = Layout::new(registry.layout());
    layout.create().expect("a layout");
    let content = noise(3, 5_000_000);
    let id = layout.put_blob(&content).expect("a blob").to_string();
    registry.switch_on();
    (registry, id, content)
}

fn blob_path(registry: &Registry, id: &str) -> String {
    let reference = registry.reference("1");
    let host = reference.split('/').next().expect("a host");
    format!("/v2/app/blobs/sha256:{id}?ns={host}")
}

#[test]
fn what_a_registry_has_wrong_is_never_given_nor_kept() {
    let (registry, id, content) = lying_registry();
    let file = registry.layout().join("blobs/sha256").join(&id);
    let mut wrong = content.clone();
    wrong[4_321_000] ^= 1;
    fs::write(&file, &wrong).expect("the layout");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let seed = Daemon::start("seed", folder.path(), &["role=seed".into()]);
    let (node, mirror) = start("node", folder.path(), &[seed.join()]);
    node.wait_for_home();

    let path = blob_path(&registry, &id);
    let answer = get(mirror, &path, &[]);
    assert!((500..600).contains(&answer.status) && answer.body.len() < 1000, "{}", answer.status);
    for daemon in [&seed, &node] {
        assert_eq!(daemon.store_usage()["store"]["bytes"], 0, "{}", daemon.store_usage());
        assert!(daemon.log().contains(&format!("expected sha256:{id}")), "{}", daemon.log());
    }
    // A lie is no memory: once the registry is right, so is the answer.
    fs::write(&file, &content).expect("the layout");
    let answer = get(mirror, &path, &[]);
    assert!(answer.status == 200 && answer.body == content, "{}: {}", answer.status, node.log());
}

/// A seed peer that gives a list, and pieces, of its own making.
struct Liar {
    list: Bytes,
    content: Vec<u8>,
}

impl Service for Liar {
    fn handle(&self, _: PeerContext, request: Request, mut answers: AnswerSender) {
        let (list, content) = (self.list.clone(), self.content.clone());
        tokio::spawn(async move {
            match request.what {
                Asked::Object { kind: ObjectKind::HashList, .. } => {
                    if answers.send_data(0, list).await.is_ok() {
                        answers.end().await.ok();
                    }
                }
                Asked::Object { .. } => _ = answers.cannot_source("no".into()).await,
                Asked::Pieces { first, fingerprints, .. } => {
                    let pieces = content.chunks(HashList::PIECE as usize);
                    for (number, piece) in (0..).zip(pieces).skip(first as usize).take(fingerprints.len()) {
                        if answers.send_data(number, Bytes::copy_from_slice(piece)).await.is_err() {
                            return;
                        }
                    }
                    // The asker may hang up as soon as it has seen the lie.
                    answers.end().await.ok();
                }
            }
        });
    }
}

fn list(content: &[u8]) -> Bytes {
    let digests = content.chunks(HashList::PIECE as usize);
    let digests = digests.map(|piece| digest(shoal_proto::Algorithm::Blake3, piece).bytes).collect();
    HashList::new(content.len() as u64, digests).expect("a list").encode().into()
}

/// Pulls a blob through a node whose only seed peer is `liar` until all of it comes; gives the answers before that, and how
/// many lists the node found out to be wrong.
fn pull_past(registry: &Registry, id: &str, content: &[u8], liar: Liar) -> (Vec<Answer>, f64) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (data, control, address) = runtime.block_on(impostor(Arc::new(liar)));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (node, mirror) = start("victim", folder.path(), &[format!("control.bootstrap_peers=[\"{address}\"]")]);
    node.wait_for_home();
    let mut before = Vec::new();
    let path = blob_path(registry, id);
    while before.len() < 5 {
        let answer = get(mirror, &path, &[]);
        if answer.status == 200 && answer.body.len() == content.len() {
            assert!(answer.body == content, "wrong bytes to the last one: {}", node.log());
            wait_for_ban(&node);
            let part = get(mirror, &path, &[("Range", "bytes=4000000-4000009")]);
            assert!(part.status == 206 && part.body == content[4_000_000..4_000_010]);
            assert_eq!(node.store_usage()["store"]["bytes"], content.len(), "{}", node.store_usage());
            runtime.block_on(async {
                control.stop().await;
                data.stop().await;
            });
            return (before, metric(&node, "shoal_refuted_lists_total"));
        }
        before.push(answer);
    }
    panic!("it never comes: {}", node.log());
}

#[test]
fn a_peer_that_lies_about_the_pieces_of_a_blob_is_found_out() {
    let (registry, id, content) = lying_registry();
    let mut false_content = content.clone();
    false_content[123_456] ^= 1;
    let liar = Liar { list: list(&false_content), content: false_content.clone() };
    let (before, refuted) = pull_past(&registry, &id, &content, liar);
    assert_eq!(refuted, 1.0);
    assert!(before.iter().all(|answer| answer.body.len() < content.len()), "what is wrong is not completed");
}

#[test]
fn a_peer_that_sends_wrong_pieces_is_found_out() {
    let (registry, id, content) = lying_registry();
    let mut false_content = content.clone();
    false_content[123_456] ^= 1;
    let liar = Liar { list: list(&content), content: false_content };
    // The registry gives what the liar does not.
    let (_, refuted) = pull_past(&registry, &id, &content, liar);
    assert_eq!(refuted, 0.0, "the list was right");
}

#[test]
fn a_list_of_another_size_than_the_registry_says_is_refuted_at_once() {
    let (registry, id, content) = lying_registry();
    let short = content[..3_000_000].to_vec();
    let liar = Liar { list: list(&short), content: short };
    let (before, refuted) = pull_past(&registry, &id, &content, liar);
    assert_eq!(refuted, 1.0);
    assert!(before.iter().all(|answer| answer.status != 200), "none of it is given");
}

#[test]
fn without_room_a_blob_is_left_to_the_registry() {
    let (registry, id, _) = lying_registry();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (node, mirror) = start("node", folder.path(), &["store.max_bytes=2000000".into()]);
    let answer = get(mirror, &blob_path(&registry, &id), &[]);
    assert_eq!(answer.status, 502, "{}", node.log());
    let usage = json(&node.store(&["usage", "--json"]));
    assert_eq!(usage["store"]["bytes"], 0, "{usage}");
    assert!(metric(&node, "shoal_mirror_requests_total{status=\"502\"}") >= 1.0);
}

/// Runs `shoal mirror configure`; gives what it says and its exit code.
fn configure(folder: &std::path::Path, arguments: &[&str]) -> (serde_json::Value, String, Option<i32>) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.args(["mirror", "configure", "--json", "--certs-dir"]).arg(folder).args(arguments);
    let output = command.output().expect("shoal runs");
    let said = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (said, String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code())
}

#[test]
fn configure_touches_its_own_files_only() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |registry: &str| folder.path().join(registry).join("hosts.toml");
    let registries = ["--registry", "docker.io", "--registry", "r.example:5000"];
    for done in ["written", "unchanged"] {
        let (said, error, code) = configure(folder.path(), &registries);
        assert_eq!(code, Some(0), "{error}");
        assert!(
            said.as_array().is_some_and(|all| all.len() == 2 && all.iter().all(|one| one["done"] == done)),
            "{said}"
        );
    }
    let (_, _, code) = configure(folder.path(), &["--registry", "docker.io", "--mirror", "127.0.0.1:9999"]);
    let text = fs::read_to_string(at("docker.io")).expect("it is there");
    assert!(
        code == Some(0) && text.contains("http://127.0.0.1:9999") && text.contains("https://registry-1.docker.io")
    );

    // Somebody else's, beside one that would have been written: neither is touched.
    fs::create_dir_all(folder.path().join("other.example")).expect("a folder");
    fs::write(at("other.example"), "server = \"https://other.example\"\n").expect("a file");
    let (_, error, code) = configure(folder.path(), &["--registry", "new.example", "--registry", "other.example"]);
    assert!(code == Some(1) && error.contains("other.example/hosts.toml was not written by"), "{error}");
    assert!(!at("new.example").exists());
    // One of its own that was changed since.
    fs::write(at("docker.io"), format!("{text}# and more\n")).expect("a file");
    for arguments in [&["--registry", "docker.io"][..], &["--remove"][..]] {
        let (_, error, code) = configure(folder.path(), arguments);
        assert!(code == Some(1) && error.contains("was changed since"), "{error}");
    }
    assert!(at("r.example:5000").exists(), "all or nothing");
    fs::write(at("docker.io"), text).expect("a file");
    let (said, error, code) = configure(folder.path(), &["--remove"]);
    assert!(code == Some(0) && said.as_array().is_some_and(|all| all.len() == 2), "{said} {error}");
    let left: Vec<_> =
        fs::read_dir(folder.path()).expect("a folder").map(|e| e.expect("an entry").file_name()).collect();
    assert_eq!(left, ["other.example"]);
    let (said, _, code) = configure(folder.path(), &["--remove", "--registry", "docker.io"]);
    assert!(code == Some(0) && said[0]["done"] == "absent", "{said}");
    assert_eq!(configure(folder.path(), &["--registry", "no/registry"]).2, Some(2));
}

/// The proxy in front of the registry gives another byte of a layer: it is read again, past the proxy, before anybody gets it.
#[test]
fn a_layer_that_a_proxy_gives_wrong_is_read_again() {
    let Some(registry) = RegistryServer::start("mirror", None) else { return };
    let image = OrdinaryImage::push(&registry, "team/app", "1");
    let (proxy, folder) = (ProxyDouble::start(), tempfile::tempdir().expect("a temporary folder"));
    let (node, mirror) = start("node", folder.path(), &[format!("registry.proxy.url=\"{}\"", proxy.url())]);
    let host = &registry.host;
    let manifest = get(mirror, &format!("/v2/team/app/manifests/sha256:{}?ns={host}", image.manifest_id), &[]);
    assert!(manifest.body == image.manifest, "{}", node.log());
    proxy.set(Mood::Lie);
    let (id, bytes) = image.largest();
    let layer = get(mirror, &format!("/v2/team/app/blobs/sha256:{id}?ns={host}"), &[]);
    assert!(layer.status == 200 && layer.body == *bytes, "{}: {}", layer.status, node.log());
    let asked: Vec<_> = proxy.asked().into_iter().map(|asked| asked.line.contains("/blobs/")).collect();
    assert_eq!(asked, [false, true], "manifest and layer, once each");
    assert_eq!(metric(&node, "shoal_registry_proxy_used"), 0.0);
}

/// The registry answers questions, and no more; or not even those.
#[test]
fn a_client_of_a_slow_registry_is_told_so_within_the_patience() {
    let (registry, id, _) = lying_registry();
    let layout = Layout::new(registry.layout());
    let manifest = format!(r#"{{"schemaVersion":2,"config":{{}},"layers":[],"padding":"{}"}}"#, "x".repeat(100));
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    layout.put_manifest(Some("1"), manifest_type, manifest.as_bytes()).expect("a manifest");
    let reference = registry.reference("1");
    let server = reference.split('/').next().expect("a host");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (node, mirror) = start("node", folder.path(), &["mirror.patience=1s".into()]);
    for (stalls, path) in
        [("GET /v2/", format!("/v2/app/blobs/sha256:{id}")), ("HEAD /v2/", "/v2/app/manifests/1".to_owned())]
    {
        let slow = relay_that_stalls(server, stalls);
        let answer = get(mirror, &format!("{path}?ns={slow}"), &[]);
        assert_eq!(answer.status, 504, "{stalls}: {}", node.log());
        assert!(answer.body.starts_with(b"{\"errors\""));
    }
    // It waits for nobody else, and has what is not slow.
    assert_eq!(get(mirror, &format!("/v2/app/manifests/1?ns={server}"), &[]).status, 200, "{}", node.log());
}

#[test]
fn clients_that_take_nothing_do_not_keep_others_away() {
    /// As many as are answered at a time.
    const STALLED: usize = 64;
    let mut registry = Registry::start();
    let layout = Layout::new(registry.layout());
    layout.create().expect("a layout");
    // More than the kernel takes for a client that does not.
    let content = noise(5, 24_000_000);
    let id = layout.put_blob(&content).expect("a blob").to_string();
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (node, mirror) = start("node", folder.path(), &["mirror.patience=3s".into()]);
    let path = blob_path(&registry, &id);
    assert!(get(mirror, &path, &[]).body == content, "{}", node.log());

    let stalled: Vec<_> = (0..STALLED)
        .map(|_| {
            let mut connection = TcpStream::connect(mirror).expect("the mirror listens");
            write!(connection, "GET {path} HTTP/1.1\r\nHost: {mirror}\r\n\r\n").expect("a request");
            let mut head = [0; 15];
            connection.read_exact(&mut head).expect("the beginning of an answer");
            assert_eq!(&head, b"HTTP/1.1 200 OK");
            connection
        })
        .collect();
    wait("all of them are cut", || metric(&node, "shoal_mirror_cut_answers_total") as usize == STALLED);
    let again = get(mirror, &path, &[]);
    assert!(again.status == 200 && again.body == content, "{}: {}", again.status, node.log());
    drop(stalled);
}
