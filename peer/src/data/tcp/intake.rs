//! The socket below TLS, which wakes its reader only when there is something to do.
//!
//! The kernel wakes whoever waits for a socket with each packet. Of a record that is not whole, nothing can be decrypted, and of a part
//! of a piece that is not whole, nothing is handed on: on a link of 20 Mbit/s a node would be woken seventeen hundred times a second
//! to find that it has to wait. So the kernel is told how much is worth waking for: the rest of the record, which says its
//! length, and of the payload that the reader of frames waits for. What is waited for is always on its way, whatever the
//! peer does: a peer that stops in the midst of it is silent either way.

use std::{
    io,
    os::fd::AsRawFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Most bytes that are waited for at a time: half of what the kernel lets a new connection send unread, so that the sender
/// never waits for the reader to wake.
const MOST: usize = 32 << 10;

/// Bytes before the body of a TLS record; the last two are its length (RFC 8446, section 5.1).
const RECORD_HEADER: usize = 5;

/// Payload that the reader of frames waits for and has not been given: the one tells, the other asks.
pub(super) type Awaited = Arc<AtomicUsize>;

/// See the module.
#[derive(Debug)]
pub(super) struct Intake {
    stream: TcpStream,
    record: Record,
    awaited: Awaited,
    /// What the kernel was told last.
    told: usize,
}

impl Intake {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, record: Record::default(), awaited: Awaited::default(), told: 1 }
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.stream
    }

    pub(super) fn awaited(&self) -> Awaited {
        self.awaited.clone()
    }

    /// Tells the kernel what to wake for. If that is here already, it wakes at once.
    fn wait(&mut self) {
        let bytes = self.record.lacks(self.awaited.load(Relaxed)).clamp(1, MOST);
        // A kernel that refuses wakes more often, and nothing else.
        if bytes != self.told && set_low_water(&self.stream, bytes).is_ok() {
            self.told = bytes;
        }
    }
}

impl AsyncRead for Intake {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buffer);
        match &polled {
            Poll::Ready(_) => this.record.took(&buffer.filled()[before..]),
            Poll::Pending => this.wait(),
        }
        polled
    }
}

impl AsyncWrite for Intake {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// How far the record is that is coming in.
#[derive(Debug, Default)]
struct Record {
    header: [u8; RECORD_HEADER],
    /// Bytes of the header that are here; none once the body begins.
    begun: usize,
    /// Length of the body.
    body: usize,
    /// Bytes of the body that are to come.
    rest: usize,
}

impl Record {
    /// Takes note of what was read.
    fn took(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let wanted = if self.rest > 0 { self.rest } else { RECORD_HEADER - self.begun };
            let (here, behind) = bytes.split_at(wanted.min(bytes.len()));
            bytes = behind;
            if self.rest > 0 {
                self.rest -= here.len();
                continue;
            }
            self.header[self.begun..self.begun + here.len()].copy_from_slice(here);
            self.begun += here.len();
            if let [_, _, _, high, low] = self.header
                && self.begun == RECORD_HEADER
            {
                self.begun = 0;
                self.body = usize::from(u16::from_be_bytes([high, low]));
                self.rest = self.body;
            }
        }
    }

    /// Bytes that are certain to come before anything can be done, when all that was decrypted has been read and `awaited`
    /// bytes of plaintext are still waited for. The record that is coming in holds at most as much of them as its body is long.
    fn lacks(&self, awaited: usize) -> usize {
        if self.rest > 0 { self.rest + awaited.saturating_sub(self.body) } else { awaited }
    }
}

/// `SO_RCVLOWAT`: readable means that so much is there, or that the sender may not send more, or that nothing more comes.
fn set_low_water(stream: &TcpStream, bytes: usize) -> io::Result<()> {
    let bytes = bytes as libc::c_int;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is the stream's, and the kernel reads one integer from a place that lives past the call.
    let failed = unsafe {
        let value = (&raw const bytes).cast();
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, length)
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A record of plaintext and 17 bytes more: a tag, and the kind of content (RFC 8446, section 5.2).
    fn record(plaintext: usize) -> Vec<u8> {
        let body = plaintext + 17;
        let mut bytes = vec![23, 3, 3, (body >> 8) as u8, body as u8];
        bytes.resize(RECORD_HEADER + body, 0);
        bytes
    }

    #[test]
    fn never_more_is_waited_for_than_will_come() {
        for lengths in [[1, 0, 40], [16384, 16384, 7], [3, 16384, 1]] {
            let wire: Vec<u8> = lengths.iter().flat_map(|&length| record(length)).collect();
            for step in [1, 4, 5, 6, 1448, 16406] {
                let (mut seen, mut at) = (Record::default(), 0);
                for bytes in wire.chunks(step) {
                    seen.took(bytes);
                    at += bytes.len();
                    // What of the plaintext was in whole records has been read.
                    let mut end = 0;
                    let whole = lengths.iter().take_while(|&&length| {
                        end += RECORD_HEADER + 17 + length;
                        end <= at
                    });
                    let awaited = lengths.iter().sum::<usize>() - whole.sum::<usize>();
                    let (lacks, left) = (seen.lacks(awaited), wire.len() - at);
                    assert!(lacks <= left, "{lacks} of {left} at {at}");
                    assert!(left == 0 || awaited == 0 || lacks > 0 || seen.begun > 0);
                }
                assert_eq!((seen.rest, seen.begun, seen.lacks(0)), (0, 0, 0));
            }
        }
    }

    fn low_water(stream: &TcpStream) -> libc::c_int {
        let (mut bytes, mut length) = (0, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: both places live past the call, and the length is that of the first.
        let failed = unsafe {
            let value = (&raw mut bytes).cast();
            libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, &raw mut length)
        };
        assert_eq!(failed, 0);
        bytes
    }

    #[tokio::test]
    async fn the_kernel_is_told_what_is_worth_waking_for() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut intake = Intake::new(listener.accept().await.unwrap().0);
        let (wire, mut read) = (record(1000), vec![0; 100]);
        sender.write_all(&wire[..100]).await.unwrap();
        intake.read_exact(&mut read).await.unwrap();
        let mut more = vec![0; wire.len()];
        assert!(intake.read(&mut more).now_or_never().is_none());
        assert_eq!(low_water(&intake.stream) as usize, wire.len() - 100);
        intake.awaited().store(5000, Relaxed);
        assert!(intake.read(&mut more).now_or_never().is_none());
        assert_eq!(low_water(&intake.stream) as usize, wire.len() - 100 + 5000 - 1017);
        intake.awaited().store(1 << 20, Relaxed);
        assert!(intake.read(&mut more).now_or_never().is_none());
        assert_eq!(low_water(&intake.stream) as usize, MOST);
        // Less than that, and then the end: it wakes.
        sender.write_all(&wire[100..]).await.unwrap();
        sender.shutdown().await.unwrap();
        poll_fn(|cx| intake.stream.poll_read_ready(cx)).await.unwrap();
        intake.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, wire);
    }
}
