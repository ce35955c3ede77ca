//! Connections that end at every stage of every request, tokens that expire on the way, storms of 429: what helps is tried again,
//! and a tag never names what is not all there.

use futures::StreamExt;

use super::{
    registry_double::{Auth, CUTS, Fault, RegistryDouble},
    source::{image, layers, noise},
    *,
};
use crate::oci::{Authfile, ConvertOptions, Credentials, Descriptor, PushReport, RegistryError, convert, copy};

/// base64 of `user:correct horse`.
const BASIC: &str = "Basic dXNlcjpjb3JyZWN0IGhvcnNl";

fn registry(auth: Auth) -> RegistryDouble {
    RegistryDouble::start(auth, |bytes| sha256(bytes).to_string())
}

fn reference(double: &RegistryDouble, name: &str) -> Reference {
    format!("{}/{name}", double.host()).parse().unwrap()
}

fn with(retries: u32, hosts: &[&RegistryDouble]) -> Registry {
    let mut auth = Authfile::default();
    for host in hosts {
        let credentials = Credentials { username: "user".to_owned(), password: "correct horse".to_owned() };
        auth.insert(&host.host(), credentials);
    }
    Registry::new(RegistryOptions { auth: auth.into(), retries, ..options() }).unwrap()
}

async fn pushed(registry: &Registry, fixture: &Fixture, to: &Reference) -> Result<PushReport, PushError> {
    push(registry, &fixture.bootstrap(), &fixture.dir.path().join("blobs"), to, Default::default(), |_| ()).await
}

/// If there is something under the tag, all of it is there.
fn nothing_half(double: &RegistryDouble, repository: &str, tag: &str) -> bool {
    let Some(manifest) = double.tagged(&format!("{repository}:{tag}")) else { return false };
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    for descriptor in layers.iter().chain([&manifest["config"]]) {
        let digest = descriptor["digest"].as_str().unwrap();
        let blob = double.blob(repository, digest).unwrap_or_else(|| panic!("{digest} is not there"));
        assert_eq!(format!("sha256:{}", sha256(&blob)), digest);
        assert_eq!(descriptor["size"], blob.len());
    }
    true
}

