//! Conversion from layout to layout: what comes out, what is done twice, and what a broken source leaves behind.

use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::{bed::Bed, source::*, *};
use crate::oci::{
    ConvertError, ConvertEvent, ConvertOptions, ConvertReport, LayerFailure, Layout, RegistryError, check_image,
    convert,
    document::{Content, Document},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_converted_image_has_the_tree_of_its_source() {
    let bed = Bed::new();
    let source = image(&bed.registry, &bed.source(), &layers()).await;
    let target = bed.reference("target", "v1");
    let read = Arc::new(Mutex::new((0, 0, 0)));
    let seen = Arc::clone(&read);
    let watch = move |event| {
        let mut seen = seen.lock().unwrap();
        match event {
            ConvertEvent::Platform { layer_bytes } => seen.0 += layer_bytes,
            ConvertEvent::Read(bytes) => seen.1 += bytes,
            ConvertEvent::Layer(_) => seen.2 += 1,
        }
    };
    let report = convert(&bed.registry, &bed.source(), &target, &bed.options(), watch).await.unwrap();
    let all: u64 = layers().iter().map(|layer| layer.stored.len() as u64).sum();
    let twice = layers()[1].stored.len() as u64;
    assert_eq!(*read.lock().unwrap(), (all, all - twice, 4), "a layer that is there twice is converted once");
    assert_eq!(report.read_bytes, all - twice);
    let converted = &report.images[0];
    assert_eq!((converted.source, converted.platform.as_str()), (source.id, "linux/amd64"));
    assert!(converted.layers.iter().all(|layer| !layer.reused));
    bed.is_right(&target).await;

    // What a client sees: environment and command are the source's, layers are the blobs and the bootstrap.
    let image = bed.registry.image(&target).await.unwrap();
    let key = "containerd.io/snapshot/nydus-source-digest";
    assert_eq!(image.manifest.annotations[key], format!("sha256:{}", source.id));
    assert!(
        !image.manifest.annotations.contains_key("containerd.io/snapshot/nydus-source-reference"),
        "a local path"
    );
    let config = bed.registry.blob(&image.source, image.manifest.config.id, 1 << 20).await.unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["config"]["Cmd"][0], "/bin/tool");
    assert_eq!(config["history"].as_array().unwrap().len(), 2);
}

