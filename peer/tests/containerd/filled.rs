//! Containers over an image that is mounted natively while nearly all of it is still in the registry.

use std::{io, os::fd::AsFd, thread, time::Duration};

use shoal_keeper::Group;

use crate::{
    bed::{Bed, in_container},
    image::{DATA_BYTES, Layers},
    support::{drop_caches, wait},
};

/// Containers outlive the daemon, and a reader waits for the next.
fn settings() -> [String; 4] {
    ["mounts.native_lazy=true", "mounts.keeper=on", "mounts.keeper_patience=60s", "mounts.on_stop=leave"]
        .map(str::to_owned)
}

/// Whether the kernel asks before a file is read, and for files of this folder.
fn raises_events() -> io::Result<()> {
    Group::new()?.mark(tempfile::tempfile()?.as_fd())
}

#[test]
fn containers_read_what_is_filled_as_they_read_it_and_wait_while_the_daemon_is_killed() {
    let test = "containers over a native mount that is filled";
    if let Err(error) = raises_events() {
        println!("skipped: {test} (needs pre-content events: {error})");
        return;
    }
    let Some(mut bed) = Bed::start_with(test, &settings()) else { return };
    let layers = Layers::new();
    let blob_bytes = layers.push_lazy(&bed.registry.layout(), "1");
    let image = bed.registry.reference("1");
    bed.daemon.ctl(&["rpull", &image]);
    bed.start_waiting(&image, "filled-a");
    bed.start_waiting(&image, "filled-b");
    let (sent, mounts) = (bed.registry.sent_bytes(), bed.mounts());
    assert!(blob_bytes > DATA_BYTES as u64 && sent < blob_bytes / 2, "{sent} of {blob_bytes} bytes were sent");
    let status = bed.daemon.status();
    let mount = &status["mounts"][0];
    assert!(mounts.len() == 1 && mount["native"] == true, "{status}");
    assert!(mount["present_pieces"].as_u64() < mount["pieces"].as_u64(), "{status}");

    // Overlayfs over it is what it is over any other mount.
    let seen = bed.exec("filled-a", "cat /etc/motd; head -c 10 /data | wc -c; stat -c %a:%u /bin/su-id");
    assert_eq!(seen, "upper\n10\n4755:0\n");
    bed.exec("filled-a", "echo new > /etc/new; echo changed >> /etc/motd; rm /data");
    assert_eq!(
        bed.exec("filled-a", "cat /etc/new /etc/motd; ls /"),
        "new\nupper\nchanged\nbin\ndev\netc\nproc\nrun\nsys\ntmp\n"
    );

    bed.daemon.kill();
    drop_caches();
    let containerd = bed.socket();
    let reading = thread::spawn(move || {
        in_container(&containerd, &["tasks", "exec"], &["--exec-id", "waits", "filled-b", "/bin/sha256sum", "/data"])
    });
    thread::sleep(Duration::from_secs(1));
    assert!(!reading.is_finished(), "what is missing is waited for");
    bed.daemon.start_again();
    let read = reading.join().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&read.stdout), Layers::data_digest());
    bed.wait_for_snapshotter();
    assert_eq!(bed.mounts(), mounts);
    assert_eq!(
        bed.run(&image, "filled-c", "cat /etc/motd; sha256sum /data"),
        format!("upper\n{}", Layers::data_digest())
    );

    ["filled-a", "filled-b"].into_iter().for_each(|id| bed.end(id));
    bed.remove_image(&image);
    wait("nothing is left", || bed.directories().is_empty() && bed.mounts().is_empty());
}
