//! An image that has become complete: containers that come after that lie on a native mount, and read without the daemon.

use crate::{
    bed::Bed,
    image::Layers,
    support::{drop_caches, wait},
};

#[test]
fn the_next_container_of_a_complete_image_needs_no_daemon() {
    let Some(mut bed) = Bed::start_with("graduation", &["mounts.graduate_after=10ms".to_owned()]) else { return };
    Layers::new().push_lazy(&bed.registry.layout(), "1");
    let image = bed.registry.reference("1");
    bed.daemon.ctl(&["rpull", &image]);
    bed.start_waiting(&image, "early");
    bed.daemon.ctl(&["prefetch", &image]);
    wait("the image is decoded", || bed.daemon.log().contains("its next mount is native"));

    bed.start_waiting(&image, "late");
    assert_eq!(bed.mounts().len(), 2, "one over FUSE and a native one");
    let status = bed.daemon.status();
    let native = |mount: &&serde_json::Value| mount["native"] == true;
    assert_eq!(status["mounts"].as_array().expect("a list").iter().filter(native).count(), 1);
    for container in ["early", "late"] {
        assert_eq!(
            bed.exec(container, "cat /etc/motd; sha256sum /data"),
            format!("upper\n{}", Layers::data_digest())
        );
    }
    bed.exec("late", "echo new > /etc/new; rm /data");
    assert_eq!(bed.exec("late", "cat /etc/new; ls /"), "new\nbin\ndev\netc\nproc\nrun\nsys\ntmp\n");
    bed.start_waiting(&image, "later");
    assert_eq!(bed.mounts().len(), 2, "the late ones share it");

    bed.daemon.kill();
    drop_caches();
    assert_eq!(bed.exec("later", "sha256sum /data"), Layers::data_digest());
    bed.daemon.start_again();
    bed.wait_for_snapshotter();
    assert_eq!(bed.exec("later", "stat -c %a:%u /bin/su-id"), "4755:0\n");

    ["early", "late", "later"].into_iter().for_each(|id| bed.end(id));
    bed.remove_image(&image);
    wait("nothing is left", || bed.directories().is_empty() && bed.mounts().is_empty());
}
