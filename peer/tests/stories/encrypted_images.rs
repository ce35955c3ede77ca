//! An encrypted image: its bytes travel and are kept as the registry has them, and are read where the key is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use rcgen::KeyPair;
use shoal_rafs::Bootstrap;
use tempfile::TempDir;

use crate::{
    store_scrub::flip,
    support::{
        Built, Daemon, Registry, assert_same, can_mount, drop_caches, files, json, shoal, total_bytes, tree, wait,
    },
};

/// In a file of the image.
const SECRET: &str = "what neither a registry nor a disk shall show";

/// Both halves of a key in PEM.
struct Keys {
    public: PathBuf,
    private: PathBuf,
}

impl Keys {
    fn new(folder: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let file = |kind: &str, pem: String| {
            let path = folder.join(format!("{name}-{kind}.pem"));
            fs::write(&path, pem).expect("a key file");
            path
        };
        Self { public: file("public", key.public_key_pem()), private: file("private", key.serialize_pem()) }
    }

    fn setting(&self) -> String {
        format!("registry.decryption_keys=[\"{}\"]", self.private.display())
    }
}

/// A registry with an encrypted image of a tree, and its secrets.
struct Bed {
    registry: Registry,
    source: TempDir,
    folder: TempDir,
    keys: Keys,
    encoded: u64,
    /// The blob's key and tweak, as the bootstrap has them.
    blob_key: Vec<u8>,
}

impl Bed {
    fn new() -> Self {
        let (source, folder) = (tree(71, 30, 40_000), tempfile::tempdir().expect("a temporary folder"));
        fs::write(source.path().join("secret"), SECRET.repeat(5_000)).expect("a file");
        fs::write(source.path().join("tiny"), "t").expect("a file");
        let keys = Keys::new(folder.path(), "node");
        let built = Built::with(source.path(), &["--compressor", "none", "--batch-size", "0x1000", "--encrypt"]);
        let bootstrap = fs::read(built.bootstrap()).expect("the bootstrap");
        let table = Bootstrap::parse(bootstrap.clone().into()).expect("a bootstrap").super_blocks().blob_table_offset;
        let blob_key = bootstrap[table as usize + 168..][..48].to_vec();
        let mut registry = Registry::start();
        let recipient = format!("jwe:{}", keys.public.display());
        let target = format!("oci:{}:1", registry.layout().display());
        let pushed = shoal(
            &["image", "push", "--json", "--encryption-key", &recipient, &target, "--bootstrap"],
            &[&built.bootstrap(), Path::new("--blob-dir"), &built.blobs()],
        );
        let encoded = json(&pushed)["encoded_bytes"].as_u64().expect("encoded_bytes");
        registry.switch_on();
        Self { registry, source, folder, keys, encoded, blob_key }
    }

    fn daemon(&self, name: &str, settings: &[String]) -> Daemon {
        Daemon::start(name, self.folder.path(), settings)
    }

    /// Neither content nor keys lie in any file below `folder`.
    fn shows_nothing(&self, folder: &Path) {
        for name in files(folder) {
            let bytes = fs::read(folder.join(&name)).unwrap_or_default();
            let holds = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
            let found = [SECRET.as_bytes(), &self.blob_key[..16], &self.blob_key[16..32], &self.blob_key[32..]];
            assert!(!found.into_iter().any(holds), "{}", name.display());
        }
    }

    fn says_nothing(&self, daemon: &Daemon) {
        let log = daemon.log();
        let private = fs::read_to_string(&self.keys.private).expect("the key");
        let pem = private.lines().nth(1).expect("a line of the key");
        assert!(!log.contains(pem) && !log.contains(SECRET), "{log}");
        for part in self.blob_key.chunks(16) {
            assert!(!log.to_lowercase().contains(&hex::encode(part)), "{log}");
        }
    }
}

