//! Who the API server is, and who this node is there: from a kubeconfig, or from the service account of a pod.
//!
//! Of a kubeconfig the current context counts. The server must be spoken to over TLS and have its authority named; this node shows a
//! token, or a certificate. Files that it names are relative to its folder, and read each time: tokens and
//! certificates are rotated. Ways to log in that would run programs are refused.

use std::{
    env,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use reqwest::{Url, header::HeaderValue};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde::Deserialize;

/// Where Kubernetes puts what a pod shows to the API server.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Most bytes of a kubeconfig, a token or certificates.
const MAX_FILE: u64 = 1 << 20;

/// Why there is no way to the API server. Says nothing of keys and tokens.
#[derive(Debug, thiserror::Error)]
pub(super) enum KubeconfigError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: {reason}", path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error("this is no pod: there is no KUBERNETES_SERVICE_HOST")]
    NoPod,
}

/// A server, and what is shown to it.
pub(super) struct Login {
    pub(super) server: Url,
    pub(super) tls: ClientConfig,
    pub(super) token: Option<HeaderValue>,
}

/// As the API has them; unknown fields are other programs' business, but for ways to log in.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    #[serde(default)]
    clusters: Vec<Named>,
    #[serde(default)]
    users: Vec<Named>,
    #[serde(default)]
    contexts: Vec<Named>,
    #[serde(default)]
    current_context: String,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    #[serde(default)]
    cluster: Option<Cluster>,
    #[serde(default)]
    user: Option<User>,
    #[serde(default)]
    context: Option<Context>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    proxy_url: Option<String>,
    tls_server_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    exec: Option<serde::de::IgnoredAny>,
    auth_provider: Option<serde::de::IgnoredAny>,
    username: Option<String>,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
    user: String,
}

/// Reads a kubeconfig, and what it names.
///
/// # Errors
/// See [`KubeconfigError`].
pub(super) fn load(path: &Path) -> Result<Login, KubeconfigError> {
    let text = read(path)?;
    let files = Files { kubeconfig: path };
    // What is wrong is not told: the text around it may be a token.
    let parsed: Kubeconfig = serde_norway::from_slice(&text).map_err(|error| {
        let line = error.location().map_or(0, |location| location.line());
        files.unusable(format!("it is no kubeconfig, see line {line}"))
    })?;
    let missing = |what: &str, name: &str| files.unusable(format!("there is no {what} {name:?}"));
    let find = |all: Vec<Named>, name: &str| all.into_iter().find(|one| one.name == name);
    let name = parsed.current_context;
    let context =
        find(parsed.contexts, &name).and_then(|one| one.context).ok_or_else(|| missing("context", &name))?;
    let cluster = find(parsed.clusters, &context.cluster).and_then(|one| one.cluster);
    let user = find(parsed.users, &context.user).and_then(|one| one.user);
    files.login(
        cluster.ok_or_else(|| missing("cluster", &context.cluster))?,
        user.ok_or_else(|| missing("user", &context.user))?,
    )
}

/// Reads the service account of this pod.
///
/// # Errors
/// See [`KubeconfigError`].
pub(super) fn in_cluster() -> Result<Login, KubeconfigError> {
    let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
    let host = variable("KUBERNETES_SERVICE_HOST").ok_or(KubeconfigError::NoPod)?;
    let port = variable("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".into());
    service_account(Path::new(SERVICE_ACCOUNT), &host, &port)
}

fn service_account(folder: &Path, host: &str, port: &str) -> Result<Login, KubeconfigError> {
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let cluster = Cluster {
        server: format!("https://{host}:{port}"),
        certificate_authority: Some("ca.crt".into()),
        certificate_authority_data: None,
        insecure_skip_tls_verify: false,
        proxy_url: None,
        tls_server_name: None,
    };
    let user = User {
        token: None,
        token_file: Some("token".into()),
        client_certificate: None,
        client_certificate_data: None,
        client_key: None,
        client_key_data: None,
        exec: None,
        auth_provider: None,
        username: None,
    };
    Files { kubeconfig: &folder.join("token") }.login(cluster, user)
}

/// What a kubeconfig names.
struct Files<'a> {
    kubeconfig: &'a Path,
}

