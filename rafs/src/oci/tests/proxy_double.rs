//! A small HTTP proxy on real sockets: it passes requests on as a proxy, as a mirror or through tunnels, writes down what it was
//! asked, and misbehaves when it is told to. Only the standard library and threads, so that the daemon's tests use it as well.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// What it does with requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Pass,
    /// Another byte in the middle of every body.
    Lie,
    /// No answer at all.
    Hang,
    /// Half of the answer, then silence.
    Stop,
    /// Half of the answer, then the end of the connection.
    Cut,
    /// This status, as its own word.
    Status(u16),
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// Method, target and version.
    pub(crate) line: String,
    headers: Vec<(String, String)>,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

struct Shared {
    mood: Mutex<Mood>,
    asked: Mutex<Vec<Asked>>,
    pings: Mutex<usize>,
    /// Connections that are never answered.
    held: Mutex<Vec<TcpStream>>,
}

/// The proxy. It answers pings at `/ping` as long as it passes requests on or lies.
pub(crate) struct ProxyDouble {
    address: SocketAddr,
    shared: Arc<Shared>,
    running: Option<(Arc<AtomicBool>, thread::JoinHandle<()>)>,
}

impl ProxyDouble {
    pub(crate) fn start() -> Self {
        let shared = Shared {
            mood: Mutex::new(Mood::Pass),
            asked: Mutex::default(),
            pings: Mutex::default(),
            held: Mutex::default(),
        };
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut double = Self { address, shared: Arc::new(shared), running: None };
        double.revive();
        double
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn set(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    /// All requests so far but pings.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// How often it was pinged.
    pub(crate) fn pings(&self) -> usize {
        *self.shared.pings.lock().unwrap()
    }

    /// Takes no more connections, and breaks those that it has.
    pub(crate) fn die(&mut self) {
        let Some((stop, thread)) = self.running.take() else { return };
        stop.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for a connection.
        drop(TcpStream::connect(self.address));
        thread.join().unwrap();
        for held in self.shared.held.lock().unwrap().drain(..) {
            let _ = held.shutdown(Shutdown::Both);
        }
    }

    /// Listens, again at the same address.
    pub(crate) fn revive(&mut self) {
        let listener = TcpListener::bind(self.address).unwrap();
        self.address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, shared) = (stop.clone(), self.shared.clone());
        let thread = thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let shared = shared.clone();
                // A client that goes away is what some tests want.
                thread::spawn(move || drop(serve(stream, &shared)));
            }
        });
        self.running = Some((stop, thread));
    }
}

impl Drop for ProxyDouble {
    fn drop(&mut self) {
        self.die();
    }
}

fn serve(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    let head = read_head(&mut client)?;
    let mut lines = head.lines();
    let line = lines.next().unwrap_or_default().to_owned();
    let headers = lines.filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_lowercase(), v.to_owned()));
    let asked = Asked { line, headers: headers.collect() };
    let mood = *shared.mood.lock().unwrap();
    let mut words = asked.line.split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if target == "/ping" {
        *shared.pings.lock().unwrap() += 1;
        let status = if matches!(mood, Mood::Pass | Mood::Lie) { 200 } else { 503 };
        return client.write_all(own_answer(status).as_bytes());
    }
    shared.asked.lock().unwrap().push(asked.clone());
    match mood {
        Mood::Hang => {
            shared.held.lock().unwrap().push(client);
            return Ok(());
        }
        Mood::Status(status) => return client.write_all(own_answer(status).as_bytes()),
        _ => {}
    }
    if method == "CONNECT" {
        return tunnel(client, &target);
    }
    let named = asked.header("x-dragonfly-registry").map(|registry| format!("{registry}{target}"));
    let url = if target.starts_with('/') { named.unwrap_or_default() } else { target };
    let Some((host, path)) = url.strip_prefix("http://").and_then(|rest| rest.split_once('/')) else {
        return client.write_all(own_answer(400).as_bytes());
    };
    let answer = match fetch(&method, host, path, &asked) {
        Ok(answer) => answer,
        Err(_) => return client.write_all(own_answer(502).as_bytes()),
    };
    answer_in(mood, client, answer, shared)
}

fn answer_in(mood: Mood, mut client: TcpStream, mut answer: Vec<u8>, shared: &Shared) -> io::Result<()> {
    let body = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    let middle = body + (answer.len() - body) / 2;
    match mood {
        Mood::Lie if middle < answer.len() => answer[middle] ^= 1,
        Mood::Stop | Mood::Cut => answer.truncate(middle),
        _ => {}
    }
    client.write_all(&answer)?;
    if mood == Mood::Stop {
        shared.held.lock().unwrap().push(client);
    }
    Ok(())
}

/// Asks the registry, and gives all that it answers.
fn fetch(method: &str, host: &str, path: &str, asked: &Asked) -> io::Result<Vec<u8>> {
    let mut registry = TcpStream::connect(host)?;
    let mut request = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    for (name, value) in &asked.headers {
        if !matches!(name.as_str(), "host" | "connection") && !name.starts_with("proxy-") {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    registry.write_all(format!("{request}\r\n").as_bytes())?;
    let mut answer = Vec::new();
    registry.read_to_end(&mut answer)?;
    Ok(answer)
}

fn tunnel(mut client: TcpStream, host: &str) -> io::Result<()> {
    let mut registry = TcpStream::connect(host)?;
    client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
    let (mut from, mut to) = (client.try_clone()?, registry.try_clone()?);
    let up = thread::spawn(move || {
        let copied = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
        copied
    });
    io::copy(&mut registry, &mut client)?;
    client.shutdown(Shutdown::Both)?;
    up.join().unwrap().map(drop)
}

fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    String::from_utf8(head).map_err(io::Error::other)
}

fn own_answer(status: u16) -> String {
    format!(
        "HTTP/1.1 {status} Status\r\nX-Dragonfly-Error-Type: proxy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
}
