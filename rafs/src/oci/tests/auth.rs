//! Who sees which credentials.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::net::TcpListener;

use super::{
    double::{Reply, Seen},
    registry_double::{Auth, RegistryDouble},
    *,
};
use crate::oci::{Authfile, Credentials, Keyring, RegistryError};

const BODY: &[u8] = b"blob";
const PASSWORD: &str = "correct horse";
/// base64 of `user:correct horse`.
const BASIC: &str = "Basic dXNlcjpjb3JyZWN0IGhvcnNl";

fn client_for(source: &Source) -> Registry {
    let mut auth = Authfile::default();
    let credentials = Credentials { username: "user".to_owned(), password: PASSWORD.to_owned() };
    auth.insert(source.registry(), credentials);
    Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap()
}

fn challenge(value: &str) -> Reply {
    Reply::new(401, &[("www-authenticate", value)], b"")
}

/// A registry that wants a bearer token and hands out `t0`, `t1`, ... itself, each for `lifetime` seconds.
async fn token_registry(lifetime: u64, accepts: fn(&str) -> bool) -> Double {
    Double::start(move |seen, before| {
        if seen.path.starts_with("/token") {
            return Reply::new(200, &[], format!(r#"{{"token":"t{before}","expires_in":{lifetime}}}"#).as_bytes());
        }
        if seen.header("authorization").is_some_and(accepts) {
            return Reply::new(200, &[], BODY);
        }
        let realm = format!("http://{}/token", seen.header("host").unwrap());
        challenge(&format!("Bearer realm=\"{realm}\",service=\"reg\",scope=\"repository:other:push\""))
    })
    .await
}

fn tokens(seen: &[Seen]) -> Vec<&Seen> {
    seen.iter().filter(|seen| seen.path.starts_with("/token")).collect()
}

#[tokio::test]
async fn a_token_is_fetched_once_and_for_this_repository_only() {
    let double = token_registry(300, |value| value.starts_with("Bearer t")).await;
    let registry = client_for(&double.source());
    for _ in 0..3 {
        assert_eq!(registry.blob(&double.source(), sha256(BODY), 100).await.unwrap(), BODY);
    }
    let seen = double.seen();
    assert_eq!(seen.len(), 5, "401, token, then three answers");
    let token = tokens(&seen)[0];
    assert_eq!(token.path, "/token?scope=repository%3Aapp%3Apull&service=reg");
    assert_eq!(token.header("authorization"), Some(BASIC));
    assert!(seen.iter().all(|seen| seen.path.starts_with("/token") || seen.header("authorization") != Some(BASIC)));
}

#[tokio::test]
async fn an_identity_token_goes_to_the_token_server_and_nowhere_else() {
    let double = token_registry(300, |value| value.starts_with("Bearer t")).await;
    let mut auth = Authfile::default();
    auth.insert(double.source().registry(), Credentials::identity_token("pass & word".to_owned()));
    let registry = Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap();
    assert_eq!(registry.blob(&double.source(), sha256(BODY), 100).await.unwrap(), BODY);
    let seen = double.seen();
    let token = tokens(&seen)[0];
    assert_eq!((token.method.as_str(), token.path.as_str(), token.header("authorization")), ("POST", "/token", None));
    assert_eq!(token.header("content-type"), Some("application/x-www-form-urlencoded"));
    let form = "grant_type=refresh_token&client_id=shoal&refresh_token=pass+%26+word&scope=repository%3Aapp%3Apull&service=reg";
    assert_eq!(String::from_utf8_lossy(&token.body), form);
    let others = seen.iter().filter(|seen| !seen.path.starts_with("/token"));
    assert!(others.clone().count() == 2 && others.clone().all(|seen| seen.body.is_empty()));

    // It is no password.
    let double = Double::start(|seen, _| match seen.header("authorization") {
        Some(_) => Reply::new(200, &[], BODY),
        None => challenge("Basic realm=\"x\""),
    })
    .await;
    let mut auth = Authfile::default();
    auth.insert(double.source().registry(), Credentials::identity_token("word".to_owned()));
    let registry = Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap();
    let refused = registry.blob(&double.source(), sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(refused, RegistryError::Unauthorized { .. }), "{refused:?}");
    assert!(double.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn many_reads_that_start_together_fetch_one_token() {
    let double = token_registry(300, |value| value.starts_with("Bearer t")).await;
    let registry = client_for(&double.source());
    let source = double.source();
    let reads = (0..20).map(|_| registry.blob(&source, sha256(BODY), 100));
    for read in futures::future::join_all(reads).await {
        assert_eq!(read.unwrap(), BODY);
    }
    assert_eq!(tokens(&double.seen()).len(), 1);
}

#[tokio::test]
async fn expired_and_refused_tokens_are_replaced() {
    // Lives shorter than the margin: never used twice.
    let double = token_registry(1, |value| value.starts_with("Bearer t")).await;
    let registry = client_for(&double.source());
    for _ in 0..2 {
        assert_eq!(registry.blob(&double.source(), sha256(BODY), 100).await.unwrap(), BODY);
    }
    assert_eq!(tokens(&double.seen()).len(), 2);
    // Refused although it should live.
    let double = token_registry(300, |value| value == "Bearer t4").await;
    let registry = client_for(&double.source());
    let first = registry.blob(&double.source(), sha256(BODY), 100).await;
    assert!(matches!(first, Err(RegistryError::Unauthorized { given: true, .. })), "{first:?}");
    assert_eq!(registry.blob(&double.source(), sha256(BODY), 100).await.unwrap(), BODY);
}

#[tokio::test]
async fn a_password_is_not_taken_to_another_host() {
    let thief = Double::start(|_, _| Reply::new(200, &[], br#"{"token":"t"}"#)).await;
    // The same machine by another name is another host.
    let realm = format!("http://localhost:{}/token?secret=1", thief.port());
    let value = format!("Bearer realm=\"{realm}\",service=\"reg\"");
    let double = Double::start(move |_, _| challenge(&value)).await;
    let error = client_for(&double.source()).blob(&double.source(), sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::BadRealm { .. }), "{error}");
    assert!(!error.to_string().contains("secret"), "{error}");
    assert!(thief.seen().is_empty());
    for realm in ["ftp://127.0.0.1/token", "http://me:you@127.0.0.1/token", "nonsense"] {
        let value = format!("Bearer realm=\"{realm}\"");
        let double = Double::start(move |_, _| challenge(&value)).await;
        let error = client_for(&double.source()).blob(&double.source(), sha256(BODY), 100).await.unwrap_err();
        assert!(matches!(error, RegistryError::BadRealm { .. }), "{realm}: {error}");
    }
}

/// A registry that somebody has taken over names a token server of theirs, with a certificate that everybody trusts.
#[tokio::test]
async fn a_password_is_not_taken_to_another_domain() {
    let thief = TcpListener::bind("localhost:0").await.unwrap();
    let port = thief.local_addr().unwrap().port();
    let visits = Arc::new(AtomicUsize::new(0));
    let counted = visits.clone();
    let listening = tokio::spawn(async move {
        while let Ok((stream, _)) = thief.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            drop(stream);
        }
    });
    let value = format!("Bearer realm=\"https://localhost:{port}/token?secret=1\"");
    let double = Double::start(move |_, _| challenge(&value)).await;
    let source = double.source();
    for credentials in [
        Credentials { username: "user".to_owned(), password: PASSWORD.to_owned() },
        Credentials::identity_token(PASSWORD.to_owned()),
    ] {
        let mut auth = Authfile::default();
        auth.insert(source.registry(), credentials);
        let options = RegistryOptions { auth: auth.into(), retries: 0, ..options() };
        let registry = Registry::new(options.clone()).unwrap();
        let error = registry.blob(&source, sha256(BODY), 100).await.unwrap_err();
        let told = error.to_string();
        assert!(matches!(error, RegistryError::UntrustedRealm { .. }), "{told}");
        assert!(told.contains("--token-server") && told.contains("name localhost "), "{told}");
        assert!(!told.contains("secret"), "{told}");
        assert_eq!(visits.load(Ordering::Relaxed), 0);
        // Named, it is asked; that it ends the connection is another matter.
        let named = RegistryOptions { token_servers: vec![format!("localhost:{port}")], ..options };
        let error = Registry::new(named).unwrap().blob(&source, sha256(BODY), 100).await.unwrap_err();
        assert!(matches!(error, RegistryError::Transport { .. }), "{error}");
        assert!(visits.swap(0, Ordering::Relaxed) > 0);
    }
    // Who has nothing to show may ask anybody.
    let error = client().blob(&source, sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Transport { .. }), "{error}");
    listening.abort();
}

#[tokio::test]
async fn redirects_carry_no_credentials_to_another_host() {
    let storage = Double::start(|_, _| Reply::new(200, &[], BODY)).await;
    let location = format!("http://127.0.0.1:{}/data", storage.port());
    let double = Double::start(move |seen, _| match seen.header("authorization") {
        Some(_) if seen.path == "/here" => Reply::new(307, &[("location", &location)], b""),
        Some(_) => Reply::new(307, &[("location", "/here")], b""),
        None => challenge("Basic realm=\"x\""),
    })
    .await;
    let registry = client_for(&double.source());
    assert_eq!(registry.blob(&double.source(), sha256(BODY), 100).await.unwrap(), BODY);
    assert_eq!(double.seen()[2].path, "/here");
    assert_eq!(double.seen()[2].header("authorization"), Some(BASIC), "the same host may see it again");
    assert_eq!(storage.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn a_challenge_behind_a_redirect_is_not_answered() {
    let thief = Double::start(|seen, _| {
        let host = seen.header("host").unwrap();
        challenge(&format!("Bearer realm=\"http://{host}/token\""))
    })
    .await;
    let location = format!("http://127.0.0.1:{}/data", thief.port());
    let double = Double::start(move |_, _| Reply::new(307, &[("location", &location)], b"")).await;
    let error = client_for(&double.source()).blob(&double.source(), sha256(BODY), 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error}");
    assert!(thief.seen().iter().all(|seen| seen.path == "/data" && seen.header("authorization").is_none()));
}

#[tokio::test]
async fn passwords_are_used_where_they_belong_and_told_nowhere() {
    let strict = |seen: &Seen, _| match seen.header("authorization") {
        Some(BASIC) => Reply::new(200, &[], BODY),
        _ => challenge("Basic realm=\"x\""),
    };
    let double = Double::start(strict).await;
    let id = sha256(BODY);
    assert_eq!(client_for(&double.source()).blob(&double.source(), id, 100).await.unwrap(), BODY);
    let error = client().blob(&double.source(), id, 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { given: false, .. }), "{error}");

    let closed = Double::start(|_, _| challenge("Basic realm=\"x\"")).await;
    let registry = client_for(&closed.source());
    for _ in 0..2 {
        let error = registry.blob(&closed.source(), id, 100).await.unwrap_err();
        assert!(matches!(error, RegistryError::Unauthorized { given: true, .. }), "{error}");
        let told = format!("{error} {error:?} {registry:?}");
        assert!(!told.contains(PASSWORD) && !told.contains(&BASIC[6..]), "{told}");
    }
    let forbidden = Double::start(|_, _| Reply::new(403, &[], b"")).await;
    let error = client().blob(&forbidden.source(), id, 100).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error}");
}

#[tokio::test]
async fn broken_token_servers_are_errors_of_their_own() {
    for body in [&b"{}"[..], b"<html>", br#"{"token":""}"#, br#"{"token":"a\nb"}"#] {
        let double = Double::start(move |seen, _| {
            if seen.path.starts_with("/token") {
                return Reply::new(200, &[], body);
            }
            challenge(&format!("Bearer realm=\"http://{}/token\"", seen.header("host").unwrap()))
        })
        .await;
        let error = client().blob(&double.source(), sha256(BODY), 100).await.unwrap_err();
        assert!(matches!(error, RegistryError::Protocol { .. }), "{error}");
    }
}

/// What a pull shows is for the repository of its image, and for as long as somebody stands for it.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_a_pull_open_its_repository_alone() {
    let credentials = |password: &str| Credentials { username: "user".to_owned(), password: password.to_owned() };
    for auth in [Auth::Basic(BASIC), Auth::Token { basic: BASIC, uses: 9, polite: true }] {
        let double = RegistryDouble::start(auth, |bytes| sha256(bytes).to_string());
        let [app, other] = ["app", "other"].map(|name| Source::new(&double.host(), name).unwrap());
        let owner = client_for(&app);
        for source in [&app, &other] {
            owner.upload_bytes(source, Bytes::from_static(BODY)).await.unwrap();
        }
        let keyring = Keyring::new(Authfile::default(), Duration::from_secs(3600));
        let registry = Registry::new(RegistryOptions { auth: keyring.clone(), ..options() }).unwrap();
        let read = async |source: &Source| match registry.blob(source, sha256(BODY), 100).await {
            Ok(bytes) => bytes == BODY,
            Err(RegistryError::Unauthorized { .. }) => false,
            Err(error) => panic!("{error}"),
        };
        assert!(!read(&app).await);
        // It fails in the end: then what was got with it is not used any more.
        let failing = keyring.offer(&app, credentials(PASSWORD)).unwrap();
        assert!(read(&app).await && !read(&other).await);
        drop(failing);
        assert!(!read(&app).await);
        // Those of somebody else are no harm, before and after.
        let wrong = keyring.offer(&app, credentials("battery staple")).unwrap();
        assert!(!read(&app).await);
        let right = keyring.offer(&app, credentials(PASSWORD)).unwrap();
        assert!(read(&app).await);
        right.keep();
        drop(wrong);
        assert!(read(&app).await && !read(&other).await);
        let _wrong = keyring.offer(&app, credentials("battery staple")).unwrap();
        assert!(read(&app).await);
    }
}

/// What is open to anybody is not closed by a pull that shows something wrong.
#[tokio::test]
async fn a_wrong_pull_closes_nothing() {
    let double = Double::start(|seen, _| match (seen.path.starts_with("/token"), seen.header("authorization")) {
        (true, None) => Reply::new(200, &[], br#"{"token":"anybody"}"#),
        (false, Some("Bearer anybody")) => Reply::new(200, &[], BODY),
        (true, _) => Reply::new(401, &[], b""),
        _ => challenge(&format!("Bearer realm=\"http://{}/token\"", seen.header("host").unwrap())),
    })
    .await;
    let keyring = Keyring::new(Authfile::default(), Duration::from_secs(3600));
    let registry = Registry::new(RegistryOptions { auth: keyring.clone(), ..options() }).unwrap();
    let wrong = Credentials { username: "user".to_owned(), password: "battery staple".to_owned() };
    let _pull = keyring.offer(&double.source(), wrong).unwrap();
    assert_eq!(registry.blob(&double.source(), sha256(BODY), 100).await.unwrap(), BODY);
}
