//! A whole registry in memory on real sockets: blobs, uploads with their sessions, manifests, passwords and tokens. It breaks at
//! any stage of any request when it is told to. Only the standard library and threads, so that the daemon's tests use it as well.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// Gives the digest of bytes in hexadecimal.
pub(crate) type Sha256 = fn(&[u8]) -> String;

/// A request as it came, without its body.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    fn number(&self, name: &str) -> usize {
        self.header(name).and_then(|text| text.parse().ok()).unwrap_or(0)
    }
}

/// Where a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// When the head of the request has come.
    Head,
    /// When half of its body has come; the registry keeps that half.
    Body,
    /// When all of it has come and was done.
    Unanswered,
    /// In the head of the answer.
    AnswerHead,
    /// In the body of the answer.
    AnswerBody,
    /// Not at all: this status is answered, with this `Retry-After`, and nothing is done.
    Status(u16, Option<u32>),
}

/// Every stage at which a connection can end.
pub(crate) const CUTS: [Fault; 5] =
    [Fault::Head, Fault::Body, Fault::Unanswered, Fault::AnswerHead, Fault::AnswerBody];

/// Whom it lets in.
#[derive(Debug, Clone)]
pub(crate) enum Auth {
    Open,
    /// Who shows this value of `Authorization`.
    Basic(&'static str),
    /// Who shows a token, which it gives at `/token` to who shows this value. A token is good for so many requests. Where it
    /// is not polite, it refuses before it has read the body.
    Token {
        basic: &'static str,
        uses: u32,
        polite: bool,
    },
}

/// Decides what becomes of a request, by what it is and how many came before it.
type Faults = dyn Fn(&Request, usize) -> Fault + Send + Sync;

struct Shared {
    auth: Auth,
    sha256: Sha256,
    faults: Mutex<Arc<Faults>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    seen: Vec<Request>,
    /// By repository and digest.
    blobs: BTreeMap<String, Vec<u8>>,
    /// By repository and tag or digest: media type and bytes.
    manifests: BTreeMap<String, (String, Vec<u8>)>,
    uploads: BTreeMap<usize, Vec<u8>>,
    /// How often each may still be shown.
    tokens: BTreeMap<String, u32>,
    made: usize,
    /// Told in the place of what an upload has.
    lie: Option<String>,
}

/// The registry.
pub(crate) struct RegistryDouble {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl RegistryDouble {
    pub(crate) fn start(auth: Auth, sha256: Sha256) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let faults: Arc<Faults> = Arc::new(|_, _| Fault::None);
        let shared = Arc::new(Shared { auth, sha256, faults: Mutex::new(faults), state: Mutex::default() });
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, serving) = (stop.clone(), shared.clone());
        let thread = thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let shared = serving.clone();
                // A client that goes away is what some tests want.
                thread::spawn(move || drop(serve(stream, &shared)));
            }
        });
        Self { address, shared, stop, thread: Some(thread) }
    }

    /// `host:port`.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn break_at(&self, faults: impl Fn(&Request, usize) -> Fault + Send + Sync + 'static) {
        *self.shared.faults.lock().unwrap() = Arc::new(faults);
    }

    /// How much an upload has, whatever is true.
    pub(crate) fn lie_about_uploads(&self, range: &str) {
        self.shared.state.lock().unwrap().lie = Some(range.to_owned());
    }

    /// Everything asked so far.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.shared.state.lock().unwrap().seen.clone()
    }

    /// What lies under `repository:tag`, if anything does.
    pub(crate) fn tagged(&self, name: &str) -> Option<Vec<u8>> {
        self.shared.state.lock().unwrap().manifests.get(name).map(|(_, bytes)| bytes.clone())
    }

    /// A blob of a repository.
    pub(crate) fn blob(&self, repository: &str, digest: &str) -> Option<Vec<u8>> {
        self.shared.state.lock().unwrap().blobs.get(&format!("{repository}@{digest}")).cloned()
    }

    /// All tokens that it gave out.
    pub(crate) fn tokens(&self) -> Vec<String> {
        self.shared.state.lock().unwrap().tokens.keys().cloned().collect()
    }
}

