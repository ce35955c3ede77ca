//! Images whose gzip layers stay what they are: what is pushed, what is published, and what a check says of damage.

use super::{docker_registry::start, source::*, *};
use crate::oci::{
    ConvertError, ConvertOptions, ConvertReport, LayerFailure, LayerIndex, Ordinary, OrdinaryManifest, Platform,
    RegistryError, check_image, convert,
};

fn options() -> ConvertOptions {
    let build = BuildOptions { chunk_size: 0x1_0000, ..Default::default() };
    ConvertOptions { build, oci_ref: true, ..Default::default() }
}

fn reference(dir: &TempDir, name: &str) -> Reference {
    format!("oci:{}/{name}", dir.path().display()).parse().unwrap()
}

/// Gzip layers alone: of some MiB, so that there are several contexts, and one that changes it.
fn gzip_layers() -> Vec<Layer> {
    let text: Vec<u8> = noise(9, 2_000_000).iter().flat_map(|byte| [b'a' + byte % 16; 3]).collect();
    let base = Tar::default().dir("data/").file("data/noise", &noise(8, 2_500_000)).file("data/text", &text);
    let top = Tar::default().dir("data/").file("data/.wh.noise", b"").file("data/new", &noise(7, 70_000));
    let [base, top] = [base.file("keep", b"keep").hard_link("kept", "keep").end(), top.end()];
    vec![Layer::gzip(&base), Layer::gzip(&top)]
}

async fn is_right(registry: &Registry, reference: &Reference, source: &Reference) {
    let report = check_image(registry, reference, Some(source), &[]).await.unwrap();
    assert!(report.ok && report.images[0].compared.is_some_and(|compared| compared.files > 1), "{report:#?}");
}

