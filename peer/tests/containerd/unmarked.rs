//! Pullers that say little of a layer: the manifest tells, if they say where it is.

use std::collections::HashMap;

use sha2::{Digest, Sha256};
use shoal_rafs::oci::Layout;
use tonic::{Code, Status};

use crate::{
    bed::{Bed, call},
    image::{self, Layers},
};

/// `containerd.services.snapshots.v1.PrepareSnapshotRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct Prepare {
    #[prost(string, tag = "2")]
    key: String,
    #[prost(string, tag = "3")]
    parent: String,
    #[prost(map = "string, string", tag = "4")]
    labels: HashMap<String, String>,
}

fn prepare(bed: &Bed, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<(), Status> {
    let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let request = Prepare { key: key.to_owned(), parent: parent.to_owned(), labels };
    call(&bed.snapshotter(), "/containerd.services.snapshots.v1.Snapshots/Prepare", request)
}

/// What is done with each layer of an image, asked as a client of remote snapshotters does.
fn prepare_all(bed: &Bed, tag: &str) -> Vec<Code> {
    let layout = Layout::new(bed.registry.layout());
    let manifest = image::manifest(&layout, tag);
    let diff_ids = image::config(&layout, &manifest)["rootfs"]["diff_ids"].clone();
    let mut parent = String::new();
    let mut codes = Vec::new();
    for (layer, diff_id) in
        manifest["layers"].as_array().expect("layers").iter().zip(diff_ids.as_array().expect("ids"))
    {
        let diff_id = diff_id.as_str().expect("a digest");
        let chain = match parent.as_str() {
            "" => diff_id.to_owned(),
            parent => format!("sha256:{}", hex::encode(Sha256::digest(format!("{parent} {diff_id}")))),
        };
        let labels = [
            ("containerd.io/snapshot.ref", chain.as_str()),
            ("containerd.io/snapshot/remote/any.reference", &bed.registry.reference(tag)),
            ("containerd.io/snapshot/remote/any.digest", layer["digest"].as_str().expect("a digest")),
        ];
        let answer = prepare(bed, &format!("{tag} {chain}"), &parent, &labels);
        codes.push(answer.err().map_or(Code::Ok, |status| status.code()));
        parent = chain;
    }
    codes
}

#[test]
fn layers_without_marks_are_found_in_the_manifest() {
    let Some(bed) = Bed::start("layers without marks") else { return };
    let layers = Layers::new();
    layers.push_lazy(&bed.registry.layout(), "1");
    layers.push_ordinary(&bed.registry.layout(), "plain");
    assert_eq!(prepare_all(&bed, "1"), [Code::AlreadyExists; 3]);
    assert_eq!(bed.mounts().len(), 1);
    assert_eq!(prepare_all(&bed, "1"), [Code::AlreadyExists; 3], "they are there");
    // The first layer is to be unpacked; the second has no parent before that is committed.
    assert_eq!(prepare_all(&bed, "plain"), [Code::Ok, Code::NotFound]);
    assert_eq!(bed.mounts().len(), 1);
    assert_eq!(bed.directories().len(), 4);
    // containerd knows of none of these, and its garbage collection takes them away.
    bed.collect_garbage();
    assert_eq!((bed.directories().len(), bed.mounts().len()), (0, 0));
}

#[test]
fn a_bootstrap_layer_without_a_reference_says_what_to_do() {
    let Some(bed) = Bed::start("bootstrap layer of no image") else { return };
    let labels = [("containerd.io/snapshot.ref", "sha256:x"), ("containerd.io/snapshot/nydus-bootstrap", "true")];
    let refused = prepare(&bed, "key", "", &labels).expect_err("nobody knows where the image is");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("shoal ctl rpull"), "{}", refused.message());
    assert!(bed.directories().is_empty());
}

/// The labels of a layer that is marked as a data blob.
fn marked<'a>(chain: &'a str, reference: &'a str, layer: &'a str) -> [(&'static str, &'a str); 4] {
    [
        ("containerd.io/snapshot.ref", chain),
        ("containerd.io/snapshot/nydus-blob", "true"),
        ("containerd.io/snapshot/cri.image-ref", reference),
        ("containerd.io/snapshot/cri.layer-digest", layer),
    ]
}