impl Drop for RegistryDouble {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// An answer before it is written.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Of a HEAD: the length that is told without a body.
    length: Option<usize>,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), length: None }
    }

    fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    fn body(mut self, body: &[u8]) -> Self {
        self.body = body.to_vec();
        self
    }

    fn head(&self) -> String {
        let length = self.length.unwrap_or(self.body.len());
        let mut head =
            format!("HTTP/1.1 {} Status\r\nConnection: close\r\nContent-Length: {length}\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head + "\r\n"
    }
}

fn serve(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    let request = read_request(&mut client)?;
    let fault = {
        let faults = shared.faults.lock().unwrap().clone();
        let mut state = shared.state.lock().unwrap();
        state.seen.push(request.clone());
        faults(&request, state.seen.len() - 1)
    };
    if fault == Fault::Head {
        return Ok(());
    }
    let refused = refusal(&request, shared);
    if let (Some(answer), Auth::Token { polite: false, .. }) = (&refused, &shared.auth) {
        client.write_all(answer.head().as_bytes())?;
        return client.write_all(&answer.body);
    }
    let length = request.number("content-length");
    let mut body = vec![0; if fault == Fault::Body { length / 2 } else { length }];
    client.read_exact(&mut body)?;
    if fault == Fault::Body {
        if refused.is_none() && matches!(request.method.as_str(), "PUT" | "PATCH") {
            shared.state.lock().unwrap().append(&request, &body);
        }
        return Ok(());
    }
    let answer = match (fault, refused) {
        (Fault::Status(status, after), _) => {
            let answer = Answer::new(status);
            after.iter().fold(answer, |answer, after| answer.header("Retry-After", after.to_string()))
        }
        (_, Some(refused)) => refused,
        _ => shared.state.lock().unwrap().answer(&request, body, shared.sha256),
    };
    let head = answer.head();
    match fault {
        Fault::Unanswered => return Ok(()),
        Fault::AnswerHead => client.write_all(&head.as_bytes()[..head.len() / 2])?,
        Fault::AnswerBody if answer.body.is_empty() => client.write_all(&head.as_bytes()[..head.len() - 1])?,
        Fault::AnswerBody => {
            client.write_all(head.as_bytes())?;
            client.write_all(&answer.body[..answer.body.len() / 2])?;
        }
        _ => {
            client.write_all(head.as_bytes())?;
            client.write_all(&answer.body)?;
        }
    }
    client.shutdown(Shutdown::Write)
}

fn read_request(client: &mut TcpStream) -> io::Result<Request> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).map_err(io::Error::other)?;
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let headers = lines.filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_lowercase(), v.to_owned()));
    Ok(Request {
        method: words.next().unwrap_or_default(),
        path: words.next().unwrap_or_default(),
        headers: headers.collect(),
    })
}

/// What who may not be let in is told.
fn refusal(request: &Request, shared: &Shared) -> Option<Answer> {
    let shown = request.header("authorization");
    match &shared.auth {
        Auth::Open => None,
        Auth::Basic(basic) if shown == Some(basic) => None,
        Auth::Basic(_) => Some(Answer::new(401).header("WWW-Authenticate", "Basic realm=\"double\"")),
        Auth::Token { basic, uses, .. } if request.path.starts_with("/token") => {
            if shown != Some(basic) {
                return Some(Answer::new(401));
            }
            let mut state = shared.state.lock().unwrap();
            let token = format!("secret-token-{}", state.tokens.len());
            state.tokens.insert(token.clone(), *uses);
            Some(Answer::new(200).body(format!("{{\"token\":\"{token}\",\"expires_in\":300}}").as_bytes()))
        }
        Auth::Token { .. } => {
            let mut state = shared.state.lock().unwrap();
            let left = shown.and_then(|shown| state.tokens.get_mut(shown.strip_prefix("Bearer ")?));
            if let Some(left) = left.filter(|left| **left > 0) {
                *left -= 1;
                return None;
            }
            let realm = format!("Bearer realm=\"http://{}/token\",service=\"double\"", request.header("host")?);
            Some(Answer::new(401).header("WWW-Authenticate", realm))
        }
    }
}

