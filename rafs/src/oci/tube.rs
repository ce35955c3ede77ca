//! A blob from afar through code that reads as from a file and may wait.

use std::{
    io::{self, Read},
    panic::resume_unwind,
};

use sha2::{Digest, Sha256};
use shoal_proto::ObjectId;
use tokio::{
    io::{AsyncReadExt, DuplexStream, duplex},
    runtime::Handle,
};

use super::{Descriptor, Registry, RegistryError, Source};

/// Bytes between the download and the reader.
const TUBE_BYTES: usize = 1 << 20;

/// Streams a blob through `work`, on a thread of its own. `on_read` is told how many bytes it reads.
///
/// The outer error is that of the download, wrong digests among them, which are known only at the end: what `work` made
/// counts for nothing then. The inner one is that of `work`, which may end before the blob does. When the future is
/// dropped, `work` sees the end of the blob.
pub(super) async fn through<T, E>(
    registry: &Registry,
    source: &Source,
    descriptor: &Descriptor,
    on_read: impl Fn(u64) + Send + 'static,
    work: impl FnOnce(&mut dyn Read) -> Result<T, E> + Send + 'static,
) -> Result<Result<T, E>, RegistryError>
where
    T: Send + 'static,
    E: Send + 'static,
{
    let (mut sink, stream) = duplex(TUBE_BYTES);
    let mut tube = Tube { stream, runtime: Handle::current(), on_read };
    let worker = tokio::task::spawn_blocking(move || work(&mut tube));
    let download = async {
        let downloaded = registry.blob_to(source, descriptor, &mut sink).await;
        // The worker sees the end.
        drop(sink);
        downloaded
    };
    let (downloaded, worked) = tokio::join!(download, worker);
    let worked = match worked {
        Ok(worked) => worked,
        Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
        Err(error) => return Err(RegistryError::io("cannot read a blob")(io::Error::other(error))),
    };
    match (downloaded, worked) {
        (Ok(()), worked) => Ok(worked),
        // The worker went away first.
        (Err(RegistryError::Io { source, .. }), Err(error)) if source.kind() == io::ErrorKind::BrokenPipe => {
            Ok(Err(error))
        }
        (Err(error), _) => Err(error),
    }
}

struct Tube<F> {
    stream: DuplexStream,
    runtime: Handle,
    on_read: F,
}

impl<F: Fn(u64)> Read for Tube<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.runtime.block_on(self.stream.read(buffer))?;
        (self.on_read)(read as u64);
        Ok(read)
    }
}

/// A reader that hashes what is read from it.
pub(super) struct Hashed<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Hashed<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256::new() }
    }

    /// The digest of all that was read.
    pub(super) fn digest(self) -> ObjectId {
        ObjectId::new(self.hasher.finalize().into())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}
