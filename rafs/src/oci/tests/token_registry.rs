//! Debian's `docker-registry` with tokens: it verifies what a token server, which is a double, has signed. So what is asked for, and
//! when a token is shown that has expired, is judged by a registry that was not made for this.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject};
use serde_json::json;

use super::{
    docker_registry::{certificate, start},
    double::{Reply, Seen},
    *,
};
use crate::oci::{Authfile, Credentials, RegistryError, copy::copy};

const SERVICE: &str = "registry of the test";
const ISSUER: &str = "token server of the test";
/// base64 of `user:secret`.
const BASIC: &str = "Basic dXNlcjpzZWNyZXQ=";
/// A token is good for so many seconds.
const LIFETIME: u64 = 8;
/// This registry takes tokens for as long after that.
const LEEWAY: u64 = 60;

/// What signs tokens.
struct Signer {
    key: EcdsaKeyPair,
    certificate: String,
}

impl Signer {
    fn new(key: &Path, certificate: &Path) -> Self {
        let key = PrivatePkcs8KeyDer::from_pem_file(key).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_pkcs8_der()).unwrap();
        Self { key, certificate: STANDARD.encode(CertificateDer::from_pem_file(certificate).unwrap()) }
    }

    /// For all that the query of a request asks for.
    fn token(&self, path: &str) -> String {
        let query: Vec<(String, String)> =
            reqwest::Url::parse(&format!("http://double{path}")).unwrap().query_pairs().into_owned().collect();
        assert!(query.contains(&("service".to_owned(), SERVICE.to_owned())), "{path}");
        let access = query.iter().filter(|(name, _)| name == "scope").map(|(_, scope)| {
            let [kind, name, actions] = scope.split(':').collect::<Vec<_>>().try_into().unwrap();
            json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() })
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let (issued, expires) = (now - 2 * LEEWAY, now - LEEWAY + LIFETIME);
        let claims = json!({
            "iss": ISSUER, "sub": "user", "aud": SERVICE, "jti": "1", "iat": issued, "nbf": issued,
            "exp": expires, "access": access.collect::<Vec<_>>(),
        });
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [self.certificate] });
        let text = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
        let signature = self.key.sign(&SystemRandom::new(), text.as_bytes()).unwrap();
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// A token server for the user `user` with the password `secret`. It says that its tokens live longer than they do.
async fn token_server(signer: Signer) -> Double {
    Double::start(move |seen, _| match seen.header("authorization") {
        Some(BASIC) => {
            let token = signer.token(&seen.path);
            Reply::new(200, &[], json!({ "token": token, "expires_in": 3600 }).to_string().as_bytes())
        }
        _ => Reply::new(401, &[], b"{}"),
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_takes_the_tokens_of_its_server() {
    let Some((_dir, key, certificate)) = certificate() else { return };
    let tokens = token_server(Signer::new(&key, &certificate)).await;
    let auth = |_: &Path| {
        format!(
            "auth: {{token: {{realm: \"http://127.0.0.1:{}/token\", service: \"{SERVICE}\", issuer: \"{ISSUER}\", \
             rootcertbundle: {}}}}}\n",
            tokens.port(),
            certificate.display()
        )
    };
    let Some(server) = start(auth, "").await else { return };
    let with = |password: &str| {
        let mut auth = Authfile::default();
        auth.insert(&server.host, Credentials { username: "user".to_owned(), password: password.to_owned() });
        Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap()
    };
    let reference = |name: &str| -> Reference { format!("{}/{name}:v1", server.host).parse().unwrap() };
    for (client, expected) in [(client(), false), (with("wrong"), true)] {
        let error = client.resolve(&reference("app")).await.unwrap_err();
        assert!(matches!(error, RegistryError::Unauthorized { given, .. } if given == expected), "{error}");
    }

    let (client, fixture) = (with("secret"), Fixture::new());
    fixture.round_trip(&client, &reference("app")).await;
    // The token is refused by now, and another one taken.
    tokio::time::sleep(Duration::from_secs(LIFETIME + 1)).await;
    let before = tokens.seen().len();
    client.resolve(&reference("app")).await.unwrap();
    assert!(tokens.seen().len() > before);
    // What one repository has is mounted into another, which takes a token for both.
    let (app, other) = (reference("app"), reference("other"));
    copy(&client, &app, &other, None, |_, _| {}).await.unwrap();
    let asked: Vec<Seen> = tokens.seen();
    let scoped = |scopes: &[&str]| {
        let scopes: String = scopes.iter().map(|scope| format!("scope=repository%3A{scope}&")).collect();
        asked.iter().any(|seen| seen.path.contains(&scopes))
    };
    assert!(scoped(&["app%3Apull"]) && scoped(&["app%3Apull%2Cpush"]), "{asked:?}");
    assert!(scoped(&["other%3Apull%2Cpush", "app%3Apull"]), "{asked:?}");
    assert!(asked.iter().all(|seen| seen.header("authorization").is_none_or(|shown| shown.starts_with("Basic "))));
}
