//! Programs that call `nydus-image` call this one, with the arguments that they pass to it: those of the converter that
//! BuildKit and nydusify share, FIFOs at both ends included.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;
use sha2::{Digest, Sha256};
use shoal_rafs::{ImageFile, Toc};
use tempfile::TempDir;

use crate::support::{assert_same, noise, shoal};

/// A folder, with the program in it under the other name.
struct Bed {
    folder: TempDir,
}

impl Bed {
    fn new() -> Self {
        let bed = Self { folder: tempfile::tempdir().expect("a folder") };
        symlink(env!("CARGO_BIN_EXE_shoal"), bed.path("nydus-image")).expect("a link");
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    fn folder(&self, name: &str) -> PathBuf {
        fs::create_dir_all(self.path(name)).expect("a folder");
        self.path(name)
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name)).expect("a file")).expect("JSON")
    }

    /// Runs it with `input` on standard input.
    fn try_run(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = Command::new(self.path("nydus-image"));
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        // It may end without reading.
        let _ = child.stdin.take().expect("its standard input").write_all(input.as_bytes());
        child.wait_with_output().expect("it ends")
    }

    fn run(&self, arguments: &[&str], input: &str) -> Output {
        let output = self.try_run(arguments, input);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    /// Runs it while `input` is written into the FIFO `tar`, and gives what comes out of the FIFO `blob`.
    fn through_fifos(&self, arguments: &[&str], input: &[u8]) -> (Output, Vec<u8>) {
        let [tar, blob] = ["tar.fifo", "blob.fifo"].map(|name| self.path(name));
        for fifo in [&tar, &blob] {
            // Left by the last run.
            let _ = fs::remove_file(fifo);
            mknodat(CWD, fifo, FileType::Fifo, Mode::RWXU, 0).expect("a FIFO");
        }
        std::thread::scope(|scope| {
            // Without a reader it would wait for one.
            if !input.is_empty() {
                // A builder that fails reads no further.
                scope.spawn(|| fs::File::options().write(true).open(tar).expect("the FIFO").write_all(input).ok());
            }
            let reader = scope.spawn(|| {
                let mut bytes = Vec::new();
                fs::File::open(blob).expect("the FIFO").read_to_end(&mut bytes).expect("bytes");
                bytes
            });
            (self.try_run(arguments, "/"), reader.join().expect("a reader"))
        })
    }

    /// A layer as the converter makes it.
    fn pack(&self, more: &[&str], tar: &[u8]) -> Vec<u8> {
        let [source, blob] = ["tar.fifo", "blob.fifo"].map(|name| self.text(name));
        let arguments = ["create", "--log-level", "warn", "--prefetch-policy", "fs", "--blob", &blob];
        let arguments = [&arguments[..], &["--whiteout-spec", "none", "--fs-version", "6", "--type", "tar-rafs"]];
        let inlined = ["--blob-inline-meta", "--features", "blob-toc"];
        let (output, blob) =
            self.through_fifos(&[&arguments.concat(), &inlined[..], more, &[source.as_str()]].concat(), tar);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!((&output.stdout[..], &output.stderr[..]), (&b""[..], &b""[..]));
        blob
    }

    /// Takes the bootstrap out of a layer and gives the file the name of the layer.
    fn take_bootstrap(&self, layer: &[u8], name: &str) -> String {
        let stored = self.folder("blobs").join(digest(layer));
        fs::write(&stored, layer).expect("a blob");
        self.folder("merge");
        fs::write(self.path("merge").join(name), ImageFile::open(&stored).expect("a layer").bootstrap())
            .expect("a bootstrap");
        self.text(&format!("merge/{name}"))
    }
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn tar(folder: &Path) -> Vec<u8> {
    let packed = Command::new("tar").arg("-C").arg(folder).args(["--numeric-owner", "-cf", "-", "."]).output();
    packed.expect("tar runs").stdout
}

fn untar(tar: &Path, folder: &Path) {
    let unpacked = Command::new("tar").arg("-C").arg(folder).arg("-xf").arg(tar).status();
    assert!(unpacked.expect("tar runs").success());
}

/// The part of a layer with this name, by its table of contents.
fn part(layer: &[u8], name: &str) -> Vec<u8> {
    let header = layer.len() - 512;
    let size = std::str::from_utf8(&layer[header + 124..header + 135]).expect("a number");
    let start = header - usize::from_str_radix(size, 8).expect("octal");
    let toc = Toc::parse(&layer[start..header]).expect("a table of contents");
    let range = toc.entry(name).expect("a part").range.clone();
    layer[range.start as usize..range.end as usize].to_vec()
}

/// Two layers, the second of which takes away from the first, and what they stand for together.
fn layers(bed: &Bed) -> [Vec<u8>; 2] {
    let [base, top, expected] = ["base", "top", "expected"].map(|name| bed.folder(name));
    for root in [&base, &expected] {
        fs::create_dir_all(root.join("data")).expect("a folder");
        fs::write(root.join("large"), noise(1, 3_000_000)).expect("a file");
        fs::hard_link(root.join("large"), root.join("data/again")).expect("a hard link");
        fs::write(root.join("data/text"), "the same words ".repeat(20_000)).expect("a file");
        symlink("data/text", root.join("link")).expect("a link");
    }
    fs::write(base.join("data/gone"), noise(2, 10_000)).expect("a file");
    fs::create_dir(top.join("data")).expect("a folder");
    fs::write(top.join("data/.wh.gone"), "").expect("a whiteout");
    for root in [&top, &expected] {
        fs::write(root.join("data/new"), noise(3, 100_000)).expect("a file");
        fs::write(root.join("data/shared"), noise(1, 3_000_000)).expect("a file");
    }
    [tar(&base), tar(&top)]
}

#[test]
fn callers_find_what_they_look_for() {
    let bed = Bed::new();
    let help = String::from_utf8(bed.run(&["create", "-h"], "").stdout).expect("text");
    for feature in
        ["--type", "tar-rafs", "targz-ref", "tar-tarfs", "--batch-size", "--blob-inline-meta", "--chunk-dict"]
    {
        assert!(help.contains(feature), "{feature}: {help}");
    }
    // What is listed counts as supported.
    assert!(!help.contains("--encrypt"), "{help}");
    let verb = shoal(&["nydus-image", "create", "-h"], &[]);
    assert!(String::from_utf8_lossy(&verb.stdout).contains("tar-rafs"));
    let version = String::from_utf8(bed.run(&["--version"], "").stdout).expect("text");
    let expected = format!("Version: \tv{}", env!("CARGO_PKG_VERSION"));
    assert!(version.starts_with("nydus-image") && version.lines().any(|line| line == expected), "{version:?}");
    let source = bed.text("source");
    bed.folder("source");
    for (arguments, code) in [
        (&["create", "--blob", "/none", "--encrypt", "--blob-inline-meta", &source][..], 2),
        (&["create", "--blob", "/none", "--fs-version", "5", "--blob-inline-meta", &source], 2),
        (&["create", "--bootstrap", "/none", "--blob", "/none", "--type", "tar-tarfs", &source], 2),
        (&["create", "--bootstrap", "/none", "--blob-dir", &source, "--type", "tar-tarfs", "--encrypt", &source], 2),
        (&["create", "--bootstrap", "/none", "--blob-dir", &source, "--blob-id", &"0".repeat(64), &source], 2),
        (
            &[
                "create",
                "--blob",
                "/none",
                "--type",
                "targz-ref",
                "--compressor",
                "zstd",
                "--blob-inline-meta",
                &source,
            ],
            2,
        ),
        (&["create", "--blob", "/none", &source], 2),
        (&["create", "--blob-inline-meta", &source], 2),
        (&["merge", "--bootstrap", "/none", "--blob-sizes", "1,2", &source], 2),
        (&["unpack", "--bootstrap", "/none", "--output", "/none", "--backend-type", "oss"], 2),
        (&["unpack", "--bootstrap", "/none", "--output", "/none"], 1),
        (&["merge", "--bootstrap", "/none", "/none"], 1),
        (&["check", "/none"], 1),
        (&["check"], 2),
        (&[], 2),
    ] {
        let output = bed.try_run(arguments, "");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(!said.is_empty(), "{arguments:?}");
    }
}

/// As the snapshotter asks for it: the tar comes from standard input or a FIFO and is kept by whoever asks.
#[test]
fn a_bootstrap_over_a_tar() {
    let bed = Bed::new();
    let tars = layers(&bed);
    bed.folder("cache");
    let [cache, merged, report] = ["cache", "merged", "report"].map(|name| bed.text(name));
    let mut sources = Vec::new();
    for (number, tar) in tars.iter().enumerate() {
        let [source, boot] = [format!("tar-{number}"), format!("boot-{number}")].map(|name| bed.text(&name));
        let id = digest(tar);
        fs::write(&source, tar).expect("a tar");
        let arguments = ["create", "--log-level", "warn", "--type", "tar-tarfs", "--bootstrap", &boot];
        // Its own name is that of the tar as well.
        let named = if number == 0 { &[][..] } else { &["--blob-id", id.as_str()][..] };
        bed.run(&[&arguments[..], named, &["--blob-dir", &cache, "--output-json", &report, &source]].concat(), "");
        assert_eq!(bed.json("report")["blobs"], serde_json::json!([id]));
        assert_eq!(bed.json("report")["compressor"], "none");
        sources.push(boot);
    }
    assert_eq!(fs::read_dir(&cache).expect("a folder").count(), 0);
    for tar in &tars {
        fs::write(Path::new(&cache).join(digest(tar)), tar).expect("a tar");
    }
    bed.run(&["merge", "--bootstrap", &merged, "--output-json", &report, &sources[0], &sources[1]], "");
    assert_eq!(bed.json("report")["blobs"].as_array().map(Vec::len), Some(2));
    bed.run(&["check", "--bootstrap", &merged, "--blob-dir", &cache], "");
    let output = bed.text("out.tar");
    bed.run(&["unpack", "--bootstrap", &merged, "--blob-dir", &cache, "--output", &output], "");
    assert!(fs::metadata(output).expect("a tar").len() > 3_000_000);
}

#[test]
fn layers_come_and_go_through_fifos() {
    for more in [&[][..], &["--compressor", "lz4_block", "--chunk-size", "0x10000"], &["--batch-size", "0x40000"]] {
        let bed = Bed::new();
        let blobs = layers(&bed).map(|tar| bed.pack(more, &tar));
        let sources = blobs.each_ref().map(|blob| bed.take_bootstrap(blob, &digest(blob)));
        let [target, report] = ["bootstrap", "report"].map(|name| bed.text(name));
        let merge = ["merge", "--log-level", "warn", "--prefetch-policy", "fs", "--output-json", &report];
        let merge = [&merge[..], &["--bootstrap", &target], &sources.each_ref().map(String::as_str)].concat();
        let output = bed.run(&merge, "/");
        assert_eq!((&output.stdout[..], &output.stderr[..]), (&b""[..], &b""[..]));
        let expected: Vec<_> = blobs.iter().map(|blob| digest(blob)).collect();
        let merged = bed.json("report");
        let ids = merged["blobs"].as_array().expect("a list").iter();
        let mut found: Vec<_> = ids.map(|id| id.as_str().expect("an id")).collect();
        found.sort_by_key(|id| expected.iter().position(|other| other == id));
        assert_eq!(found, expected);

        // What a check says of the bootstrap alone, and of all.
        let checked = bed.text("checked");
        bed.run(&["check", "--log-level", "warn", "--output-json", &checked, "--bootstrap", &target], "");
        assert_eq!(bed.json("checked")["blobs"], merged["blobs"]);
        assert_eq!(bed.json("checked")["fs_version"], "6");
        let dir = bed.text("blobs");
        bed.run(&["check", "--verbose", "--blob-dir", &dir, &target], "");
        let inspected = bed.run(&["inspect", &target, "--request", "blobs"], "").stdout;
        let inspected: Value = serde_json::from_slice(&inspected).expect("JSON");
        assert_eq!(inspected[0]["blob_id"], merged["blobs"][0]);
        let whole = bed.text("whole.tar");
        bed.run(&["unpack", "--blob-dir", &dir, "--bootstrap", &target, "--output", &whole], "");
        let tree = bed.folder("tree");
        untar(&bed.path("whole.tar"), &tree);
        assert_same(&bed.path("expected"), &tree);
        let inode = |name: &str| fs::metadata(tree.join(name)).expect("metadata").ino();
        assert_eq!(inode("large"), inode("data/again"));

        for (blob, source) in blobs.iter().zip(["base", "top"]) {
            // Where batches lie, only the whole blob tells.
            let data = if more.contains(&"--batch-size") { blob.clone() } else { part(blob, "image.blob") };
            fs::write(bed.path("image.blob"), data).expect("chunks");
            bed.take_bootstrap(blob, "image.boot");
            let [boot, data, out] = ["merge/image.boot", "image.blob", "blob.fifo"].map(|name| bed.text(name));
            let arguments = ["unpack", "--log-level", "warn", "--bootstrap", &boot, "--output", &out];
            let (output, tar) = bed.through_fifos(&[&arguments[..], &["--blob", &data]].concat(), b"");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            fs::write(bed.path("layer.tar"), tar).expect("a tar");
            let back = bed.folder(&format!("{source}-back"));
            untar(&bed.path("layer.tar"), &back);
            assert_same(&bed.path(source), &back);
        }
    }
}

#[test]
fn a_gzip_layer_is_referred_to() {
    let bed = Bed::new();
    let [tar, _] = layers(&bed);
    let mut gzip = Command::new("gzip").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("gzip");
    let (mut input, mut layer) = (gzip.stdin.take().expect("a pipe"), Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(&tar).expect("gzip reads"));
        gzip.stdout.take().expect("a pipe").read_to_end(&mut layer).expect("gzip writes");
    });
    assert!(gzip.wait().expect("gzip ends").success());
    let [source, blob] = ["tar.fifo", "blob.fifo"].map(|name| bed.text(name));
    let arguments = ["create", "--log-level", "warn", "--type", "targz-ref", "--blob-inline-meta"];
    let arguments = [&arguments[..], &["--features", "blob-toc", "--blob", &blob, &source]].concat();
    let (output, index) = bed.through_fifos(&arguments, &layer);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let boot = bed.take_bootstrap(&index, &digest(&layer));
    fs::write(bed.path("blobs").join(digest(&layer)), &layer).expect("the layer");
    let header = index.len() - 512;
    let toc = digest(&index[header - 4 * 128..header]);
    let [target, report, dir] = ["bootstrap", "report", "blobs"].map(|name| bed.text(name));
    let (id, size) = (digest(&index), index.len().to_string());
    let merge = ["merge", "--output-json", &report, "--bootstrap", &target, &boot, "--blob-digests", &id];
    bed.run(&[&merge[..], &["--blob-toc-digests", &toc, "--blob-sizes", &size]].concat(), "");
    assert_eq!(bed.json("report")["blobs"], serde_json::json!([digest(&layer)]));
    assert_eq!(bed.json("report")["compressor"], "gzip");
    bed.run(&["check", "--bootstrap", &target, "--blob-dir", &dir], "");
    let whole = bed.text("whole.tar");
    bed.run(&["unpack", "--blob-dir", &dir, "--bootstrap", &target, "--output", &whole], "");
    let tree = bed.folder("tree");
    untar(&bed.path("whole.tar"), &tree);
    assert_same(&bed.path("base"), &tree);
}