/// Breaks the connection of one request.
fn once(at: usize, fault: Fault) -> impl Fn(&registry_double::Request, usize) -> Fault + Send + Sync {
    move |_, before| if before == at { fault } else { Fault::None }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_survives_one_cut_at_any_stage() {
    let fixture = Fixture::new();
    let whole = registry(Auth::Open);
    pushed(&with(0, &[]), &fixture, &reference(&whole, "app:v1")).await.unwrap();
    let requests = whole.seen().len();
    assert_eq!(requests, 10, "three blobs of three requests, and the manifest");
    let tries = (0..requests).flat_map(|at| CUTS.map(|cut| (at, cut)));
    let tries = tries.map(|(at, cut)| {
        let fixture = &fixture;
        async move {
            let double = registry(Auth::Open);
            double.break_at(once(at, cut));
            let to = reference(&double, "app:v1");
            let report = pushed(&with(2, &[]), fixture, &to).await;
            let report = report.unwrap_or_else(|error| panic!("{cut:?} at {at}: {error} {:#?}", double.seen()));
            assert!(nothing_half(&double, "app", "v1"), "{cut:?} at {at}");
            assert_eq!(client().resolve(&to).await.unwrap().0, report.manifest, "{cut:?} at {at}");
        }
    });
    futures::stream::iter(tries).buffer_unordered(8).collect::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_ends_for_good_leaves_nothing_half_and_is_finished_later() {
    let fixture = Fixture::new();
    for at in 0..10 {
        for cut in CUTS {
            let double = registry(Auth::Open);
            double.break_at(move |_, before| if before >= at { cut } else { Fault::None });
            let to = reference(&double, "app:v1");
            let error = pushed(&with(0, &[]), &fixture, &to).await.unwrap_err();
            let PushError::Registry(registry) = &error else { panic!("{cut:?} at {at}: {error:?}") };
            assert!(
                registry.is_transient() && error.to_string().contains(&double.host()),
                "{cut:?} at {at}: {error}"
            );
            let tagged = nothing_half(&double, "app", "v1");
            assert!(!tagged || at == 9, "{cut:?} at {at}");
            double.break_at(|_, _| Fault::None);
            pushed(&with(0, &[]), &fixture, &to).await.unwrap();
            assert!(nothing_half(&double, "app", "v1"), "{cut:?} at {at}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_survive_one_cut_at_any_stage() {
    let fixture = Fixture::new();
    let blob = std::fs::read(fixture.blob_file()).unwrap();
    let double = registry(Auth::Open);
    let to = reference(&double, "app:v1");
    pushed(&with(0, &[]), &fixture, &to).await.unwrap();
    let start = double.seen().len();
    read(&with(0, &[]), &to, &blob).await.unwrap();
    let requests = double.seen().len() - start;
    assert_eq!(requests, 5, "tag, manifest, bootstrap layer, range, blob");
    for at in 0..requests {
        for cut in CUTS {
            let first = double.seen().len() + at;
            double.break_at(once(first, cut));
            let got = read(&with(2, &[]), &to, &blob).await;
            got.unwrap_or_else(|error| panic!("{cut:?} at {at}: {error}"));
            // Without tries the error says what happened, and to whom.
            let first = double.seen().len() + at;
            double.break_at(move |_, before| if before >= first { cut } else { Fault::None });
            let error = read(&with(0, &[]), &to, &blob).await.unwrap_err();
            assert!(error.is_transient() && error.to_string().contains(&double.host()), "{cut:?} at {at}: {error}");
        }
    }
}

/// All that a reader does: tag, manifest, layer, a range as the daemon reads it, and a whole blob.
async fn read(registry: &Registry, reference: &Reference, blob: &[u8]) -> Result<(), RegistryError> {
    let image = registry.image(reference).await?;
    registry.blob(&image.source, image.manifest.bootstrap.id, 1 << 20).await?;
    let id = blob_id(blob);
    let mut stream = registry.blob_range(&image.source, id, 1_000..90_000).await?;
    let mut got = Vec::new();
    while let Some(chunk) = stream.next().await {
        match chunk {
            Ok(chunk) => got.extend_from_slice(&chunk),
            Err(error) if registry.http.options.retries == 0 => return Err(error),
            Err(_) => {
                let rest = 1_000 + got.len() as u64..90_000;
                stream = registry.rest_of_range(&image.source, id, rest).await?;
            }
        }
    }
    assert!(got == blob[1_000..90_000]);
    let mut whole = Vec::new();
    let descriptor = Descriptor { id: sha256(blob), size: blob.len() as u64 };
    registry.blob_to(&image.source, &descriptor, &mut whole).await?;
    assert!(whole == blob);
    Ok(())
}

/// From one registry to another one, either of which breaks.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_survives_one_cut_at_any_stage_of_either_end() {
    let source = registry(Auth::Open);
    let from = reference(&source, "app:v1");
    image(&with(0, &[]), &from, &layers()).await;
    let start = source.seen().len();
    let target = registry(Auth::Open);
    let to = reference(&target, "app:v1");
    let report = copy(&with(0, &[]), &from, &to, None, |_, _| {}).await.unwrap();
    let requests = (source.seen().len() - start, target.seen().len());
    assert!(requests.0 >= 4 && requests.1 >= 8, "{requests:?}");
    for at in 0..requests.0 {
        for cut in CUTS {
            let target = registry(Auth::Open);
            source.break_at(once(source.seen().len() + at, cut));
            let to = reference(&target, "app:v1");
            let copied = copy(&with(2, &[]), &from, &to, None, |_, _| {}).await;
            let copied = copied.unwrap_or_else(|error| panic!("{cut:?} at {at} of the source: {error}"));
            assert_eq!(copied.manifest, report.manifest);
            assert!(nothing_half(&target, "app", "v1"), "{cut:?} at {at} of the source");
        }
    }
    source.break_at(|_, _| Fault::None);
    let tries = (0..requests.1).flat_map(|at| CUTS.map(|cut| (at, cut)));
    let tries = tries.map(|(at, cut)| {
        let (from, manifest) = (&from, report.manifest);
        async move {
            let target = registry(Auth::Open);
            target.break_at(once(at, cut));
            let to = reference(&target, "app:v1");
            let copied = copy(&with(2, &[]), from, &to, None, |_, _| {}).await;
            let copied = copied.unwrap_or_else(|error| panic!("{cut:?} at {at} of the target: {error}"));
            assert_eq!(copied.manifest, manifest);
            assert!(nothing_half(&target, "app", "v1"), "{cut:?} at {at} of the target");
        }
    });
    futures::stream::iter(tries).buffer_unordered(8).collect::<()>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_in_the_middle_of_a_push_is_replaced() {
    let fixture = Fixture::new();
    for (uses, polite) in [(1, true), (2, true), (3, true), (5, true), (2, false), (3, false), (5, false)] {
        let double = registry(Auth::Token { basic: BASIC, uses, polite });
        let to = reference(&double, "app:v1");
        let pushed = pushed(&with(2, &[&double]), &fixture, &to).await;
        pushed.unwrap_or_else(|error| panic!("{uses} {polite}: {error}"));
        assert!(nothing_half(&double, "app", "v1"));
        assert!(double.tokens().len() >= 10 / (uses as usize + 1), "{uses}: {:?}", double.tokens());
        // The password is for the token server alone.
        for seen in double.seen() {
            let shows = seen.header("authorization") == Some(BASIC);
            assert_eq!(shows, seen.path.starts_with("/token"), "{seen:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_are_told_at_once_and_leave_nothing() {
    let fixture = Fixture::new();
    for auth in [Auth::Basic(BASIC), Auth::Token { basic: BASIC, uses: 9, polite: true }] {
        let double = registry(auth);
        let to = reference(&double, "app:v1");
        for (credentials, given) in [(None, false), (Some("battery staple"), true)] {
            let mut auth = Authfile::default();
            if let Some(password) = credentials {
                let credentials = Credentials { username: "user".to_owned(), password: password.to_owned() };
                auth.insert(&double.host(), credentials);
            }
            let registry = Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap();
            let before = double.seen().len();
            let error = pushed(&registry, &fixture, &to).await.unwrap_err();
            let refused = matches!(&error, PushError::Registry(RegistryError::Unauthorized { given: told, .. }) if *told == given);
            assert!(refused, "{error:?}");
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("battery") && !shown.contains("YmF0dGVyeS"), "{shown}");
            assert!(double.seen().len() - before <= 3, "{:#?}", double.seen());
            assert!(double.tagged("app:v1").is_none());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_429_is_sat_out_or_told() {
    let fixture = Fixture::new();
    let blob = std::fs::read(fixture.blob_file()).unwrap();
    let double = registry(Auth::Open);
    let to = reference(&double, "app:v1");
    // Two of three requests are refused, whoever makes them, in no order.
    double.break_at(|_, before| {
        let chance = (before as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
        if chance.is_multiple_of(3) { Fault::None } else { Fault::Status(429, Some(0)) }
    });
    let registry = with(40, &[]);
    pushed(&registry, &fixture, &to).await.unwrap();
    assert!(nothing_half(&double, "app", "v1"));
    let reads = (0..24).map(|_| read(&registry, &to, &blob));
    for read in futures::future::join_all(reads).await {
        read.unwrap();
    }
    // One that does not end is an error of its own, after as many tries as were allowed, and nothing is under the tag.
    double.break_at(|_, _| Fault::Status(429, Some(0)));
    let (before, other) = (double.seen().len(), reference(&double, "app:v2"));
    let error = pushed(&with(3, &[]), &fixture, &other).await.unwrap_err();
    assert!(matches!(&error, PushError::Registry(RegistryError::RateLimited { .. })), "{error:?}");
    assert_eq!(double.seen().len() - before, 4);
    assert!(double.tagged("app:v2").is_none());
    // At the very last request, too.
    double.break_at(|seen, _| match seen.path.contains("/manifests/") {
        true => Fault::Status(429, Some(3600)),
        false => Fault::None,
    });
    let error = pushed(&with(3, &[]), &fixture, &other).await.unwrap_err();
    let PushError::Registry(limited) = &error else { panic!("{error:?}") };
    assert_eq!(limited.retry_after(), Some(Duration::from_secs(3600)));
    assert!(double.tagged("app:v2").is_none());
}

/// What it says that it has is not what is to be sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_blob_of_another_size_is_not_taken_for_ours() {
    let bytes = noise(51, 10_000);
    let id = sha256(&bytes);
    let double = Double::start(move |seen, _| match seen.method.as_str() {
        "HEAD" => double::Reply::raw(200, &[("content-length", "9999")], b""),
        "POST" => double::Reply::new(202, &[("location", "/v2/app/blobs/uploads/1")], b""),
        _ => double::Reply::new(201, &[], b""),
    })
    .await;
    let (sent, existed) = client().upload_bytes(&double.source(), bytes.clone().into()).await.unwrap();
    assert!(sent == id && !existed);
    assert_eq!(double.seen().last().unwrap().body, bytes);
    // It says that it has stored something else.
    let other = format!("sha256:{}", ObjectId::new([7; 32]));
    let double = Double::start(move |seen, _| match seen.method.as_str() {
        "HEAD" => double::Reply::new(404, &[], b""),
        "POST" => double::Reply::new(202, &[("location", "/v2/app/blobs/uploads/1")], b""),
        _ => double::Reply::new(201, &[("docker-content-digest", &other)], b""),
    })
    .await;
    let error = client().upload_bytes(&double.source(), bytes.into()).await.unwrap_err();
    assert!(matches!(&error, RegistryError::WrongDigest { expected, .. } if *expected == id), "{error}");
}

/// A manifest that is what its digest says, and whose layers are not as large as it says.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_lies_about_sizes_leaves_nothing_under_the_tag() {
    let double = registry(Auth::Open);
    let from = reference(&double, "app:v1");
    image(&with(0, &[]), &from, &layers()).await;
    let honest: serde_json::Value = serde_json::from_slice(&double.tagged("app:v1").unwrap()).unwrap();
    let size = honest["layers"][0]["size"].as_u64().unwrap();
    for (lie, key) in
        [(size - 1, "layers"), (size + 1, "layers"), (1, "layers"), (u64::MAX / 2, "layers"), (1, "config")]
    {
        let mut manifest = honest.clone();
        match key {
            "config" => manifest["config"]["size"] = lie.into(),
            _ => manifest["layers"][0]["size"] = lie.into(),
        }
        let tag = reference(&double, "app:lie");
        let kind = "application/vnd.oci.image.manifest.v1+json";
        with(0, &[]).put_manifest(&tag, kind, manifest.to_string().into()).await.unwrap();
        for done in ["converted", "copied"] {
            let target = registry(Auth::Open);
            let to = reference(&target, &format!("{done}:v1"));
            let options = ConvertOptions {
                build: BuildOptions { chunk_size: 0x1_0000, ..Default::default() },
                ..Default::default()
            };
            let error = match done {
                "converted" => {
                    convert(&with(1, &[]), &tag, &to, &options, |_| {}).await.err().map(|e| crate::chain(&e))
                }
                _ => copy(&with(1, &[]), &tag, &to, None, |_, _| {}).await.err().map(|e| crate::chain(&e)),
            };
            // The config is read whole and compared with its digest: its size is not needed.
            if done == "converted" && key == "config" {
                continue;
            }
            let error = error.unwrap_or_else(|| panic!("{lie} for {size} is {done}"));
            assert!(error.contains(&double.host()) || error.contains("sha256"), "{error}");
            assert!(target.tagged(&format!("{done}:v1")).is_none(), "{lie}");
        }
    }
}

/// How much of an upload it has is its word; whether that was true the digest says.
#[tokio::test(flavor = "multi_thread")]
async fn a_lie_about_how_much_has_come_costs_another_upload() {
    let bytes = noise(52, 20_000);
    for lie in ["0-0", "0-12344", "0-19999", "0-20000", "0-18446744073709551615", "5-9", "-1", "x"] {
        let double = registry(Auth::Open);
        let broke = std::sync::atomic::AtomicBool::new(false);
        double.break_at(move |seen, _| {
            let first = seen.method == "PUT" && !broke.swap(true, std::sync::atomic::Ordering::Relaxed);
            if first { Fault::Body } else { Fault::None }
        });
        double.lie_about_uploads(lie);
        let source = reference(&double, "app:v1").source().clone();
        let (id, _) = with(2, &[]).upload_bytes(&source, bytes.clone().into()).await.unwrap();
        assert!(double.blob("app", &format!("sha256:{id}")).unwrap() == bytes, "{lie}");
    }
}

/// An upload may go on at another host, which is shown nothing and may ask for nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_at_another_host_shows_no_credentials() {
    let bytes = noise(53, 1_000);
    for scheme in
        ["Basic realm=\"x\"".to_owned(), "Bearer realm=\"http://127.0.0.1/token\"".to_owned(), String::new()]
    {
        let challenge = scheme.clone();
        let storage = Double::start(move |_, _| match challenge.as_str() {
            "" => double::Reply::new(201, &[], b""),
            challenge => double::Reply::new(401, &[("www-authenticate", challenge)], b""),
        })
        .await;
        let session = format!("http://127.0.0.1:{}/store", storage.port());
        let registry = Double::start(move |seen, _| match (seen.header("authorization"), seen.method.as_str()) {
            (None, _) => double::Reply::new(401, &[("www-authenticate", "Basic realm=\"x\"")], b""),
            (_, "HEAD") => double::Reply::new(404, &[], b""),
            _ => double::Reply::new(202, &[("location", &session)], b""),
        })
        .await;
        let mut auth = Authfile::default();
        let credentials = Credentials { username: "user".to_owned(), password: "correct horse".to_owned() };
        auth.insert(registry.source().registry(), credentials);
        let client = Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap();
        let sent = client.upload_bytes(&registry.source(), bytes.clone().into()).await;
        match scheme.as_str() {
            "" => assert_eq!(sent.unwrap().0, sha256(&bytes)),
            _ => assert!(matches!(sent, Err(RegistryError::Unauthorized { .. })), "{sent:?}"),
        }
        let seen = storage.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert!(seen.iter().all(|seen| seen.header("authorization").is_none()), "{seen:?}");
        // Tokens were asked for nowhere.
        assert!(registry.seen().iter().all(|seen| !seen.path.starts_with("/token")));
    }
}
