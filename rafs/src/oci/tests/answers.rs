//! Answers that are late, short, long, wrong or elsewhere.

use futures::StreamExt;

use super::{double::Reply, *};
use crate::oci::{Descriptor, RegistryError};

const BODY: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";

fn partial(headers: &[(&str, &str)], body: &[u8]) -> Reply {
    Reply::new(206, headers, body)
}

#[tokio::test]
async fn a_tag_is_resolved_by_head_or_by_hashing_what_get_brings() {
    let id = sha256(BODY);
    let digest = format!("sha256:{id}");
    let by_head = Double::start(move |_, _| {
        Reply::raw(200, &[("docker-content-digest", &digest), ("content-length", "36")], b"")
    })
    .await;
    assert_eq!(client().resolve(&by_head.reference()).await.unwrap(), (id, 36));
    let seen = &by_head.seen()[0];
    assert_eq!((seen.method.as_str(), seen.path.as_str()), ("HEAD", "/v2/app/manifests/v1"));
    let accept = seen.header("accept").unwrap();
    assert!(accept.contains("oci.image.index") && accept.contains("docker.distribution.manifest.list"), "{accept}");

    // A head without a digest, with one of another kind, and none at all.
    for (status, digest) in [(200, None), (200, Some("sha512:00")), (405, None)] {
        let double = Double::start(move |seen, _| match (seen.method.as_str(), digest) {
            ("HEAD", Some(digest)) => Reply::raw(status, &[("docker-content-digest", digest)], b""),
            ("HEAD", None) => Reply::raw(status, &[], b""),
            _ => Reply::new(200, &[], BODY),
        })
        .await;
        assert_eq!(client().resolve(&double.reference()).await.unwrap(), (id, 36), "{status} {digest:?}");
    }
}

#[tokio::test]
async fn wrong_digests_are_found_out() {
    let other = format!("sha256:{}", ObjectId::new([1; 32]));
    let double = Double::start(move |seen, _| match seen.method.as_str() {
        "HEAD" => Reply::raw(200, &[("docker-content-digest", &other), ("content-length", "36")], b""),
        _ => Reply::new(200, &[], b"something else"),
    })
    .await;
    let (id, source) = (sha256(BODY), double.source());
    let pinned = double.reference().pinned(id);
    let wrong = |result: Result<(), RegistryError>| {
        assert!(matches!(&result, Err(RegistryError::WrongDigest { expected, .. }) if *expected == id), "{result:?}");
    };
    wrong(client().resolve(&pinned).await.map(drop));
    wrong(client().manifest(&source, id).await.map(drop));
    wrong(client().blob(&source, id, 100).await.map(drop));
    let descriptor = Descriptor { id, size: 14 };
    let ranged = Double::start(|_, _| partial(&[("content-range", "bytes 0-13/14")], b"something else")).await;
    wrong(client().blob_to(&ranged.source(), &descriptor, &mut Vec::new()).await);
}

#[tokio::test]
async fn large_bodies_are_refused_announced_or_not() {
    let id = sha256(BODY);
    for reply in [Reply::new, Reply::chunked] {
        let double = Double::start(move |_, _| reply(200, &[], BODY)).await;
        let refused = client().blob(&double.source(), id, 35).await;
        assert!(matches!(refused, Err(RegistryError::TooLarge { limit: 35, .. })), "{refused:?}");
        assert_eq!(client().blob(&double.source(), id, 36).await.unwrap(), BODY);
    }
}

