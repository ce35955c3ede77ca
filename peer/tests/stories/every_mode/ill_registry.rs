//! A registry that is ill at times: it passes requests on to a healthy one, and spoils answers with parts of blobs, one in a way
//! after the other: late, an error, half of it, another byte.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

/// How late what comes late is.
const LATE: Duration = Duration::from_millis(300);

/// How it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    Well,
    /// Answers are spoilt.
    Ill,
    /// There are no parts of blobs at all.
    Down,
}

/// Answers that were spoilt.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Faults {
    pub(super) late: usize,
    pub(super) failed: usize,
    pub(super) cut: usize,
    pub(super) wrong: usize,
}

struct Shared {
    healthy: SocketAddr,
    health: Mutex<Health>,
    turn: AtomicUsize,
    faults: Mutex<Faults>,
}

/// It listens until it is dropped.
pub(super) struct IllRegistry {
    address: SocketAddr,
    shared: Arc<Shared>,
    over: Arc<AtomicBool>,
}

impl IllRegistry {
    pub(super) fn start(healthy: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let (turn, faults) = (AtomicUsize::new(0), Mutex::default());
        let shared = Arc::new(Shared { healthy, health: Mutex::new(Health::Well), turn, faults });
        let over = Arc::new(AtomicBool::new(false));
        let (served, ended) = (shared.clone(), over.clone());
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok).take_while(|_| !ended.load(Relaxed)) {
                let shared = served.clone();
                // A client that goes away is no failure.
                thread::spawn(move || drop(shared.serve(client)));
            }
        });
        Self { address, shared, over }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn set(&self, health: Health) {
        *self.shared.health.lock().unwrap_or_else(PoisonError::into_inner) = health;
    }

    pub(super) fn faults(&self) -> Faults {
        *self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for IllRegistry {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        // Wakes the thread that waits for a connection.
        drop(TcpStream::connect(self.address));
    }
}

impl Shared {
    /// One request of a connection.
    fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        let head = read_head(&mut client)?;
        let mut answer = self.ask(&head)?;
        let is_part = head.contains("/blobs/") && head.to_ascii_lowercase().contains("\r\nrange:");
        let health = *self.health.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_part || health == Health::Well {
            return client.write_all(&answer);
        }
        let count = |add: fn(&mut Faults)| add(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner));
        let body = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
        let middle = body + (answer.len() - body) / 2;
        match if health == Health::Down { 1 } else { self.turn.fetch_add(1, Relaxed) % 5 } {
            0 => {
                count(|faults| faults.late += 1);
                thread::sleep(LATE);
            }
            1 => {
                count(|faults| faults.failed += 1);
                answer = b"HTTP/1.1 503 Ill\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec();
            }
            2 => {
                count(|faults| faults.cut += 1);
                answer.truncate(middle);
            }
            3 if middle < answer.len() => {
                count(|faults| faults.wrong += 1);
                answer[middle] ^= 1;
            }
            _ => {}
        }
        client.write_all(&answer)
    }

    /// All that the healthy one answers.
    fn ask(&self, head: &str) -> io::Result<Vec<u8>> {
        let mut registry = TcpStream::connect(self.healthy)?;
        let lines = head.lines().filter(|line| {
            let line = line.to_ascii_lowercase();
            !line.is_empty() && !line.starts_with("connection:") && !line.starts_with("host:")
        });
        let mut request: String = lines.map(|line| format!("{line}\r\n")).collect();
        request.push_str(&format!("Host: {}\r\nConnection: close\r\n\r\n", self.healthy));
        registry.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        registry.read_to_end(&mut answer)?;
        Ok(answer)
    }
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
