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

#[test]
fn a_blob_layer_under_the_name_of_another_layer_is_of_no_use() {
    let Some(bed) = Bed::start("blob layer of another name") else { return };
    let labels = [("containerd.io/snapshot.ref", "sha256:x"), ("containerd.io/snapshot/nydus-blob", "true")];
    let taken = prepare(&bed, "key", "", &labels).expect_err("there is nothing to unpack");
    assert_eq!(taken.code(), Code::AlreadyExists);
    let refused = prepare(&bed, "container", "sha256:x", &[]).expect_err("it has no files");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("is a data blob layer"), "{}", refused.message());
}
