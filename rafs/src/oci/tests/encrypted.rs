//! Encrypted images in registries: blobs that nobody can read without the bootstrap, and bootstrap layers for recipients only,
//! as others encrypt and decrypt them.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command, sync::Arc};

use serde_json::Value;

use super::{bed::Bed, docker_registry::start, source::*, *};
use crate::{
    Compressor, Encryption,
    oci::{
        ConvertError, ConvertOptions, DecryptionKeys, LayerCompression, PushOptions, check_image, copy, reverse,
        seal::tests::{KeyFiles, openers, recipients},
    },
};

/// In a file of the image.
const SECRET: &[u8] = b"what a registry shall not know of";

fn with(keys: DecryptionKeys) -> Registry {
    Registry::new(RegistryOptions { decryption_keys: Arc::new(keys), ..options() }).unwrap()
}

/// The bed's source is an image with a secret.
async fn bed() -> Bed {
    let bed = Bed::new();
    let base = Tar::default()
        .dir("./")
        .file("secret", &SECRET.repeat(3_000))
        .file("tiny", b"t")
        .file("noise", &noise(3, 90_000));
    let base = base.dir("d/").file("d/a", b"a").file("d/b", &noise(4, 17)).file("d/c", b"c").symlink("link", "tiny");
    let top = Tar::default()
        .dir("./")
        .dir("e/")
        .file("e/another", &noise(5, 70_001))
        .file("e/b", b"b")
        .file("e/c", b"c")
        .end();
    image(&bed.registry, &bed.source(), &[Layer::gzip(&base.end()), Layer::gzip(&top)]).await;
    bed
}

fn encrypted(bed: &Bed, keys: &[&KeyFiles]) -> ConvertOptions {
    let build =
        BuildOptions { compressor: Compressor::None, encryption: Encryption::FreshKey, ..bed.options().build };
    ConvertOptions { build, recipients: Some(recipients(keys)), ..bed.options() }
}

/// Whether any file below a folder has these bytes.
fn is_in(dir: &Path, bytes: &[u8]) -> bool {
    fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => is_in(&path, bytes),
            false => fs::read(&path).unwrap().windows(bytes.len()).any(|window| window == bytes),
        }
    })
}

