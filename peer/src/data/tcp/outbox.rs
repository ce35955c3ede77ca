//! What a connection has to send: a lane for each urgency, each with a bound on its bytes.
//!
//! The writer takes from the most urgent lane, so an answer that somebody waits for is at most behind the frame that is
//! being written and what the kernel has not sent yet. Within a lane a piece goes out whole before the next begins: a
//! whole piece can be verified and served on, two halves cannot.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use shoal_proto::MAX_OPEN;
use tokio::sync::{Notify, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use crate::data::frames::Urgency;

/// Bytes that wait in one lane.
const ROOM: usize = 512 << 10;
/// Small frames without room that wait in all lanes: twice as many as requests can be open both ways.
const MAX_SMALL: usize = 4 * MAX_OPEN;

/// A frame on its way out.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) header: Bytes,
    pub(super) payload: Bytes,
    /// Given back when the frame has been sent.
    pub(super) room: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
struct Lane {
    /// Held to push or pop.
    frames: Mutex<VecDeque<Queued>>,
    room: Arc<Semaphore>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Default for Lane {
    fn default() -> Self {
        Self { frames: Mutex::default(), room: Arc::new(Semaphore::new(ROOM)), turn: Arc::default() }
    }
}

/// The right to send one piece on a lane; see the module.
pub(super) type Turn = OwnedMutexGuard<()>;

/// See the module. Frames are pushed by many and taken by one.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    lanes: [Lane; 3],
    /// Frames without room.
    small: AtomicUsize,
    filled: Notify,
}

impl Outbox {
    fn lane(&self, urgency: Urgency) -> &Lane {
        &self.lanes[urgency as usize]
    }

    /// Waits for room for a frame of this many bytes; `None` when the outbox is closed.
    pub(super) async fn room(&self, urgency: Urgency, length: usize) -> Option<OwnedSemaphorePermit> {
        self.lane(urgency).room.clone().acquire_many_owned(length.min(ROOM) as u32).await.ok()
    }

    /// Queues a frame when there is room for it; false when the outbox is closed. Nothing is queued if it is dropped.
    pub(super) async fn push(&self, urgency: Urgency, header: Bytes, payload: Bytes) -> bool {
        let Some(room) = self.room(urgency, header.len() + payload.len()).await else { return false };
        self.push_into(room, urgency, header, payload);
        true
    }

    /// Queues a frame in the room that it was given.
    pub(super) fn push_into(&self, room: OwnedSemaphorePermit, urgency: Urgency, header: Bytes, payload: Bytes) {
        self.queue(urgency, Queued { header, payload, room: Some(room) });
    }

    /// Queues a small frame, room or not, for what must not wait: that a request is over. False when so many wait that the
    /// peer cannot be reading.
    #[must_use]
    pub(super) fn push_now(&self, urgency: Urgency, header: Bytes) -> bool {
        if self.small.fetch_add(1, Relaxed) >= MAX_SMALL {
            return false;
        }
        self.queue(urgency, Queued { header, payload: Bytes::new(), room: None });
        true
    }

    fn queue(&self, urgency: Urgency, frame: Queued) {
        self.lane(urgency).frames.lock().unwrap_or_else(PoisonError::into_inner).push_back(frame);
        self.filled.notify_one();
    }

    /// Waits for the turn to send a piece on a lane.
    pub(super) async fn turn(&self, urgency: Urgency) -> Turn {
        self.lane(urgency).turn.clone().lock_owned().await
    }

    /// The most urgent frame, if there is any.
    pub(super) fn pop(&self) -> Option<Queued> {
        let mut lanes = self.lanes.iter().rev();
        let frame = lanes.find_map(|lane| lane.frames.lock().unwrap_or_else(PoisonError::into_inner).pop_front())?;
        if frame.room.is_none() {
            self.small.fetch_sub(1, Relaxed);
        }
        Some(frame)
    }

    /// Whether nothing waits to be sent.
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.iter().all(|lane| lane.frames.lock().unwrap_or_else(PoisonError::into_inner).is_empty())
    }

    /// Waits for the most urgent frame. Cancel safe.
    pub(super) async fn next(&self) -> Queued {
        loop {
            if let Some(frame) = self.pop() {
                return frame;
            }
            self.filled.notified().await;
        }
    }

    /// Drops what is queued; nothing more gets in.
    pub(super) fn close(&self) {
        for lane in &self.lanes {
            lane.room.close();
            lane.frames.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn bytes(len: usize) -> Bytes {
        vec![0; len].into()
    }

    #[test]
    fn the_most_urgent_goes_first_and_each_lane_in_order() {
        let outbox = Outbox::default();
        for (urgency, header) in [
            (Urgency::Bulk, "bulk 1"),
            (Urgency::OnDemand, "read"),
            (Urgency::Bulk, "bulk 2"),
            (Urgency::Notice, "notice"),
        ] {
            assert_eq!(outbox.push(urgency, header.into(), Bytes::new()).now_or_never(), Some(true));
        }
        let order: Vec<_> = std::iter::from_fn(|| outbox.pop()).map(|frame| frame.header).collect();
        assert_eq!(order, ["notice", "read", "bulk 1", "bulk 2"]);
        assert!(outbox.next().now_or_never().is_none());
    }

    #[test]
    fn a_full_lane_waits_and_leaves_the_others_alone() {
        let outbox = Outbox::default();
        let push = |urgency, len| outbox.push(urgency, Bytes::new(), bytes(len)).now_or_never();
        assert_eq!(push(Urgency::Bulk, ROOM), Some(true));
        assert_eq!(push(Urgency::Bulk, 1), None);
        assert_eq!(push(Urgency::OnDemand, ROOM * 2), Some(true), "what is larger than all the room takes all of it");
        drop(outbox.pop());
        assert_eq!(push(Urgency::OnDemand, 1), Some(true));
        drop((outbox.pop(), outbox.pop()));
        assert_eq!(push(Urgency::Bulk, 1), Some(true));
        outbox.close();
        assert_eq!(push(Urgency::Notice, 1), Some(false));
        assert!(outbox.pop().is_none());
    }

    #[test]
    fn what_must_not_wait_is_bounded_too() {
        let outbox = Outbox::default();
        (0..MAX_SMALL).for_each(|_| assert!(outbox.push_now(Urgency::Bulk, Bytes::new())));
        assert!(!outbox.push_now(Urgency::OnDemand, Bytes::new()));
        let other = Outbox::default();
        (0..2 * MAX_SMALL).for_each(|_| {
            assert!(other.push_now(Urgency::Bulk, Bytes::new()) && other.pop().is_some());
        });
    }

    #[test]
    fn pieces_take_turns() {
        let outbox = Outbox::default();
        let first = outbox.turn(Urgency::Bulk).now_or_never().expect("nobody sends");
        assert!(outbox.turn(Urgency::Bulk).now_or_never().is_none());
        assert!(outbox.turn(Urgency::OnDemand).now_or_never().is_some());
        drop(first);
        assert!(outbox.turn(Urgency::Bulk).now_or_never().is_some());
    }
}
