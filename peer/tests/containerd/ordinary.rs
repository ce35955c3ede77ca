//! An ordinary image goes through the same snapshotter, unpacked by containerd.

use crate::{bed::Bed, image::Layers, support::wait};

#[test]
fn an_ordinary_image_is_unpacked_and_runs() {
    let Some(bed) = Bed::start("ordinary image") else { return };
    Layers::new().push_ordinary(&bed.registry.layout(), "plain");
    let image = bed.registry.reference("plain");
    bed.ctr(&["images", "pull", "--plain-http", "--snapshotter", "shoal", &image]);
    assert_eq!((bed.snapshots().len(), bed.mounts().len()), (2, 0));
    let seen = bed.run(
        &image,
        "ordinary-first",
        "cat /etc/motd; ls /etc; sha256sum /data; echo x > /etc/x; stat -c %a /bin/su-id",
    );
    assert_eq!(seen, format!("upper\nmotd\n{}4755\n", Layers::data_digest()));
    assert_eq!(bed.run(&image, "second", "ls /etc"), "motd\n", "what the first wrote has gone with it");
    let usage = bed.ctr(&["snapshots", "--snapshotter", "shoal", "usage", "-b"]);
    let largest = usage.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).max();
    assert!(largest.is_some_and(|bytes| bytes >= crate::image::DATA_BYTES as u64), "{usage}");

    let refused = bed.daemon.try_ctl(&["rpull", &image]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("has no Nydus form"));
    bed.remove_image(&image);
    wait("nothing is left", || bed.snapshots().is_empty() && bed.directories().is_empty());
}
