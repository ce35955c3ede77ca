//! The client against Debian's `docker-registry`: in the clear, with a password, with a certificate of its own.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
};

use super::*;
use crate::oci::{Authfile, Credentials, RegistryError};

/// A running registry.
pub(super) struct Server {
    child: Child,
    pub(super) host: String,
    _dir: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `None`, and a line saying so, where a program is not installed. `auth` makes that section of the configuration in a
/// folder it may use, `tls` goes below `http`.
pub(super) async fn start(auth: impl FnOnce(&Path) -> String, tls: &str) -> Option<Server> {
    for program in ["docker-registry", "openssl"] {
        if Command::new(program).arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            println!("skipped: {program} is not installed");
            return None;
        }
    }
    let dir = TempDir::new().unwrap();
    // Free now; a race for it is lost by one of us, and then the test says so.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let host = format!("127.0.0.1:{port}");
    let config = dir.path().join("config.yml");
    let storage = dir.path().join("storage");
    let text = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: {}}}}}\n{}http:\n  addr: {host}\n{tls}",
        storage.display(),
        auth(dir.path()),
    );
    std::fs::write(&config, text).unwrap();
    let child = Command::new("docker-registry")
        .args(["serve".as_ref(), config.as_os_str()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let server = Server { child, host: host.clone(), _dir: dir };
    for _ in 0..200 {
        if tokio::net::TcpStream::connect(&host).await.is_ok() {
            return Some(server);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("docker-registry does not listen on {host}");
}

fn reference(server: &Server) -> Reference {
    format!("{}/team/app:v1", server.host).parse().unwrap()
}

#[tokio::test]
async fn an_image_goes_in_and_comes_out() {
    let Some(server) = start(|_| String::new(), "").await else { return };
    let fixture = Fixture::new();
    fixture.round_trip(&client(), &reference(&server)).await;
    let absent = format!("{}/team/app:v2", server.host).parse().unwrap();
    let error = client().resolve(&absent).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
}

/// Lets in the user `user` with the password `secret` alone.
pub(super) fn password(dir: &Path) -> String {
    // bcrypt of "secret", cost 4.
    let line = "user:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";
    std::fs::write(dir.join("htpasswd"), line).unwrap();
    format!("auth: {{htpasswd: {{realm: here, path: {}}}}}\n", dir.join("htpasswd").display())
}

#[tokio::test]
async fn a_password_opens_it() {
    let Some(server) = start(password, "").await else { return };
    let fixture = Fixture::new();
    let error = client().resolve(&reference(&server)).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { given: false, .. }), "{error}");
    let with = |password: &str| {
        let mut auth = Authfile::default();
        auth.insert(&server.host, Credentials { username: "user".to_owned(), password: password.to_owned() });
        Registry::new(RegistryOptions { auth: auth.into(), ..options() }).unwrap()
    };
    let error = with("wrong").resolve(&reference(&server)).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { given: true, .. }), "{error}");
    fixture.round_trip(&with("secret"), &reference(&server)).await;
}

/// A key and a certificate for 127.0.0.1 in a folder; `None`, and a line saying so, where they cannot be made.
pub(super) fn certificate() -> Option<(TempDir, PathBuf, PathBuf)> {
    let dir = TempDir::new().unwrap();
    let (key, cert) = (dir.path().join("key.pem"), dir.path().join("cert.pem"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=test"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-days", "2", "-keyout", &key.display().to_string(), "-out", &cert.display().to_string()])
        .stderr(Stdio::null())
        .status();
    if !made.is_ok_and(|status| status.success()) {
        println!("skipped: openssl makes no certificate");
        return None;
    }
    Some((dir, key, cert))
}

#[tokio::test]
async fn a_certificate_of_its_own_must_be_named() {
    let Some((_dir, key, cert)) = certificate() else { return };
    let (key_text, cert_text) = (key.display(), cert.display());
    let tls = format!("  tls:\n    certificate: {cert_text}\n    key: {key_text}\n");
    let Some(server) = start(|_| String::new(), &tls).await else { return };
    let trusting = |ca_files| {
        let https = vec![server.host.clone()];
        Registry::new(RegistryOptions { https, ca_files, retries: 0, ..options() }).unwrap()
    };
    let error = trusting(Vec::new()).resolve(&reference(&server)).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    Fixture::new().round_trip(&trusting(vec![cert]), &reference(&server)).await;
}
