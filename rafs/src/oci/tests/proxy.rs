//! Registries behind a proxy that keeps what they have: it may lie, hang, cut and die, and sees what it may.

use std::collections::BTreeMap;

use futures::StreamExt;

use super::{
    docker_registry::{certificate, password, start},
    double::Reply,
    proxy_double::{Asked, Mood, ProxyDouble},
    source::noise,
    *,
};
use crate::oci::{Authfile, Credentials, Descriptor, ProxyForm, ProxyOptions, RegistryError};

const FORMS: [ProxyForm; 3] = [ProxyForm::Mirror, ProxyForm::Forward, ProxyForm::Tunnel];
/// base64 of `user:secret`.
const BASIC: &str = "Basic dXNlcjpzZWNyZXQ=";

fn through(proxy: &ProxyDouble) -> ProxyOptions {
    ProxyOptions {
        url: proxy.url().parse().unwrap(),
        form: ProxyForm::Mirror,
        registries: vec!["*".to_owned()],
        credentials: false,
        headers: BTreeMap::new(),
        ping_url: None,
        check_interval: Duration::from_secs(60),
        fallback: true,
        timeout: Duration::from_millis(300),
    }
}

fn reading(proxy: ProxyOptions) -> Registry {
    Registry::new(RegistryOptions { proxy: Some(proxy), ..options() }).unwrap()
}

fn knowing(proxy: ProxyOptions, source: &Source) -> Registry {
    let mut auth = Authfile::default();
    auth.insert(source.registry(), Credentials { username: "user".to_owned(), password: "secret".to_owned() });
    Registry::new(RegistryOptions { auth: auth.into(), proxy: Some(proxy), ..options() }).unwrap()
}

/// A registry that has these bytes as a blob and as a manifest, and gives ranges of them.
async fn holder(body: Vec<u8>) -> Double {
    Double::start(move |seen, _| give(seen, &body)).await
}

fn give(seen: &double::Seen, body: &[u8]) -> Reply {
    let digest = format!("sha256:{}", sha256(body));
    let length = body.len().to_string();
    let range = seen.header("range").map(|range| {
        let (first, last) = range["bytes=".len()..].split_once('-').unwrap();
        first.parse().unwrap()..last.parse::<usize>().unwrap() + 1
    });
    match (seen.method.as_str(), range) {
        ("HEAD", _) => Reply::raw(200, &[("docker-content-digest", &digest), ("content-length", &length)], b""),
        (_, None) => Reply::new(200, &[], body),
        (_, Some(range)) => {
            let said = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            Reply::new(206, &[("content-range", &said)], &body[range])
        }
    }
}

/// Reads a range as the daemon does: goes on where it broke, and again where it is wrong.
async fn read_range(registry: &Registry, source: &Source, body: &[u8], range: std::ops::Range<usize>) {
    let (mut got, mut broken) = (Vec::new(), false);
    loop {
        let rest = (range.start + got.len()) as u64..range.end as u64;
        let mut stream = match broken {
            true => registry.rest_of_range(source, blob_id(body), rest).await.unwrap(),
            false => registry.blob_range(source, blob_id(body), rest).await.unwrap(),
        };
        while let Some(chunk) = stream.next().await {
            match chunk {
                Ok(chunk) => got.extend_from_slice(&chunk),
                Err(error) => {
                    assert!(error.is_transient() && !broken, "{error}");
                    broken = true;
                    break;
                }
            }
        }
        if got == body[range.clone()] {
            return;
        }
        if got.len() == range.len() {
            assert!(registry.distrust(source), "the registry itself gave wrong bytes");
            (got, broken) = (Vec::new(), false);
        }
    }
}

async fn read_all(registry: &Registry, source: &Source, body: &[u8]) {
    let id = sha256(body);
    assert_eq!(registry.manifest(source, id).await.unwrap(), body);
    assert_eq!(registry.blob(source, id, 1 << 20).await.unwrap(), body);
    read_range(registry, source, body, 10..body.len() - 10).await;
}

fn priorities(asked: &[Asked]) -> Vec<&str> {
    asked.iter().map(|asked| asked.header("x-dragonfly-priority").unwrap()).collect()
}

