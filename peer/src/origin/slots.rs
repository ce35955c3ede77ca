//! Slots for requests at the registry: on-demand reads first, and some slots for them alone.
//!
//! A semaphore would serve in the order of arrival, and a prefetch that came earlier would go before a read that a
//! process waits for.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use shoal_proto::Priority;
use tokio::sync::oneshot;

/// A number of slots. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    /// Short sections without an await in them.
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Prefetch leaves this many free.
    reserved: usize,
    on_demand: VecDeque<oneshot::Sender<Slot>>,
    prefetch: VecDeque<oneshot::Sender<Slot>>,
}

/// One slot; free again when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Slots,
}

impl Slots {
    /// `count` slots, at least one; `reserved` of them are not for prefetch, but one always is.
    pub(super) fn new(count: usize, reserved: usize) -> Self {
        let free = count.max(1);
        let state =
            State { free, reserved: reserved.min(free - 1), on_demand: VecDeque::new(), prefetch: VecDeque::new() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Waits for a slot, first come first served within a priority. May be dropped while it waits.
    pub(super) async fn acquire(&self, priority: Priority) -> Slot {
        loop {
            let (sender, receiver) = oneshot::channel();
            let handed = self.with(|state| {
                match priority {
                    Priority::OnDemand => state.on_demand.push_back(sender),
                    Priority::Prefetch => state.prefetch.push_back(sender),
                }
                state.due()
            });
            self.hand_out(handed);
            // Only a state that is gone drops a sender, and this call holds the state.
            if let Ok(slot) = receiver.await {
                return slot;
            }
        }
    }

    /// Gives slots to those who are due. Outside of the lock: a waiter that has gone away drops the slot right here,
    /// which frees it and comes back to this function.
    fn hand_out(&self, due: Vec<oneshot::Sender<Slot>>) {
        for waiter in due {
            drop(waiter.send(Slot { slots: self.clone() }));
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl State {
    /// Takes the waiters whose turn it is out of the queues, and a free slot for each.
    fn due(&mut self) -> Vec<oneshot::Sender<Slot>> {
        self.on_demand.retain(|waiter| !waiter.is_closed());
        self.prefetch.retain(|waiter| !waiter.is_closed());
        let mut due = Vec::new();
        while self.free > 0 {
            let next = match self.on_demand.pop_front() {
                None if self.free > self.reserved => self.prefetch.pop_front(),
                next => next,
            };
            let Some(waiter) = next else { break };
            self.free -= 1;
            due.push(waiter);
        }
        due
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let due = self.slots.with(|state| {
            state.free += 1;
            state.due()
        });
        self.slots.hand_out(due);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn now(slots: &Slots, priority: Priority) -> Option<Slot> {
        slots.acquire(priority).now_or_never()
    }

    #[test]
    fn prefetch_leaves_the_reserved_slots_alone() {
        let slots = Slots::new(3, 2);
        let first = now(&slots, Priority::Prefetch).expect("one is for prefetch");
        assert!(now(&slots, Priority::Prefetch).is_none());
        let on_demand = [now(&slots, Priority::OnDemand), now(&slots, Priority::OnDemand)];
        assert!(on_demand.iter().all(Option::is_some));
        assert!(now(&slots, Priority::OnDemand).is_none());
        drop(on_demand);
        assert!(now(&slots, Priority::Prefetch).is_none(), "its slot is still taken");
        drop(first);
        assert!(now(&slots, Priority::Prefetch).is_some());
        assert!(now(&Slots::new(0, 9), Priority::Prefetch).is_some(), "there is always one");
    }

    #[test]
    fn on_demand_goes_first_and_the_gone_are_passed_over() {
        let slots = Slots::new(1, 0);
        let held = now(&slots, Priority::OnDemand);
        let mut prefetch = Box::pin(slots.acquire(Priority::Prefetch));
        let mut gone = Box::pin(slots.acquire(Priority::OnDemand));
        let mut on_demand = Box::pin(slots.acquire(Priority::OnDemand));
        for waiting in [&mut prefetch, &mut gone, &mut on_demand] {
            assert!(waiting.now_or_never().is_none());
        }
        drop(gone);
        drop(held);
        assert!((&mut prefetch).now_or_never().is_none());
        let slot = (&mut on_demand).now_or_never().expect("it is first");
        drop(slot);
        assert!(prefetch.now_or_never().is_some());
    }

    #[test]
    fn a_slot_handed_to_someone_who_left_is_free_again() {
        let slots = Slots::new(1, 0);
        let held = now(&slots, Priority::OnDemand);
        let mut waiting = Box::pin(slots.acquire(Priority::OnDemand));
        assert!((&mut waiting).now_or_never().is_none());
        drop(held);
        drop(waiting);
        assert!(now(&slots, Priority::Prefetch).is_some());
    }
}