async fn problems(registry: &Registry, reference: &Reference) -> Vec<String> {
    let report = check_image(registry, reference, None, &[]).await.unwrap();
    assert_eq!(report.ok, report.images.iter().all(|image| image.problems.is_empty() && image.image.ok));
    report.images[0].problems.iter().map(|problem| format!("{}: {}", problem.place, problem.problem)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_image_is_read_by_its_recipients() {
    let bed = bed().await;
    let keys =
        [KeyFiles::rsa(&bed.dir, "rsa"), KeyFiles::curve(&bed.dir, "curve", 0), KeyFiles::rsa(&bed.dir, "other")];
    let (lazy, plain) = (bed.reference("lazy", "v1"), bed.reference("plain", "v1"));
    bed.convert(&lazy, &encrypted(&bed, &[&keys[0], &keys[1]])).await.unwrap();
    for key in &keys[..2] {
        let registry = with(openers(&[key]));
        let report = check_image(&registry, &lazy, Some(&bed.source()), &[]).await.unwrap();
        assert!(report.ok && report.images[0].compared.is_some(), "{report:#?}");
    }
    for (keys, said) in
        [(DecryptionKeys::default(), "no decryption key is given"), (openers(&[&keys[2]]), "none of 1")]
    {
        let registry = with(keys);
        let found = problems(&registry, &lazy).await;
        let layer = registry.image(&lazy).await.unwrap().manifest.bootstrap.id;
        assert!(
            matches!(&found[..], [found] if found.contains(said) && found.contains(&layer.to_string())),
            "{found:?}"
        );
        let error = reverse(&registry, &lazy, &plain, &[], LayerCompression::Gzip, |_| {}).await.unwrap_err();
        assert!(crate::chain(&error).contains(said), "{}", crate::chain(&error));
        bed.nothing_is_under(&plain).await;
    }
    // What the registry has.
    let image = bed.registry.image(&lazy).await.unwrap();
    let manifest: Value = serde_json::from_slice(&image.bytes).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    for layer in &layers[..layers.len() - 1] {
        assert_eq!(layer["annotations"]["containerd.io/snapshot/nydus-encrypted-blob"], "true");
    }
    let layer = layers.last().unwrap();
    assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
    assert_eq!(layer["annotations"]["containerd.io/snapshot/nydus-bootstrap"], "true");
    let folder = lazy.source().layout_dir().unwrap().to_owned();
    assert!(!is_in(&folder, SECRET) && is_in(&folder, b"/bin/tool"), "the config is no secret");
    // Records have the keys of their blobs.
    let records = fs::read_dir(bed.dir.path().join("state")).unwrap().map(|entry| entry.unwrap().path());
    let records: Vec<_> = records.filter(|path| path.extension().is_some_and(|kind| kind == "record")).collect();
    let mode = |path: &PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert!(records.len() == 2 && records.iter().all(|path| mode(path) == 0o600), "{records:?}");
    // The same image again is not the same, but for layers with records.
    let again = bed.reference("lazy", "v2");
    let kept = bed.convert(&again, &encrypted(&bed, &[&keys[0]])).await.unwrap();
    assert_eq!(kept.read_bytes, 0);
    let forgetful = ConvertOptions { state: None, ..encrypted(&bed, &[&keys[0]]) };
    let other = bed.convert(&again, &forgetful).await.unwrap();
    assert!(
        other.images[0]
            .layers
            .iter()
            .zip(&kept.images[0].layers)
            .all(|(a, b)| a.blob.unwrap().id != b.blob.unwrap().id)
    );

    reverse(&with(openers(&[&keys[1]])), &lazy, &plain, &[], LayerCompression::Gzip, |_| {}).await.unwrap();
    let report = check_image(&with(openers(&[&keys[0]])), &lazy, Some(&plain), &[]).await.unwrap();
    assert!(report.ok, "{report:#?}");
    let copied = bed.reference("copied", "v1");
    copy(&bed.registry, &lazy, &copied, None, |_, _| {}).await.unwrap();
    assert!(problems(&with(openers(&[&keys[0]])), &copied).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_never_put_anywhere_in_the_clear() {
    let bed = bed().await;
    let key = KeyFiles::curve(&bed.dir, "curve", 2);
    let lazy = bed.reference("lazy", "v1");
    let right = encrypted(&bed, &[&key]);
    for (wrong, said) in [
        (ConvertOptions { recipients: None, ..right.clone() }, "say whom"),
        (ConvertOptions { cache: Some(bed.reference("cache", "v1")), ..right.clone() }, "cache"),
        (ConvertOptions { merge_index: true, ..right.clone() }, "index of both"),
        (ConvertOptions { oci_ref: true, ..right.clone() }, "stay as they are"),
    ] {
        let error = bed.convert(&lazy, &wrong).await.unwrap_err();
        assert!(matches!(&error, ConvertError::Encryption { problem } if problem.contains(said)), "{error}");
    }
    bed.nothing_is_under(&lazy).await;
    bed.convert(&lazy, &right).await.unwrap();
    // The chunks of an encrypted dictionary bring their keys along.
    let (second, registry) = (bed.reference("second", "v1"), with(openers(&[&key])));
    let build = BuildOptions { encryption: Encryption::None, ..right.build };
    let second_options = ConvertOptions { build, chunk_dict: Some(lazy.clone()), recipients: None, ..right.clone() };
    let error = crate::oci::convert(&registry, &bed.source(), &second, &second_options, |_| {}).await.unwrap_err();
    assert!(matches!(error, ConvertError::Encryption { .. }), "{error}");
    let second_options = ConvertOptions { recipients: right.recipients.clone(), ..second_options };
    crate::oci::convert(&registry, &bed.source(), &second, &second_options, |_| {}).await.unwrap();
    assert!(problems(&registry, &second).await.is_empty());
    // So does a bootstrap from a file.
    let (source, boot, blobs) =
        (bed.dir.path().join("tree"), bed.dir.path().join("boot"), bed.dir.path().join("blobs"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), SECRET).unwrap();
    Builder::new(right.build).build(&source, &boot, &blobs).unwrap();
    let pushed = bed.reference("pushed", "v1");
    let error = push(&bed.registry, &boot, &blobs, &pushed, PushOptions::default(), |_| {}).await.unwrap_err();
    assert!(matches!(error, PushError::Keys), "{error}");
    let to = PushOptions { recipients: Some(recipients(&[&key])), ..PushOptions::default() };
    push(&bed.registry, &boot, &blobs, &pushed, to, |_| {}).await.unwrap();
    assert!(problems(&registry, &pushed).await.is_empty());
    assert!(!is_in(&bed.dir.path().join("pushed"), SECRET));
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_layers_are_found_before_anything_is_read() {
    let bed = bed().await;
    let key = KeyFiles::rsa(&bed.dir, "rsa");
    let lazy = bed.reference("lazy", "v1");
    bed.convert(&lazy, &encrypted(&bed, &[&key])).await.unwrap();
    let registry = with(openers(&[&key]));
    let image = registry.image(&lazy).await.unwrap();
    let layer = registry.blob(&image.source, image.manifest.bootstrap.id, 1 << 20).await.unwrap();
    let seal = image.manifest.seal.as_ref();
    let mut changed = layer.to_vec();
    changed[50] ^= 1;
    let id = image.manifest.bootstrap.id;
    let error = registry.open_layer(id, changed.into(), seal).unwrap_err();
    assert!(error.to_string().contains("not those that were encrypted"), "{error}");
    let opened = registry.open_layer(id, layer.clone(), seal).unwrap();
    assert!(opened != layer && opened.starts_with(&[0x1F, 0x8B]), "a gzip");
}

/// skopeo 1.9.3 keeps the annotations of no layer but the one whose encryption it changes.
async fn is_right_but_for_marks(bed: &Bed, registry: &Registry, reference: &Reference) {
    let report = check_image(registry, reference, Some(&bed.source()), &[]).await.unwrap();
    let image = &report.images[0];
    assert!(image.image.ok && image.compared.is_some(), "{report:#?}");
    let expected = "no annotation containerd.io/snapshot/nydus-blob";
    assert!(image.problems.iter().all(|problem| problem.problem == expected), "{report:#?}");
}

/// skopeo decrypts what is encrypted here, and what it encrypts is read here, with both kinds of keys.
#[tokio::test(flavor = "multi_thread")]
async fn skopeo_does_the_same() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let bed = bed().await;
    for (name, key) in [
        ("rsa", KeyFiles::rsa(&bed.dir, "rsa")),
        ("curve", KeyFiles::curve(&bed.dir, "curve", 0)),
        ("large", KeyFiles::curve(&bed.dir, "large", 2)),
    ] {
        let of = |tag: &str| -> Reference { format!("{}/{name}:{tag}", server.host).parse().unwrap() };
        let (lazy, opened, again) = (of("lazy"), of("opened"), of("again"));
        bed.convert(&lazy, &encrypted(&bed, &[&key])).await.unwrap();
        let skopeo = |arguments: &[&str], from: &Reference, to: &Reference| {
            let copied = Command::new("skopeo")
                .args(["--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"])
                .args(arguments)
                .args([format!("docker://{from}"), format!("docker://{to}")])
                .output();
            let copied = copied.ok()?;
            assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
            Some(())
        };
        let private = key.private.display().to_string();
        if skopeo(&["--decryption-key", &private], &lazy, &opened).is_none() {
            return println!("skipped: skopeo is not installed");
        }
        // Nothing but the layer's encryption is gone: its bytes are those that were sealed.
        is_right_but_for_marks(&bed, &bed.registry, &opened).await;
        assert!(bed.registry.image(&opened).await.unwrap().manifest.seal.is_none());
        if skopeo(&["--encryption-key", &key.name(), "--encrypt-layer", "-1"], &opened, &again).is_some() {
            assert!(!problems(&bed.registry, &again).await.is_empty());
            is_right_but_for_marks(&bed, &with(openers(&[&key])), &again).await;
        }
    }
}