#[tokio::test]
async fn ranges_must_be_exact() {
    let read = async |reply: fn() -> Reply| {
        let double = Double::start(move |_, _| reply()).await;
        let stream = client().blob_range(&double.source(), blob_id(BODY), 10..20).await?;
        let bytes = stream.collect(u64::MAX).await;
        assert_eq!(double.seen()[0].header("range"), Some("bytes=10-19"));
        bytes
    };
    assert_eq!(read(|| partial(&[("content-range", "bytes 10-19/36")], &BODY[10..20])).await.unwrap(), BODY[10..20]);
    assert_eq!(read(|| partial(&[("content-range", "bytes 10-19/*")], &BODY[10..20])).await.unwrap(), BODY[10..20]);
    // Who ignores ranges is understood while little is wasted.
    assert_eq!(read(|| Reply::new(200, &[], BODY)).await.unwrap(), BODY[10..20]);
    for reply in [
        || partial(&[("content-range", "bytes 9-18/36")], &BODY[9..19]),
        || partial(&[("content-range", "bytes 10-20/36")], &BODY[10..21]),
        || partial(&[("content-range", "bytes 10-19/36")], &BODY[10..19]),
        || partial(&[("content-range", "10-19")], &BODY[10..20]),
        || partial(&[], &BODY[10..20]),
        || Reply::new(200, &[], &BODY[..19]),
        || Reply::new(204, &[], b""),
        || Reply::new(416, &[("content-range", "bytes */5")], b""),
    ] {
        let found = read(reply).await;
        assert!(matches!(found, Err(RegistryError::WrongRange { .. })), "{found:?}");
    }
    let longer = read(|| Reply::chunked(206, &[("content-range", "bytes 10-19/36")], &BODY[10..21])).await;
    assert!(matches!(longer, Err(RegistryError::WrongLength { expected: 10, found: 11, .. })), "{longer:?}");
    let shorter = read(|| Reply::chunked(206, &[("content-range", "bytes 10-19/36")], &BODY[10..19])).await;
    assert!(matches!(shorter, Err(RegistryError::WrongLength { expected: 10, found: 9, .. })), "{shorter:?}");
    let cut = read(|| partial(&[("content-range", "bytes 10-19/36")], &BODY[10..20]).cut(3)).await;
    assert!(matches!(cut, Err(RegistryError::Transport { .. })), "{cut:?}");
}

#[tokio::test]
async fn a_registry_without_ranges_is_not_read_from_afar() {
    let double = Double::start(|_, _| Reply::raw(200, &[("content-length", "4000000")], b"")).await;
    let far = client().blob_range(&double.source(), blob_id(BODY), 3_000_000..3_000_001).await;
    assert!(matches!(far, Err(RegistryError::WrongRange { .. })), "{far:?}");
}

#[tokio::test]
async fn a_stream_gives_what_came_before_the_cut() {
    let headers = [("content-range", "bytes 0-35/36")];
    let double = Double::start(move |_, _| partial(&headers, BODY).cut(6)).await;
    let mut stream = client().blob_range(&double.source(), blob_id(BODY), 0..36).await.unwrap();
    let mut got = Vec::new();
    let error = loop {
        match stream.next().await.unwrap() {
            Ok(chunk) => got.extend_from_slice(&chunk),
            Err(error) => break error,
        }
    };
    assert_eq!(got, BODY[..30]);
    assert!(error.is_transient(), "{error}");
    assert!(stream.next().await.is_none(), "nothing follows an error");
}

#[tokio::test]
async fn broken_transfers_begin_again_or_go_on() {
    let double = Double::start(|_, before| match before {
        0 => Reply::new(200, &[], BODY).cut(20),
        _ => Reply::new(200, &[], BODY),
    })
    .await;
    assert_eq!(client().blob(&double.source(), sha256(BODY), 100).await.unwrap(), BODY);
    assert_eq!(double.seen().len(), 2);

    let double = Double::start(|seen, before| {
        let start: usize = seen.header("range").unwrap()[6..].split('-').next().unwrap().parse().unwrap();
        let range = format!("bytes {start}-35/36");
        let reply = partial(&[("content-range", &range)], &BODY[start..]);
        if before < 3 { reply.cut(36 - start - 8) } else { reply }
    })
    .await;
    let mut out = Vec::new();
    let descriptor = Descriptor { id: sha256(BODY), size: 36 };
    client().blob_to(&double.source(), &descriptor, &mut out).await.unwrap();
    assert_eq!(out, BODY);
    let ranges: Vec<_> = double.seen().iter().map(|seen| seen.header("range").unwrap().to_owned()).collect();
    assert_eq!(ranges, ["bytes=0-35", "bytes=8-35", "bytes=16-35", "bytes=24-35"]);
}

