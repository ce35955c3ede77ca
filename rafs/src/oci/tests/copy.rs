//! Copies between layouts, archives and registries.

use super::{
    double::{Reply, Seen},
    source::*,
    *,
};
use crate::oci::{Location, OpenLocation, Placed, RegistryError, copy};

fn layout(dir: &TempDir, name: &str) -> Reference {
    format!("oci:{}/{name}:v1", dir.path().display()).parse().unwrap()
}

#[tokio::test]
async fn an_index_keeps_all_its_digests() {
    let dir = TempDir::new().unwrap();
    let registry = client();
    let (from, to) = (layout(&dir, "from"), layout(&dir, "to"));
    let children = index(&registry, &from).await;
    let report = copy(&registry, &from, &to, None, |_, _| {}).await.unwrap();
    let (id, _) = registry.resolve(&from).await.unwrap();
    assert_eq!(report.manifest, id);
    for child in children {
        let bytes = registry.manifest(from.source(), child.id).await.unwrap();
        assert_eq!(registry.manifest(to.source(), child.id).await.unwrap(), bytes);
    }
    let again = copy(&registry, &from, &to, None, |placed, _| assert_eq!(placed, Placed::Existed)).await.unwrap();
    assert_eq!((again.blobs.sent_bytes, again.blobs.existing_bytes), (0, report.blobs.sent_bytes));
    let arm64 = "linux/arm64".parse().unwrap();
    let one = copy(&registry, &from, &layout(&dir, "one"), Some(&arm64), |_, _| {}).await.unwrap();
    assert_eq!(one.manifest, children[1].id);
}

#[tokio::test]
async fn an_archive_goes_out_and_comes_in() {
    let dir = TempDir::new().unwrap();
    let registry = client();
    let (from, back) = (layout(&dir, "from"), layout(&dir, "back"));
    image(&registry, &from, &layers()).await;
    let file = dir.path().join("image.tar");
    let archive: Location = format!("oci-archive:{}:v1", file.display()).parse().unwrap();
    let target = OpenLocation::target(&archive).unwrap();
    let out = copy(&registry, &from, target.reference(), None, |_, _| {}).await.unwrap();
    assert!(!file.exists(), "nothing before all is in it");
    target.finish().unwrap();
    let source = OpenLocation::source(&archive).unwrap();
    let back = copy(&registry, source.reference(), &back, None, |_, _| {}).await.unwrap();
    assert_eq!(back.manifest, out.manifest);
}

#[tokio::test]
async fn wrong_bytes_do_not_arrive() {
    let dir = TempDir::new().unwrap();
    let registry = client();
    let (from, to) = (layout(&dir, "from"), layout(&dir, "to"));
    let layers = layers();
    image(&registry, &from, &layers).await;
    let path = crate::oci::Layout::new(from.source().layout_dir().unwrap()).blob_path(layers[0].id());
    let mut bytes = layers[0].stored.clone();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, &bytes).unwrap();
    let error = copy(&registry, &from, &to, None, |_, _| {}).await.unwrap_err();
    assert!(matches!(error, RegistryError::WrongDigest { .. }), "{error}");
    let resolved = registry.resolve(&to).await.unwrap_err();
    assert!(matches!(resolved, RegistryError::NotFound { .. }), "{resolved}");
    // A registry is not given the last byte of something else.
    let double = Double::start(|seen, _| match seen.method.as_str() {
        "HEAD" => Reply::raw(404, &[], b""),
        "POST" => Reply::new(202, &[("location", "/v2/app/blobs/uploads/1")], b""),
        _ => Reply::new(201, &[], b""),
    })
    .await;
    let descriptor = crate::oci::Descriptor { id: layers[0].id(), size: bytes.len() as u64 };
    let error = registry.copy_blob(from.source(), &double.source(), &descriptor).await.unwrap_err();
    assert!(matches!(error, RegistryError::WrongDigest { .. }), "{error}");
    assert!(double.seen().iter().all(|seen| seen.method != "PUT"), "the request never was complete");
}

#[tokio::test]
async fn a_neighbour_repository_is_asked_first() {
    let methods =
        |seen: &[Seen]| seen.iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect::<Vec<_>>();
    let body = b"blob";
    let descriptor = crate::oci::Descriptor { id: sha256(body), size: 4 };
    let answer = |status: u16| {
        move |seen: &Seen, _: usize| match seen.method.as_str() {
            "HEAD" => Reply::raw(404, &[], b""),
            "POST" if seen.path.contains("mount=") => {
                Reply::new(status, &[("location", "/v2/app/blobs/uploads/1")], b"")
            }
            "POST" => Reply::new(202, &[("location", "/v2/app/blobs/uploads/2")], b""),
            "GET" => Reply::new(206, &[("content-range", "bytes 0-3/4")], body),
            _ => Reply::new(201, &[], b""),
        }
    };
    for (status, placed, last) in [
        (201, Placed::Mounted, "POST"),
        // The session that came instead is used.
        (202, Placed::Sent, "PUT /v2/app/blobs/uploads/1"),
        // Not allowed: the bytes are sent.
        (403, Placed::Sent, "PUT /v2/app/blobs/uploads/2"),
    ] {
        let double = Double::start(answer(status)).await;
        let from = Source::new(double.source().registry(), "other").unwrap();
        assert_eq!(client().copy_blob(&from, &double.source(), &descriptor).await.unwrap(), placed);
        let seen = methods(&double.seen());
        let mount = format!("POST /v2/app/blobs/uploads/?mount=sha256%3A{}&from=other", descriptor.id);
        assert_eq!(seen[1], mount);
        assert!(seen.last().unwrap().starts_with(last), "{seen:?}");
    }
}
