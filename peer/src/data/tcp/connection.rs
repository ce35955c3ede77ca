//! One TLS stream as many: each frame names its request, and those that name none are hellos and notices.
//!
//! ```text
//! Writer, Reader::drop, ask -> Outbox -> write task -> TLS -> read task -> Streams -> Reader of that request
//!                                                                       '> notices      '> accept
//! ```
//!
//! The read task takes one frame, the hello, and goes on when the peer is welcome. It never waits for who reads an answer:
//! what was asked for is bounded, and room for it was set aside. It does wait for who reads notices, so a peer with too
//! much to say is slowed down. Either task ends the connection for all; the write task then says why, if it can.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use shoal_proto::{MAX_OPEN, MAX_REASON, Message, PREFIX, PeerId, Request, Status, decode_body, header_len};
use socket2::{SockRef, Socket};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::TlsStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    PART,
    intake::{Awaited, Intake},
    outbox::{Outbox, Turn},
    streams::{Frame, Frames, Streams, ends},
};
use crate::data::{
    Closing, Gone,
    frames::{FrameError, FrameReader, FrameWriter, Urgency, WriteFailed, encode},
    tls,
};

/// How long an end may take to be told.
const FAREWELL: Duration = Duration::from_secs(1);
/// Bytes that TLS may hold encrypted and unsent: a part with its header, so that it is handed to the kernel at once.
const ENCRYPTED: usize = PART + (4 << 10);
/// Notices that wait for who reads them.
const NOTICES: usize = 16;

/// See the module. When the last clone is dropped the connection ends.
#[derive(Debug, Clone)]
pub(in crate::data) struct Connection(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    peer: Option<PeerId>,
    remote: SocketAddr,
    /// To ask the kernel what it measured.
    socket: Socket,
    /// Taken by who reads hello and notices.
    notices: Mutex<Option<Frames>>,
    accepted: tokio::sync::Mutex<mpsc::Receiver<(u64, Frames)>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.end(Gone::Ours { why: Closing::Stopping, detail: String::new() });
    }
}

/// What the handle, the tasks and the streams share.
#[derive(Debug)]
struct Shared {
    id: usize,
    outbox: Outbox,
    /// Held for a look-up or a change.
    streams: Mutex<Streams>,
    /// Places for requests of this side.
    open: Arc<Semaphore>,
    welcome: CancellationToken,
    /// Set before `ended` is cancelled.
    gone: OnceLock<Gone>,
    ended: CancellationToken,
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says at once that a request is over; ends the connection if the peer has not read that of thousands.
    fn push_now(&self, urgency: Urgency, header: Bytes) {
        if !self.outbox.push_now(urgency, header) {
            self.end(Gone::Ours { why: Closing::Violation, detail: "it does not read".into() });
        }
    }

    /// Ends the connection; the first reason counts.
    fn end(&self, why: Gone) {
        if self.gone.set(why).is_ok() {
            self.ended.cancel();
            self.open.close();
            self.outbox.close();
            self.streams().end();
        }
    }

    /// Why it ended, for those who found out that it did.
    fn gone(&self) -> Gone {
        self.gone.get().cloned().unwrap_or_else(|| Gone::Lost("the connection is ending".into()))
    }
}

