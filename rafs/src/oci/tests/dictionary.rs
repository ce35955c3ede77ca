//! Conversion with a dictionary: what it has is named, and neither stored nor sent again.

use super::{bed::Bed, docker_registry::start, source::*, *};
use crate::oci::{ConvertError, ConvertOptions, NydusSourceError, check_image, convert};

/// The layers of a first version, and one more with a file of the first under another name and something new.
fn next_layers() -> Vec<Layer> {
    let mut next = layers();
    let tar = Tar::default().dir("next/").file("next/copy", &noise(1, 300_000)).file("next/new", &noise(8, 90_000));
    next.push(Layer::gzip(&tar.end()));
    next
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_version_stores_what_is_new() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let first = bed.reference("first", "v1");
    bed.convert(&first, &bed.options()).await.unwrap();
    image(&bed.registry, &bed.source(), &next_layers()).await;
    let second = bed.reference("first", "v2");
    let options = ConvertOptions { chunk_dict: Some(first.clone()), ..bed.options() };
    let report = bed.convert(&second, &options).await.unwrap();
    bed.is_right(&second).await;
    let converted = &report.images[0];
    let own: Vec<_> = converted.layers.iter().filter_map(|layer| layer.blob).collect();
    // The new layer, and below it what upper layers take away: the dictionary is a merged image and has none of that.
    assert_eq!(own.len(), 2, "{converted:#?}");
    assert!(own[0].size < 80_000 && (90_000..100_000).contains(&own[1].size), "{own:?}");
    assert!(converted.dictionary.existing_bytes > 400_000, "{converted:#?}");
    assert_eq!((converted.dictionary.sent_bytes, converted.dictionary.mounted_bytes), (0, 0));

    // Again: nothing is read, and it is the same image. Without the dictionary it is another one.
    let again = bed.convert(&second, &options).await.unwrap();
    assert_eq!((again.manifest, again.read_bytes, again.sent_bytes), (report.manifest, 0, 0));
    let plain = bed.convert(&bed.reference("plain", "v2"), &bed.options()).await.unwrap();
    assert_ne!(plain.manifest, report.manifest);

    // Elsewhere the dictionary's blobs come along.
    let elsewhere = bed.reference("elsewhere", "v2");
    let moved = bed.convert(&elsewhere, &options).await.unwrap();
    assert_eq!(moved.manifest, report.manifest);
    assert_eq!(moved.images[0].dictionary.sent_bytes, converted.dictionary.existing_bytes);
    bed.is_right(&elsewhere).await;

    // And layers that are all in the dictionary have no blob of their own.
    let same = ConvertOptions { chunk_dict: Some(second.clone()), ..bed.options() };
    let report = bed.convert(&bed.reference("first", "v3"), &same).await.unwrap();
    assert!(report.images[0].layers[1..].iter().all(|layer| layer.blob.is_none()), "{report:#?}");
    bed.is_right(&bed.reference("first", "v3")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dictionary_that_does_not_fit_is_refused_by_name() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let (first, target) = (bed.reference("first", "v1"), bed.reference("target", "v1"));
    bed.convert(&first, &bed.options()).await.unwrap();
    let refused = async |chunk_dict: Reference, build| {
        let options = ConvertOptions { chunk_dict: Some(chunk_dict), build, ..bed.options() };
        let error = bed.convert(&target, &options).await.unwrap_err();
        bed.nothing_is_under(&target).await;
        error
    };
    let other = BuildOptions { chunk_size: 0x1000, ..Default::default() };
    let error = refused(first.clone(), other).await;
    assert!(crate::chain(&error).contains("65536"), "{}", crate::chain(&error));
    assert!(matches!(error, ConvertError::Dictionary { source: NydusSourceError::Unfit { .. }, .. }), "{error:?}");
    // An OCI image, and none at all.
    for name in [bed.source(), bed.reference("absent", "v1")] {
        let error = refused(name.clone(), bed.options().build).await;
        let registry = matches!(error, ConvertError::Dictionary { source: NydusSourceError::Registry(_), .. });
        assert!(registry && error.to_string().contains(&name.to_string()), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_mounts_the_blobs_of_the_dictionary() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let registry = client();
    let name = |name: &str| -> Reference { format!("{}/{name}", server.host).parse().unwrap() };
    let (source, first, next) = (name("source:v1"), name("lazy/app:v1"), name("other/app:v2"));
    image(&registry, &source, &layers()).await;
    let build = BuildOptions { chunk_size: 0x1_0000, ..Default::default() };
    let options = ConvertOptions { build, ..Default::default() };
    convert(&registry, &source, &first, &options, |_| {}).await.unwrap();
    image(&registry, &source, &next_layers()).await;
    let options = ConvertOptions { chunk_dict: Some(first), ..options };
    let report = convert(&registry, &source, &next, &options, |_| {}).await.unwrap();
    let dictionary = report.images[0].dictionary;
    assert!(dictionary.mounted_bytes > 400_000, "{report:#?}");
    assert_eq!((dictionary.sent_bytes, dictionary.existing_bytes), (0, 0));
    assert!(report.sent_bytes < 180_000, "{report:#?}");
    let found = check_image(&registry, &next, Some(&source), &[]).await.unwrap();
    assert!(found.ok, "{found:#?}");
    // Its layers are all blobs that the bootstrap names.
    let image = registry.image(&next).await.unwrap();
    assert!(image.manifest.blobs.len() > report.images[0].layers.iter().filter(|layer| layer.blob.is_some()).count());
}
