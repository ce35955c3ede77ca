//! Over real sockets: with the client of this project, and byte for byte.

use std::net::{Ipv4Addr, SocketAddr};

use bytes::Bytes;
use shoal_proto::{BlobId, ObjectId};
use shoal_rafs::oci::{Reference, Registry, RegistryError, RegistryOptions};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{LayoutServer, LayoutStats};

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"layers":[]}"#;
const BLOB: &[u8] = b"0123456789";

struct Fixture {
    dir: TempDir,
    server: LayoutServer,
    registry: Registry,
    blob: ObjectId,
    manifest: ObjectId,
}

impl Fixture {
    /// A layout with one tagged manifest and one blob.
    async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let registry = Registry::new(RegistryOptions { retries: 0, ..Default::default() }).unwrap();
        let reference: Reference = format!("oci:{}:v1", dir.path().display()).parse().unwrap();
        let (blob, _) = registry.upload_bytes(reference.source(), Bytes::from_static(BLOB)).await.unwrap();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = registry.put_manifest(&reference, media_type, Bytes::from_static(MANIFEST)).await.unwrap();
        let server = LayoutServer::start(dir.path(), SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.unwrap();
        Self { dir, server, registry, blob, manifest }
    }

    fn reference(&self, name: &str) -> Reference {
        format!("{}/{name}", self.server.addr()).parse().unwrap()
    }

    /// Sends a request as it is; gives the head, lower case, and the body.
    async fn raw(&self, request: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(self.server.addr()).await.unwrap();
        let text = format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        read_answer(&mut stream).await
    }

