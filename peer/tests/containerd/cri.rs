//! What a kubelet does: images are pulled through the CRI, which tells the snapshotter what belongs to which image.

use crate::{
    bed::{Bed, call},
    image::{DATA_BYTES, Layers},
    support::wait,
};

/// `runtime.v1.PullImageRequest`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub(crate) image: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct PullImageResponse {
    #[prost(string, tag = "1")]
    pub(crate) image_ref: String,
}

/// Pulls as a kubelet does.
pub(crate) fn pull(bed: &Bed, image: &str) {
    let request = PullImageRequest { image: Some(ImageSpec { image: image.to_owned() }) };
    let pulled = call::<_, PullImageResponse>(&bed.socket(), "/runtime.v1.ImageService/PullImage", request);
    assert!(pulled.expect("a pull").image_ref.starts_with("sha256:"));
}

/// Runs a shell command in a new container of the namespace into which a kubelet pulls.
pub(crate) fn run(bed: &Bed, image: &str, id: &str, script: &str) -> String {
    let arguments = ["--rm", "--snapshotter", "shoal", image, id, "/bin/sh", "-c", script];
    bed.printed(&["-n", "k8s.io", "run"], &arguments)
}

#[test]
fn a_kubelet_pulls_lazily_what_is_lazy() {
    let Some(bed) = Bed::start("CRI") else { return };
    let layers = Layers::new();
    layers.push_lazy(&bed.registry.layout(), "1");
    layers.push_ordinary(&bed.registry.layout(), "plain");
    let lazy = bed.registry.reference("1");
    pull(&bed, &lazy);
    let sent = bed.registry.sent_bytes();
    assert!(sent < DATA_BYTES as u64 / 10, "{sent} bytes were sent");
    assert_eq!(bed.mounts().len(), 1);
    let run = |image: &str, id: &str| run(&bed, image, id, "sha256sum /data");
    assert_eq!(run(&lazy, "lazy"), Layers::data_digest());

    let plain = bed.registry.reference("plain");
    pull(&bed, &plain);
    assert_eq!((run(&plain, "plain"), bed.mounts().len()), (Layers::data_digest(), 1));

    // The same image for another namespace: its layers are there.
    bed.daemon.ctl(&["rpull", &lazy]);
    assert_eq!((bed.run(&lazy, "other", "sha256sum /data"), bed.mounts().len()), (Layers::data_digest(), 1));
    bed.ctr(&["-n", "k8s.io", "images", "rm", "--sync", &lazy]);
    let by_digest = bed.ctr(&["-n", "k8s.io", "images", "ls", "-q"]);
    for name in by_digest.lines() {
        bed.ctr(&["-n", "k8s.io", "images", "rm", "--sync", name]);
    }
    assert_eq!(bed.run(&lazy, "still", "cat /etc/motd"), "upper\n", "one namespace still has it");
    bed.remove_image(&lazy);
    wait("nothing is left", || bed.mounts().is_empty() && bed.directories().is_empty());
}