impl Connection {
    pub(super) fn start(mut stream: TlsStream<Intake>, tasks: &TaskTracker) -> io::Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        match &mut stream {
            TlsStream::Client(stream) => stream.get_mut().1.set_buffer_limit(Some(ENCRYPTED)),
            TlsStream::Server(stream) => stream.get_mut().1.set_buffer_limit(Some(ENCRYPTED)),
        }
        let (intake, session) = stream.get_ref();
        let (tcp, awaited) = (intake.socket(), intake.awaited());
        let peer = session.peer_certificates().and_then(tls::peer_of);
        let remote = tcp.peer_addr()?;
        let socket = SockRef::from(tcp).try_clone()?;
        let shared = Arc::new(Shared {
            id: NEXT.fetch_add(1, Relaxed),
            outbox: Outbox::default(),
            streams: Mutex::default(),
            open: Arc::new(Semaphore::new(MAX_OPEN)),
            welcome: CancellationToken::new(),
            gone: OnceLock::new(),
            ended: CancellationToken::new(),
        });
        let (receive, send) = tokio::io::split(stream);
        let (to_notices, notices) = mpsc::channel(NOTICES);
        // As many as may be open, so that it is never full.
        let (to_accepted, accepted) = mpsc::channel(MAX_OPEN);
        tasks.spawn(write(shared.clone(), send, socket.try_clone()?));
        tasks.spawn(read(
            shared.clone(),
            Receiver { stream: receive, awaited, header: Vec::new() },
            to_notices,
            to_accepted,
        ));
        let notices = Mutex::new(Some(notices));
        Ok(Self(Arc::new(Handle { shared, peer, remote, socket, notices, accepted: accepted.into() })))
    }

    /// Distinguishes it from all others.
    pub(in crate::data) fn id(&self) -> usize {
        self.0.shared.id
    }

    pub(in crate::data) fn remote_address(&self) -> SocketAddr {
        self.0.remote
    }

    pub(in crate::data) fn peer(&self) -> Option<PeerId> {
        self.0.peer
    }

    pub(in crate::data) fn rtt(&self) -> Duration {
        rtt(&self.0.socket).unwrap_or_default()
    }

    pub(in crate::data) fn close(&self, why: Closing, detail: &str) {
        self.0.shared.end(Gone::Ours { why, detail: detail.to_owned() });
    }

    pub(in crate::data) async fn closed(&self) -> Gone {
        self.0.shared.ended.cancelled().await;
        self.0.shared.gone()
    }

    /// The frames that belong to no request.
    pub(in crate::data) fn first(&self) -> Result<(FrameWriter, FrameReader), Gone> {
        let notices = self.0.notices.lock().unwrap_or_else(PoisonError::into_inner).take();
        let frames = notices.ok_or_else(|| self.0.shared.gone())?;
        Ok((self.writer(Urgency::Notice, None), self.reader(frames, None)))
    }

    pub(in crate::data) fn welcome(&self) {
        self.0.shared.welcome.cancel();
    }

    pub(in crate::data) async fn accept(&self) -> Result<(FrameWriter, FrameReader), Gone> {
        let mut accepted = self.0.accepted.lock().await;
        let (request, frames) = accepted.recv().await.ok_or_else(|| self.0.shared.gone())?;
        Ok((self.writer(Urgency::Bulk, Some(request)), self.reader(frames, None)))
    }

    pub(in crate::data) async fn ask(&self, request: Request, limits: &[u64]) -> Result<FrameReader, WriteFailed> {
        let shared = &self.0.shared;
        let id = request.id;
        let header = encode(&Message::Request(request))?;
        let gone = || WriteFailed::Gone(shared.gone());
        let open = shared.open.clone().acquire_owned().await.map_err(|_| gone())?;
        let room = shared.outbox.room(Urgency::OnDemand, header.len()).await.ok_or_else(gone)?;
        // From here on it is open, and is cancelled when it is dropped. No wait in between: what is open was sent, or it would
        // stay open for ever.
        let frames = shared.streams().ask(id, limits, open).ok_or_else(gone)?;
        shared.outbox.push_into(room, Urgency::OnDemand, header, Bytes::new());
        Ok(self.reader(frames, Some(id)))
    }

    fn reader(&self, frames: Frames, asked: Option<u64>) -> FrameReader {
        FrameReader::Tcp(Reader { shared: self.0.shared.clone(), frames, payload: Bytes::new(), asked })
    }

    fn writer(&self, urgency: Urgency, serves: Option<u64>) -> FrameWriter {
        FrameWriter::Tcp(Writer { shared: self.0.shared.clone(), urgency, serves, turn: None })
    }
}

/// See [`FrameReader`].
#[derive(Debug)]
pub(in crate::data) struct Reader {
    shared: Arc<Shared>,
    frames: Frames,
    /// What came with the last message.
    payload: Bytes,
    /// The request that these frames answer.
    asked: Option<u64>,
}

impl Reader {
    pub(in crate::data) async fn next(&mut self) -> Result<Option<Message>, FrameError> {
        match self.frames.recv().await {
            Some(frame) => {
                let (message, payload) = frame?;
                self.payload = payload;
                Ok(Some(message))
            }
            // Without a reason for the connection's end it is only this stream that is over.
            None => self.shared.gone.get().map_or(Ok(None), |gone| Err(gone.clone().into())),
        }
    }