#[tokio::test]
async fn what_digests_name_comes_through_the_proxy_in_each_form() {
    let body = noise(31, 5_000);
    for form in FORMS {
        let (registry, proxy) = (holder(body.clone()).await, ProxyDouble::start());
        let headers = [("X-Dragonfly-Tag".to_owned(), "shoal".to_owned())].into();
        let client = reading(ProxyOptions { form, headers, ..through(&proxy) });
        let source = registry.source();
        read_all(&client, &source, &body).await;
        read_range(&client.in_background(), &source, &body, 0..10).await;
        let asked = proxy.asked();
        assert_eq!((asked.len(), registry.seen().len()), (4, 4), "{form:?}");
        assert_eq!(priorities(&asked), ["6", "6", "6", "3"]);
        for asked in &asked {
            assert_eq!(asked.header("x-dragonfly-use-p2p"), Some("true"));
            assert_eq!(asked.header("x-dragonfly-tag"), Some("shoal"));
            let (host, url) = (source.registry(), format!("http://{}", source.registry()));
            let mirror = form == ProxyForm::Mirror;
            assert_eq!(asked.header("x-dragonfly-registry"), mirror.then_some(url.as_str()));
            let shape = if mirror { "GET /v2/app/".to_owned() } else { format!("GET http://{host}/v2/app/") };
            assert!(asked.line.starts_with(&shape), "{form:?}: {}", asked.line);
        }
        assert_eq!(registry.seen()[2].header("range"), Some("bytes=10-4989"));
        // What a tag means, and what is there already, the registry says itself.
        assert_eq!(client.resolve(&registry.reference()).await.unwrap(), (sha256(&body), 5_000));
        client.blob_size(&source, sha256(&body)).await.unwrap();
        assert_eq!((proxy.asked().len(), registry.seen().len()), (4, 6), "{form:?}");
        let stats = client.proxy_stats().unwrap();
        assert!(stats.used && stats.reads == 4 && stats.failed == 0, "{stats:?}");
    }
}

#[tokio::test]
async fn registries_that_are_not_listed_are_read_past_it() {
    let (body, proxy) = (noise(32, 500), ProxyDouble::start());
    let (one, other) = (holder(body.clone()).await, holder(body.clone()).await);
    let client = reading(ProxyOptions { registries: vec![one.source().registry().to_owned()], ..through(&proxy) });
    read_all(&client, &other.source(), &body).await;
    assert_eq!((proxy.asked().len(), other.seen().len()), (0, 3));
    read_all(&client, &one.source(), &body).await;
    assert_eq!((proxy.asked().len(), one.seen().len()), (3, 3));
}

#[tokio::test]
async fn whatever_the_proxy_does_every_read_is_right() {
    let body = noise(33, 40_000);
    let moods = [
        Mood::Lie,
        Mood::Hang,
        Mood::Stop,
        Mood::Cut,
        Mood::Status(200),
        Mood::Status(400),
        Mood::Status(407),
        Mood::Status(429),
        Mood::Status(503),
    ];
    for form in [ProxyForm::Mirror, ProxyForm::Forward] {
        for mood in moods {
            let (registry, proxy) = (holder(body.clone()).await, ProxyDouble::start());
            let client = reading(ProxyOptions { form, ..through(&proxy) });
            proxy.set(mood);
            read_all(&client, &registry.source(), &body).await;
            // It failed once, and was left alone from then on.
            let stats = client.proxy_stats().unwrap();
            assert!(!stats.used && stats.reads == 1 && stats.failed == 1, "{mood:?}: {stats:?}");
            assert_eq!(proxy.asked().len(), 1, "{mood:?}");
        }
        // A refusal is the proxy's own affair, and says nothing of the next thing.
        for mood in [Mood::Status(403), Mood::Status(404)] {
            let (registry, proxy) = (holder(body.clone()).await, ProxyDouble::start());
            let client = reading(ProxyOptions { form, ..through(&proxy) });
            proxy.set(mood);
            read_all(&client, &registry.source(), &body).await;
            assert_eq!((proxy.asked().len(), registry.seen().len()), (3, 3), "{mood:?}");
            proxy.set(Mood::Pass);
            read_all(&client, &registry.source(), &body).await;
            assert_eq!((proxy.asked().len(), registry.seen().len()), (6, 6), "{mood:?}");
        }
    }
}

