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
    async fn start(command: impl FnOnce(&Path, u16) -> Command) -> Self {
        let dir = TempDir::new().unwrap();
        // Free now; a race for it is lost by one of us, and then the test says so.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = command(dir.path(), port);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Self { child, host: format!("127.0.0.1:{port}"), dir };
        for _ in 0..1200 {
            if tokio::net::TcpStream::connect(&server.host).await.is_ok() {
                return server;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no server listens on {}", server.host);
    }
}

/// `None`, and a line saying so, where it is not installed. What is below `/blobs/` anybody may read and write, what is
/// below `/private/` the user `user` with the password `secret`; both lie in the folder `root`.
pub(super) async fn nginx() -> Option<BlobServer> {
    let program = ["nginx", "/usr/sbin/nginx"].into_iter().find(|program| runs(program, "-v"));
    let Some(program) = program else {
        println!("skipped: nginx is not installed");
        return None;
    };
    let start = |dir: &Path, port| {
        let place = dir.display();
        std::fs::create_dir_all(dir.join("root/blobs")).unwrap();
        std::fs::write(dir.join("htpasswd"), "user:{PLAIN}secret\n").unwrap();
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {place}/{kind};\n"))
            .concat();
        let config = format!(
            "daemon off;\nmaster_process off;\npid {place}/pid;\nerror_log {place}/error.log;\n\
             events {{ worker_connections 64; }}\n\
             http {{ access_log {place}/access.log; client_max_body_size 0;\n{temporary}\
             server {{ listen 127.0.0.1:{port}; root {place}/root; dav_methods PUT; create_full_put_path on;\n\
             location /private/ {{ auth_basic here; auth_basic_user_file {place}/htpasswd; }} }} }}\n"
        );
        std::fs::write(dir.join("nginx.conf"), config).unwrap();
        let mut command = Command::new(program);
        command.arg("-p").arg(dir).arg("-e").arg(dir.join("error.log")).arg("-c").arg(dir.join("nginx.conf"));
        command
    };
    Some(BlobServer::start(start).await)
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
    let start = |_: &Path, port: u16| {
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        command
    };
    let server = BlobServer::start(start).await;
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