    pub(in crate::data) fn payload(&mut self, length: usize, to: &mut BytesMut) -> Result<(), FrameError> {
        let payload = std::mem::take(&mut self.payload);
        if payload.len() != length {
            return Err(FrameError::Truncated);
        }
        to.extend_from_slice(&payload);
        Ok(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let Some(request) = self.asked else { return };
        let tell = self.shared.streams().cancel(request);
        if tell && let Ok(header) = encode(&Message::Cancel { request }) {
            self.shared.push_now(Urgency::OnDemand, header);
        }
    }
}

/// See [`FrameWriter`].
#[derive(Debug)]
pub(in crate::data) struct Writer {
    shared: Arc<Shared>,
    urgency: Urgency,
    /// The request that is answered, until it is over.
    serves: Option<u64>,
    /// Held from the first part of a piece to the last.
    turn: Option<Turn>,
}

impl Writer {
    pub(in crate::data) fn set_urgency(&mut self, urgency: Urgency) {
        self.urgency = urgency;
    }

    pub(in crate::data) async fn write(&mut self, message: &Message, payload: Bytes) -> Result<(), WriteFailed> {
        let header = encode(message)?;
        let goes_on = matches!(message, Message::Data(data) if !data.is_last());
        if goes_on && self.turn.is_none() {
            self.turn = Some(self.shared.outbox.turn(self.urgency).await);
        }
        if ends(message) {
            self.finish();
        }
        let queued = self.shared.outbox.push(self.urgency, header, payload).await;
        if !goes_on {
            self.turn = None;
        }
        if queued { Ok(()) } else { Err(WriteFailed::Gone(self.shared.gone())) }
    }

    /// To come before the asker hears that the answer is over: then it may ask again.
    pub(in crate::data) fn finish(&mut self) {
        self.turn = None;
        if let Some(request) = self.serves.take() {
            self.shared.streams().answered(request);
        }
    }

    pub(in crate::data) fn reset(&mut self, status: Status) {
        let serves = self.serves;
        self.finish();
        if let Some(request) = serves
            && let Ok(header) = encode(&Message::End { request, status })
        {
            self.shared.push_now(self.urgency, header);
        }
    }

