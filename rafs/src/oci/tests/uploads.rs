//! Uploads that are cut, and how they go on.

use std::sync::Mutex;

use super::{double::Reply, source::noise, *};
use crate::oci::{Authfile, Credentials, Descriptor, Placed};

const SESSION: &str = "/v2/app/blobs/uploads/7";

/// A registry that has kept so many bytes of the first PUT when that broke.
struct Keeper {
    kept: usize,
    has: Mutex<Vec<u8>>,
}

impl Keeper {
    async fn start(kept: usize) -> (Double, std::sync::Arc<Self>) {
        let keeper = std::sync::Arc::new(Self { kept, has: Mutex::default() });
        let of = keeper.clone();
        (Double::start(move |seen, _| of.answer(seen)).await, keeper)
    }

    fn answer(&self, seen: &double::Seen) -> Reply {
        let mut has = self.has.lock().unwrap();
        let range = format!("0-{}", has.len().saturating_sub(1));
        match seen.method.as_str() {
            "HEAD" => Reply::new(404, &[], b""),
            "POST" => {
                has.clear();
                Reply::new(202, &[("location", SESSION)], b"")
            }
            "GET" => Reply::raw(204, &[("location", SESSION), ("range", &range)], b""),
            "PATCH" => {
                let expected = format!("{}-{}", has.len(), has.len() + seen.body.len() - 1);
                assert_eq!(seen.header("content-range"), Some(expected.as_str()));
                has.extend_from_slice(&seen.body);
                Reply::new(202, &[("location", SESSION)], b"")
            }
            "PUT" if has.is_empty() => {
                has.extend_from_slice(&seen.body[..self.kept]);
                Reply(Vec::new())
            }
            _ => {
                has.extend_from_slice(&seen.body);
                Reply::new(201, &[], b"")
            }
        }
    }
}

#[tokio::test]
async fn the_rest_follows_what_the_registry_has() {
    let bytes = noise(3, 50_000);
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("blob");
    std::fs::write(&file, &bytes).unwrap();
    let descriptor = Descriptor { id: sha256(&bytes), size: bytes.len() as u64 };
    for kept in [1, 20_000, bytes.len()] {
        let (double, keeper) = Keeper::start(kept).await;
        assert!(!client().upload_blob(&double.source(), &descriptor, &file).await.unwrap());
        assert!(*keeper.has.lock().unwrap() == bytes, "{kept}");
        let methods: Vec<_> = double.seen().iter().map(|seen| seen.method.clone()).collect();
        let expected: &[&str] = match kept {
            50_000 => &["HEAD", "POST", "PUT", "GET", "PUT"],
            _ => &["HEAD", "POST", "PUT", "GET", "PATCH", "PUT"],
        };
        assert_eq!(methods, expected, "{kept}");
        let sent: usize = double.seen().iter().map(|seen| seen.body.len()).sum();
        assert_eq!(sent, 2 * bytes.len() - kept, "no byte again that was there");
        let path = double.seen().last().unwrap().path.clone();
        assert!(path.contains("digest=sha256%3A") || path.contains("digest=sha256:"), "{path}");
    }
}

/// What comes from another place goes on as well, from the last place where its hash is known, and is verified as a whole.
#[tokio::test]
async fn a_copy_goes_on_behind_what_the_registry_has() {
    let bytes = noise(5, 6 << 20);
    let dir = TempDir::new().unwrap();
    let from = Source::layout(dir.path()).unwrap();
    client().upload_bytes(&from, Bytes::from(bytes.clone())).await.unwrap();
    let descriptor = Descriptor { id: sha256(&bytes), size: bytes.len() as u64 };
    for kept in [1, 5 << 20, bytes.len()] {
        let (double, keeper) = Keeper::start(kept).await;
        let placed = client().copy_blob(&from, &double.source(), &descriptor).await.unwrap();
        assert_eq!(placed, Placed::Sent);
        assert!(*keeper.has.lock().unwrap() == bytes, "{kept}");
        let sent: usize = double.seen().iter().map(|seen| seen.body.len()).sum();
        assert_eq!(sent, 2 * bytes.len() - kept, "no byte again that was there");
    }
}

/// Storage that a registry sends uploads to gets the bytes, and no credentials.
#[tokio::test]
async fn an_upload_follows_to_where_it_is_sent() {
    let storage = Double::start(|_, _| Reply::new(201, &[], b"")).await;
    let there = format!("http://127.0.0.1:{}/put", storage.port());
    let registry = Double::start(move |seen, _| match (seen.method.as_str(), seen.header("authorization")) {
        ("HEAD", _) => Reply::new(404, &[], b""),
        (_, None) => Reply::new(401, &[("www-authenticate", "Basic realm=\"x\"")], b""),
        ("POST", _) => Reply::new(202, &[("location", SESSION)], b""),
        _ => Reply::new(307, &[("location", &there)], b""),
    })
    .await;
    let mut auth = Authfile::default();
    let credentials = Credentials { username: "user".to_owned(), password: "secret".to_owned() };
    auth.insert(registry.source().registry(), credentials);
    let client = Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap();
    let bytes = noise(6, 100_000);
    client.upload_bytes(&registry.source(), Bytes::from(bytes.clone())).await.unwrap();
    let [put] = &storage.seen()[..] else { panic!("one request") };
    assert!(put.method == "PUT" && put.body == bytes && put.header("authorization").is_none());
}

#[tokio::test]
async fn a_registry_that_has_forgotten_gets_it_all_again() {
    let bytes = noise(4, 30_000);
    let broke = Mutex::new(false);
    let double = Double::start(move |seen, _| match seen.method.as_str() {
        "HEAD" | "GET" => Reply::new(404, &[], b""),
        "POST" => Reply::new(202, &[("location", SESSION)], b""),
        _ if !std::mem::replace(&mut broke.lock().unwrap(), true) => Reply(Vec::new()),
        _ => Reply::new(201, &[], b""),
    })
    .await;
    let (id, existed) = client().upload_bytes(&double.source(), Bytes::from(bytes.clone())).await.unwrap();
    assert!(id == sha256(&bytes) && !existed);
    let methods: Vec<_> = double.seen().iter().map(|seen| seen.method.clone()).collect();
    assert_eq!(methods, ["HEAD", "POST", "PUT", "GET", "POST", "PUT"]);
    assert_eq!(double.seen()[5].body, bytes);
}
