//! A real application on its whole way: into Debian's docker-registry, converted there to one tag for both kinds of client, pulled
//! from it by clients that know nothing of lazy images, and mounted lazily. All of them have the same tree.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::mount::{UnmountFlags, unmount};
use sha2::{Digest, Sha256};

use crate::{
    application::{Application, PROGRAM, RESULT, TAG},
    bed::Bed,
    registry_server::RegistryServer,
    support::{json, shoal},
};

/// All that a container sees of a tree but the times of directories, which unpacking changes.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("an entry").path();
            let meta = path.symlink_metadata().expect("its attributes");
            let kind = meta.file_type();
            let mut is = format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
            if kind.is_dir() {
                folders.push(path.clone());
            } else {
                is.push_str(&format!(" at {}.{}", meta.mtime(), meta.mtime_nsec()));
            }
            if kind.is_symlink() {
                is.push_str(&format!(" to {:?}", fs::read_link(&path).expect("a target")));
            } else if kind.is_file() {
                let digest = Sha256::digest(fs::read(&path).expect("its bytes"));
                is.push_str(&format!(" of {} {}", meta.len(), hex::encode(digest)));
            } else if kind.is_char_device() || kind.is_block_device() {
                is.push_str(&format!(" device {:x}", meta.rdev()));
            }
            found.insert(path.strip_prefix(root).expect("below the root").to_owned(), is);
        }
    }
    found
}

fn assert_same_tree(what: &str, found: &BTreeMap<PathBuf, String>, expected: &BTreeMap<PathBuf, String>) {
    let names = found.keys().chain(expected.keys());
    let different: Vec<_> = names
        .filter(|name| found.get(*name) != expected.get(*name))
        .map(|name| format!("{}: {:?}, not {:?}", name.display(), found.get(name), expected.get(name)))
        .take(10)
        .collect();
    assert!(different.is_empty(), "{what}: {different:#?}");
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("it runs");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn every_kind_of_client_has_the_same_tree_of_an_application() {
    let test = "an application through a registry for every kind of client";
    let Some(application) = Application::new(test) else { return };
    let Some(server) = RegistryServer::start(test, None) else { return };
    for program in ["skopeo", "umoci"] {
        if Command::new(program).arg("--version").output().is_err() {
            return println!("skipped: {test} (needs {program})");
        }
    }
    let [plain, both] = ["plain", "both"].map(|tag| format!("{}/team/app:{tag}", server.host));
    let source = format!("oci:{}:{TAG}", application.source().display());
    let copied = json(&shoal(&["image", "copy", "--json", &source, &plain], &[]));
    let converted = json(&shoal(&["image", "convert", "--merge-index", "--json", &plain, &both], &[]));
    assert_eq!(converted["copied"]["sent_bytes"], 0, "{converted}");
    let checked = json(&shoal(&["image", "check", "--source", &plain, "--json", &both], &[]));
    assert_eq!((&checked["ok"], checked["images"].as_array().map(Vec::len)), (&true.into(), Some(1)), "{checked}");

    let Some(bed) = Bed::start(test) else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let [layout, bundle, unpacked, lazy] = ["layout", "bundle", "unpacked", "lazy"].map(path);
    fs::create_dir(&unpacked).expect("a folder");
    fs::create_dir(&lazy).expect("a folder");
    bed.daemon.mount_at(&both, lazy.as_ref());
    let expected = tree(lazy.as_ref());
    bed.daemon.umount(lazy.as_ref());
    assert!(expected.len() > 10_000, "{} names", expected.len());

    run(
        "skopeo",
        &["copy", "--quiet", "--src-tls-verify=false", &format!("docker://{both}"), &format!("oci:{layout}:it")],
    );
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(Path::new(&layout).join("index.json")).expect("an index")).expect("JSON");
    assert_eq!(index["manifests"][0]["digest"], copied["manifest"], "the ordinary image, as it was");
    run("umoci", &["unpack", "--image", &format!("{layout}:it"), &bundle]);
    assert_same_tree("skopeo", &tree(&Path::new(&bundle).join("rootfs")), &expected);

    bed.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &both]);
    bed.ctr(&["images", "mount", "--snapshotter", "overlayfs", &both, &unpacked]);
    let found = tree(unpacked.as_ref());
    unmount(&*unpacked, UnmountFlags::empty()).expect("unmounted");
    assert_same_tree("containerd", &found, &expected);
    bed.remove_image(&both);

    bed.daemon.ctl(&["rpull", &both]);
    assert_eq!(bed.run(&both, "lazy", &format!("python3 -c '{PROGRAM}'")), RESULT);
}