    /// What was queued is the connection's to send, and is bounded there.
    pub(in crate::data) fn taken(&self) -> impl Future<Output = ()> + Send + use<> {
        let ended = self.serves.is_some().then(|| self.shared.ended.clone());
        async move {
            if let Some(ended) = ended {
                ended.cancelled().await;
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.reset(Status::Failed);
    }
}

/// Sends what is queued until the connection ends, and then says why.
async fn write(shared: Arc<Shared>, mut stream: WriteHalf<TlsStream<Intake>>, socket: Socket) {
    let mut between_frames = true;
    let sending = async {
        loop {
            let frame = shared.outbox.next().await;
            between_frames = false;
            // Both at once: neither is worth a packet, a record or a call of its own.
            stream.write_all_buf(&mut frame.header.chain(frame.payload)).await?;
            drop(frame.room);
            between_frames = true;
            if shared.outbox.is_empty() {
                stream.flush().await?;
            }
        }
    };
    let failed: Option<io::Error> = tokio::select! {
        biased;
        () = shared.ended.cancelled() => None,
        failed = sending => { let Err(error): Result<std::convert::Infallible, _> = failed; Some(error) }
    };
    if let Some(error) = failed {
        shared.end(Gone::Lost(error.to_string()));
    } else if between_frames && let Gone::Ours { why, mut detail } = shared.gone() {
        detail.truncate(detail.floor_char_boundary(MAX_REASON));
        // Who does not hear it finds out by itself.
        let _ = timeout(FAREWELL, async {
            let close = encode(&Message::Close { code: why.code(), reason: detail }).map_err(io::Error::other)?;
            stream.write_all(&close).await?;
            stream.shutdown().await
        })
        .await;
    }
    // Fails for a connection that is over; the read task ends with it.
    let _ = socket.shutdown(std::net::Shutdown::Write);
}

/// Hands out what comes, until the connection ends; then throws away what comes, so that the peer hears why it ended
/// before it hears that nobody reads.
async fn read(
    shared: Arc<Shared>,
    mut frames: Receiver,
    notices: mpsc::Sender<Result<Frame, FrameError>>,
    accepted: mpsc::Sender<(u64, Frames)>,
) {
    tokio::select! {
        biased;
        () = shared.ended.cancelled() => {}
        Err(error) = receive(&shared, &mut frames, &notices, &accepted) => match error {
            FrameError::Gone(gone) => shared.end(gone),
            // Whoever reads notices closes the connection for it.
            violation => {
                let _ = notices.send(Err(violation)).await;
                shared.ended.cancelled().await;
            }
        }
    }
    let _ = timeout(FAREWELL, async { while frames.skip().await.is_ok_and(|read| read > 0) {} }).await;
}

/// Ends with the reason why nothing more is received.
async fn receive(
    shared: &Shared,
    frames: &mut Receiver,
    notices: &mpsc::Sender<Result<Frame, FrameError>>,
    accepted: &mpsc::Sender<(u64, Frames)>,
) -> Result<std::convert::Infallible, FrameError> {
    let hello = frames.message().await?;
    notify(notices, hello).await;
    shared.welcome.cancelled().await;
    loop {
        let message = frames.message().await?;
        if message.request().is_none() {
            notify(notices, message).await;
            continue;
        }
        let mut payload = Bytes::new();
        if let Message::Data(data) = &message {
            shared.streams().expect(data)?;
            payload = frames.payload(data.length as usize).await?;
        }
        let opened = shared.streams().deliver((message, payload))?;
        if let Some(opened) = opened {
            // Nobody accepts any more when the connection ends.
            let _ = accepted.send(opened).await;
        }
    }
}

async fn notify(notices: &mpsc::Sender<Result<Frame, FrameError>>, message: Message) {
    // Nobody listens any more when the connection ends.
    let _ = notices.send(Ok((message, Bytes::new()))).await;
}

/// The receiving half.
#[derive(Debug)]
struct Receiver {
    stream: ReadHalf<TlsStream<Intake>>,
    awaited: Awaited,
    header: Vec<u8>,
}

impl Receiver {
    /// The next message, without its payload.
    async fn message(&mut self) -> Result<Message, FrameError> {
        let mut prefix = [0; PREFIX];
        self.stream.read_exact(&mut prefix).await.map_err(lost)?;
        self.header.resize(header_len(prefix)?, 0);
        self.stream.read_exact(&mut self.header).await.map_err(lost)?;
        match decode_body(&self.header)? {
            Message::Close { code, reason } => {
                Err(Gone::Theirs { why: Closing::from_code(code.into()), detail: reason }.into())
            }
            message => Ok(message),
        }
    }

    /// `length` is bounded by the codec.
    async fn payload(&mut self, length: usize) -> Result<Bytes, FrameError> {
        let mut payload = BytesMut::with_capacity(length);
        while payload.len() < length {
            let left = length - payload.len();
            self.awaited.store(left, Relaxed);
            if self.stream.read_buf(&mut (&mut payload).limit(left)).await.map_err(lost)? == 0 {
                return Err(lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        self.awaited.store(0, Relaxed);
        Ok(payload.freeze())
    }

    /// Reads something and drops it; 0 at the end.
    async fn skip(&mut self) -> io::Result<usize> {
        // Nothing is waited for any more.
        self.awaited.store(0, Relaxed);
        self.header.resize(16 << 10, 0);
        self.stream.read(&mut self.header).await
    }
}

fn lost(error: io::Error) -> FrameError {
    Gone::Lost(error.to_string()).into()
}

/// The kernel's smoothed round trip time.
fn rtt(socket: &Socket) -> Option<Duration> {
    // SAFETY: tcp_info is plain integers, for which zeros are a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let to = (&raw mut info).cast();
    // SAFETY: `to` and `length` describe `info`, which lives past the call; the kernel writes at most `length` bytes.
    let failed =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, to, &raw mut length) };
    (failed == 0).then(|| Duration::from_micros(info.tcpi_rtt.into()))
}
