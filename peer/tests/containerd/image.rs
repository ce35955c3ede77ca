//! A small image of two layers with a shell in it, lazy and ordinary.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shoal_rafs::oci::{Layout, Platform, Reference};
use tempfile::TempDir;

use crate::support::{noise, shoal};

/// Bytes of the file that takes most of the image.
pub(crate) const DATA_BYTES: usize = 3_000_000;

/// The trees of the layers, the lowest first.
pub(crate) struct Layers {
    folder: TempDir,
}

impl Layers {
    /// A shell and `/etc`; over it `/data`, a changed and a removed file, and a set-user-id program.
    pub(crate) fn new() -> Self {
        let layers = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        let [lower, upper] = layers.trees();
        fs::DirBuilder::new().mode(0o755).create(&lower).expect("a folder");
        for dir in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
            fs::create_dir(lower.join(dir)).expect("a folder");
        }
        fs::copy("/bin/busybox", lower.join("bin/busybox")).expect("busybox");
        for name in ["sh", "cat", "sha256sum", "sleep", "ls", "stat", "id", "rm", "mount"] {
            symlink("busybox", lower.join("bin").join(name)).expect("a link");
        }
        fs::write(lower.join("etc/motd"), "lower\n").expect("a file");
        fs::write(lower.join("etc/gone"), "lower\n").expect("a file");

        fs::DirBuilder::new().recursive(true).mode(0o755).create(upper.join("etc")).expect("a folder");
        fs::create_dir(upper.join("bin")).expect("a folder");
        fs::write(upper.join("etc/motd"), "upper\n").expect("a file");
        fs::write(upper.join("etc/.wh.gone"), "").expect("a whiteout");
        fs::write(upper.join("data"), Self::data()).expect("a file");
        fs::copy("/bin/busybox", upper.join("bin/su-id")).expect("busybox");
        fs::set_permissions(upper.join("bin/su-id"), fs::Permissions::from_mode(0o4755)).expect("a mode");
        layers
    }

    fn trees(&self) -> [PathBuf; 2] {
        ["lower", "upper"].map(|name| self.folder.path().join(name))
    }

    fn data() -> Vec<u8> {
        noise(7, DATA_BYTES)
    }

    /// What `sha256sum /data` says in a container.
    pub(crate) fn data_digest() -> String {
        format!("{}  /data\n", hex::encode(Sha256::digest(Self::data())))
    }

    /// Builds each layer, merges and pushes them into `layout`; gives the bytes of the blobs.
    pub(crate) fn push_lazy(&self, layout: &Path, tag: &str) -> u64 {
        let at = |name: &str| self.folder.path().join(name);
        let blobs = at("blobs");
        let bootstraps = [at("boot-lower"), at("boot-upper")];
        for (tree, bootstrap) in self.trees().iter().zip(&bootstraps) {
            let arguments = ["image", "build", "--compressor", "zstd", "--source"];
            shoal(&arguments, &[tree, Path::new("--bootstrap"), bootstrap, Path::new("--blob-dir"), &blobs]);
        }
        shoal(&["image", "merge", "--bootstrap"], &[&at("boot"), &bootstraps[0], &bootstraps[1]]);
        let reference = format!("oci:{}:{tag}", layout.display());
        let arguments = ["image", "push", "--bootstrap"];
        shoal(&arguments, &[&at("boot"), Path::new("--blob-dir"), &blobs, Path::new(&reference)]);
        let sizes = fs::read_dir(&blobs).expect("the blobs").map(|blob| blob.expect("a blob").metadata());
        sizes.map(|metadata| metadata.expect("its size").len()).sum()
    }

    /// Puts the layers into `layout` as tars.
    pub(crate) fn push_ordinary(&self, layout: &Path, tag: &str) {
        let layout = Layout::new(layout);
        let tars = self.trees().map(|tree| {
            let tar = tar(&tree);
            layout.put_blob(&tar).map(|id| (id, tar.len())).expect("a layout")
        });
        let layer = |(id, size): &_| layer("application/vnd.oci.image.layer.v1.tar", id, *size, json!({}));
        let diff_ids = tars.iter().map(|(id, _)| format!("sha256:{id}")).collect();
        put(&layout, tag, diff_ids, tars.iter().map(layer).collect());
    }

    /// The same in gzip, as registries have them.
    pub(crate) fn push_packed(&self, layout: &Path, tag: &str) {
        put_packed(&Layout::new(layout), tag, &self.trees());
    }

    /// An image of the lowest layer and one with the file `/etc/other`.
    pub(crate) fn push_other(&self, layout: &Path, tag: &str) {
        let [lower, _] = self.trees();
        let other = self.folder.path().join("other");
        fs::create_dir_all(other.join("etc")).expect("a folder");
        fs::write(other.join("etc/other"), "other\n").expect("a file");
        put_packed(&Layout::new(layout), tag, &[lower, other]);
    }
}