impl State {
    /// Keeps what came of an upload's body.
    fn append(&mut self, request: &Request, body: &[u8]) {
        if let Some(upload) = session(&request.path).and_then(|(_, id)| self.uploads.get_mut(&id)) {
            upload.extend_from_slice(body);
        }
    }

    fn answer(&mut self, request: &Request, body: Vec<u8>, sha256: Sha256) -> Answer {
        let plain = request.path.split('?').next().unwrap_or_default();
        if let Some((repository, id)) = session(plain) {
            return self.upload(request, repository, id, body, sha256);
        }
        let Some(rest) = plain.strip_prefix("/v2/") else { return Answer::new(404) };
        if let Some(repository) = rest.strip_suffix("/blobs/uploads/") {
            self.made += 1;
            self.uploads.insert(self.made, Vec::new());
            return Answer::new(202).header("Location", format!("/v2/{repository}/blobs/uploads/{}", self.made));
        }
        if let Some((repository, name)) = rest.split_once("/blobs/") {
            return match self.blobs.get(&format!("{repository}@{name}")) {
                Some(bytes) => give(request, bytes, name, "application/octet-stream"),
                None => Answer::new(404),
            };
        }
        let Some((repository, name)) = rest.split_once("/manifests/") else { return Answer::new(404) };
        let key = |name: &str| format!("{repository}{}{name}", if name.contains(':') { "@" } else { ":" });
        if request.method == "PUT" {
            let digest = format!("sha256:{}", sha256(&body));
            let kind = request.header("content-type").unwrap_or_default().to_owned();
            self.manifests.insert(key(&digest), (kind.clone(), body.clone()));
            self.manifests.insert(key(name), (kind, body));
            return Answer::new(201).header("Docker-Content-Digest", digest);
        }
        match self.manifests.get(&key(name)) {
            Some((kind, bytes)) => give(request, bytes, &format!("sha256:{}", sha256(bytes)), kind),
            None => Answer::new(404),
        }
    }

    fn upload(&mut self, request: &Request, repository: &str, id: usize, body: Vec<u8>, sha256: Sha256) -> Answer {
        let Some(upload) = self.uploads.get_mut(&id) else { return Answer::new(404) };
        let place = format!("/v2/{repository}/blobs/uploads/{id}");
        if request.method == "GET" {
            let range = self.lie.clone().unwrap_or_else(|| format!("0-{}", upload.len().saturating_sub(1)));
            return Answer::new(204).header("Location", place).header("Range", range);
        }
        upload.extend_from_slice(&body);
        if request.method == "PATCH" {
            return Answer::new(202).header("Location", place);
        }
        let bytes = upload.clone();
        let digest = format!("sha256:{}", sha256(&bytes));
        let asked = request.path.split_once("digest=").map(|(_, digest)| digest.replace("%3A", ":"));
        if asked.as_deref() != Some(digest.as_str()) {
            return Answer::new(400);
        }
        self.uploads.remove(&id);
        self.blobs.insert(format!("{repository}@{digest}"), bytes);
        Answer::new(201).header("Docker-Content-Digest", digest)
    }
}

fn give(request: &Request, bytes: &[u8], digest: &str, kind: &str) -> Answer {
    let answer = Answer::new(200).header("Docker-Content-Digest", digest).header("Content-Type", kind);
    if request.method == "HEAD" {
        return Answer { length: Some(bytes.len()), ..answer };
    }
    let range = request.header("range").and_then(|text| text.strip_prefix("bytes=")?.split_once('-'));
    let Some((first, last)) = range else { return answer.body(bytes) };
    let (first, end) =
        (first.parse::<usize>().unwrap_or(0), last.parse::<usize>().map_or(bytes.len(), |last| last + 1));
    if first >= end || end > bytes.len() {
        return Answer::new(416);
    }
    let said = format!("bytes {first}-{}/{}", end - 1, bytes.len());
    Answer { status: 206, ..answer }.header("Content-Range", said).body(&bytes[first..end])
}

/// Repository and number of an upload's session.
fn session(path: &str) -> Option<(&str, usize)> {
    let path = path.split('?').next()?;
    let (repository, id) = path.strip_prefix("/v2/")?.split_once("/blobs/uploads/")?;
    Some((repository, id.parse().ok()?))
}
