//! What a connection has to send: a lane for each urgency, each with a bound on its bytes.
//!
//! The writer takes from the most urgent lane, so an answer that somebody waits for is at most behind the frame that is
//! being written and what the kernel has not sent yet. Within a lane a piece goes out whole before the next begins: a
//! whole piece can be verified and served on, two halves cannot.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use tokio::sync::{Notify, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use crate::data::frames::Urgency;

/// Bytes that wait in one lane.
const ROOM: usize = 512 << 10;

/// A frame on its way out.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) header: Bytes,
    pub(super) payload: Bytes,
    _room: Option<OwnedSemaphorePermit>,
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
    filled: Notify,
}

impl Outbox {
    fn lane(&self, urgency: Urgency) -> &Lane {
        &self.lanes[urgency as usize]
    }

    /// Queues a frame when there is room for it; false when the outbox is closed. Nothing is queued if it is dropped.
    pub(super) async fn push(&self, urgency: Urgency, header: Bytes, payload: Bytes) -> bool {
        let length = (header.len() + payload.len()).min(ROOM) as u32;
        let Ok(room) = self.lane(urgency).room.clone().acquire_many_owned(length).await else { return false };
        self.queue(urgency, Queued { header, payload, _room: Some(room) });
        true
    }

    /// Queues a small frame, room or not. Only for what follows from something that is bounded itself.
    pub(super) fn push_now(&self, urgency: Urgency, header: Bytes) {
        self.queue(urgency, Queued { header, payload: Bytes::new(), _room: None });
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
        lanes.find_map(|lane| lane.frames.lock().unwrap_or_else(PoisonError::into_inner).pop_front())
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
    fn pieces_take_turns() {
        let outbox = Outbox::default();
        let first = outbox.turn(Urgency::Bulk).now_or_never().expect("nobody sends");
        assert!(outbox.turn(Urgency::Bulk).now_or_never().is_none());
        assert!(outbox.turn(Urgency::OnDemand).now_or_never().is_some());
        drop(first);
        assert!(outbox.turn(Urgency::Bulk).now_or_never().is_some());
    }
}
