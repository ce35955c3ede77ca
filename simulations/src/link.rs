//! A link that sends one piece after the other, on-demand before prefetch, and in turn for each request, as parallel
//! streams share a real one.

use std::{collections::VecDeque, time::Duration};

use shoal_proto::Priority;

use crate::node::Ticket;

/// The sending side of a link.
#[derive(Debug)]
pub(crate) struct Link<T> {
    bytes_per_s: f64,
    /// Prefetch, on-demand.
    queues: [Turns<T>; 2],
    queued: u64,
    sending: Option<T>,
}

/// What waits, by request; the first request is the next to be served.
type Turns<T> = VecDeque<(Ticket, VecDeque<(u64, T)>)>;

impl<T> Link<T> {
    pub(crate) fn new(mbit: f64) -> Self {
        let queues = [VecDeque::new(), VecDeque::new()];
        Self { bytes_per_s: mbit * 125_000.0, queues, queued: 0, sending: None }
    }

    /// How long so many bytes take.
    pub(crate) fn time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_s)
    }

    /// How long until something that is queued now would have been sent.
    pub(crate) fn backlog(&self) -> Duration {
        self.time(self.queued)
    }

    pub(crate) fn push(&mut self, priority: Priority, ticket: Ticket, bytes: u64, what: T) {
        self.queued += bytes;
        let turns = &mut self.queues[priority as usize];
        match turns.iter_mut().find(|(other, _)| *other == ticket) {
            Some((_, queue)) => queue.push_back((bytes, what)),
            None => turns.push_back((ticket, VecDeque::from([(bytes, what)]))),
        }
    }

    /// Starts sending the next one if the link is idle; says how long it takes.
    pub(crate) fn start(&mut self) -> Option<Duration> {
        if self.sending.is_some() {
            return None;
        }
        let [prefetch, on_demand] = &mut self.queues;
        let (bytes, what) = next(on_demand).or_else(|| next(prefetch))?;
        self.queued -= bytes;
        self.sending = Some(what);
        Some(self.time(bytes))
    }

    /// What was being sent has left.
    pub(crate) fn sent(&mut self) -> Option<T> {
        self.sending.take()
    }

    /// Drops what a request still waits for.
    pub(crate) fn cancel(&mut self, ticket: Ticket) {
        for turns in &mut self.queues {
            turns.retain(|(other, _)| *other != ticket);
        }
        self.queued = self.queues.iter().flatten().flat_map(|(_, queue)| queue).map(|(bytes, _)| bytes).sum();
    }
}

fn next<T>(turns: &mut Turns<T>) -> Option<(u64, T)> {
    let (ticket, mut queue) = turns.pop_front()?;
    let next = queue.pop_front();
    if !queue.is_empty() {
        turns.push_back((ticket, queue));
    }
    next
}

#[cfg(test)]
mod tests {
    use shoal_scheduler::RequestId;

    use super::*;

    #[test]
    fn one_at_a_time_in_turn_and_on_demand_first() {
        let ticket = |n| (0, RequestId(n));
        let mut link = Link::new(8.0);
        link.push(Priority::Prefetch, ticket(1), 1_000_000, 'a');
        assert_eq!(link.start(), Some(Duration::from_secs(1)));
        for (n, what) in [(2, 'b'), (2, 'c'), (3, 'd'), (4, 'x')] {
            link.push(Priority::Prefetch, ticket(n), 500_000, what);
        }
        link.push(Priority::OnDemand, ticket(5), 500_000, 'e');
        assert_eq!((link.start(), link.backlog()), (None, Duration::from_millis(2500)));
        link.cancel(ticket(4));
        let mut order = Vec::new();
        while let Some(what) = link.sent() {
            order.push(what);
            link.start();
        }
        assert_eq!(order, ['a', 'e', 'b', 'd', 'c']);
    }
}
