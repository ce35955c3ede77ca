//! A real application: a Debian with Python, numpy and scipy, half a gigabyte, as `scripts/cold-start-image` makes it and
//! `shoal image convert` converts it. Pulled lazily, run, written to, committed, removed.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use rustix::mount::{UnmountFlags, unmount};
use serde_json::Value;
use shoal_rafs::oci::Layout;

use crate::{
    bed::{Bed, can_run_containers},
    cri, image,
    pod::Pod,
    support::{Registry, drop_caches, shoal, wait},
};

/// Of the image, before and after it is converted.
pub(crate) const TAG: &str = "1";
/// What Python is given: numpy's libraries of C and Fortran take part.
pub(crate) const PROGRAM: &str =
    "import numpy; print((numpy.arange(1001) ** 3).sum(), numpy.linalg.solve([[2., 0.], [0., 4.]], [2., 8.]))";
/// What it prints.
pub(crate) const RESULT: &str = "250500250000 [1. 2.]\n";
/// A start fetches less than this part of the image.
pub(crate) const PART: u64 = 5;
/// Where Debian has modules of Python.
const MODULES: &str = "/usr/lib/python3/dist-packages";

/// The image in its lazy form.
pub(crate) struct Application {
    layout: PathBuf,
}

impl Application {
    /// None, with a line that says why, where containers cannot be run or the image has not been made.
    pub(crate) fn new(test: &str) -> Option<Self> {
        if !can_run_containers(test) {
            return None;
        }
        let cache = env::var_os("SHOAL_CACHE").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache/shoal")));
        let folder = cache.unwrap_or_default().join("cold-start");
        if !folder.join("layout").exists() {
            println!("skipped: {test} (needs the image of scripts/cold-start-image)");
            return None;
        }
        static CONVERTED: OnceLock<PathBuf> = OnceLock::new();
        Some(Self { layout: CONVERTED.get_or_init(|| convert(&folder)).clone() })
    }

    /// Where it is, under [`TAG`].
    pub(crate) fn layout(&self) -> &Path {
        &self.layout
    }

    /// Where the image is that it was converted from, under the same tag.
    pub(crate) fn source(&self) -> PathBuf {
        self.layout.with_file_name("layout")
    }

    fn layers(&self) -> Vec<Value> {
        image::manifest(&Layout::new(&self.layout), TAG)["layers"].as_array().expect("layers").clone()
    }

    /// Encoded bytes, those of all layers.
    pub(crate) fn bytes(&self) -> u64 {
        self.layers().iter().map(|layer| layer["size"].as_u64().expect("a size")).sum()
    }

    /// Nothing that is read lazily may have been downloaded by containerd.
    fn assert_no_blob_in(&self, bed: &Bed, namespace: &str) {
        let blobs = self.layers();
        let blobs: Vec<_> = blobs
            .iter()
            .filter(|layer| layer["annotations"]["containerd.io/snapshot/nydus-blob"] == "true")
            .map(|layer| layer["digest"].as_str().expect("a digest"))
            .collect();
        assert!(blobs.len() >= 3, "{blobs:?}");
        let content = bed.ctr(&["-n", namespace, "content", "ls", "-q"]);
        assert!(content.contains("sha256:"), "containerd knows the manifest: {content}");
        assert!(!blobs.iter().any(|blob| content.contains(blob)), "{content}");
    }
}

/// Converts as a user does, into the folder beside the original; what has been converted before is found there. Gives the layout.
fn convert(folder: &Path) -> PathBuf {
    let layout = folder.join("lazy");
    let oci = |layout: &Path| PathBuf::from(format!("oci:{}:{TAG}", layout.display()));
    shoal(&["image", "convert", "--state"], &[&folder.join("records"), &oci(&folder.join("layout")), &oci(&layout)]);
    layout
}

/// A shell command that computes.
fn compute() -> String {
    format!("python3 -c '{PROGRAM}'")
}

fn pieces(bed: &Bed) -> u64 {
    bed.daemon.status()["store"]["pieces"].as_u64().expect("a figure")
}