#[tokio::test]
async fn a_body_that_breaks_is_finished_by_the_registry() {
    let body = noise(34, 100_000);
    for mood in [Mood::Stop, Mood::Cut] {
        let (registry, proxy) = (holder(body.clone()).await, ProxyDouble::start());
        let client = reading(through(&proxy));
        proxy.set(mood);
        let mut whole = Vec::new();
        let descriptor = Descriptor { id: sha256(&body), size: 100_000 };
        client.blob_to(&registry.source(), &descriptor, &mut whole).await.unwrap();
        assert!(whole == body, "{mood:?}");
        // What had come through the proxy did not come again.
        assert_eq!(registry.seen().last().unwrap().header("range"), Some("bytes=50000-99999"), "{mood:?}");
        read_all(&client, &registry.source(), &body).await;
        assert_eq!(proxy.asked().len(), 1, "{mood:?}");
    }
    // Wrong bytes that were passed on cannot be taken back; the next try is right.
    let (registry, proxy) = (holder(body.clone()).await, ProxyDouble::start());
    let client = reading(through(&proxy));
    proxy.set(Mood::Lie);
    let descriptor = Descriptor { id: sha256(&body), size: 100_000 };
    let error = client.blob_to(&registry.source(), &descriptor, &mut Vec::new()).await.unwrap_err();
    assert!(matches!(error, RegistryError::WrongDigest { .. }), "{error}");
    client.blob_to(&registry.source(), &descriptor, &mut Vec::new()).await.unwrap();
}

