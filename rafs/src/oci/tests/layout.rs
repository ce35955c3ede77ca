//! The client over a layout folder.

use super::*;
use crate::oci::{Descriptor, Layout, PushError, RegistryError};

fn reference(dir: &TempDir, tag: &str) -> Reference {
    format!("oci:{}/layout{tag}", dir.path().display()).parse().unwrap()
}

#[tokio::test]
async fn an_image_goes_in_and_comes_out() {
    let fixture = Fixture::new();
    let reference = reference(&fixture.dir, ":v1");
    fixture.round_trip(&client(), &reference).await;
    let entries = Layout::new(reference.source().layout_dir().unwrap()).entries().unwrap();
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].tag.as_deref(), Some("v1"));
}

#[tokio::test]
async fn tags_move_and_others_stay() {
    let dir = TempDir::new().unwrap();
    let registry = client();
    let put = async |tag: &str, bytes: &'static [u8]| {
        registry.put_manifest(&reference(&dir, tag), "a/b", Bytes::from_static(bytes)).await.unwrap()
    };
    let first = put(":v1", b"1").await;
    assert_eq!(registry.resolve(&reference(&dir, "")).await.unwrap(), (first, 1), "the only one needs no tag");
    let layout = Layout::new(dir.path().join("layout"));
    // An entry of another tool, with fields that are not known here.
    let index = dir.path().join("layout/index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, text.replacen("\"digest\"", "\"platform\":{\"os.features\":[\"x\"]},\"digest\"", 1))
        .unwrap();
    let second = put(":v2", b"2").await;
    let untagged = put("", b"3").await;
    put("", b"3").await;
    let moved = put(":v2", b"4").await;
    assert_eq!(registry.resolve(&reference(&dir, ":v1")).await.unwrap(), (first, 1));
    assert_eq!(registry.resolve(&reference(&dir, ":v2")).await.unwrap(), (moved, 1));
    let pinned = reference(&dir, "").pinned(second);
    assert_eq!(registry.resolve(&pinned).await.unwrap(), (second, 1), "what a tag left is still there by digest");
    let tags: Vec<_> = layout.entries().unwrap().into_iter().map(|entry| (entry.tag, entry.manifest.id)).collect();
    assert_eq!(tags, [(Some("v1".to_owned()), first), (None, untagged), (Some("v2".to_owned()), moved)]);
    assert!(std::fs::read_to_string(&index).unwrap().contains("os.features"), "it was kept");
    for missing in [reference(&dir, ""), reference(&dir, ":v3")] {
        let error = registry.resolve(&missing).await.unwrap_err();
        assert!(matches!(error, RegistryError::NotFound { .. }), "{missing}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_pushers_lose_no_tag() {
    let dir = TempDir::new().unwrap();
    let registry = client();
    let tasks = (0..16).map(|n| {
        let (registry, reference) = (registry.clone(), reference(&dir, &format!(":v{n}")));
        tokio::spawn(
            async move { registry.put_manifest(&reference, "a/b", Bytes::from(n.to_string())).await.unwrap() },
        )
    });
    for task in futures::future::join_all(tasks).await {
        task.unwrap();
    }
    assert_eq!(Layout::new(dir.path().join("layout")).entries().unwrap().len(), 16);
}

#[tokio::test]
async fn damage_and_lies_are_found_out() {
    let dir = TempDir::new().unwrap();
    let registry = client();
    let reference = reference(&dir, ":v1");
    let source = reference.source();
    let error = registry.resolve(&reference).await.unwrap_err();
    assert!(matches!(error, RegistryError::Layout { .. }), "{error}");
    let (id, _) = registry.upload_bytes(source, Bytes::from_static(b"blob")).await.unwrap();
    let layout = Layout::new(source.layout_dir().unwrap());
    std::fs::write(layout.blob_path(id), "blub").unwrap();
    let error = registry.blob(source, id, 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::WrongDigest { .. }), "{error}");

    let file = dir.path().join("file");
    std::fs::write(&file, "content").unwrap();
    let descriptor = Descriptor { id: ObjectId::new([1; 32]), size: 7 };
    let error = registry.upload_blob(source, &descriptor, &file).await.unwrap_err();
    assert!(matches!(error, RegistryError::WrongDigest { .. }), "{error}");
    assert!(!layout.blob_path(descriptor.id).exists());
    let left = std::fs::read_dir(dir.path().join("layout/blobs/sha256")).unwrap().count();
    assert_eq!(left, 1, "no temporary file stays");

    for index in ["", "[]", "{\"manifests\":[{\"digest\":\"sha256:../x\",\"size\":1,\"mediaType\":\"a\"}]}"] {
        std::fs::write(dir.path().join("layout/index.json"), index).unwrap();
        let error = registry.resolve(&reference).await.unwrap_err();
        assert!(matches!(error, RegistryError::Layout { .. }), "{index}: {error}");
    }
}

#[tokio::test]
async fn a_push_of_broken_parts_leaves_no_tag() {
    let fixture = Fixture::new();
    let reference = reference(&fixture.dir, ":v1");
    let blobs = fixture.dir.path().join("blobs");
    let registry = client();
    let push =
        async |to: &Reference| push(&registry, &fixture.bootstrap(), &blobs, to, Default::default(), |_| ()).await;
    let pinned = reference.pinned(ObjectId::new([1; 32]));
    assert!(matches!(push(&pinned).await, Err(PushError::Registry(RegistryError::Reference(_)))));
    let good = std::fs::read(fixture.blob_file()).unwrap();
    let mut bad = good.clone();
    bad[0] ^= 1;
    std::fs::write(fixture.blob_file(), bad).unwrap();
    let error = push(&reference).await.unwrap_err();
    assert!(matches!(error, PushError::Registry(RegistryError::WrongDigest { .. })), "{error}");
    std::fs::write(fixture.blob_file(), &good[1..]).unwrap();
    assert!(matches!(push(&reference).await, Err(PushError::BlobSize { .. })));
    std::fs::remove_file(fixture.blob_file()).unwrap();
    assert!(matches!(push(&reference).await, Err(PushError::MissingBlob { .. })));
    let resolved = registry.resolve(&reference).await;
    assert!(matches!(resolved, Err(RegistryError::NotFound { .. })), "{resolved:?}");
}
