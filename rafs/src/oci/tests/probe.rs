//! Whom the registry would let in, and who sees what the client showed.

use super::{
    docker_registry::{password, start},
    double::Reply,
    *,
};
use crate::oci::{Access, Authfile, Credentials, Described, Probe};

/// base64 of `user:secret`.
const GOOD: &str = "Basic dXNlcjpzZWNyZXQ=";
const WRONG: &str = "Basic dXNlcjpndWVzcw==";

#[tokio::test]
async fn a_real_registry_lets_in_whoever_shows_the_password() {
    let Some(server) = start(password, "").await else { return };
    let source = Source::new(&server.host, "team/app").unwrap();
    let mut auth = Authfile::default();
    auth.insert(&server.host, Credentials { username: "user".to_owned(), password: "secret".to_owned() });
    let owner = Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap();
    let (id, _) = owner.upload_bytes(&source, Bytes::from_static(b"layer")).await.unwrap();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{id}","size":5}},"layers":[]}}"#
    );
    let size = manifest.len() as u64;
    let reference = format!("{source}:v1").parse().unwrap();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = owner.put_manifest(&reference, media_type, manifest.into()).await.unwrap();

    let described = |id, size, media_type: Option<&str>| {
        Access::Granted(Described { id: Some(id), size: Some(size), media_type: media_type.map(str::to_owned) })
    };
    let tag = Probe::Tag("v1".to_owned());
    // What this client itself could show has no part in it.
    for registry in [&client(), &owner] {
        for (probe, granted) in [
            (tag.clone(), described(manifest, size, Some(media_type))),
            (Probe::Manifest(manifest), described(manifest, size, Some(media_type))),
            (Probe::Blob(id), described(id, 5, None)),
        ] {
            let ask = |shown| registry.probe(&source, &probe, shown, None);
            assert_eq!(ask(Some(GOOD)).await.unwrap(), granted, "{probe:?}");
            let refused = ask(Some(WRONG)).await.unwrap();
            assert!(matches!(&refused, Access::Refused { challenges } if challenges.len() == 1), "{refused:?}");
        }
    }
    let nobody = client().probe(&source, &tag, None, None).await.unwrap();
    assert!(matches!(&nobody, Access::Refused { challenges } if challenges[0].starts_with("Basic")), "{nobody:?}");
    let absent = Probe::Blob(ObjectId::new([1; 32]));
    assert_eq!(client().probe(&source, &absent, Some(GOOD), None).await.unwrap(), Access::Absent);
    let unprintable = client().probe(&source, &tag, Some("Basic \n"), None).await.unwrap();
    assert_eq!(unprintable, Access::Refused { challenges: Vec::new() });
}

/// Wants a token, which it gives to anybody; lets those in whose token `opens` it.
async fn token_registry(opens: bool) -> Double {
    Double::start(move |seen, _| {
        if seen.path.starts_with("/token") {
            return Reply::new(200, &[], br#"{"token":"anonymous"}"#);
        }
        if opens && seen.header("authorization") == Some("Bearer anonymous") {
            return Reply::raw(200, &[("content-length", "7")], b"");
        }
        let realm = format!("Bearer realm=\"http://{}/token\",service=\"s\"", seen.header("host").unwrap());
        Reply::new(401, &[("www-authenticate", &realm)], b"")
    })
    .await
}

#[tokio::test]
async fn nobody_gets_the_token_that_is_given_to_anybody() {
    let probe = Probe::Blob(ObjectId::new([2; 32]));
    for opens in [true, false] {
        let double = token_registry(opens).await;
        let access = client().probe(&double.source(), &probe, None, None).await.unwrap();
        match access {
            Access::Granted(Described { size, .. }) => assert!(opens && size == Some(7)),
            // The challenge of the registry to who shows nothing, which says where tokens are.
            Access::Refused { challenges } => assert!(!opens && challenges[0].contains("/token"), "{challenges:?}"),
            Access::Absent => panic!("it is there"),
        }
        let tokens = double.seen().into_iter().filter(|seen| seen.path.starts_with("/token"));
        assert!(tokens.into_iter().all(|seen| seen.header("authorization").is_none()));
    }
    // Who shows something is asked about as such: no token is fetched instead.
    let double = token_registry(true).await;
    let access = client().probe(&double.source(), &probe, Some("Bearer guess"), None).await.unwrap();
    assert!(matches!(access, Access::Refused { challenges } if challenges.len() == 1));
    assert_eq!(double.seen().len(), 1);
}

#[tokio::test]
async fn what_was_shown_goes_no_further_than_the_registry() {
    // Where blobs are kept: signed links that are good for GET only.
    let storage = Double::start(|seen, _| match seen.method.as_str() {
        "GET" => Reply::new(206, &[("content-range", "bytes 0-0/4711")], b"x"),
        _ => Reply::new(403, &[], b""),
    })
    .await;
    let link = format!("http://127.0.0.1:{}/signed", storage.port());
    let registry = Double::start(move |seen, _| match seen.header("authorization") {
        Some(GOOD) => Reply::new(307, &[("location", &link)], b""),
        _ => Reply::new(401, &[("www-authenticate", "Basic realm=\"r\"")], b""),
    })
    .await;
    let id = ObjectId::new([3; 32]);
    let access = client().probe(&registry.source(), &Probe::Blob(id), Some(GOOD), None).await.unwrap();
    assert_eq!(access, Access::Granted(Described { id: Some(id), size: Some(4711), media_type: None }));
    let asked = storage.seen();
    assert_eq!(asked.iter().map(|seen| seen.method.as_str()).collect::<Vec<_>>(), ["HEAD", "GET"]);
    assert!(asked.iter().all(|seen| seen.header("authorization").is_none()));
    assert_eq!(asked[1].header("range"), Some("bytes=0-0"));
}

#[tokio::test]
async fn a_redirect_is_no_permission() {
    let elsewhere = Double::start(|_, _| Reply::new(403, &[], b"")).await;
    let link = format!("http://127.0.0.1:{}/login", elsewhere.port());
    let registry = Double::start(move |_, _| Reply::new(302, &[("location", &link)], b"")).await;
    for probe in [Probe::Blob(ObjectId::new([4; 32])), Probe::Tag("v1".to_owned())] {
        let access = client().probe(&registry.source(), &probe, Some(GOOD), None).await.unwrap();
        assert_eq!(access, Access::Refused { challenges: Vec::new() }, "{probe:?}");
    }
}
