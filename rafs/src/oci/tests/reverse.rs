//! The way back: OCI images of Nydus images, with the same tree and the same bytes every time.

use serde_json::Value;

use super::{bed::Bed, docker_registry::start, source::*, *};
use crate::oci::{
    ConvertOptions, LayerCompression, ReverseError, ReverseReport, check_image, convert,
    document::{Content, Document},
    reverse,
};

async fn back(bed: &Bed, from: &Reference, to: &Reference, compression: LayerCompression) -> ReverseReport {
    reverse(&bed.registry, from, to, &[], compression, |_| {}).await.unwrap()
}

/// A check that reads the layers of `plain` with other code than what wrote them.
async fn same_tree(bed: &Bed, lazy: &Reference, plain: &Reference) {
    let found = check_image(&bed.registry, lazy, Some(plain), &[]).await.unwrap();
    assert!(found.ok && found.images.iter().all(|image| image.compared.is_some()), "{found:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_layer_has_the_whole_tree() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let (lazy, plain) = (bed.reference("lazy", "v1"), bed.reference("plain", "v1"));
    bed.convert(&lazy, &bed.options()).await.unwrap();
    let report = back(&bed, &lazy, &plain, LayerCompression::Gzip).await;
    assert!(!report.images[0].per_layer && report.images[0].layers.len() == 1, "{report:#?}");
    assert!(report.sent_bytes > 0 && report.read_bytes > 0);
    same_tree(&bed, &lazy, &plain).await;
    let bytes = bed.registry.manifest(plain.source(), report.manifest).await.unwrap();
    let Content::Image(links) = Document::parse(&bytes).unwrap().content else { panic!("a manifest") };
    let config = bed.registry.blob(plain.source(), links.config.descriptor.id, 1 << 20).await.unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["config"]["Cmd"][0], "/bin/tool");
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 1);
    assert_eq!(config["history"], serde_json::json!([{ "created_by": "a test" }]));
    // The same bytes again, and others with another compression, of the same tar.
    let again = back(&bed, &lazy, &plain, LayerCompression::Gzip).await;
    assert_eq!((again.manifest, again.sent_bytes), (report.manifest, 0));
    let zstd = bed.reference("plain", "zstd");
    let report = back(&bed, &lazy, &zstd, LayerCompression::Zstd).await;
    assert_ne!(report.manifest, again.manifest);
    same_tree(&bed, &lazy, &zstd).await;
    // And forth: it can be converted like any other image.
    let forth = bed.reference("forth", "v1");
    convert(&bed.registry, &zstd, &forth, &bed.options(), |_| {}).await.unwrap();
    same_tree(&bed, &forth, &plain).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_whose_blobs_hold_their_trees_come_back_one_by_one() {
    let bed = Bed::new();
    let base = Tar::default().dir("./").file("a", &noise(1, 200_000)).dir("d/").file("d/gone", b"gone").dir("e/");
    let base = base.file("e/old", b"old").symlink("link", "a").end();
    let top = Tar::default().dir("./").dir("d/").file("d/.wh.gone", b"").file("d/new", &noise(2, 70_000)).dir("e/");
    let top = top.file("e/.wh..wh..opq", b"").file("e/fresh", b"fresh").hard_link("e/again", "e/fresh").end();
    image(&bed.registry, &bed.source(), &[Layer::gzip(&base), Layer::gzip(&top)]).await;
    let (lazy, plain) = (bed.reference("lazy", "v1"), bed.reference("plain", "v1"));
    let inline = BuildOptions { inline_meta: true, toc: true, ..bed.options().build };
    bed.convert(&lazy, &ConvertOptions { build: inline, ..bed.options() }).await.unwrap();
    let report = back(&bed, &lazy, &plain, LayerCompression::Gzip).await;
    assert!(report.images[0].per_layer && report.images[0].layers.len() == 2, "{report:#?}");
    same_tree(&bed, &lazy, &plain).await;
    // Layer by layer it is what it was: the upper one has no file of the lower one.
    let bytes = bed.registry.manifest(plain.source(), report.manifest).await.unwrap();
    let Content::Image(links) = Document::parse(&bytes).unwrap().content else { panic!("a manifest") };
    let upper = bed.registry.blob(plain.source(), links.layers[1].descriptor.id, 1 << 20).await.unwrap();
    let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(&upper[..]));
    let paths = tar.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string());
    let paths: Vec<_> = paths.collect();
    assert!(paths.iter().any(|path| path == "d/.wh.gone") && !paths.iter().any(|path| path == "a"), "{paths:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_platforms_come_back_under_one_index() {
    let bed = Bed::new();
    index(&bed.registry, &bed.source()).await;
    let (lazy, plain) = (bed.reference("lazy", "v1"), bed.reference("plain", "v1"));
    bed.convert(&lazy, &ConvertOptions { merge_index: true, ..bed.options() }).await.unwrap();
    let report = back(&bed, &lazy, &plain, LayerCompression::Zstd).await;
    let names: Vec<_> = report.images.iter().map(|image| image.platform.as_str()).collect();
    assert_eq!(names, ["linux/amd64", "linux/arm64/v8"]);
    let bytes = bed.registry.manifest(plain.source(), report.manifest).await.unwrap();
    let Content::Index(children) = Document::parse(&bytes).unwrap().content else { panic!("an index") };
    assert!(children.iter().all(|child| !child.is_nydus), "{children:#?}");
    same_tree(&bed, &lazy, &plain).await;
    let arm = ["linux/arm64".parse().unwrap()];
    let one = reverse(&bed.registry, &lazy, &plain, &arm, LayerCompression::Gzip, |_| {}).await.unwrap();
    assert_eq!((one.images.len(), one.manifest), (1, one.images[0].manifest));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_nydus_image_or_is_damaged_leaves_no_tag() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let (lazy, plain) = (bed.reference("lazy", "v1"), bed.reference("plain", "v1"));
    let error = reverse(&bed.registry, &bed.source(), &plain, &[], LayerCompression::Gzip, |_| {}).await.unwrap_err();
    assert!(crate::chain(&error).contains("convert it first"), "{}", crate::chain(&error));
    let report = bed.convert(&lazy, &bed.options()).await.unwrap();
    let blob = report.images[0].layers[0].blob.unwrap();
    let path = crate::oci::Layout::new(lazy.source().layout_dir().unwrap()).blob_path(blob.id);
    let mut stored = std::fs::read(&path).unwrap();
    stored[1000] ^= 1;
    std::fs::write(&path, stored).unwrap();
    let error = reverse(&bed.registry, &lazy, &plain, &[], LayerCompression::Gzip, |_| {}).await.unwrap_err();
    assert!(matches!(error, ReverseError::Registry(_)), "{error:?}");
    bed.nothing_is_under(&plain).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn through_a_registry_and_a_client_that_knows_nothing_of_nydus() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let name = |name: &str| -> Reference { format!("{}/{name}", server.host).parse().unwrap() };
    let (lazy, plain) = (name("lazy:v1"), name("plain:v1"));
    bed.convert(&lazy, &bed.options()).await.unwrap();
    back(&bed, &lazy, &plain, LayerCompression::Gzip).await;
    same_tree(&bed, &lazy, &plain).await;
    // skopeo compares config and layers as it copies into the old form.
    let target = format!("docker-archive:{}", bed.dir.path().join("plain.tar").display());
    let copied = std::process::Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--src-tls-verify=false", &format!("docker://{plain}"), &target])
        .output();
    let Ok(copied) = copied else { return println!("skipped: skopeo is not installed") };
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
}
