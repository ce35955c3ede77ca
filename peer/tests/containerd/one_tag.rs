//! One tag for both kinds of client: who knows nothing of lazy images pulls the ordinary one, and a node reads the lazy one.

use crate::{
    bed::Bed,
    image::{DATA_BYTES, Layers},
    support::shoal,
};

#[test]
fn each_kind_of_client_takes_its_own_from_one_tag() {
    let Some(bed) = Bed::start("one tag for both kinds of client") else { return };
    let layout = bed.registry.layout();
    Layers::new().push_ordinary(&layout, "plain");
    let name = |tag: &str| format!("oci:{}:{tag}", layout.display());
    shoal(&["image", "convert", "--merge-index", &name("plain"), &name("both")], &[]);
    let image = bed.registry.reference("both");
    let script = "cat /etc/motd; ls /etc; sha256sum /data; stat -c %a:%u /bin/su-id /";
    let expected = format!("upper\nmotd\n{}4755:0\n755:0\n", Layers::data_digest());

    bed.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &image]);
    let run = ["--rm", "--snapshotter", "overlayfs", &image, "ordinary", "/bin/sh", "-c", script];
    assert_eq!(bed.printed(&["run"], &run), expected);
    assert_eq!((bed.snapshots().len(), bed.mounts().len()), (0, 0));
    bed.remove_image(&image);

    let before = bed.registry.sent_bytes();
    bed.daemon.ctl(&["rpull", &image]);
    let sent = bed.registry.sent_bytes() - before;
    assert!(sent < DATA_BYTES as u64 / 5, "{sent} bytes were sent");
    assert_eq!(bed.mounts().len(), 1);
    assert_eq!(bed.run(&image, "lazy-first", script), expected);
}