/// As containerd 1.6 unpacks it for overlayfs: a directory takes the place of the link, with the attributes of the one that the
/// link led to.
#[tokio::test(flavor = "multi_thread")]
async fn files_below_a_link_of_a_lower_layer_are_where_runtimes_put_them() {
    let bed = Bed::new();
    let mut all = layers();
    let upper = Tar::default().file("lib/mine", b"mine").file("up/down/mine", b"mine").file("none/mine", b"mine");
    let links = Tar::default().symlink("up", "bin/../lib/..").dir("usr/down/").symlink("none", "usr/nowhere");
    all.extend([Layer::gzip(&links.end()), Layer::gzip(&upper.end())]);
    image(&bed.registry, &bed.source(), &all).await;
    let target = bed.reference("target", "v1");
    bed.convert(&target, &bed.options()).await.unwrap();
    bed.is_right(&target).await;
    let image = bed.registry.image(&target).await.unwrap();
    let layer = bed.registry.blob(&image.source, image.manifest.bootstrap.id, 1 << 20).await.unwrap();
    let bootstrap = read_bootstrap_layer(&layer[..], &LayerLimits::default()).unwrap().bootstrap;
    let bootstrap = Bootstrap::parse(bootstrap).unwrap();
    for (path, mode) in [("lib", 0o750), ("usr/lib", 0o750), ("up", 0o750), ("up/down", 0o755), ("none", 0o755)] {
        let at = |nid, name: &str| bootstrap.inode(nid).unwrap().lookup(name.as_bytes()).unwrap().unwrap();
        let inode = bootstrap.inode(path.split('/').fold(bootstrap.root(), at)).unwrap();
        assert_eq!((inode.kind(), inode.mode() & 0o7777), (crate::Kind::Directory, mode), "{path}");
        assert_eq!(inode.lookup(b"mine").unwrap().is_some(), path != "usr/lib" && path != "up", "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_of_the_source_is_said_of_the_image() {
    let bed = Bed::new();
    let said = |name: &str| {
        serde_json::json!({
            "org.opencontainers.image.version": name,
            "org.opencontainers.image.ref.name": "not here",
            "containerd.io/snapshot/nydus-source-digest": "sha256:other",
            "containerd.io/snapshot/stargz/toc.digest": "sha256:other",
            "io.containerd.image.name": "not here",
        })
    };
    let manifest = store(&bed.registry, bed.source().source(), &layers(), "amd64").await;
    let bytes = bed.registry.manifest(bed.source().source(), manifest.id).await.unwrap();
    let mut document: Value = serde_json::from_slice(&bytes).unwrap();
    document["annotations"] = said("of the manifest");
    let bytes = Bytes::from(document.to_string());
    let size = bytes.len() as u64;
    let media_type = crate::oci::document::OCI_MANIFEST;
    let id = bed.registry.put_child(bed.source().source(), media_type, bytes).await.unwrap();
    let mut entry = crate::oci::document::descriptor(media_type, crate::oci::Descriptor { id, size });
    entry["platform"] = serde_json::json!({ "os": "linux", "architecture": "amd64" });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [entry], "annotations": said("of the index") });
    let index_type = crate::oci::document::OCI_INDEX;
    bed.registry.put_manifest(&bed.source(), index_type, index.to_string().into()).await.unwrap();

    let target = bed.reference("target", "v1");
    let options = ConvertOptions { merge_index: true, ..bed.options() };
    let report = bed.convert(&target, &options).await.unwrap();
    let annotations = async |id| {
        let bytes = bed.registry.manifest(target.source(), id).await.unwrap();
        Document::parse(&bytes).unwrap().annotations
    };
    let version = "org.opencontainers.image.version";
    let index = annotations(report.manifest).await;
    assert_eq!((index.len(), index[version].as_str()), (1, "of the index"));
    let image = annotations(report.images[0].manifest).await;
    assert_eq!(image[version], "of the manifest");
    assert_eq!(image["containerd.io/snapshot/nydus-source-digest"], format!("sha256:{id}"));
    assert_eq!(image.len(), 3, "{image:?}");
}

/// The tag is written when all else is.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_cannot_be_written_leaves_no_tag() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let file = bed.dir.path().join("cache");
    std::fs::write(&file, "no folder").unwrap();
    let options = ConvertOptions { cache: Some(bed.reference("cache", "v1")), ..bed.options() };
    let target = bed.reference("target", "v1");
    bed.convert(&target, &options).await.unwrap_err();
    bed.nothing_is_under(&target).await;
    std::fs::remove_file(&file).unwrap();
    bed.convert(&target, &options).await.unwrap();
    bed.is_right(&target).await;
}

