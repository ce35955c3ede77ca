//! An API server that knows secrets and nothing else: lists in parts, watches from a version on, over TLS. It can lose its watches,
//! forget what was, rotate its token, and send those who ask elsewhere. It notes what it was asked.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};

type Connection = StreamOwned<ServerConnection, TcpStream>;

pub(crate) struct ApiDouble {
    address: SocketAddr,
    authority: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    version: u64,
    secrets: BTreeMap<String, Value>,
    /// What has happened, by version.
    events: Vec<(u64, Value)>,
    /// Nothing is known of what was before.
    oldest: u64,
    /// Watches of an earlier one are cut.
    epoch: u64,
    token: String,
    /// Who asks is sent elsewhere, on this server.
    redirects: bool,
    asked: Vec<String>,
}

impl ApiDouble {
    pub(crate) fn start(token: &str) -> Self {
        let rcgen::CertifiedKey { cert, key_pair } =
            rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(key_pair.serialize_pem().as_bytes()).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("TLS");
        let tls = tls.with_no_client_auth().with_single_cert(vec![cert.der().clone()], key).expect("a certificate");
        let (tls, shared) = (Arc::new(tls), Arc::new(Shared::default()));
        shared.state().token = token.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (serving, authority) = (shared.clone(), cert.pem());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (tls, serving) = (tls.clone(), serving.clone());
                // Who asks may go away at any time.
                thread::spawn(move || drop(serving.answer(tls, stream)));
            }
        });
        Self { address, authority, shared }
    }

    /// A kubeconfig in `folder`, with the token in a file beside it.
    pub(crate) fn kubeconfig(&self, folder: &Path) -> PathBuf {
        std::fs::write(folder.join("ca.crt"), &self.authority).expect("a file");
        self.write_token(folder);
        let path = folder.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: here\ncontexts:\n- name: here\n  context:\n    cluster: double\n    user: node\n\
             clusters:\n- name: double\n  cluster:\n    server: https://{}\n    certificate-authority: ca.crt\n\
             users:\n- name: node\n  user:\n    tokenFile: token\n",
            self.address
        );
        std::fs::write(&path, text).expect("a file");
        path
    }

    /// The token that is good now.
    pub(crate) fn write_token(&self, folder: &Path) {
        let token = self.shared.state().token.clone();
        std::fs::write(folder.join("token.new"), token).expect("a file");
        std::fs::rename(folder.join("token.new"), folder.join("token")).expect("a name");
    }

    /// Adds or changes a secret with these credentials.
    pub(crate) fn put(&self, name: &str, registry: &str, user: &str, password: &str) {
        let entry = json!({ registry: { "username": user, "password": password } });
        self.put_content(name, "kubernetes.io/dockerconfigjson", ".dockerconfigjson", &json!({ "auths": entry }));
    }

    /// The same of the older type.
    pub(crate) fn put_legacy(&self, name: &str, registry: &str, user: &str, password: &str) {
        let entry = json!({ registry: { "auth": STANDARD.encode(format!("{user}:{password}")) } });
        self.put_content(name, "kubernetes.io/dockercfg", ".dockercfg", &entry);
    }

    fn put_content(&self, name: &str, kind: &str, key: &str, content: &Value) {
        let (namespace, short) = name.split_once('/').expect("NAMESPACE/NAME");
        let mut state = self.shared.state();
        state.version += 1;
        let object = json!({
            "metadata": { "namespace": namespace, "name": short, "resourceVersion": state.version.to_string() },
            "type": kind,
            "data": { key: STANDARD.encode(content.to_string()) },
        });
        let event =
            if state.secrets.insert(name.to_owned(), object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        self.tell(state, event, object);
    }

    pub(crate) fn remove(&self, name: &str) {
        let mut state = self.shared.state();
        let mut object = state.secrets.remove(name).expect("it is there");
        state.version += 1;
        object["metadata"]["resourceVersion"] = state.version.to_string().into();
        self.tell(state, "DELETED", object);
    }

    /// Tells those who watch how far they are.
    pub(crate) fn bookmark(&self) {
        let mut state = self.shared.state();
        state.version += 7;
        let object = json!({ "metadata": { "resourceVersion": state.version.to_string() } });
        self.tell(state, "BOOKMARK", object);
    }

    fn tell(&self, mut state: MutexGuard<'_, State>, event: &str, object: Value) {
        let version = state.version;
        state.events.push((version, json!({ "type": event, "object": object })));
        self.shared.changed.notify_all();
    }

    /// Cuts all watches, in the middle of their answers.
    pub(crate) fn cut(&self) {
        self.shared.state().epoch += 1;
        self.shared.changed.notify_all();
    }

    /// Forgets what has happened so far.
    pub(crate) fn forget(&self) {
        let mut state = self.shared.state();
        state.version += 1;
        state.oldest = state.version;
    }

    /// Tells those who watch that it has forgotten what they would need.
    pub(crate) fn expire(&self) {
        let mut state = self.shared.state();
        state.version += 1;
        let status =
            json!({ "kind": "Status", "metadata": {}, "code": 410, "reason": "Expired", "message": "too old" });
        self.tell(state, "ERROR", status);
    }

    /// From now on this token is good, and no other.
    pub(crate) fn rotate(&self, token: &str) {
        self.shared.state().token = token.to_owned();
    }

    /// Sends all who ask elsewhere, where they would be trusted as here.
    pub(crate) fn redirect(&self) {
        self.shared.state().redirects = true;
    }

    /// Requests so far, each its path and query.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.shared.state().asked.clone()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while it is held")
    }

    /// One request for each connection.
    fn answer(&self, tls: Arc<ServerConfig>, stream: TcpStream) -> io::Result<()> {
        let connection = ServerConnection::new(tls).map_err(io::Error::other)?;
        let mut connection = StreamOwned::new(connection, stream);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            connection.read_exact(&mut byte)?;
            head.extend(byte);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let shown = head.lines().find_map(|line| line.strip_prefix("authorization: Bearer "));
        let url = url::Url::parse(&format!("https://double{target}")).map_err(io::Error::other)?;
        let query: BTreeMap<String, String> = url.query_pairs().into_owned().collect();
        let mut state = self.state();
        state.asked.push(target);
        if state.redirects {
            return respond(&mut connection, "302 Found", "Location: /elsewhere\r\n", &json!({}));
        }
        if shown != Some(state.token.as_str()) {
            return respond(
                &mut connection,
                "401 Unauthorized",
                "",
                &json!({ "code": 401, "message": "Unauthorized" }),
            );
        }
        if query.contains_key("watch") {
            drop(state);
            return self.watch(&mut connection, url.path(), &query);
        }
        let limit = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let after = query.get("continue").cloned().unwrap_or_default();
        let all = state.secrets.iter().filter(|(name, object)| **name > after && wanted(object, url.path(), &query));
        let mut items: Vec<_> =
            all.take(limit.saturating_add(1)).map(|(name, object)| (name, object.clone())).collect();
        let more = items.len() > limit;
        items.truncate(limit);
        let rest = if more { items.last().map(|(name, _)| (*name).clone()) } else { None };
        let metadata = json!({ "resourceVersion": state.version.to_string(), "continue": rest });
        let items: Vec<Value> = items.into_iter().map(|(_, object)| object).collect();
        let list = json!({ "kind": "SecretList", "metadata": metadata, "items": items });
        drop(state);
        respond(&mut connection, "200 OK", "", &list)
    }

    fn watch(&self, connection: &mut Connection, path: &str, query: &BTreeMap<String, String>) -> io::Result<()> {
        let mut seen: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or_default();
        let epoch = {
            let state = self.state();
            if seen < state.oldest {
                return respond(connection, "410 Gone", "", &json!({ "code": 410, "message": "too old" }));
            }
            state.epoch
        };
        connection.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        loop {
            let state = self.state();
            // A look now and then is for those who have gone.
            let (state, _) = self.changed.wait_timeout(state, Duration::from_millis(20)).expect("nobody panics");
            if state.epoch != epoch {
                return Ok(());
            }
            let new = state.events.iter().filter(|(version, _)| *version > seen);
            let new: Vec<_> = new.map(|(version, event)| (*version, event.clone())).collect();
            drop(state);
            for (version, event) in new {
                seen = version;
                let is_secret = event["object"].get("type").is_some();
                if is_secret && !wanted(&event["object"], path, query) {
                    continue;
                }
                let line = format!("{event}\n");
                // In two parts, as networks do it.
                let (first, second) = line.as_bytes().split_at(line.len() / 2);
                connection.write_all(first)?;
                connection.flush()?;
                connection.write_all(second)?;
                connection.flush()?;
                if event["type"] == "ERROR" {
                    connection.conn.send_close_notify();
                    return connection.flush();
                }
            }
        }
    }
}

/// Whether a secret is in the namespace and of the type that are asked for.
fn wanted(object: &Value, path: &str, query: &BTreeMap<String, String>) -> bool {
    let namespace = path.strip_prefix("/api/v1/namespaces/").and_then(|rest| rest.strip_suffix("/secrets"));
    let kind = query.get("fieldSelector").and_then(|selector| selector.strip_prefix("type="));
    namespace.is_none_or(|namespace| object["metadata"]["namespace"] == namespace)
        && kind.is_none_or(|kind| object["type"] == kind)
}

fn respond(connection: &mut Connection, status: &str, more: &str, body: &Value) -> io::Result<()> {
    let body = body.to_string();
    write!(
        connection,
        "HTTP/1.1 {status}\r\n{more}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    connection.conn.send_close_notify();
    connection.flush()
}