#[test]
fn a_directory_over_a_parent_and_beside_a_dictionary() {
    let bed = Bed::new();
    layers(&bed);
    let [base, top, dir] = ["base", "top", "blobs"].map(|name| bed.text(name));
    let [parent, child, first, second] = ["parent", "child", "first", "second"].map(|name| bed.text(name));
    let create = ["create", "--log-level", "warn", "--source-type", "directory", "--blob-dir", &dir];
    bed.run(&[&create[..], &["--bootstrap", &parent, "--output-json", &first, &base]].concat(), "");
    let over = ["--parent-bootstrap", &parent, "--bootstrap", &child, "--output-json", &second, &top];
    bed.run(&[&create[..], &over].concat(), "");
    let (old, new) = (bed.json("first"), bed.json("second"));
    assert_eq!((&old["blobs"][0], new["blobs"].as_array().map(Vec::len)), (&new["blobs"][0], Some(2)));
    assert_eq!((&old["bootstrap"], &old["compressor"]), (&Value::from(parent.as_str()), &Value::from("zstd")));
    let whole = bed.text("whole.tar");
    bed.run(&["unpack", "--blob-dir", &dir, &child, "--output", &whole], "");
    let tree = bed.folder("tree");
    untar(&bed.path("whole.tar"), &tree);
    assert_same(&bed.path("expected"), &tree);

    // All but one file of the upper layer is in the lower one; the blob goes to a file of its own, the bootstrap beside it.
    let (dictionary, blob, third) = (format!("bootstrap={parent}"), bed.text("own.blob"), bed.text("third"));
    let out = bed.text("bootstraps");
    let create = ["create", "--type", "dir-rafs", "--chunk-dict", &dictionary, "--blob", &blob, "--blob-dir", &out];
    let output = bed.run(&[&create[..], &["--output-json", &third, &top]].concat(), "");
    assert!(String::from_utf8_lossy(&output.stdout).contains("in earlier images"));
    let report = bed.json("third");
    let own = digest(&fs::read(bed.path("own.blob")).expect("a blob"));
    assert_eq!(report["blobs"], serde_json::json!([old["blobs"][0], own]));
    let bootstrap = fs::read(report["bootstrap"].as_str().expect("a path")).expect("a bootstrap");
    assert_eq!(Path::new(report["bootstrap"].as_str().unwrap()), bed.path("bootstraps").join(digest(&bootstrap)));
    assert_eq!(fs::read_dir(bed.path("bootstraps")).expect("a folder").count(), 1);
    fs::rename(bed.path("own.blob"), bed.path("blobs").join(own)).expect("a rename");
    bed.run(&["check", "--blob-dir", &dir, report["bootstrap"].as_str().unwrap()], "");
}

#[test]
fn a_broken_layer_ends_both_fifos() {
    let bed = Bed::new();
    let [mut tar, _] = layers(&bed);
    tar.truncate(2_000_000);
    let [source, blob] = ["tar.fifo", "blob.fifo"].map(|name| bed.text(name));
    let arguments = ["create", "--type", "tar-rafs", "--blob-inline-meta", "--blob", &blob, &source];
    let (output, _) = bed.through_fifos(&arguments, &tar);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("cut off"), "{said}");
}