fn stored_bytes(report: &ConvertReport) -> u64 {
    report.images[0].layers.iter().map(|layer| layer.source_bytes).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_its_source_an_image_is_its_index_alone() {
    let (dir, registry) = (TempDir::new().unwrap(), client());
    let (from, to) = (reference(&dir, "images:v1"), reference(&dir, "images:v1-lazy"));
    image(&registry, &from, &gzip_layers()).await;
    let state = Some(dir.path().join("state"));
    let options = ConvertOptions { state, ..options() };
    let report = convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    assert!(report.images[0].layers.iter().all(|layer| layer.indexed && layer.blob.is_some()), "{report:#?}");
    assert!(report.sent_bytes < stored_bytes(&report) / 10, "{report:#?}");
    is_right(&registry, &to, &from).await;

    let manifest = registry.image(&to).await.unwrap().manifest;
    let layers: Vec<_> = gzip_layers().iter().map(|layer| layer.id()).collect();
    let named: Vec<_> = manifest.references.iter().map(|(layer, _)| ObjectId::new(*layer.as_bytes())).collect();
    assert_eq!(named, layers);
    let again = convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    assert_eq!((again.manifest, again.read_bytes, again.sent_bytes), (report.manifest, 0, 0));
    // An ordinary conversion is another thing, and its records are others.
    let ordinary =
        convert(&registry, &from, &to, &ConvertOptions { oci_ref: false, ..options }, |_| {}).await.unwrap();
    assert_ne!(ordinary.manifest, report.manifest);
    assert!(ordinary.images[0].layers.iter().all(|layer| !layer.indexed && !layer.reused));
}

#[tokio::test(flavor = "multi_thread")]
async fn elsewhere_the_source_is_put_beside_it_and_other_layers_are_converted() {
    let (dir, registry) = (TempDir::new().unwrap(), client());
    let (from, to) = (reference(&dir, "source:v1"), reference(&dir, "target:v1"));
    let source = image(&registry, &from, &layers()).await;
    let report = convert(&registry, &from, &to, &options(), |_| {}).await.unwrap();
    let indexed: Vec<_> = report.images[0].layers.iter().map(|layer| layer.indexed).collect();
    // The empty one has no chunks, so there is nothing to index.
    assert_eq!(indexed, [true, false, false, false]);
    assert!(report.copied.sent_bytes > 0, "{report:#?}");
    is_right(&registry, &to, &from).await;
    assert!(registry.manifest(to.source(), source.id).await.is_ok(), "so that nobody throws the layers away");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_with_a_sparse_file_is_converted() {
    let (dir, registry) = (TempDir::new().unwrap(), client());
    let (from, to) = (reference(&dir, "images:v1"), reference(&dir, "images:v1-lazy"));
    let mut layers = gzip_layers();
    layers.push(Layer::gzip(&Tar::default().sparse("data/sparse", 100_000, &noise(6, 5_000)).end()));
    image(&registry, &from, &layers).await;
    let options = ConvertOptions { state: Some(dir.path().join("state")), ..options() };
    let ordinary = ConvertOptions { oci_ref: false, ..options.clone() };
    convert(&registry, &from, &reference(&dir, "images:v1-converted"), &ordinary, |_| {}).await.unwrap();
    let report = convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    let indexed: Vec<_> = report.images[0].layers.iter().map(|layer| layer.indexed).collect();
    assert_eq!(indexed, [true, true, false]);
    assert!(report.images[0].layers[2].reused && report.read_bytes == stored_bytes(&report), "{report:#?}");
    is_right(&registry, &to, &from).await;
    let again = convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    assert_eq!((again.manifest, again.read_bytes, again.sent_bytes), (report.manifest, 0, 0));
    // From nothing it is read twice, and that is told.
    let other = ConvertOptions { state: Some(dir.path().join("other")), ..options };
    let report = convert(&registry, &from, &to, &other, |_| {}).await.unwrap();
    assert!(report.read_bytes > stored_bytes(&report), "{report:#?}");
    let again = convert(&registry, &from, &to, &other, |_| {}).await.unwrap();
    assert_eq!((again.manifest, again.read_bytes, again.sent_bytes), (report.manifest, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_a_layer_or_to_its_index_is_found() {
    let (dir, registry) = (TempDir::new().unwrap(), client());
    let (from, to) = (reference(&dir, "images:v1"), reference(&dir, "images:v1-lazy"));
    image(&registry, &from, &gzip_layers()).await;
    convert(&registry, &from, &to, &options(), |_| {}).await.unwrap();
    let (layer, meta) = registry.image(&to).await.unwrap().manifest.references[0];
    for blob in [layer, meta] {
        let path = dir.path().join(format!("images/blobs/sha256/{blob}"));
        let whole = std::fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        let report = check_image(&registry, &to, None, &[]).await.unwrap();
        let problems: Vec<_> = report.images[0].problems.iter().map(|problem| problem.place.clone()).collect();
        assert!(!report.ok && problems.contains(&format!("blob {blob}")), "{report:#?}");
        std::fs::remove_file(&path).unwrap();
        assert!(!check_image(&registry, &to, None, &[]).await.unwrap().ok);
        std::fs::write(&path, whole).unwrap();
    }
    is_right(&registry, &to, &from).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_what_its_config_says_gets_no_index() {
    let (dir, registry) = (TempDir::new().unwrap(), client());
    let (from, to) = (reference(&dir, "source:v1"), reference(&dir, "target:v1"));
    let mut layers = gzip_layers();
    layers[1].diff_id = ObjectId::new([7; 32]);
    image(&registry, &from, &layers).await;
    let error = convert(&registry, &from, &to, &options(), |_| {}).await.unwrap_err();
    assert!(matches!(error, ConvertError::Layer { source: LayerFailure::DiffId { .. }, .. }), "{error:?}");
    let resolved = registry.resolve(&to).await;
    assert!(matches!(resolved, Err(RegistryError::NotFound { .. } | RegistryError::Layout { .. })), "{resolved:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_mounts_the_layers_and_lists_the_index() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let registry = client();
    let name = |name: &str| -> Reference { format!("{}/{name}", server.host).parse().unwrap() };
    let (from, to) = (name("source/app:v1"), name("lazy/app:v1"));
    let source = image(&registry, &from, &gzip_layers()).await;
    assert_eq!(registry.layer_indexes(to.source(), source.id).await.unwrap(), []);
    let options = ConvertOptions { with_referrer: true, ..options() };
    let report = convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    assert_eq!(report.copied.sent_bytes, 0, "{report:#?}");
    assert!(report.copied.mounted_bytes >= stored_bytes(&report), "{report:#?}");
    assert!(report.sent_bytes < stored_bytes(&report) / 10, "{report:#?}");
    is_right(&registry, &to, &from).await;

    let listed = registry.layer_indexes(to.source(), source.id).await.unwrap();
    assert_eq!(listed.iter().map(|index| index.layers).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(listed[1].manifest, report.manifest);
    // Each is an image of its own: of the first layer alone here.
    let LayerIndex { manifest, .. } = listed[0];
    let stage = check_image(&registry, &to.pinned(manifest), None, &[]).await.unwrap();
    assert!(stage.ok && stage.images[0].image.blobs.len() == 1, "{stage:#?}");
    // Done again, nothing is listed twice.
    convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    assert_eq!(registry.layer_indexes(to.source(), source.id).await.unwrap(), listed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layout_lists_what_is_published_as_well() {
    let (dir, registry) = (TempDir::new().unwrap(), client());
    let (from, to) = (reference(&dir, "images:v1"), reference(&dir, "images:v1-lazy"));
    let source = image(&registry, &from, &gzip_layers()).await;
    let options = ConvertOptions { with_referrer: true, ..options() };
    convert(&registry, &from, &to, &options, |_| {}).await.unwrap();
    assert_eq!(registry.layer_indexes(to.source(), source.id).await.unwrap().len(), 2);
    let bytes = registry.manifest(from.source(), source.id).await.unwrap();
    let platform: Platform = "linux/amd64".parse().unwrap();
    let Ordinary::Image(found) = OrdinaryManifest::find(&bytes, &platform).unwrap() else { panic!("an image") };
    assert_eq!(found.layers.len(), 2);
}
