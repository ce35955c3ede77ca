//! The bytes of a blob or a part of it as they come, with the length checked.

use std::{
    fmt,
    ops::Range,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt, stream::BoxStream};
use sha2::{Digest, Sha256};
use shoal_proto::ObjectId;
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt, SeekFrom},
};

use super::RegistryError;

/// Bytes read from a file at once.
const READ_BYTES: usize = 256 * 1024;

/// A stream of exactly the bytes that were asked for. It ends with an error when fewer or more of them come, or when
/// they do not have the digest asked for; whole blobs carry one, ranges cannot. The last bytes of a stream with a digest
/// are given only once it was compared: who needs all of them never has all of something else. Dropping it ends the
/// transfer.
pub struct BlobStream {
    inner: BoxStream<'static, Result<Bytes, RegistryError>>,
    what: String,
    expected: u64,
    found: u64,
    digest: Option<(ObjectId, Sha256)>,
    done: bool,
}

impl BlobStream {
    pub(super) fn new(inner: BoxStream<'static, Result<Bytes, RegistryError>>, what: String, expected: u64) -> Self {
        Self { inner, what, expected, found: 0, digest: None, done: false }
    }

    /// Host and path, or the file.
    pub(super) fn what(&self) -> &str {
        &self.what
    }

    pub(super) fn empty(what: String) -> Self {
        Self::new(futures::stream::empty().boxed(), what, 0)
    }

    /// The body of an answer without its first `skip` bytes, given up after `timeout` without a byte. With `cut`, the
    /// body may go on beyond what is expected: the rest is left alone.
    pub(super) fn from_response(
        response: reqwest::Response,
        what: String,
        (skip, expected, cut): (u64, u64, bool),
        timeout: Duration,
    ) -> Self {
        let state = (response, skip, cut.then_some(expected), what.clone());
        let inner = futures::stream::try_unfold(state, move |(mut response, mut skip, mut left, what)| async move {
            while left != Some(0) {
                let read = tokio::time::timeout(timeout, response.chunk()).await;
                let chunk = read.map_err(|_| RegistryError::Timeout { what: what.clone(), after: timeout })?;
                let Some(mut chunk) = chunk.map_err(|error| RegistryError::transport(&what, error))? else { break };
                let skipped = skip.min(chunk.len() as u64);
                chunk.advance(skipped as usize);
                skip -= skipped;
                if let Some(left) = &mut left {
                    chunk.truncate((*left).min(chunk.len() as u64) as usize);
                    *left -= chunk.len() as u64;
                }
                if !chunk.is_empty() {
                    return Ok(Some((chunk, (response, skip, left, what))));
                }
            }
            Ok(None)
        });
        Self::new(inner.boxed(), what, expected)
    }

    /// A range of a file.
    pub(super) async fn from_file(path: &Path, range: Range<u64>) -> Result<Self, RegistryError> {
        let what = path.display().to_string();
        let io = |source| RegistryError::Io { what: format!("cannot read {what}"), source };
        let mut file = File::open(path).await.map_err(io)?;
        file.seek(SeekFrom::Start(range.start)).await.map_err(io)?;
        let expected = range.end - range.start;
        let state = (file.take(expected), what.clone());
        let inner = futures::stream::try_unfold(state, |(mut file, what)| async move {
            let mut buffer = BytesMut::with_capacity(READ_BYTES.min(file.limit() as usize));
            let read = file.read_buf(&mut buffer).await;
            let read = read.map_err(RegistryError::io(format!("cannot read {what}")))?;
            Ok((read > 0).then(|| (buffer.freeze(), (file, what))))
        });
        Ok(Self::new(inner.boxed(), what, expected))
    }

    /// The same stream, with the digest of all its bytes checked at the end.
    pub(super) fn verified(mut self, id: ObjectId) -> Self {
        self.digest = Some((id, Sha256::new()));
        self
    }

    /// The same stream; `report` hears why it breaks, if it does.
    pub(super) fn reporting(self, report: impl Fn(&RegistryError) + Send + 'static) -> Self {
        let (what, expected) = (self.what.clone(), self.expected);
        Self::new(self.inspect_err(report).boxed(), what, expected)
    }

    /// Number of bytes that the stream gives in all.
    pub fn len(&self) -> u64 {
        self.expected
    }

    /// Whether the stream gives no bytes.
    pub fn is_empty(&self) -> bool {
        self.expected == 0
    }

    /// All bytes, when they are no more than `limit`.
    pub async fn collect(mut self, limit: u64) -> Result<Bytes, RegistryError> {
        if self.expected > limit {
            return Err(RegistryError::TooLarge { what: self.what, limit });
        }
        // What a registry announces is not yet memory spent.
        let mut bytes = BytesMut::with_capacity(self.expected.min(1 << 20) as usize);
        while let Some(chunk) = self.next().await {
            bytes.extend_from_slice(&chunk?);
        }
        Ok(bytes.freeze())
    }

    fn check(&mut self, chunk: &Bytes) -> Result<(), RegistryError> {
        self.found += chunk.len() as u64;
        if self.found > self.expected {
            return Err(self.wrong_length(self.expected + 1));
        }
        if let Some((_, hasher)) = &mut self.digest {
            hasher.update(chunk);
        }
        if self.found == self.expected { self.compare() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), RegistryError> {
        if self.found < self.expected {
            return Err(self.wrong_length(self.found));
        }
        self.compare()
    }

    /// Compares the digest, once, when all bytes have been seen.
    fn compare(&mut self) -> Result<(), RegistryError> {
        let Some((expected, hasher)) = self.digest.take() else { return Ok(()) };
        let found = ObjectId::new(hasher.finalize().into());
        if found == expected {
            return Ok(());
        }
        Err(RegistryError::WrongDigest { what: self.what.clone(), expected, found: format!("sha256:{found}") })
    }

    fn wrong_length(&self, found: u64) -> RegistryError {
        RegistryError::WrongLength { what: self.what.clone(), expected: self.expected, found }
    }
}

impl Stream for BlobStream {
    type Item = Result<Bytes, RegistryError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        let item = match std::task::ready!(self.inner.poll_next_unpin(context)) {
            Some(Ok(chunk)) => match self.check(&chunk) {
                Ok(()) => return Poll::Ready(Some(Ok(chunk))),
                Err(error) => Some(Err(error)),
            },
            Some(Err(error)) => Some(Err(error)),
            None => self.finish().err().map(Err),
        };
        self.done = true;
        Poll::Ready(item)
    }
}

impl fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobStream")
            .field("what", &self.what)
            .field("expected", &self.expected)
            .field("found", &self.found)
            .finish_non_exhaustive()
    }
}