#[test]
fn a_kubelet_starts_an_application_of_which_little_is_fetched() {
    let Some(application) = Application::new("an application through the CRI") else { return };
    let bed = Bed::behind(Registry::over(application.layout()), &[]);
    let image = bed.registry.reference(TAG);
    cri::pull(&bed, &image);
    application.assert_no_blob_in(&bed, "k8s.io");
    let pod = Pod::start(&bed, "application");
    let containers = ["first", "second"].map(|name| pod.container(name, &image));
    assert_eq!(pod.exec(&containers[0], &compute()), RESULT);
    let (sent, bytes) = (bed.registry.sent_bytes(), application.bytes());
    println!("a kubelet's start: {sent} of {bytes} bytes were sent");
    assert!(sent < bytes / PART, "{sent} of {bytes} bytes were sent");
    application.assert_no_blob_in(&bed, "k8s.io");

    // Both containers use the same mount, and each has its own over it.
    assert_eq!(bed.mounts().len(), 1);
    pod.exec(&containers[0], &format!("rm -r {MODULES}/numpy"));
    assert_eq!(pod.exec(&containers[1], &compute()), RESULT);
    drop(pod);

    // The image goes, and with it the mount. What was fetched stays for the next time.
    let kept = pieces(&bed);
    assert!(kept > 0);
    for name in bed.ctr(&["-n", "k8s.io", "images", "ls", "-q"]).lines() {
        bed.ctr(&["-n", "k8s.io", "images", "rm", "--sync", name]);
    }
    wait("nothing is mounted", || bed.mounts().is_empty() && bed.directories().is_empty());
    assert_eq!(pieces(&bed), kept);
    let before = bed.registry.sent_bytes();
    cri::pull(&bed, &image);
    drop_caches();
    assert_eq!(cri::run(&bed, &image, "kubelet-again", &compute()), RESULT);
    let again = bed.registry.sent_bytes() - before;
    assert!(again < sent / 4, "{again} of {sent} bytes were sent once more");
}

#[test]
fn an_application_is_shared_changed_committed_and_removed() {
    let Some(application) = Application::new("an application through rpull") else { return };
    let bed = Bed::behind(Registry::over(application.layout()), &["store.keep_unmounted=false".into()]);
    let image = bed.registry.reference(TAG);
    bed.daemon.ctl(&["rpull", &image]);
    application.assert_no_blob_in(&bed, "default");
    bed.start_waiting(&image, "app-a");
    bed.start_waiting(&image, "app-b");
    assert_eq!(bed.mounts().len(), 1, "both use the same mount");
    assert_eq!(bed.exec("app-a", &compute()), RESULT);
    let (sent, bytes) = (bed.registry.sent_bytes(), application.bytes());
    println!("a pulled start: {sent} of {bytes} bytes were sent");
    assert!(sent < bytes / PART, "{sent} of {bytes} bytes were sent");
    drop_caches();
    assert_eq!(bed.exec("app-b", &compute()), RESULT);
    let again = bed.registry.sent_bytes() - sent;
    // What is fetched ahead may be something else this time.
    assert!(again < sent / 4, "{again} of {sent} bytes were sent once more for the second container");

    // A file that is changed is copied from the lazy mount, and a tree that is removed is hidden; for this container alone.
    let version = |id: &str| bed.exec(id, "python3 -c 'import numpy; print(numpy.__version__)'");
    let scipy = "python3 -c 'import importlib.util; print(importlib.util.find_spec(\"scipy\") is not None)'";
    let original = version("app-b");
    bed.exec(
        "app-a",
        &format!("echo '__version__ = \"changed\"' >> {MODULES}/numpy/__init__.py && rm -r {MODULES}/scipy"),
    );
    assert_eq!((version("app-a").as_str(), bed.exec("app-a", scipy).as_str()), ("changed\n", "False\n"));
    assert_eq!((version("app-b"), bed.exec("app-b", scipy)), (original.clone(), "True\n".into()));
    assert_ne!(original, "changed\n");

    // What the container has written becomes a layer, over which others run.
    bed.end_task("app-a");
    let snapshots = |arguments: &[&str]| bed.ctr(&[&["snapshots", "--snapshotter", "shoal"], arguments].concat());
    snapshots(&["commit", "app-layer", "app-a"]);
    bed.ctr(&["containers", "rm", "app-a"]);
    snapshots(&["prepare", "app-work", "app-layer"]);
    let root = tempfile::tempdir().expect("a temporary folder");
    let target = root.path().to_str().expect("UTF-8");
    let mount = snapshots(&["mounts", target, "app-work"]);
    assert!(Command::new("sh").args(["-c", &mount]).status().expect("mount runs").success(), "{mount}");
    let script = format!("python3 -c 'import numpy; print(numpy.__version__)'; {scipy}; {}", compute());
    let committed = bed.printed(&["run"], &["--rm", "--rootfs", target, "app-committed", "/bin/sh", "-c", &script]);
    unmount(root.path(), UnmountFlags::empty()).expect("unmounted");
    assert_eq!(committed, format!("changed\nFalse\n{RESULT}"));
    assert_eq!(bed.mounts().len(), 1);

    // As nothing is to be kept that is not mounted, the store is empty after the last of them.
    snapshots(&["rm", "app-work"]);
    snapshots(&["rm", "app-layer"]);
    bed.end("app-b");
    assert!(pieces(&bed) > 0);
    bed.remove_image(&image);
    bed.collect_garbage();
    wait("nothing is left", || bed.snapshots().is_empty() && bed.mounts().is_empty() && bed.directories().is_empty());
    wait("the store is empty", || pieces(&bed) == 0);
}