/// Digests of an image's layers.
fn digests(layout: &Layout, tag: &str) -> Vec<String> {
    let manifest = image::manifest(layout, tag);
    let layers = manifest["layers"].as_array().expect("layers").iter();
    layers.map(|layer| layer["digest"].as_str().expect("a digest").to_owned()).collect()
}

#[test]
fn a_layer_marked_as_a_blob_is_taken_for_one_only_if_its_image_agrees() {
    let Some(bed) = Bed::start("blob layer of another name") else { return };
    let layers = Layers::new();
    layers.push_lazy(&bed.registry.layout(), "1");
    layers.push_ordinary(&bed.registry.layout(), "plain");
    let layout = Layout::new(bed.registry.layout());
    let (lazy, plain) = (bed.registry.reference("1"), bed.registry.reference("plain"));
    let (blobs, tars) = (digests(&layout, "1"), digests(&layout, "plain"));
    for (chain, reference, layer, says) in [
        // In the name of the ordinary image's layer.
        (&tars[0], &lazy, &blobs[0], "is not what its chain id"),
        (&tars[0], &lazy, &tars[0], "does not have the layer"),
        // Of an image that is not lazy; the bootstrap.
        (&tars[0], &plain, &tars[0], "manifest sha256:"),
        (&blobs[2], &lazy, &blobs[2], "does not have the layer"),
    ] {
        let refused = prepare(&bed, "key", "", &marked(chain, reference, layer)).expect_err("it is a lie");
        assert_eq!(refused.code(), Code::FailedPrecondition, "{}", refused.message());
        assert!(refused.message().contains(says), "{}", refused.message());
    }
    let unknown = prepare(&bed, "key", "", &marked(&tars[0], &lazy, &tars[0])[..2]).expect_err("nobody can tell");
    assert_eq!(unknown.code(), Code::FailedPrecondition);
    assert!(bed.directories().is_empty());
    let taken = prepare(&bed, "key", "", &marked(&blobs[0], &lazy, &blobs[0])).expect_err("nothing to unpack");
    assert_eq!(taken.code(), Code::AlreadyExists);
    let refused = prepare(&bed, "container", &blobs[0], &[]).expect_err("it has no files");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("is a data blob layer"), "{}", refused.message());
}

/// A lazy image may have the tar of an ordinary layer as a blob, and then both have the same name.
#[test]
fn a_blob_layer_is_not_in_the_way_of_an_ordinary_layer_of_its_name() {
    let Some(bed) = Bed::start("blob layer that is a tar") else { return };
    let layers = Layers::new();
    layers.push_lazy(&bed.registry.layout(), "1");
    layers.push_ordinary(&bed.registry.layout(), "plain");
    let layout = Layout::new(bed.registry.layout());
    let tar = digests(&layout, "plain").remove(0);
    let mut manifest = image::manifest(&layout, "1")["layers"].as_array().expect("layers").clone();
    manifest[0]["digest"] = tar.clone().into();
    let diff_ids = manifest.iter().map(|layer| layer["digest"].as_str().expect("a digest").to_owned()).collect();
    image::put(&layout, "greedy", diff_ids, manifest);

    let greedy = bed.registry.reference("greedy");
    let taken = prepare(&bed, "key", "", &marked(&tar, &greedy, &tar)).expect_err("nothing to unpack");
    assert_eq!(taken.code(), Code::AlreadyExists);
    // As in another namespace of containerd: in this one it would not even ask.
    let plain = bed.registry.reference("plain");
    let labels = [
        ("containerd.io/snapshot.ref", tar.as_str()),
        ("containerd.io/snapshot/cri.image-ref", &plain),
        ("containerd.io/snapshot/cri.layer-digest", &tar),
    ];
    prepare(&bed, "unpacked", "", &labels).expect("it is to be unpacked");
    let again = prepare(&bed, "other", "", &marked(&tar, &greedy, &tar)).expect_err("it is there");
    assert_eq!(again.code(), Code::AlreadyExists);
}