#[tokio::test]
async fn it_is_used_again_when_it_answers_its_ping() {
    let body = noise(35, 1_000);
    let (registry, mut proxy) = (holder(body.clone()).await, ProxyDouble::start());
    let client = reading(ProxyOptions {
        ping_url: Some(format!("{}/ping", proxy.url()).parse().unwrap()),
        check_interval: Duration::from_millis(20),
        timeout: Duration::from_millis(100),
        ..through(&proxy)
    });
    let source = registry.source();
    read_all(&client, &source, &body).await;
    assert_eq!(proxy.asked().len(), 3);
    for mood in [None, Some(Mood::Status(503)), Some(Mood::Hang)] {
        match mood {
            None => proxy.die(),
            Some(mood) => proxy.set(mood),
        }
        read_all(&client, &source, &body).await;
        assert!(!client.proxy_stats().unwrap().used);
        let (asked, pings) = (proxy.asked().len(), proxy.pings());
        if mood.is_some() {
            // It is pinged, but the answer is no good: no read is tried.
            while proxy.pings() < pings + 2 {
                read_all(&client, &source, &body).await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(proxy.asked().len(), asked, "{mood:?}");
        } else {
            proxy.revive();
        }
        proxy.set(Mood::Pass);
        while proxy.asked().len() < asked + 3 {
            read_all(&client, &source, &body).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    // Nobody reads, nobody asks: at most the ping that is under way is still to come.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let pings = proxy.pings();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(proxy.pings(), pings);
}

#[tokio::test]
async fn reads_that_go_on_while_it_comes_and_goes_are_right() {
    let body = noise(36, 20_000);
    let (registry, mut proxy) = (holder(body.clone()).await, ProxyDouble::start());
    let client = reading(ProxyOptions {
        check_interval: Duration::from_millis(1),
        timeout: Duration::from_millis(30),
        ..through(&proxy)
    });
    let source = registry.source();
    let mut seed = 7u64;
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let moods = [Mood::Pass, Mood::Pass, Mood::Cut, Mood::Stop, Mood::Hang, Mood::Status(500), Mood::Status(404)];
    for step in 0..80 {
        match random(8) {
            0 => proxy.die(),
            _ => {
                proxy.die();
                proxy.revive();
                proxy.set(moods[random(moods.len() as u64) as usize]);
            }
        }
        let start = random(10_000) as usize;
        let reads = (0..4).map(|n| read_range(&client, &source, &body, start + n..start + 5_000));
        futures::future::join_all(reads).await;
        let id = sha256(&body);
        assert!(client.blob(&source, id, 1 << 20).await.unwrap() == body, "step {step}");
    }
    let stats = client.proxy_stats().unwrap();
    assert!(stats.failed > 10 && stats.reads > stats.failed, "{stats:?}");
}

#[tokio::test]
async fn without_fallback_the_registry_is_left_alone() {
    let body = noise(37, 100);
    let (registry, proxy) = (holder(body.clone()).await, ProxyDouble::start());
    let client = reading(ProxyOptions { fallback: false, ..through(&proxy) });
    for (mood, passes) in [(Mood::Status(503), true), (Mood::Lie, true), (Mood::Status(404), false)] {
        proxy.set(mood);
        let error = client.blob(&registry.source(), sha256(&body), 100).await.unwrap_err();
        assert!(matches!(error, RegistryError::Proxy { .. }), "{mood:?}: {error}");
        assert_eq!((error.is_transient(), error.retry_after()), (passes, None), "{mood:?}: {error}");
    }
    assert_eq!(registry.seen().len(), 1, "through the liar");
    proxy.set(Mood::Pass);
    read_all(&client, &registry.source(), &body).await;
    assert_eq!(proxy.asked().len(), 6);
}

#[tokio::test]
async fn it_sees_credentials_only_where_it_may() {
    let body = noise(38, 2_000);
    for (form, credentials) in FORMS.into_iter().flat_map(|form| [(form, false), (form, true)]) {
        let (kept, proxy) = (body.clone(), ProxyDouble::start());
        let registry = Double::start(move |seen, _| match seen.header("authorization") {
            Some(BASIC) => give(seen, &kept),
            _ => Reply::new(401, &[("www-authenticate", "Basic realm=\"x\"")], b""),
        })
        .await;
        let source = registry.source();
        let client = knowing(ProxyOptions { form, credentials, ..through(&proxy) }, &source);
        read_all(&client, &source, &body).await;
        let asked = proxy.asked();
        match credentials {
            // Over plain HTTP a tunnel hides nothing.
            false => assert!(asked.is_empty(), "{form:?}: {asked:?}"),
            true => {
                let shown: Vec<_> = asked.iter().map(|asked| asked.header("authorization")).collect();
                assert_eq!(shown, [None, Some(BASIC), Some(BASIC), Some(BASIC)], "{form:?}");
            }
        }
    }
}

/// The one who hands out tokens sees the password; the proxy sees what they open.
#[tokio::test]
async fn tokens_are_fetched_past_it_and_its_challenges_are_not_answered() {
    let body = noise(39, 2_000);
    let (kept, proxy) = (body.clone(), ProxyDouble::start());
    let registry = Double::start(move |seen, _| {
        if seen.path.starts_with("/token") {
            return Reply::new(200, &[], br#"{"token":"for-anybody","expires_in":300}"#);
        }
        if seen.header("authorization") == Some("Bearer for-anybody") {
            return give(seen, &kept);
        }
        let realm = format!("Bearer realm=\"http://{}/token\"", seen.header("host").unwrap());
        Reply::new(401, &[("www-authenticate", &realm)], b"")
    })
    .await;
    let client = reading(through(&proxy));
    read_all(&client, &registry.source(), &body).await;
    let shown: Vec<_> = proxy.asked().iter().map(|asked| asked.header("authorization").map(str::to_owned)).collect();
    let token = || Some("Bearer for-anybody".to_owned());
    assert_eq!(shown, [None, token(), token(), token()]);
    let direct = registry.seen().into_iter().filter(|seen| seen.header("x-dragonfly-use-p2p").is_none());
    let direct: Vec<_> = direct.map(|seen| (seen.method, seen.path.starts_with("/token"))).collect();
    assert_eq!(direct, [("HEAD".to_owned(), false), ("GET".to_owned(), true)]);

    // A proxy that asks for the password to be brought elsewhere.
    let thief = Double::start(|_, _| Reply::new(200, &[], br#"{"token":"t"}"#)).await;
    let realm = format!("Bearer realm=\"http://127.0.0.1:{}/token\"", thief.port());
    let liar = Double::start(move |_, _| Reply::new(401, &[("www-authenticate", &realm)], b"")).await;
    let open = holder(body.clone()).await;
    let options = ProxyOptions {
        url: format!("http://127.0.0.1:{}", liar.port()).parse().unwrap(),
        credentials: true,
        ..through(&proxy)
    };
    read_all(&knowing(options, &open.source()), &open.source(), &body).await;
    assert_eq!((liar.seen().len(), thief.seen().len()), (3, 0));
    assert!(open.seen().iter().all(|seen| seen.header("authorization").is_none()), "the registry did not ask");
}

#[tokio::test]
async fn links_that_the_registry_signed_are_followed_past_it() {
    let body = noise(40, 2_000);
    for credentials in [false, true] {
        let (storage, proxy) = (holder(body.clone()).await, ProxyDouble::start());
        let link = format!("http://127.0.0.1:{}/signed?key=secret", storage.port());
        let registry = Double::start(move |_, _| Reply::new(307, &[("location", &link)], b"")).await;
        let client = reading(ProxyOptions { credentials, ..through(&proxy) });
        read_all(&client, &registry.source(), &body).await;
        assert_eq!((registry.seen().len(), storage.seen().len()), (3, 3));
        let links = proxy.asked().iter().filter(|asked| asked.line.contains("secret")).count();
        assert_eq!(links, if credentials { 3 } else { 0 });
    }
}

/// A helper may have credentials, and one that does not answer does not say that it has none.
#[tokio::test]
async fn what_a_helper_may_know_is_not_shown_to_the_proxy() {
    let body = noise(43, 5_000);
    let (registry, proxy) = (holder(body.clone()).await, ProxyDouble::start());
    let source = registry.source();
    for (file, reads) in [
        (r#"{"credsStore": "not-installed"}"#.to_owned(), 0),
        (format!(r#"{{"credHelpers": {{"{}": "not-installed"}}}}"#, source.registry()), 0),
        (r#"{"credHelpers": {"h.io": "not-installed"}}"#.to_owned(), 3),
    ] {
        let auth = Authfile::parse(file.as_bytes(), "auth.json").unwrap();
        let proxy = Some(through(&proxy));
        let client = Registry::new(RegistryOptions { auth: auth.into(), proxy, ..options() }).unwrap();
        read_all(&client, &source, &body).await;
        assert_eq!(client.proxy_stats().unwrap().reads, reads, "{file}");
    }
}

/// Through a tunnel a proxy sees the names of registries and nothing else.
#[tokio::test]
async fn a_tunnel_carries_tls_to_a_real_registry() {
    let Some((_dir, key, cert)) = certificate() else { return };
    let tls = format!("  tls:\n    certificate: {}\n    key: {}\n", cert.display(), key.display());
    let Some(server) = start(password, &tls).await else { return };
    let (source, proxy) = (Source::new(&server.host, "team/app").unwrap(), ProxyDouble::start());
    let mut auth = Authfile::default();
    auth.insert(&server.host, Credentials { username: "user".to_owned(), password: "secret".to_owned() });
    let headers = [("Proxy-Authorization".to_owned(), "Basic cHJveHk6cHJveHk=".to_owned())].into();
    let options = |proxy| RegistryOptions {
        https: vec![server.host.clone()],
        ca_files: vec![cert.clone()],
        auth: auth.clone().into(),
        proxy,
        ..options()
    };
    let body = noise(41, 100_000);
    let (id, _) = Registry::new(options(None)).unwrap().upload_bytes(&source, body.clone().into()).await.unwrap();
    let through =
        ProxyOptions { form: ProxyForm::Tunnel, headers, timeout: Duration::from_secs(20), ..through(&proxy) };
    let client = Registry::new(options(Some(through))).unwrap();
    assert!(client.blob(&source, id, 1 << 20).await.unwrap() == body);
    read_range(&client, &source, &body, 1_000..90_000).await;
    let asked = proxy.asked();
    assert!(!asked.is_empty());
    for asked in &asked {
        assert_eq!(asked.line, format!("CONNECT {} HTTP/1.1", server.host));
        assert_eq!(asked.header("proxy-authorization"), Some("Basic cHJveHk6cHJveHk="));
        assert_eq!(asked.header("authorization"), None);
    }
    // What leaves TLS to the proxy would have to show it the password.
    assert_eq!(client.proxy_stats().unwrap().failed, 0);
    let forward = ProxyOptions { form: ProxyForm::Forward, credentials: false, ..super::proxy::through(&proxy) };
    let client = Registry::new(options(Some(forward))).unwrap();
    assert!(client.blob(&source, id, 1 << 20).await.unwrap() == body);
    assert_eq!((proxy.asked().len(), client.proxy_stats().unwrap().reads), (asked.len(), 0));
}
