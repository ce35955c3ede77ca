//! Connections of the mirror. A client that takes nothing of its answer for as long as the patience is cut: it would have its place, of
//! which there are few, for as long as it likes.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::Sleep,
};

pub(super) struct Impatient {
    listener: TcpListener,
    patience: Duration,
}

impl Impatient {
    pub(super) fn new(listener: TcpListener, patience: Duration) -> Self {
        Self { listener, patience }
    }
}

impl Listener for Impatient {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        // Axum's own: it waits after an error.
        let (stream, address) = Listener::accept(&mut self.listener).await;
        (Connection { stream, patience: self.patience, limit: None }, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

pub(super) struct Connection {
    stream: TcpStream,
    patience: Duration,
    /// When it is cut; none while it takes what there is.
    limit: Option<Pin<Box<Sleep>>>,
}

impl Connection {
    fn limited(&mut self, context: &mut Context<'_>, taken: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if taken.is_ready() {
            self.limit = None;
            return taken;
        }
        let patience = self.patience;
        let limit = self.limit.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(limit.as_mut().poll(context));
        tracing::debug!("a client that takes nothing is cut");
        metrics::counter!("shoal_mirror_cut_answers_total").increment(1);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, to)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let taken = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.limited(context, taken)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let taken = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.limited(context, taken)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// A socket has nothing to flush.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn who_takes_nothing_is_cut_and_who_takes_little_is_not() {
        let patience = Duration::from_secs(2);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut listener = Impatient::new(listener, patience);
        for takes in [false, true] {
            let mut client = TcpStream::connect(address).await.unwrap();
            let (mut connection, _) = listener.accept().await;
            let sending = tokio::spawn(async move {
                let bytes = vec![0; 32 << 20];
                connection.write_all(&bytes).await
            });
            if takes {
                let mut all = 0;
                // Some of it, and then all.
                for _ in 0..4 {
                    all += client.read(&mut vec![0; 1 << 20]).await.unwrap();
                    tokio::time::sleep(patience / 20).await;
                }
                while all < 32 << 20 {
                    all += client.read(&mut vec![0; 1 << 20]).await.unwrap();
                }
                sending.await.unwrap().unwrap();
            } else {
                let error = sending.await.unwrap().unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            }
        }
    }
}