    async fn ranged(&self, range: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(self.server.addr()).await.unwrap();
        let path = format!("/v2/a/blobs/sha256:{}", self.blob);
        let text = format!("GET {path} HTTP/1.1\r\nhost: x\r\nrange: {range}\r\nconnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        read_answer(&mut stream).await
    }
}

async fn read_answer(stream: &mut TcpStream) -> (String, Vec<u8>) {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    let body = bytes.split_off(end);
    (String::from_utf8(bytes).unwrap().to_lowercase(), body)
}

#[tokio::test]
async fn what_was_pushed_to_a_tag_is_pulled_under_any_name() {
    let f = Fixture::start().await;
    for name in ["app:v1", "team/other/app:v1"] {
        let reference = f.reference(name);
        assert_eq!(f.registry.resolve(&reference).await.unwrap(), (f.manifest, MANIFEST.len() as u64));
        assert_eq!(f.registry.manifest(reference.source(), f.manifest).await.unwrap(), MANIFEST);
        assert_eq!(f.registry.blob(reference.source(), f.blob, 100).await.unwrap(), BLOB);
        let id = BlobId::new(*f.blob.as_bytes());
        let range = f.registry.blob_range(reference.source(), id, 3..7).await.unwrap();
        assert_eq!(range.collect(10).await.unwrap(), BLOB[3..7]);
    }
    for missing in ["app:v2", "app"] {
        let error = f.registry.resolve(&f.reference(missing)).await.unwrap_err();
        assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_name_with_its_repository_goes_before_the_plain_tag() {
    let f = Fixture::start().await;
    let index = f.dir.path().join("index.json");
    let other: Reference = format!("oci:{}:other", f.dir.path().display()).parse().unwrap();
    let bytes = Bytes::from_static(br#"{"manifests":[]}"#);
    let list = f.registry.put_manifest(&other, "application/vnd.oci.image.index.v1+json", bytes).await.unwrap();
    let text = std::fs::read_to_string(&index).unwrap().replace("\"other\"", "\"team/app:v1\"");
    std::fs::write(&index, text).unwrap();
    assert_eq!(f.registry.resolve(&f.reference("team/app:v1")).await.unwrap().0, list);
    assert_eq!(f.registry.resolve(&f.reference("app:v1")).await.unwrap().0, f.manifest);
    let (head, _) = f.raw("GET /v2/team/app/manifests/v1").await;
    assert!(head.contains("content-type: application/vnd.oci.image.index.v1+json"), "{head}");
}

#[tokio::test]
async fn answers_follow_the_distribution_specification() {
    let f = Fixture::start().await;
    let (blob, manifest) = (f.blob, f.manifest);
    let blob_path = format!("/v2/a/blobs/sha256:{blob}");
    let (head, body) = f.raw("GET /v2/").await;
    assert!(
        head.starts_with("http/1.1 200") && head.contains("docker-distribution-api-version: registry/2.0"),
        "{head}"
    );
    assert_eq!(body, b"{}");

    let (head, body) = f.raw(&format!("HEAD {blob_path}")).await;
    assert!(head.starts_with("http/1.1 200") && head.contains("content-length: 10"), "{head}");
    assert!(head.contains(&format!("docker-content-digest: sha256:{blob}")), "{head}");
    assert!(head.contains("accept-ranges: bytes") && body.is_empty(), "{head}");

    let (head, body) = f.raw("GET /v2/a/manifests/v1").await;
    assert!(head.contains("content-type: application/vnd.oci.image.manifest.v1+json"), "{head}");
    assert!(head.contains(&format!("docker-content-digest: sha256:{manifest}")), "{head}");
    assert_eq!(body, MANIFEST);

    for (request, status, code) in [
        ("GET /v2/a/manifests/v9", "404", "MANIFEST_UNKNOWN"),
        (&format!("GET /v2/a/manifests/sha256:{blob}"), "404", "MANIFEST_UNKNOWN"),
        (&format!("GET /v2/a/blobs/sha256:{}", ObjectId::new([0; 32])), "404", "BLOB_UNKNOWN"),
        ("GET /v2/a/blobs/sha256:..", "400", "DIGEST_INVALID"),
        ("GET /v2/A/manifests/v1", "400", "NAME_INVALID"),
        ("GET /v2/../../etc/passwd", "404", "NAME_UNKNOWN"),
        ("GET /v2/a/blobs/%2e%2e%2fconfig", "400", "DIGEST_INVALID"),
        ("GET /", "404", "NAME_UNKNOWN"),
        ("PUT /v2/a/manifests/v1", "405", "UNSUPPORTED"),
        (&format!("DELETE {blob_path}"), "405", "UNSUPPORTED"),
    ] {
        let (head, body) = f.raw(request).await;
        assert!(head.starts_with(&format!("http/1.1 {status}")), "{request}: {head}");
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["errors"][0]["code"], code, "{request}");
    }
    let (head, body) = f.raw(&format!("HEAD /v2/a/blobs/sha256:{}", ObjectId::new([0; 32]))).await;
    assert!(head.starts_with("http/1.1 404") && body.is_empty(), "{head}");
}

#[tokio::test]
async fn ranges_are_answered_exactly() {
    let f = Fixture::start().await;
    for (range, content_range, body) in [
        ("bytes=0-0", "bytes 0-0/10", &BLOB[..1]),
        ("bytes=9-9", "bytes 9-9/10", &BLOB[9..]),
        ("bytes=5-99", "bytes 5-9/10", &BLOB[5..]),
        ("bytes=-3", "bytes 7-9/10", &BLOB[7..]),
    ] {
        let (head, found) = f.ranged(range).await;
        assert!(head.starts_with("http/1.1 206") && head.contains(content_range), "{range}: {head}");
        assert!(head.contains(&format!("content-length: {}", body.len())), "{range}: {head}");
        assert_eq!(found, body, "{range}");
    }
    let (head, body) = f.ranged("bytes=10-").await;
    assert!(head.starts_with("http/1.1 416") && head.contains("content-range: bytes */10"), "{head}");
    assert!(body.is_empty());
    let (head, body) = f.ranged("bytes=0-1,4-5").await;
    assert!(head.starts_with("http/1.1 200"), "{head}");
    assert_eq!(body, BLOB);
}

#[tokio::test]
async fn every_byte_sent_is_counted() {
    let f = Fixture::start().await;
    assert_eq!(f.server.stats(), LayoutStats { requests: 0, sent_bytes: 0 });
    let (mut requests, mut sent) = (0, 0);
    for request in [
        "GET /v2/".to_owned(),
        format!("GET /v2/a/blobs/sha256:{}", f.blob),
        format!("HEAD /v2/a/blobs/sha256:{}", f.blob),
        "GET /v2/a/manifests/v9".to_owned(),
    ] {
        let (head, body) = f.raw(&request).await;
        requests += 1;
        sent += (head.len() + body.len()) as u64;
        assert_eq!(f.server.stats(), LayoutStats { requests, sent_bytes: sent }, "{request}");
        assert_eq!(f.server.clients().into_values().collect::<Vec<_>>(), [sent], "all came from one address");
    }
    let (head, body) = f.raw("GET /metrics").await;
    let text = String::from_utf8(body).unwrap();
    assert!(head.contains("content-type: text/plain"), "{head}");
    assert!(text.contains(&format!("\nshoal_layout_requests_total {requests}\n")), "{text}");
    assert!(text.contains(&format!("\nshoal_layout_sent_bytes_total {sent}\n")), "{text}");
}

#[tokio::test]
async fn it_stops_and_an_empty_folder_is_an_empty_registry() {
    let dir = TempDir::new().unwrap();
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server = LayoutServer::start(dir.path().join("not-yet"), any).await.unwrap();
    let addr = server.addr();
    let registry = Registry::new(RegistryOptions { retries: 0, ..Default::default() }).unwrap();
    let reference: Reference = format!("{addr}/app:v1").parse().unwrap();
    let error = registry.resolve(&reference).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    assert!(LayoutServer::start(dir.path(), addr).await.is_err(), "the port is taken");
    assert_eq!(server.stop().await.requests, 1);
    let error = registry.resolve(&reference).await.unwrap_err();
    assert!(matches!(error, RegistryError::Transport { .. }), "{error}");
}
