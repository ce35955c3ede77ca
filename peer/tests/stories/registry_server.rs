//! A real registry, private if it shall be, behind a relay that counts what it sends.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use shoal::processes::DockerRegistryProcess;
use shoal_rafs::oci::{Authfile, Credentials, Registry, RegistryOptions};
use tempfile::TempDir;

/// Whom a private registry lets in.
pub(crate) const USER: &str = "user";
pub(crate) const PASSWORD: &str = "secret";

/// An address that nobody listens on now; a race for it is lost by one of us, and then the test says so.
pub(crate) fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address")
}

/// Debian's `docker-registry`.
pub(crate) struct RegistryServer {
    _process: DockerRegistryProcess,
    /// Of the relay.
    pub(crate) host: String,
    private: bool,
    sent: Arc<AtomicU64>,
    _folder: TempDir,
}

impl RegistryServer {
    /// None, with a line that says why, where it is not installed. With a user and a password it lets nobody else in.
    pub(crate) fn start(test: &str, user: Option<(&str, &str)>) -> Option<Self> {
        if !DockerRegistryProcess::is_installed() {
            println!("skipped: {test} (needs docker-registry)");
            return None;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let passwords = folder.path().join("htpasswd");
        let auth = match user {
            None => String::new(),
            Some(_) => {
                // bcrypt of "secret", cost 4.
                let line = "user:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";
                fs::write(&passwords, line).expect("a file");
                format!("auth: {{htpasswd: {{realm: here, path: {}}}}}\n", passwords.display())
            }
        };
        let process = DockerRegistryProcess::start(folder.path(), &auth).expect("it starts");
        let sent = Arc::new(AtomicU64::new(0));
        let host = relay(process.address(), sent.clone()).to_string();
        Some(Self { _process: process, host, private: user.is_some(), sent, _folder: folder })
    }

    /// What it has sent so far, headers and all.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// One that it lets in.
    pub(crate) fn client(&self) -> Registry {
        let mut auth = Authfile::default();
        if self.private {
            auth.insert(&self.host, Credentials { username: USER.into(), password: PASSWORD.into() });
        }
        Registry::new(RegistryOptions { auth: auth.into(), ..RegistryOptions::default() }).expect("a client")
    }
}

/// Passes connections on to `server` until a request has this text: then their clients hear nothing more. Gives where it listens.
pub(crate) fn relay_that_stalls(server: &str, text: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (address, server) = (listener.local_addr().expect("its address"), server.to_owned());
    thread::spawn(move || {
        while let Ok((mut client, _)) = listener.accept() {
            let Ok(mut upstream) = TcpStream::connect(&server) else { continue };
            let (Ok(from_upstream), Ok(to_client)) = (upstream.try_clone(), client.try_clone()) else { continue };
            thread::spawn(move || pass(from_upstream, to_client, |_| ()));
            thread::spawn(move || {
                let (mut request, mut stalls) = (vec![0; 64 << 10], false);
                while let Ok(read @ 1..) = client.read(&mut request) {
                    stalls |= request[..read].windows(text.len()).any(|part| part == text.as_bytes());
                    if !stalls && upstream.write_all(&request[..read]).is_err() {
                        break;
                    }
                }
                // It may have gone.
                let _ = upstream.shutdown(Shutdown::Both);
            });
        }
    });
    address
}

/// Passes connections on to `server`, and counts what comes back.
fn relay(server: SocketAddr, sent: Arc<AtomicU64>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let Ok(upstream) = TcpStream::connect(server) else { continue };
            let (Ok(from_client), Ok(to_upstream)) = (client.try_clone(), upstream.try_clone()) else { continue };
            thread::spawn(move || pass(from_client, to_upstream, |_| ()));
            let sent = sent.clone();
            thread::spawn(move || pass(upstream, client, |bytes| _ = sent.fetch_add(bytes, Relaxed)));
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream, count: impl Fn(u64)) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read) = from.read(&mut buffer)
        && read > 0
    {
        count(read as u64);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // The other side may have gone.
    let _ = to.shutdown(Shutdown::Write);
}
