//! A client of the mirror: one request on a connection of its own, and every byte of the answer.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    /// What came of the body, which may be less than was announced.
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// A header by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }
}

pub(crate) fn get(server: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Answer {
    get_with(server, "GET", path, headers)
}

pub(crate) fn head(server: SocketAddr, path: &str) -> Answer {
    get_with(server, "HEAD", path, &[])
}

pub(crate) fn get_with(server: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let mut connection = TcpStream::connect(server).expect("the mirror listens");
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(connection, "{method} {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n{headers}\r\n")
        .expect("a request");
    let mut bytes = Vec::new();
    // A connection that is reset has given all that it will.
    let _ = connection.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("the head of an answer");
    let text = String::from_utf8(bytes[..end].to_vec()).expect("text");
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status");
    let header = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    };
    Answer { status, headers: lines.filter_map(header).collect(), body: bytes.split_off(end + 4) }
}