#[test]
fn an_encrypted_image_travels_as_it_is_and_is_read_with_the_key() {
    if !can_mount("encrypted_images") {
        return;
    }
    let mut bed = Bed::new();
    bed.shows_nothing(&bed.registry.layout());
    let reference = bed.registry.reference("1");
    let mut seed = bed.daemon("seed", &["role=seed".into(), bed.keys.setting()]);
    let graduates = "mounts.graduate_after=1ms".to_owned();
    let mut nodes: Vec<_> = ["one", "two"]
        .into_iter()
        .map(|name| {
            let node = bed.daemon(name, &[seed.join(), bed.keys.setting(), graduates.clone()]);
            node.wait_for_home();
            node.mount(&reference);
            assert_same(bed.source.path(), &node.mountpoint());
            node
        })
        .collect();
    // The home has opened the layer by the manifest, and read the registry for both.
    for node in &nodes {
        assert_eq!(total_bytes(&node.status(), "registry"), 0, "{}", node.status());
    }
    assert!(total_bytes(&seed.status(), "registry") <= bed.encoded, "{}", seed.status());

    // Decoded files would show all of it.
    let native = bed.folder.path().join("native");
    fs::create_dir(&native).expect("a folder");
    let refused = nodes[0].try_ctl(&["mount", "--mode", "native", &reference, native.to_str().expect("UTF-8")]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("mount it over FUSE"), "{said}");

    // What was kept is enough, with the key.
    bed.registry.switch_off();
    seed.stop();
    nodes[0].stop();
    nodes[0].start_again();
    wait("mounted again", || nodes[0].mountpoint().join("link").is_symlink());
    drop_caches();
    assert_same(bed.source.path(), &nodes[0].mountpoint());
    for daemon in nodes.iter_mut().chain([&mut seed]) {
        bed.shows_nothing(&daemon.data_dir());
        bed.says_nothing(daemon);
    }
    nodes.iter_mut().for_each(Daemon::stop);
}

/// Exit code, damaged pieces, pieces that nobody could verify, and good ones.
fn scrubbed(output: &std::process::Output) -> (Option<i32>, [u64; 3]) {
    let result = json(output);
    let figures = ["damaged_pieces", "unverified_pieces", "pieces"];
    (output.status.code(), figures.map(|key| result[key].as_u64().expect("a figure")))
}

#[test]
fn a_store_is_scrubbed_by_who_has_the_key() {
    if !can_mount("encrypted_images") {
        return;
    }
    let bed = Bed::new();
    let mut node = bed.daemon("node", &[bed.keys.setting()]);
    node.mount(&bed.registry.reference("1"));
    assert_same(bed.source.path(), &node.mountpoint());
    let all = node.status()["mounts"][0]["pieces"].as_u64().expect("a figure");
    assert_eq!(scrubbed(&node.store(&["scrub", "--json"])), (Some(0), [0, 0, all]));
    let folder = fs::read_dir(node.data_dir().join("blobs")).expect("a folder").next().expect("a blob");
    let blob = folder.expect("an entry").path().join("encoded");
    flip(&blob, 100);
    assert_eq!(scrubbed(&node.store(&["scrub", "--json"])), (Some(1), [1, 0, all - 1]));
    node.stop();
    let offline = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command.args(["store", "scrub", "--json", "--data-dir"]).arg(node.data_dir()).args(more);
        command.output().expect("shoal store runs")
    };
    let key = bed.keys.private.to_str().expect("UTF-8");
    assert_eq!(scrubbed(&offline(&[])), (Some(0), [0, all - 1, 0]));
    // In another piece.
    flip(&blob, 300_000);
    assert_eq!(scrubbed(&offline(&["--decryption-key", key])), (Some(1), [1, 0, all - 2]));
    let refused = node.store(&["scrub", "--decryption-key", key]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    bed.shows_nothing(&node.data_dir());
}

