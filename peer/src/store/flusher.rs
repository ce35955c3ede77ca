//! The thread that makes present pieces durable, and sees to what else is done now and then, round after round.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::{StoreError, blobs::Blobs};

/// Ends its thread when it is dropped, without a last round.
pub(super) struct Flusher {
    /// Dropping the sender is the signal. Taken by whoever stops it first.
    running: Mutex<Option<(SyncSender<()>, JoinHandle<()>)>>,
}

impl Flusher {
    pub(super) fn start(blobs: &Arc<Blobs>, interval: Duration) -> Result<Self, StoreError> {
        let (sender, receiver) = sync_channel::<()>(0);
        let blobs = blobs.clone();
        let thread = thread::Builder::new().name("store-flusher".into()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = receiver.recv_timeout(interval) {
                blobs.look_after();
            }
        });
        let thread = thread.map_err(|source| StoreError::io("starting the flusher", source))?;
        Ok(Self { running: Mutex::new(Some((sender, thread))) })
    }

    /// Waits for a running round and ends the thread.
    pub(super) fn stop(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((sender, thread)) = running {
            drop(sender);
            if thread.join().is_err() {
                tracing::error!("the flusher panicked");
            }
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.stop();
    }
}
