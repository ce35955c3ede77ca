//! Real servers of blobs for tests: nginx, and an S3 server.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// A running server, and its folder.
pub(super) struct BlobServer {
    child: Child,
    pub(super) host: String,
    pub(super) dir: TempDir,
}

impl Drop for BlobServer {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl BlobServer {
    /// `command` makes it in its folder, for the address where it is to listen; `None` where it cannot be had.
    async fn start(command: impl FnOnce(&Path, &str) -> Option<Command>) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        // Free now; a race for it is lost by one of us, and then the test says so.
        let host = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let mut command = command(dir.path(), &host)?;
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Self { child, host, dir };
        for _ in 0..1200 {
            if tokio::net::TcpStream::connect(&server.host).await.is_ok() {
                return Some(server);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no server listens on {}", server.host);
    }
}

/// See [`nginx::command`]. `None`, and a line saying so, where it is not installed.
pub(super) async fn nginx() -> Option<BlobServer> {
    let server = BlobServer::start(nginx::command).await;
    if server.is_none() {
        println!("skipped: nginx is not installed");
    }
    server
}

/// An S3 server with a bucket called `bucket`. `None`, and a line saying so, where it is not installed.
pub(super) async fn s3() -> Option<BlobServer> {
    let cache = std::env::var_os("SHOAL_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/shoal")));
    let installed = cache.map(|cache| cache.join("s3-server/bin/moto_server").display().to_string());
    let programs = installed.into_iter().chain(["moto_server".to_owned()]);
    let Some(program) = programs.into_iter().find(|program| runs(program, "--help")) else {
        println!("skipped: no S3 server is installed");
        return None;
    };
    let start = |_: &Path, address: &str| {
        let (host, port) = address.split_once(':')?;
        let mut command = Command::new(program);
        command.args(["-H", host, "-p", port]);
        Some(command)
    };
    let server = BlobServer::start(start).await?;
    let mut stream = tokio::net::TcpStream::connect(&server.host).await.unwrap();
    let request =
        format!("PUT /bucket HTTP/1.1\r\nhost: {}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", server.host);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Some(server)
}

fn runs(program: &str, argument: &str) -> bool {
    Command::new(program).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}
