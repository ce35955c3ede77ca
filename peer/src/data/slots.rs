//! What a server spends at most: requests at a time, and bytes between the store and the network.
//!
//! Both keep a part back for on-demand requests, so that a flood of prefetching never leaves a waiting reader without
//! a place.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use shoal_proto::Priority;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A number of places, of which prefetch gets at most three quarters.
#[derive(Debug)]
pub(super) struct Slots(Mutex<Places>);

#[derive(Debug)]
struct Places {
    capacity: usize,
    used: usize,
}

impl Slots {
    pub(super) fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Places { capacity: capacity.max(1), used: 0 })))
    }

    /// More places from now on, or fewer: those taken stay taken.
    pub(super) fn resize(&self, capacity: usize) {
        self.places().capacity = capacity.max(1);
    }

    /// A place, if there is one for this priority now. Dropping it gives it back.
    pub(super) fn take(self: &Arc<Self>, priority: Priority) -> Option<Slot> {
        let mut places = self.places();
        let open = match priority {
            Priority::OnDemand => places.capacity,
            Priority::Prefetch => (places.capacity * 3 / 4).max(1),
        };
        let free = places.used < open;
        places.used += usize::from(free);
        free.then(|| Slot(self.clone()))
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place taken.
#[derive(Debug)]
pub(super) struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.places().used -= 1;
    }
}

/// Bytes that may be in memory at a time: of answers, read and not yet acknowledged by who asked; of objects that come.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    all: Arc<Semaphore>,
    prefetch: Arc<Semaphore>,
    capacity: u32,
}

impl Budget {
    pub(crate) fn new(capacity: u32) -> Self {
        let capacity = capacity.max(4);
        Self {
            all: Arc::new(Semaphore::new(capacity as usize)),
            prefetch: Arc::new(Semaphore::new((capacity / 4 * 3) as usize)),
            capacity,
        }
    }

    /// Waits for room for `length` bytes; something larger than all the room takes all that its priority may have.
    pub(crate) async fn room(&self, length: usize, priority: Priority) -> Room {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let open = "the semaphores are never closed";
        let prefetch = match priority {
            Priority::OnDemand => None,
            Priority::Prefetch => {
                let length = length.min(self.capacity / 4 * 3);
                Some(self.prefetch.clone().acquire_many_owned(length).await.expect(open))
            }
        };
        let length = length.min(if prefetch.is_some() { self.capacity / 4 * 3 } else { self.capacity });
        let all = self.all.clone().acquire_many_owned(length).await.expect(open);
        Room { _all: all, _prefetch: prefetch }
    }
}

/// Room for some bytes; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Room {
    _all: OwnedSemaphorePermit,
    _prefetch: Option<OwnedSemaphorePermit>,
}

impl Room {
    /// The same bytes, which keep the room until the last part of them is dropped, by whoever holds it then.
    pub(super) fn keep(self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Kept { bytes, _room: self })
    }
}

struct Kept {
    bytes: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn prefetch_leaves_places_for_readers() {
        let slots = Slots::new(8);
        let taken: Vec<_> = std::iter::from_fn(|| slots.take(Priority::Prefetch)).collect();
        assert_eq!(taken.len(), 6);
        let urgent: Vec<_> = std::iter::from_fn(|| slots.take(Priority::OnDemand)).collect();
        assert_eq!(urgent.len(), 2);
        drop(urgent);
        assert!(slots.take(Priority::Prefetch).is_none());
        slots.resize(12);
        assert!(slots.take(Priority::Prefetch).is_some());
        slots.resize(2);
        assert!(slots.take(Priority::OnDemand).is_none());
        drop(taken);
        assert!(slots.take(Priority::Prefetch).is_some());
    }

    #[test]
    fn room_returns_with_the_last_part_of_the_bytes() {
        let budget = Budget::new(1000);
        let room = |length, priority| budget.room(length, priority).now_or_never();
        let kept = room(700, Priority::Prefetch).expect("there is room").keep(Bytes::from_static(b"piece"));
        let part = kept.slice(1..2);
        drop(kept);
        assert!(room(100, Priority::Prefetch).is_none());
        assert!(room(300, Priority::OnDemand).is_some());
        drop(part);
        assert!(room(u32::MAX as usize + 1, Priority::Prefetch).is_some());
        assert!(room(usize::MAX, Priority::OnDemand).is_some());
    }
}