#[test]
fn without_the_key_there_is_no_mount_and_a_reason() {
    if !can_mount("encrypted_images") {
        return;
    }
    let bed = Bed::new();
    let stranger = Keys::new(bed.folder.path(), "stranger");
    let reference = bed.registry.reference("1");
    for (name, settings, reason) in [
        ("none", Vec::new(), "no decryption key is given"),
        ("stranger", vec![stranger.setting()], "none of 1 decryption keys opens it"),
    ] {
        let mut daemon = bed.daemon(name, &settings);
        let mountpoint = daemon.mountpoint();
        let refused = daemon.try_ctl(&["mount", &reference, mountpoint.to_str().expect("UTF-8")]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && said.contains(reason) && said.contains("bootstrap layer sha256:"),
            "{said}"
        );
        bed.says_nothing(&daemon);
        daemon.stop();
    }
    // A home without the key cannot verify, so who asks it reads the registry.
    let mut home = bed.daemon("home", &["role=seed".into()]);
    let mut node = bed.daemon("node", &[home.join(), bed.keys.setting()]);
    node.wait_for_home();
    node.mount(&reference);
    assert_same(bed.source.path(), &node.mountpoint());
    bed.shows_nothing(&home.data_dir());
    node.stop();
    home.stop();
    let mut daemon = bed.daemon("broken", &[]);
    daemon.stop();
    daemon.fail_to_start(&[format!("registry.decryption_keys=[\"{}\"]", bed.keys.public.display())]);
    assert!(daemon.log().contains("holds no unencrypted private key"), "{}", daemon.log());
}

#[test]
fn images_are_encrypted_and_checked_by_the_command_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let (layout, expected) = (folder.path().join("layout"), folder.path().join("expected"));
    crate::converted::image(&layout, &expected, true);
    let keys = Keys::new(folder.path(), "key");
    let name = |tag: &str| format!("oci:{}:{tag}", layout.display());
    let (plain, lazy, back) = (name("plain"), name("lazy"), name("back"));
    let (public, private) = (format!("jwe:{}", keys.public.display()), keys.private.display().to_string());
    shoal(&["image", "convert", "--encrypt", "--encryption-key", &public, &plain, &lazy], &[]);
    shoal(&["image", "check", "--decryption-key", &private, &lazy, "--source", &plain], &[]);
    shoal(&["image", "convert", "--reverse", "--decryption-key", &private, &lazy, &back], &[]);
    shoal(&["image", "check", "--decryption-key", &private, &lazy, "--source", &back], &[]);
    let built = Built::with(&expected, &["--encrypt"]);
    let (bootstrap, blobs) = (built.bootstrap(), built.blobs());
    let shown = json(&shoal(&["image", "inspect", "--json", "--bootstrap"], &[&bootstrap]));
    assert_eq!(shown["blobs"][0]["encrypted"], true, "{shown}");
    shoal(&["image", "check", "--bootstrap"], &[&bootstrap, Path::new("--blob-dir"), &blobs]);
    let paths = [&expected, &bootstrap, &blobs].map(|path| path.display().to_string());
    let build =
        ["image", "build", "--encrypt", "--source", &paths[0], "--bootstrap", &paths[1], "--blob-dir", &paths[2]];
    let create = ["nydus-image", "create", "--encrypt", "--bootstrap", &paths[1], "--blob-dir", &paths[2], &paths[0]];
    shoal(&create, &[]);
    shoal(&["nydus-image", "check", "--bootstrap", &paths[1], "--blob-dir", &paths[2]], &[]);
    let push = ["image", "push", "--bootstrap", &paths[1], "--blob-dir", &paths[2], &lazy];
    for (arguments, code, said) in [
        (&[&build[..], &["--blob-inline-meta"]].concat()[..], 2, "--blob-inline-meta"),
        (&[&build[..], &["--source-type", "targz-ref"]].concat(), 2, "targz-ref"),
        (&[&build[..], &["--chunk-size", "16777216"]].concat(), 2, "--chunk-size"),
        (&["image", "convert", "--encrypt", &plain, &lazy], 2, "--encryption-key"),
        (
            &["image", "convert", "--encrypt", "--encryption-key", &public, "--cache", &back, &plain, &lazy],
            2,
            "--cache",
        ),
        (
            &["image", "convert", "--encrypt", "--encryption-key", &public, "--merge-index", &plain, &lazy],
            2,
            "--merge-index",
        ),
        (&["image", "convert", "--encrypt", "--encryption-key", &public, "--oci-ref", &plain, &lazy], 2, "--oci-ref"),
        (&["image", "convert", "--encrypt", "--encryption-key", &private, &plain, &lazy], 1, "must be jwe:FILE"),
        (&["image", "check", &lazy], 1, ""),
        (&push, 1, "say whom to encrypt"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_shoal")).args(arguments).output().expect("shoal runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(said), "{arguments:?}: {stderr}");
    }
}
