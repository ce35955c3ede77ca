//! Blobs outside of registries: in a folder, behind nginx, in object storage.

use super::{
    bed::Bed,
    docker_registry::start,
    double::Reply,
    servers::{nginx, s3},
    source::*,
    *,
};
use crate::oci::{
    Authfile, BackendRule, BlobPlace, ConvertOptions, Credentials, Descriptor, LayerCompression, PushOptions,
    RegistryError, check_image, convert, reverse,
};

fn place(text: &str) -> BlobPlace {
    text.parse().unwrap()
}

/// A client for which the blobs of some images lie in a place.
fn with(place: &BlobPlace, images: &[&str], options: RegistryOptions) -> Registry {
    let images = images.iter().map(|&image| image.to_owned()).collect();
    let rule = BackendRule { place: place.clone(), images, credentials: None };
    Registry::new(RegistryOptions { backends: vec![rule], ..options }).unwrap()
}

/// Puts an image whose blobs go to `place` under `lazy`, and reads all of it again in every way.
async fn round_trip(registry: &Registry, bed: &Bed, lazy: &Reference, place: &BlobPlace) {
    image(&bed.registry, &bed.source(), &layers()).await;
    let options = ConvertOptions { blob_backend: Some(place.clone()), state: None, ..bed.options() };
    let report = convert(registry, &bed.source(), lazy, &options, |_| {}).await.unwrap();
    assert!(report.sent_bytes > 0);
    // The registry was given the bootstrap alone.
    let image = registry.image(lazy).await.unwrap();
    assert_eq!(image.manifest.layers.len(), 1, "{:?}", image.manifest);
    let blob = report.images[0].layers[0].blob.unwrap();
    assert_eq!(registry.blob_size(lazy.source(), blob.id).await.unwrap(), None);
    let layer = registry.blob(lazy.source(), image.manifest.bootstrap.id, 1 << 20).await.unwrap();
    let layer = read_bootstrap_layer(&layer[..], &LayerLimits::default()).unwrap();
    assert_eq!(layer.backend.as_ref(), Some(place));

    let found = check_image(registry, lazy, Some(&bed.source()), &[]).await.unwrap();
    assert!(found.ok && found.images[0].compared.is_some(), "{found:#?}");
    let again = convert(registry, &bed.source(), lazy, &options, |_| {}).await.unwrap();
    assert_eq!((again.manifest, again.sent_bytes), (report.manifest, 0));
    // Exactly what was asked for, and nothing beyond the end.
    let id = BlobId::new(*blob.id.as_bytes());
    let mut whole = Vec::new();
    let descriptor = Descriptor { id: blob.id, size: blob.size };
    registry.blob_to(lazy.source(), &descriptor, &mut whole).await.unwrap();
    for range in [0..1, blob.size - 1..blob.size, 100..70_000, 7..7] {
        let stream = registry.blob_range(lazy.source(), id, range.clone()).await.unwrap();
        let bytes = stream.collect(u64::MAX).await.unwrap();
        assert_eq!(bytes, whole[range.start as usize..range.end as usize], "{range:?}");
    }
    for beyond in [blob.size - 1..blob.size + 1, blob.size..blob.size + 1] {
        let read = registry.blob_range(lazy.source(), id, beyond.clone()).await;
        assert!(read.is_err(), "{beyond:?}: {read:?}");
    }
    let absent = registry.blob_range(lazy.source(), BlobId::new([1; 32]), 0..1).await;
    assert!(matches!(absent, Err(RegistryError::NotFound { .. })), "{absent:?}");
    // Back to plain layers, and to an image that shares its chunks.
    let plain = bed.reference("plain", "v1");
    reverse(registry, lazy, &plain, &[], LayerCompression::Gzip, |_| {}).await.unwrap();
    let found = check_image(registry, lazy, Some(&plain), &[]).await.unwrap();
    assert!(found.ok, "{found:#?}");
    let options = ConvertOptions { chunk_dict: Some(lazy.clone()), blob_backend: None, state: None, ..bed.options() };
    let inside = bed.reference("inside", "v2");
    let shared = convert(registry, &bed.source(), &inside, &options, |_| {}).await.unwrap();
    assert!(shared.images[0].dictionary.sent_bytes > 0, "{shared:#?}");
    assert!(check_image(&client(), &inside, Some(&bed.source()), &[]).await.unwrap().ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_folder() {
    let bed = Bed::new();
    let place = place(&format!("file://{}/blobs", bed.dir.path().display()));
    let lazy = bed.reference("lazy", "v1");
    let registry = with(&place, &[&lazy.source().to_string()], options());
    round_trip(&registry, &bed, &lazy, &place).await;

    // The image says where its blobs are; who has not configured that place is told, and does not look there.
    let found = check_image(&client(), &lazy, None, &[]).await.unwrap();
    let problems = format!("{:?}", found.images[0].problems);
    assert!(!found.ok && problems.contains(&place.to_string()) && problems.contains("--blob-backend"), "{problems}");
    // Who has it for no image in particular follows.
    let followed = check_image(&with(&place, &[], options()), &lazy, None, &[]).await.unwrap();
    assert!(followed.ok, "{followed:#?}");

    // What is damaged there is found, as in a registry.
    let blob = bed.dir.path().join("blobs");
    for file in std::fs::read_dir(&blob).unwrap() {
        let file = file.unwrap().path();
        let mut stored = std::fs::read(&file).unwrap();
        stored[500] ^= 1;
        std::fs::write(&file, stored).unwrap();
    }
    let damaged = check_image(&registry, &lazy, None, &[]).await.unwrap();
    assert!(!damaged.ok, "{damaged:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_place_has_not_the_registry_gives() {
    let bed = Bed::new();
    image(&bed.registry, &bed.source(), &layers()).await;
    let lazy = bed.reference("lazy", "v1");
    bed.convert(&lazy, &bed.options()).await.unwrap();
    let empty = place(&format!("file://{}/empty", bed.dir.path().display()));
    let registry = with(&empty, &["*"], options());
    assert!(check_image(&registry, &lazy, Some(&bed.source()), &[]).await.unwrap().ok);
    // A place that is out of order, too, as long as the registry has the blobs.
    let broken = Double::start(|_, _| Reply::new(500, &[], b"out of order")).await;
    let registry = with(&place(&format!("http://127.0.0.1:{}/", broken.port())), &["*"], options());
    let registry = Registry::new(RegistryOptions { retries: 0, ..registry.http.options.clone() }).unwrap();
    assert!(check_image(&registry, &lazy, None, &[]).await.unwrap().ok);
    // If nobody has them, the place says why it does not give them.
    let absent = registry.blob_range(lazy.source(), BlobId::new([1; 32]), 0..1).await;
    assert!(matches!(absent, Err(RegistryError::Registry { status: 500, .. })), "{absent:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_puts_blobs_there_too() {
    let fixture = Fixture::new();
    let dir = TempDir::new().unwrap();
    let place = place(&format!("file://{}/blobs", dir.path().display()));
    let lazy: Reference = format!("oci:{}/layout:v1", dir.path().display()).parse().unwrap();
    let registry = with(&place, &["*"], options());
    let options = PushOptions { blob_backend: Some(place), ..PushOptions::default() };
    let blobs = fixture.dir.path().join("blobs");
    let report = push(&registry, &fixture.bootstrap(), &blobs, &lazy, options.clone(), |_| ()).await.unwrap();
    assert!(!report.blobs[0].existed);
    assert_eq!(
        std::fs::read(dir.path().join("blobs").join(fixture.blob.to_string())).unwrap(),
        std::fs::read(fixture.blob_file()).unwrap()
    );
    assert!(check_image(&registry, &lazy, None, &[]).await.unwrap().ok);
    // From where the blob is not: its chunk table is read from the place.
    let nothing = dir.path().join("nothing");
    let again = push(&registry, &fixture.bootstrap(), &nothing, &lazy, options, |_| ()).await.unwrap();
    assert_eq!(again.manifest, report.manifest);
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_nginx() {
    let Some(server) = nginx().await else { return };
    let Some(registry_server) = start(|_| String::new(), "").await else { return };
    let bed = Bed::new();
    let place = place(&format!("http://{}/blobs", server.host));
    let lazy: Reference = format!("{}/lazy:v1", registry_server.host).parse().unwrap();
    let registry = with(&place, &[&lazy.source().to_string()], options());
    round_trip(&registry, &bed, &lazy, &place).await;
    assert!(std::fs::read_dir(server.dir.path().join("root/blobs")).unwrap().count() >= 3);
    let log = std::fs::read_to_string(server.dir.path().join("access.log")).unwrap();
    assert!(log.contains("\" 206 ") && log.contains("PUT /blobs/"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_nginx_with_a_password() {
    let Some(server) = nginx().await else { return };
    let bed = Bed::new();
    let place = place(&format!("http://{}/private", server.host));
    let lazy = bed.reference("lazy", "v1");
    let with_password = |password: &str| {
        let mut auth = Authfile::default();
        auth.insert(&server.host, Credentials { username: "user".to_owned(), password: password.to_owned() });
        with(&place, &["*"], RegistryOptions { auth: auth.into(), ..options() })
    };
    image(&bed.registry, &bed.source(), &layers()).await;
    let convert_options = ConvertOptions { blob_backend: Some(place.clone()), state: None, ..bed.options() };
    let wrong = with_password("wrong-secret");
    let error = convert(&wrong, &bed.source(), &lazy, &convert_options, |_| {}).await.unwrap_err();
    let shown = format!("{} {error:?}", crate::chain(&error));
    assert!(shown.contains("refused the credentials") && !shown.contains("wrong-secret"), "{shown}");
    bed.nothing_is_under(&lazy).await;
    round_trip(&with_password("secret"), &bed, &lazy, &place).await;
    let log = std::fs::read_to_string(server.dir.path().join("access.log")).unwrap();
    assert!(log.contains(" user ["), "the user's name is nginx's to know: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_object_storage() {
    let Some(server) = s3().await else { return };
    let bed = Bed::new();
    let keys = bed.dir.path().join("keys");
    std::fs::write(&keys, "[default]\naws_access_key_id = AKID\naws_secret_access_key = top/secret\n").unwrap();
    let place = place(&format!("s3://bucket/some/prefix?endpoint=http://{}", server.host));
    let rule = BackendRule { place: place.clone(), images: vec!["*".to_owned()], credentials: Some(keys) };
    let registry = Registry::new(RegistryOptions { backends: vec![rule], ..options() }).unwrap();
    assert!(!format!("{registry:?}").contains("top/secret"), "{registry:?}");
    let lazy = bed.reference("lazy", "v1");
    round_trip(&registry, &bed, &lazy, &place).await;

    // A blob of several parts, and one that is not what its name says.
    let large = noise(9, (16 << 20) + 5);
    let file = bed.dir.path().join("large");
    std::fs::write(&file, &large).unwrap();
    let blob = Descriptor { id: sha256(&large), size: large.len() as u64 };
    let backend = registry.backend_at(&place).unwrap();
    assert!(!backend.put(&registry.http, &blob, &file).await.unwrap());
    assert!(backend.put(&registry.http, &blob, &file).await.unwrap(), "it is there");
    let mut back = Vec::new();
    registry.blob_to(lazy.source(), &blob, &mut back).await.unwrap();
    assert!(back == large);
    for size in [large.len() as u64, 100] {
        std::fs::write(&file, &large[..size as usize]).unwrap();
        let lie = Descriptor { id: ObjectId::new([7; 32]), size };
        let error = backend.put(&registry.http, &lie, &file).await.unwrap_err();
        assert!(matches!(error, RegistryError::WrongDigest { .. }), "{error:?}");
        assert_eq!(backend.size(&registry.http, lie.id).await.unwrap(), None, "nothing half-written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn object_storage_that_refuses_or_lies() {
    let dir = TempDir::new().unwrap();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "[default]\naws_access_key_id = AKID\naws_secret_access_key = top/secret\n").unwrap();
    let read = async |double: &Double, credentials: Option<PathBuf>| {
        let place = place(&format!("s3://bucket?endpoint=http://127.0.0.1:{}", double.port()));
        let rule = BackendRule { place: place.clone(), images: vec!["*".to_owned()], credentials };
        let registry = Registry::new(RegistryOptions { backends: vec![rule], retries: 0, ..options() }).unwrap();
        let backend = registry.backend_at(&place).unwrap();
        let stream = backend.range(&registry.http, ObjectId::new([1; 32]), 10..20).await?;
        stream.collect(100).await
    };
    let body = b"<Error><Code>SignatureDoesNotMatch</Code><StringToSign>the request</StringToSign></Error>";
    let refusing = Double::start(|_, _| Reply::new(403, &[], body)).await;
    let error = read(&refusing, Some(keys.clone())).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { given: true, .. }), "{error:?}");
    assert!(!error.to_string().contains("the request"), "{error}");
    let seen = &refusing.seen()[0];
    let authorization = seen.header("authorization").unwrap();
    assert!(authorization.contains("AKID") && !authorization.contains("top/secret"), "{authorization}");
    assert_eq!(seen.path, format!("/bucket/{}", ObjectId::new([1; 32])));

    let modified = [("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT"), ("etag", "\"x\"")];
    let ranged = |range: &'static str, body: &'static [u8]| {
        Double::start(move |_, _| {
            let headers = [&modified[..], &[("content-range", range)]].concat();
            Reply::new(206, &headers, body)
        })
    };
    let right = ranged("bytes 10-19/100", b"0123456789").await;
    assert_eq!(read(&right, Some(keys.clone())).await.unwrap(), &b"0123456789"[..]);
    let other = ranged("bytes 0-9/100", b"0123456789").await;
    assert!(read(&other, Some(keys.clone())).await.is_err());
    let short = ranged("bytes 10-19/100", b"01234").await;
    let error = read(&short, Some(keys)).await.unwrap_err();
    assert!(matches!(error, RegistryError::WrongLength { .. }), "{error:?}");
    let failing = Double::start(|_, _| Reply::new(500, &[], b"out of order")).await;
    let error = read(&failing, None).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
}