/// What builds can do with a blob, conversions can.
#[tokio::test(flavor = "multi_thread")]
async fn batches_levels_and_tables_of_contents_are_options_of_a_conversion() {
    let bed = Bed::new();
    let text: Vec<u8> = noise(11, 200_000).iter().flat_map(|byte| [b'a' + byte % 8; 2]).collect();
    let mut all = layers();
    all[0] = Layer::gzip(&Tar::default().file("text", &text).file("small", b"small").file("less", b"less").end());
    image(&bed.registry, &bed.source(), &all).await;
    let plain = bed.convert(&bed.reference("plain", "v1"), &bed.options()).await.unwrap();
    for (number, build) in [
        BuildOptions { batch_size: Some(0x4000), ..bed.options().build },
        BuildOptions { level: Some(9), ..bed.options().build },
        BuildOptions { toc: true, ..bed.options().build },
        BuildOptions { toc: true, batch_size: Some(0x1_0000), ..bed.options().build },
    ]
    .into_iter()
    .enumerate()
    {
        let target = bed.reference("target", &format!("v{number}"));
        let report = bed.convert(&target, &ConvertOptions { build, ..bed.options() }).await.unwrap();
        assert_ne!(report.images[0].layers[0].blob, plain.images[0].layers[0].blob, "{build:?}");
        bed.is_right(&target).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_image_again_sends_and_reads_nothing() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let target = bed.reference("target", "v1");
    let first = bed.convert(&target, &bed.options()).await.unwrap();
    assert!(first.sent_bytes > 0);
    let again = bed.convert(&target, &bed.options()).await.unwrap();
    assert_eq!((again.manifest, again.read_bytes, again.sent_bytes), (first.manifest, 0, 0));
    assert!(again.images[0].layers.iter().all(|layer| layer.reused));
    // Without records it is all done again, to the same bytes.
    let forgetful = ConvertOptions { state: None, ..bed.options() };
    let again = bed.convert(&target, &forgetful).await.unwrap();
    assert_eq!((again.manifest, again.sent_bytes), (first.manifest, 0));
    assert_eq!(again.read_bytes, first.read_bytes);
    // Another chunk size is another image; a record whose blob the target does not have is of no use.
    let other = BuildOptions { chunk_size: 0x1000, ..Default::default() };
    let other = bed.convert(&target, &ConvertOptions { build: other, ..bed.options() }).await.unwrap();
    assert_ne!(other.manifest, first.manifest);
    let elsewhere = bed.convert(&bed.reference("elsewhere", "v1"), &bed.options()).await.unwrap();
    assert_eq!(elsewhere.manifest, first.manifest);
    let with_blob = |report: &ConvertReport| {
        let layers = report.images[0].layers.iter().filter(|layer| layer.blob.is_some());
        layers.map(|layer| layer.reused).collect::<Vec<_>>()
    };
    assert_eq!(with_blob(&elsewhere), [false, false, false]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_image_saves_other_machines_the_work() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let cache = Some(bed.reference("cache", "c"));
    let here = ConvertOptions { state: None, cache: cache.clone(), ..bed.options() };
    let first = bed.convert(&bed.reference("one", "v1"), &here).await.unwrap();
    assert!(first.read_bytes > 0);
    let other = bed.reference("two", "v1");
    let second = bed.convert(&other, &here).await.unwrap();
    assert_eq!((second.manifest, second.read_bytes), (first.manifest, 0));
    bed.is_right(&other).await;
    // Another image joins, the first is still in it.
    let mut layers = layers();
    layers.push(Layer::gzip(&Tar::default().dir("more/").file("more/file", &noise(9, 9_000)).end()));
    image(&bed.registry, &bed.source(), &layers).await;
    let third = bed.convert(&bed.reference("three", "v1"), &here).await.unwrap();
    let reused: Vec<_> = third.images[0].layers.iter().map(|layer| layer.reused).collect();
    assert_eq!(reused, [true, true, true, true, false]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversion_goes_on_where_it_was_cut() {
    let bed = Bed::new();
    let layers = layers();
    image(&bed.registry, &bed.source(), &layers).await;
    let lost = Layout::new(bed.source().source().layout_dir().unwrap()).blob_path(layers[4].id());
    std::fs::remove_file(&lost).unwrap();
    let target = bed.reference("target", "v1");
    // One layer at a time: those below the lost one are done.
    let options = ConvertOptions { memory_bytes: 1, ..bed.options() };
    let error = bed.convert(&target, &options).await.unwrap_err();
    assert!(matches!(error, ConvertError::Registry(RegistryError::NotFound { .. })), "{error:?}");
    bed.nothing_is_under(&target).await;
    std::fs::write(&lost, &layers[4].stored).unwrap();
    let report = bed.convert(&target, &options).await.unwrap();
    let reused: Vec<_> = report.images[0].layers.iter().map(|layer| layer.reused).collect();
    assert_eq!(reused, [true, true, true, false]);
    assert_eq!(report.read_bytes, layers[4].stored.len() as u64);
    bed.is_right(&target).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_platforms_come_along_or_those_asked_for() {
    let bed = Bed::new();
    let [amd64, arm64, _] = index(&bed.registry, &bed.source()).await;
    let target = bed.reference("target", "all");
    let report = bed.convert(&target, &bed.options()).await.unwrap();
    let names: Vec<_> = report.images.iter().map(|image| (image.platform.as_str(), image.source)).collect();
    assert_eq!(names, [("linux/amd64", amd64.id), ("linux/arm64/v8", arm64.id)]);
    bed.is_right(&target).await;
    let one = bed.reference("target", "one");
    let options = ConvertOptions { platforms: vec!["linux/arm64".parse().unwrap()], ..bed.options() };
    let report = bed.convert(&one, &options).await.unwrap();
    assert_eq!(report.manifest, report.images[0].manifest, "a single one needs no index");
    assert_eq!(report.images[0].source, arm64.id);
    let none = ConvertOptions { platforms: vec!["plan9/amd64".parse().unwrap()], ..bed.options() };
    let error = bed.convert(&bed.reference("target", "none"), &none).await.unwrap_err();
    assert!(error.to_string().contains("manifest"), "{error}");
    bed.nothing_is_under(&bed.reference("target", "none")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tag_serves_both_kinds_of_client() {
    let bed = Bed::new();
    let originals = index(&bed.registry, &bed.source()).await;
    let target = bed.reference("target", "both");
    let options = ConvertOptions { merge_index: true, with_referrer: true, ..bed.options() };
    let report = bed.convert(&target, &options).await.unwrap();
    assert!(report.copied.sent_bytes > 0);
    let bytes = bed.registry.manifest(target.source(), report.manifest).await.unwrap();
    let Content::Index(children) = Document::parse(&bytes).unwrap().content else { panic!("an index") };
    let (nydus, oci): (Vec<_>, Vec<_>) = children.iter().partition(|child| child.is_nydus);
    assert!(!children[0].is_nydus, "who takes the first that fits takes the OCI image");
    assert_eq!(
        oci.iter().map(|child| child.descriptor.id).collect::<Vec<_>>(),
        originals.map(|original| original.id)
    );
    for original in originals {
        let there = bed.registry.manifest(target.source(), original.id).await.unwrap();
        assert_eq!(there, bed.registry.manifest(bed.source().source(), original.id).await.unwrap());
    }
    assert_eq!(nydus.len(), 2);
    for (child, original) in nydus.iter().zip(originals) {
        assert_eq!(child.raw["artifactType"], "application/vnd.nydus.image.manifest.v1+json");
        assert_eq!(child.raw["platform"]["os.features"][0], "nydus.remoteimage.v1");
        let manifest = bed.registry.manifest(target.source(), child.descriptor.id).await.unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        assert_eq!(manifest["subject"]["digest"], format!("sha256:{}", original.id));
        assert_eq!(manifest["config"]["mediaType"], "application/vnd.nydus.image.config.v1+json");
    }
    bed.is_right(&target).await;
    // Converted in place, the index is what it was: what is marked is made again, not converted.
    let again = convert(&bed.registry, &target, &target, &options, |_| {}).await.unwrap();
    assert_eq!((again.images.len(), again.sent_bytes, again.copied.sent_bytes), (2, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_source_is_named_and_leaves_no_tag() {
    let bed = Bed::new();
    let target = bed.reference("target", "v1");
    let good = layers()[0].clone();
    let convert = async |layer: Layer| {
        image(&bed.registry, &bed.source(), &[layer]).await;
        let error = bed.convert(&target, &bed.options()).await.unwrap_err();
        bed.nothing_is_under(&target).await;
        let left = std::fs::read_dir(bed.dir.path().join("state")).unwrap().count();
        assert_eq!(left, 1, "the lock; no record, no work folder");
        error
    };
    let truncated = Layer { stored: good.stored[..good.stored.len() / 2].to_vec(), ..good.clone() };
    let error = convert(truncated).await;
    let shown = crate::chain(&error);
    assert!(matches!(error, ConvertError::Layer { source: LayerFailure::Build(_), .. }), "{error:?}");
    assert!(shown.contains("cut off"), "{shown}");
    let other = Layer { diff_id: ObjectId::new([1; 32]), ..good.clone() };
    let error = convert(other).await;
    assert!(matches!(error, ConvertError::Layer { source: LayerFailure::DiffId { .. }, .. }), "{error:?}");
    let encrypted = Layer { media_type: "application/vnd.oci.image.layer.v1.tar+gzip+encrypted", ..good.clone() };
    let error = convert(encrypted).await;
    assert!(error.to_string().contains("no tar"), "{error}");
    let noise = Layer { stored: noise(1, 2_000), ..good.clone() };
    let error = convert(noise).await;
    assert!(matches!(error, ConvertError::Layer { .. }), "{error:?}");
    // Other bytes under the layer's digest, of the same length.
    image(&bed.registry, &bed.source(), std::slice::from_ref(&good)).await;
    let path = Layout::new(bed.source().source().layout_dir().unwrap()).blob_path(good.id());
    let mut damaged = good.stored.clone();
    // The time in the gzip header: the tar is the same.
    damaged[4] ^= 1;
    std::fs::write(path, damaged).unwrap();
    let error = bed.convert(&target, &bed.options()).await.unwrap_err();
    assert!(matches!(error, ConvertError::Registry(RegistryError::WrongDigest { .. })), "{error:?}");
    bed.nothing_is_under(&target).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_converted_already_or_no_image_is_told() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let target = bed.reference("target", "v1");
    bed.convert(&target, &bed.options()).await.unwrap();
    let error = convert(&bed.registry, &target, &bed.reference("x", "v1"), &bed.options(), |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("nydus.blob"), "{error}");
    let plain = check_image(&bed.registry, &bed.source(), None, &[]).await.unwrap_err();
    assert!(crate::chain(&plain).contains("convert it first"), "{plain}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_finds_what_was_changed() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let target = bed.reference("target", "v1");
    let report = bed.convert(&target, &bed.options()).await.unwrap();
    // Another source: names are missing there, a file has other bytes, a hard link is a symbolic one.
    let mut other = layers();
    let top = Tar::default().dir("app/").file("app/main", &noise(5, 100_000)).symlink("app/again", "main").end();
    other[4] = Layer::gzip(&top);
    let elsewhere = bed.reference("elsewhere", "v1");
    image(&bed.registry, &elsewhere, &other).await;
    let found = check_image(&bed.registry, &target, Some(&elsewhere), &[]).await.unwrap();
    let mut places: Vec<_> = found.images[0].problems.iter().map(|problem| problem.place.as_str()).collect();
    assert!(!found.ok);
    places.sort_unstable();
    assert_eq!(places, ["/app/again", "/app/main", "/bin/below", "/bin/more", "/bin/third"], "{found:#?}");
    // A flipped bit in a blob.
    let blob = report.images[0].layers[0].blob.unwrap();
    let path = Layout::new(target.source().layout_dir().unwrap()).blob_path(blob.id);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100] ^= 1;
    std::fs::write(path, bytes).unwrap();
    let found = check_image(&bed.registry, &target, None, &[]).await.unwrap();
    assert!(!found.ok);
    assert_eq!(found.images[0].problems[0].place, format!("blob {}", blob.id));
}
