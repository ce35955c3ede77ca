//! A registry double: answers every request with whatever bytes a closure makes, and remembers what it was asked.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::{Reference, Source};

/// A request as it came.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) method: String,
    /// With the query.
    pub(super) path: String,
    headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// Raw bytes of an answer; the connection is closed behind them.
pub(super) struct Reply(pub(super) Vec<u8>);

impl Reply {
    pub(super) fn new(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let length = body.len().to_string();
        let mut all = vec![("content-length", length.as_str())];
        all.extend_from_slice(headers);
        Self::raw(status, &all, body)
    }

    /// Without a length of its own.
    pub(super) fn raw(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut head = format!("HTTP/1.1 {status} Status\r\nconnection: close\r\n");
        for (name, value) in headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        head.push_str("\r\n");
        Self([head.as_bytes(), body].concat())
    }

    /// One chunk of the chunked encoding and its end.
    pub(super) fn chunked(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut all = vec![("transfer-encoding", "chunked")];
        all.extend_from_slice(headers);
        let framed = [format!("{:x}\r\n", body.len()).as_bytes(), body, b"\r\n0\r\n\r\n"].concat();
        Self::raw(status, &all, &framed)
    }

    /// The same, cut `missing` bytes before its end.
    pub(super) fn cut(mut self, missing: usize) -> Self {
        self.0.truncate(self.0.len() - missing);
        self
    }
}

pub(super) struct Double {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Double {
    /// `answer` gets the request and how many came before it.
    pub(super) async fn start(answer: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), seen.clone());
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, log) = (answer.clone(), log.clone());
                tokio::spawn(async move {
                    let serve = serve(stream, |seen| {
                        let mut log: std::sync::MutexGuard<'_, Vec<Seen>> = log.lock().unwrap();
                        log.push(seen.clone());
                        answer(&seen, log.len() - 1)
                    });
                    // A client that goes away early is what some tests want.
                    let _ = serve.await;
                });
            }
        });
        Self { addr, seen, task }
    }

    pub(super) fn port(&self) -> u16 {
        self.addr.port()
    }

    pub(super) fn source(&self) -> Source {
        Source::new(&self.addr.to_string(), "app").unwrap()
    }

    pub(super) fn reference(&self) -> Reference {
        Reference::new(self.source(), Some("v1"), None).unwrap()
    }

    /// Everything asked so far.
    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, answer: impl FnOnce(Seen) -> Reply) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let headers = lines.filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_lowercase(), v.to_owned()));
    let (method, path, headers) = (first.next().unwrap(), first.next().unwrap(), headers.collect());
    let mut seen = Seen { method, path, headers, body: Vec::new() };
    let length = seen.header("content-length").map_or(0, |length| length.parse().unwrap());
    (&mut stream).take(length).read_to_end(&mut seen.body).await?;
    stream.write_all(&answer(seen).0).await?;
    stream.shutdown().await
}
