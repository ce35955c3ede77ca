//! How long a request with a body may take: as long as it moves.
//!
//! An upload over a slow link takes the time that it takes; what ends it is that nothing of it goes out for three time-outs. Once all
//! of it has gone out, a registry that writes it somewhere before it answers is given time for that.

use std::{
    io,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{
    Stream, StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};

use crate::oci::RegistryError;

/// Time to store each MiB, on top of the time-out, between the last byte and the answer.
const STORE_PER_MIB: Duration = Duration::from_secs(2);
/// How many time-outs a large body may stand still: what a slow link has in its buffers goes out before more is taken.
const STALL: u32 = 3;
/// Bytes of a body in memory that count as progress when they have gone; no larger ones are watched.
const STEP: usize = 64 * 1024;

/// A body that is being sent: how much of it has gone, and why it broke. To the HTTP library the latter is only a request that
/// could not be sent.
#[derive(Clone, Default)]
pub(in crate::oci) struct Progress(Arc<State>);

#[derive(Default)]
struct State {
    size: u64,
    sent: AtomicU64,
    /// Held to look at it only.
    broke: Mutex<Option<RegistryError>>,
}

impl Progress {
    /// Of a body of so many bytes.
    pub(in crate::oci) fn of(size: u64) -> Self {
        Self(Arc::new(State { size, ..State::default() }))
    }

    /// A stream as a body that is watched.
    pub(in crate::oci) fn watch<S>(&self, stream: S) -> reqwest::Body
    where
        S: Stream<Item = Result<Bytes, RegistryError>> + Send + 'static,
    {
        let (moved, broken) = (self.0.clone(), self.0.clone());
        let counted = stream.inspect_ok(move |bytes| {
            moved.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        });
        reqwest::Body::wrap_stream(counted.map_err(move |error| {
            *broken.broke.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            io::Error::other("the source broke")
        }))
    }

    /// The same of bytes in memory.
    pub(in crate::oci) fn watch_bytes(&self, bytes: Bytes) -> reqwest::Body {
        if bytes.len() <= STEP { bytes.into() } else { self.watch(steps(bytes)) }
    }

    /// Waits for the answer to a request with this body. `Err` with the time for which nothing had moved.
    pub(in crate::oci) async fn answer<T>(
        &self,
        answer: impl Future<Output = T>,
        patience: Duration,
    ) -> Result<T, Duration> {
        let mut answer = pin!(answer);
        loop {
            let before = self.0.sent.load(Ordering::Relaxed);
            let mut after = if self.0.size > STEP as u64 { patience * STALL } else { patience };
            if before >= self.0.size {
                after += STORE_PER_MIB * u32::try_from(self.0.size >> 20).unwrap_or(u32::MAX);
            }
            match tokio::time::timeout(after, &mut answer).await {
                Ok(answer) => return Ok(answer),
                Err(_) if self.0.sent.load(Ordering::Relaxed) > before => {}
                Err(_) => return Err(after),
            }
        }
    }

    /// Why it broke, if it did.
    pub(in crate::oci) fn take_error(&self) -> Option<RegistryError> {
        self.0.broke.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn steps(bytes: Bytes) -> BoxStream<'static, Result<Bytes, RegistryError>> {
    let steps = stream::unfold(bytes, |mut rest| async move {
        let step = rest.split_to(rest.len().min(STEP));
        (!step.is_empty()).then_some((Ok(step), rest))
    });
    steps.boxed()
}

#[cfg(test)]
mod tests {
    use futures::future;

    use super::*;

    #[tokio::test]
    async fn what_moves_is_waited_for_and_what_does_not_is_not() {
        let (step, patience) = (Duration::from_millis(100), Duration::from_millis(600));
        let progress = Progress::of(20);
        let slow = async {
            for _ in 0..15 {
                tokio::time::sleep(step).await;
                progress.0.sent.fetch_add(1, Ordering::Relaxed);
            }
        };
        assert_eq!(progress.answer(slow, patience).await, Ok(()));
        let stuck = Progress::of(10);
        assert_eq!(stuck.answer(future::pending::<()>(), step).await, Err(step));
        // All of it is there: now it may be stored.
        let large = Progress::of(1 << 20);
        large.0.sent.fetch_add(1 << 20, Ordering::Relaxed);
        assert_eq!(large.answer(tokio::time::sleep(patience), step).await, Ok(()));
        assert_eq!(large.answer(future::pending::<()>(), step).await, Err(step * STALL + STORE_PER_MIB));
    }

    #[tokio::test]
    async fn bytes_in_memory_go_in_steps() {
        let mut steps = steps(Bytes::from(vec![7; 3 * STEP + 1])).map(Result::unwrap);
        let mut sizes = Vec::new();
        while let Some(step) = steps.next().await {
            sizes.push(step.len());
        }
        assert_eq!(sizes, [STEP, STEP, STEP, 1]);
    }
}