#[tokio::test]
async fn what_passes_is_tried_again_and_what_does_not_is_told() {
    for (status, headers) in [(429, &[("retry-after", "0")][..]), (503, &[("retry-after", "0")]), (500, &[])] {
        let double = Double::start(move |_, before| match before {
            0 | 1 => Reply::new(status, headers, b"later"),
            _ => Reply::new(200, &[], BODY),
        })
        .await;
        assert_eq!(client().blob(&double.source(), sha256(BODY), 100).await.unwrap(), BODY, "{status}");
    }
    let limited = Double::start(|_, _| Reply::new(429, &[("retry-after", "3600")], b"")).await;
    let error = client().blob(&limited.source(), sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::RateLimited { .. }), "{error}");
    assert_eq!(error.retry_after(), Some(Duration::from_secs(3600)));
    assert_eq!(limited.seen().len(), 1, "who asks for an hour gets an error, not a wait");

    let broken = Double::start(|_, _| Reply::new(500, &[], b"out\nof\norder")).await;
    let error = client().resolve(&broken.reference()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Registry { status: 500, .. }), "{error}");
    assert_eq!(broken.seen().len(), 3);
    let error = client().blob(&broken.source(), sha256(BODY), 100).await.unwrap_err();
    assert!(error.to_string().contains("status 500: out of order"), "{error}");

    let absent = Double::start(|_, _| Reply::new(404, &[], b"")).await;
    let error = client().image(&absent.reference()).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    assert_eq!(absent.seen().len(), 1);
}

#[tokio::test]
async fn silence_and_closed_doors_are_told_apart() {
    // Accepts connections by its backlog and never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let source = Source::new(&addr, "app").unwrap();
    let quick = RegistryOptions { retries: 0, read_timeout: Duration::from_millis(50), ..options() };
    let registry = Registry::new(quick).unwrap();
    let error = registry.blob(&source, sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Timeout { .. }), "{error}");
    drop(listener);
    let error = registry.blob(&source, sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Transport { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "the cause is told: {error}");
}

#[tokio::test]
async fn redirects_are_followed_to_their_end() {
    let target = Double::start(|_, _| partial(&[("content-range", "bytes 1-2/36")], &BODY[1..3])).await;
    let location = format!("http://127.0.0.1:{}/signed?key=secret", target.port());
    let double = Double::start(move |_, _| Reply::new(307, &[("location", &location)], b"")).await;
    let stream = client().blob_range(&double.source(), blob_id(BODY), 1..3).await.unwrap();
    assert_eq!(stream.collect(10).await.unwrap(), BODY[1..3]);
    assert_eq!(target.seen()[0].path, "/signed?key=secret");
    assert_eq!(target.seen()[0].header("range"), Some("bytes=1-2"));

    let circle = Double::start(|seen, _| Reply::new(302, &[("location", &seen.path)], b"")).await;
    let error = client().blob(&circle.source(), sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { reason: "too many redirects", .. }), "{error}");
    let nowhere = Double::start(|_, _| Reply::new(302, &[], b"")).await;
    let error = client().blob(&nowhere.source(), sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { reason: "no location", .. }), "{error}");
    let file = Double::start(|_, _| Reply::new(302, &[("location", "file:///etc/passwd")], b"")).await;
    let error = client().blob(&file.source(), sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Redirect { .. }), "{error}");
}

#[tokio::test]
async fn uploads_check_what_the_registry_says_it_stored() {
    let wrong = format!("sha256:{}", ObjectId::new([2; 32]));
    let double = Double::start(move |_, _| Reply::new(201, &[("docker-content-digest", &wrong)], b"")).await;
    let put = client().put_manifest(&double.reference(), "a/b", Bytes::from_static(BODY)).await;
    assert!(matches!(put, Err(RegistryError::WrongDigest { .. })), "{put:?}");
    let lost = Double::start(|seen, _| Reply::new(if seen.method == "HEAD" { 404 } else { 202 }, &[], b"")).await;
    let upload = client().upload_bytes(&lost.source(), Bytes::from_static(BODY)).await;
    assert!(matches!(upload, Err(RegistryError::Redirect { reason: "no location", .. })), "{upload:?}");
}
