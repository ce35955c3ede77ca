//! Images that nobody converted: read lazily where an index is published next to them, and unpacked as ever where none is.

use crate::{
    bed::Bed,
    cri,
    image::{DATA_BYTES, Layers},
    support::{drop_caches, shoal, wait},
};

/// A node that reads what is published, and an image with an index next to it.
fn bed(test: &str) -> Option<(Bed, Layers)> {
    let bed = Bed::start_with(test, &["snapshotter.lazy_oci=true".into()])?;
    let layers = Layers::new();
    layers.push_packed(&bed.registry.layout(), "1");
    let name = |tag: &str| format!("oci:{}:{tag}", bed.registry.layout().display());
    shoal(&["image", "convert", "--oci-ref", "--with-referrer", &name("1"), &name("index")], &[]);
    Some((bed, layers))
}

#[test]
fn an_unmodified_image_runs_by_its_index() {
    let Some((bed, _)) = bed("unmodified image") else { return };
    let image = bed.registry.reference("1");
    bed.daemon.ctl(&["rpull", &image]);
    let sent = bed.registry.sent_bytes();
    assert!(sent < DATA_BYTES as u64 / 5, "{sent} bytes were sent");
    assert_eq!((bed.snapshots().len(), bed.mounts().len()), (2, 1));
    let manifest = bed.ctr(&["images", "ls", "-q"]);
    assert_eq!(manifest.trim(), image, "it has the name of the image");

    let seen = bed.run(&image, "index-first", "cat /etc/motd; ls /etc; sha256sum /data; stat -c %a:%u /bin/su-id /");
    assert_eq!(seen, format!("upper\nmotd\n{}4755:0\n755:0\n", Layers::data_digest()));
    bed.start_waiting(&image, "over-index");
    bed.exec("over-index", "echo changed >> /etc/motd");
    drop_caches();
    assert_eq!(
        bed.exec("over-index", "cat /etc/motd; sha256sum /data"),
        format!("upper\nchanged\n{}", Layers::data_digest())
    );
    bed.end("over-index");
    bed.remove_image(&image);
    bed.collect_garbage();
    wait("nothing is left", || bed.snapshots().is_empty() && bed.mounts().is_empty() && bed.directories().is_empty());
}

#[test]
fn a_kubelet_pulls_it_and_another_image_goes_on_from_its_layer() {
    let Some((bed, layers)) = bed("unmodified image through the CRI") else { return };
    let image = bed.registry.reference("1");
    cri::pull(&bed, &image);
    let sent = bed.registry.sent_bytes();
    assert!(sent < DATA_BYTES as u64 / 5, "{sent} bytes were sent");
    let run = |image: &str, id: &str, script: &str| cri::run(&bed, image, id, script);
    assert_eq!(run(&image, "other-first", "sha256sum /data"), Layers::data_digest());
    assert_eq!(bed.mounts().len(), 1, "the lower layer by itself is wanted by nobody");

    // Nothing is published next to this one. Its upper layer is unpacked over the lower one, which is lazy.
    layers.push_other(&bed.registry.layout(), "other");
    let other = bed.registry.reference("other");
    cri::pull(&bed, &other);
    assert_eq!(bed.mounts().len(), 2);
    assert_eq!(run(&other, "other", "cat /etc/motd /etc/gone /etc/other"), "lower\nlower\nother\n");
    assert_eq!(run(&image, "again", "cat /etc/motd"), "upper\n");
}

#[test]
fn an_image_without_an_index_is_an_ordinary_one() {
    let Some(bed) = Bed::start_with("image without an index", &["snapshotter.lazy_oci=true".into()]) else { return };
    Layers::new().push_packed(&bed.registry.layout(), "1");
    let image = bed.registry.reference("1");
    let refused = bed.daemon.try_ctl(&["rpull", &image]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("--oci-ref --with-referrer"), "{said}");
    bed.ctr(&["images", "pull", "--plain-http", "--snapshotter", "shoal", &image]);
    assert_eq!(bed.run(&image, "whole-first", "sha256sum /data"), Layers::data_digest());
    assert_eq!(bed.mounts().len(), 0);
}