impl Files<'_> {
    fn unusable(&self, reason: impl Into<String>) -> KubeconfigError {
        KubeconfigError::Unusable { path: self.kubeconfig.to_owned(), reason: reason.into() }
    }

    fn login(&self, cluster: Cluster, user: User) -> Result<Login, KubeconfigError> {
        let server = Url::parse(&cluster.server).ok().filter(|url| url.scheme() == "https" && url.has_host());
        let server = server.ok_or_else(|| self.unusable("the server is no https:// URL"))?;
        if !server.username().is_empty() || server.password().is_some() || server.query().is_some() {
            return Err(self.unusable("the server is more than an address"));
        }
        for (there, what) in [
            (cluster.insecure_skip_tls_verify, "a server that is not verified"),
            (cluster.proxy_url.is_some(), "a proxy"),
            (cluster.tls_server_name.is_some(), "another name of the server (tls-server-name)"),
            (user.exec.is_some(), "a program to log in with (exec)"),
            (user.auth_provider.is_some(), "an auth-provider"),
            (user.username.is_some(), "a user with a password"),
        ] {
            if there {
                return Err(self.unusable(format!("{what} is not supported")));
            }
        }
        let authority = self.content(cluster.certificate_authority, cluster.certificate_authority_data)?;
        let authority = authority.ok_or_else(|| self.unusable("it names no certificate-authority"))?;
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(&authority)? {
            roots.add(certificate).map_err(|_| self.unusable("the certificate-authority is none"))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let tls = tls.map_err(|error| self.unusable(error.to_string()))?.with_root_certificates(roots);
        let certificate = self.content(user.client_certificate, user.client_certificate_data)?;
        let key = self.content(user.client_key, user.client_key_data)?;
        let mut tls = match (certificate, key) {
            (None, None) => tls.with_no_client_auth(),
            (Some(certificate), Some(key)) => {
                let broken = || self.unusable("the client-key is none, or none of the client-certificate");
                let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| broken())?;
                tls.with_client_auth_cert(self.certificates(&certificate)?, key).map_err(|_| broken())?
            }
            _ => return Err(self.unusable("client-certificate and client-key go together")),
        };
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A file comes first, as others do it: what is in the kubeconfig may be what it held when that was written.
        let token = match user.token_file {
            Some(path) => Some(read(&self.beside(path))?),
            None => user.token.map(String::into_bytes),
        };
        let token = token.map(|token| self.header(&token)).transpose()?;
        Ok(Login { server, tls, token })
    }

    fn header(&self, token: &[u8]) -> Result<HeaderValue, KubeconfigError> {
        let value = [b"Bearer ", token.trim_ascii()].concat();
        let mut value = HeaderValue::from_bytes(&value).map_err(|_| self.unusable("the token is none"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// What is given in base64, or in a file.
    fn content(&self, file: Option<PathBuf>, data: Option<String>) -> Result<Option<Vec<u8>>, KubeconfigError> {
        match (data, file) {
            (Some(data), _) => {
                STANDARD.decode(data.trim()).map(Some).map_err(|_| self.unusable("what should be base64 is none"))
            }
            (None, Some(file)) => read(&self.beside(file)).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn certificates(&self, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, KubeconfigError> {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        all.ok().filter(|all| !all.is_empty()).ok_or_else(|| self.unusable("what should be certificates is none"))
    }

    fn beside(&self, path: PathBuf) -> PathBuf {
        self.kubeconfig.parent().map_or_else(|| path.clone(), |folder| folder.join(&path))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, KubeconfigError> {
    let failed = |source| KubeconfigError::Read { path: path.to_owned(), source };
    let mut content = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > MAX_FILE {
        return Err(failed(io::Error::other("it is larger than 1 MiB")));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const SECRET: &str = "correct-horse";

    struct Bed {
        folder: tempfile::TempDir,
    }

    impl Bed {
        fn new() -> Self {
            let bed = Self { folder: tempfile::tempdir().unwrap() };
            let rcgen::CertifiedKey { cert, key_pair } =
                rcgen::generate_simple_self_signed(vec!["server".into()]).unwrap();
            bed.write("ca.crt", &cert.pem());
            bed.write("key.pem", &key_pair.serialize_pem());
            bed.write("token", &format!("{SECRET}\n"));
            bed
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.folder.path().join(name), text).unwrap();
        }

        /// Loads a kubeconfig with this cluster and this user.
        fn load(&self, cluster: &str, user: &str) -> Result<Login, KubeconfigError> {
            let text = format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: c\npreferences: {{}}\ncontexts:\n- name: c\n  context: {{cluster: k, user: u}}\n\
                 clusters:\n- name: k\n  cluster: {cluster}\nusers:\n- name: u\n  user: {user}\n"
            );
            self.write("config", &text);
            load(&self.folder.path().join("config"))
        }
    }

    #[test]
    fn the_current_context_says_where_and_who() {
        let bed = Bed::new();
        let cluster = "{server: 'https://10.0.0.1:6443', certificate-authority: ca.crt}";
        let login = bed.load(cluster, "{tokenFile: token}").unwrap();
        assert_eq!((login.server.host_str(), login.server.port()), (Some("10.0.0.1"), Some(6443)));
        let shown = |login: Login| login.token.map(|token| token.to_str().unwrap().to_owned());
        assert_eq!(shown(login), Some(format!("Bearer {SECRET}")));
        bed.write("token", "another");
        let rotated = bed.load(cluster, &format!("{{tokenFile: token, token: {SECRET}}}")).unwrap();
        assert_eq!(shown(rotated).as_deref(), Some("Bearer another"), "files are read again, and come first");
        let data = STANDARD.encode(fs::read(bed.folder.path().join("ca.crt")).unwrap());
        let cluster = format!("{{server: 'https://h/base', certificate-authority-data: {data}}}");
        let login = bed.load(&cluster, "{client-certificate: ca.crt, client-key: key.pem}").unwrap();
        assert!(login.token.is_none() && login.tls.client_auth_cert_resolver.has_certs());
        // What a pod has.
        let login = service_account(bed.folder.path(), "fd00::1", "443").unwrap();
        assert_eq!(login.server.as_str(), "https://[fd00::1]/");
    }

    #[test]
    fn what_is_not_safe_or_not_known_is_refused_and_nothing_is_quoted() {
        let bed = Bed::new();
        let good = "{server: 'https://h', certificate-authority: ca.crt}";
        for (cluster, user, reason) in [
            ("{server: 'http://h', certificate-authority: ca.crt}", "{}", "no https"),
            ("{server: 'https://u:correct-horse@h', certificate-authority: ca.crt}", "{}", "more than an address"),
            ("{server: 'https://h'}", "{}", "no certificate-authority"),
            ("{server: 'https://h', certificate-authority: token}", "{}", "certificates"),
            ("{server: 'https://h', certificate-authority-data: correct-horse}", "{}", "base64"),
            (
                "{server: 'https://h', certificate-authority: ca.crt, insecure-skip-tls-verify: true}",
                "{}",
                "not verified",
            ),
            ("{server: 'https://h', certificate-authority: ca.crt, proxy-url: 'http://p'}", "{}", "proxy"),
            (good, "{exec: {command: /bin/sh}}", "exec"),
            (good, "{auth-provider: {name: gcp}}", "auth-provider"),
            (good, "{username: u, password: correct-horse}", "password"),
            (good, "{client-certificate: ca.crt}", "go together"),
            (good, "{client-certificate: ca.crt, client-key-data: Y29ycmVjdC1ob3JzZQ==}", "client-key"),
            (good, "{token: \"correct-horse\\n2\"}", "token"),
            (good, "{tokenFile: nowhere}", "nowhere"),
            (good, "{token: [correct-horse]}", "no kubeconfig"),
        ] {
            let error = crate::chain(&bed.load(cluster, user).err().unwrap());
            assert!(error.contains(reason) && !error.contains(SECRET), "{error} instead of {reason}");
        }
        bed.write("config", "current-context: none\n");
        assert!(load(&bed.folder.path().join("config")).is_err_and(|error| error.to_string().contains("no context")));
        bed.write("config", &"a".repeat(MAX_FILE as usize + 1));
        assert!(load(&bed.folder.path().join("config")).is_err());
    }
}
