//! Mirrors of a registry: asked first, verified, passed over when they fail.

use super::{double::Reply, *};
use crate::oci::{Descriptor, RegistryError};

const BODY: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Has one blob and one manifest, and nothing else.
async fn holder(body: &'static [u8]) -> Double {
    Double::start(move |seen, _| {
        let digest = format!("sha256:{}", sha256(body));
        match seen.method.as_str() {
            "HEAD" => {
                let length = body.len().to_string();
                Reply::raw(200, &[("docker-content-digest", &digest), ("content-length", &length)], b"")
            }
            _ if seen.header("range").is_some() => Reply::new(206, &[("content-range", "bytes 0-35/36")], body),
            _ => Reply::new(200, &[], body),
        }
    })
    .await
}

fn with_mirrors(registry: &Double, mirrors: &[&Double]) -> Registry {
    let hosts = mirrors.iter().map(|mirror| mirror.source().registry().to_owned()).collect();
    let mirrors = [(registry.source().registry().to_owned(), hosts)].into();
    Registry::new(RegistryOptions { mirrors, retries: 0, ..options() }).unwrap()
}

async fn read_all(registry: &Registry, double: &Double) {
    let (id, source) = (sha256(BODY), double.source());
    assert_eq!(registry.resolve(&double.reference()).await.unwrap(), (id, 36));
    assert_eq!(registry.manifest(&source, id).await.unwrap(), BODY);
    assert_eq!(registry.blob(&source, id, 100).await.unwrap(), BODY);
    let mut whole = Vec::new();
    registry.blob_to(&source, &Descriptor { id, size: 36 }, &mut whole).await.unwrap();
    assert_eq!(whole, BODY);
}

#[tokio::test]
async fn the_first_mirror_that_has_it_is_read() {
    let registry = holder(b"the registry is not asked, so this does not matter").await;
    let empty = Double::start(|_, _| Reply::new(404, &[], b"")).await;
    let mirror = holder(BODY).await;
    let client = with_mirrors(&registry, &[&empty, &mirror]);
    read_all(&client, &registry).await;
    assert_eq!((registry.seen().len(), empty.seen().len(), mirror.seen().len()), (0, 4, 4));
    // Another registry has no mirrors.
    read_all(&client, &holder(BODY).await).await;
    // Whether something has to be written is asked of the registry itself.
    client.blob_size(&registry.source(), sha256(BODY)).await.unwrap();
    assert_eq!((registry.seen().len(), empty.seen().len()), (1, 4));
}

#[tokio::test]
async fn a_mirror_that_lies_or_fails_is_no_harm() {
    let registry = holder(BODY).await;
    let liar = holder(b"other bytes of the same length, 36!!").await;
    let client = with_mirrors(&registry, &[&liar]);
    let (id, source) = (sha256(BODY), registry.source());
    assert_eq!(client.manifest(&source, id).await.unwrap(), BODY);
    assert_eq!(client.blob(&source, id, 100).await.unwrap(), BODY);
    // Bytes that were passed on cannot be taken back: the reader is told.
    let error = client.blob_to(&source, &Descriptor { id, size: 36 }, &mut Vec::new()).await.unwrap_err();
    assert!(matches!(error, RegistryError::WrongDigest { .. }), "{error:?}");
    // Who verifies them says so, and the next ones come from the registry.
    client.distrust(&source);
    let asked = liar.seen().len();
    read_all(&client, &registry).await;
    assert_eq!(liar.seen().len(), asked);

    let broken = Double::start(|_, _| Reply::new(500, &[], b"out of order")).await;
    let client = with_mirrors(&registry, &[&broken]);
    read_all(&client, &registry).await;
    assert_eq!(broken.seen().len(), 1, "then it is passed over for a while");
}

#[tokio::test]
async fn what_a_mirror_cuts_the_registry_brings() {
    let registry = Double::start(|seen, _| {
        let from: usize = seen.header("range").unwrap()["bytes=".len()..].split('-').next().unwrap().parse().unwrap();
        Reply::new(206, &[("content-range", &format!("bytes {from}-35/36"))], &BODY[from..])
    })
    .await;
    let cutter = Double::start(|_, _| Reply::new(206, &[("content-range", "bytes 0-35/36")], BODY).cut(36)).await;
    let client = with_mirrors(&registry, &[&cutter]);
    let mut whole = Vec::new();
    let descriptor = Descriptor { id: sha256(BODY), size: 36 };
    client.blob_to(&registry.source(), &descriptor, &mut whole).await.unwrap();
    assert_eq!((&whole[..], cutter.seen().len(), registry.seen().len()), (BODY, 1, 1));
}

#[tokio::test]
async fn names_that_are_no_hosts_are_refused() {
    for (registry, mirror) in [("docker.io", "user@mirror.lan"), ("not a host", "mirror.lan")] {
        let mirrors = [(registry.to_owned(), vec![mirror.to_owned()])].into();
        let made = Registry::new(RegistryOptions { mirrors, ..options() });
        assert!(matches!(made, Err(RegistryError::Reference(_))), "{registry} {mirror}");
    }
}