fn put_packed(layout: &Layout, tag: &str, trees: &[PathBuf]) {
    let (mut diff_ids, mut layers) = (Vec::new(), Vec::new());
    for tree in trees {
        let plain = tree.with_extension("tar");
        fs::write(&plain, tar(tree)).expect("a tar");
        diff_ids.push(format!("sha256:{}", hex::encode(Sha256::digest(fs::read(&plain).expect("the tar")))));
        let packed = Command::new("gzip").arg("-nc").arg(&plain).output().expect("gzip runs").stdout;
        let id = layout.put_blob(&packed).expect("a layout");
        layers.push(layer("application/vnd.oci.image.layer.v1.tar+gzip", &id, packed.len(), json!({})));
    }
    put(layout, tag, diff_ids, layers);
}

/// The same bytes each time.
fn tar(tree: &Path) -> Vec<u8> {
    let mut tar = Command::new("tar");
    tar.args(["--owner=0", "--group=0", "--sort=name", "-C"]).arg(tree).args(["-cf", "-", "."]);
    let tar = tar.output().expect("tar runs");
    assert!(tar.status.success());
    tar.stdout
}

/// A layer's descriptor.
pub(crate) fn layer(media_type: &str, id: &impl ToString, size: usize, annotations: Value) -> Value {
    let digest = format!("sha256:{}", id.to_string());
    json!({ "mediaType": media_type, "digest": digest, "size": size, "annotations": annotations })
}

/// Puts an image of these layers into a layout.
pub(crate) fn put(layout: &Layout, tag: &str, diff_ids: Vec<String>, layers: Vec<Value>) {
    let platform = Platform::here();
    let config = json!({
        "architecture": platform.architecture, "os": platform.os, "config": { "Cmd": ["/bin/sleep", "600"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = config.to_string();
    let id = layout.put_blob(config.as_bytes()).expect("a layout");
    let config = layer("application/vnd.oci.image.config.v1+json", &id, config.len(), json!({}));
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    layout.put_manifest(Some(tag), media_type, manifest.to_string().as_bytes()).expect("a layout");
}

/// The manifest with this tag.
pub(crate) fn manifest(layout: &Layout, tag: &str) -> Value {
    let reference: Reference = format!("oci:{}:{tag}", layout.dir().display()).parse().expect("a reference");
    let (id, _) = layout.resolve(&reference).expect("the tag");
    serde_json::from_slice(&fs::read(layout.blob_path(id)).expect("the manifest")).expect("JSON")
}

/// The config that a manifest names.
pub(crate) fn config(layout: &Layout, manifest: &Value) -> Value {
    let digest = manifest["config"]["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
    let id = digest.and_then(|hex| hex.parse().ok()).expect("a digest");
    serde_json::from_slice(&fs::read(layout.blob_path(id)).expect("the config")).expect("JSON")
}
