//! A link that sends one piece after the other, on-demand before prefetch.

use std::{collections::VecDeque, time::Duration};

use shoal_proto::Priority;

/// The sending side of a link.
#[derive(Debug)]
pub(crate) struct Link<T> {
    bytes_per_s: f64,
    /// Prefetch, on-demand.
    queues: [VecDeque<(u64, T)>; 2],
    queued: u64,
    sending: Option<T>,
}

impl<T> Link<T> {
    pub(crate) fn new(mbit: f64) -> Self {
        Self { bytes_per_s: mbit * 125_000.0, queues: [VecDeque::new(), VecDeque::new()], queued: 0, sending: None }
    }

    /// How long so many bytes take.
    pub(crate) fn time(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.bytes_per_s)
    }

    /// How long until something that is queued now would have been sent.
    pub(crate) fn backlog(&self) -> Duration {
        self.time(self.queued)
    }

    pub(crate) fn push(&mut self, priority: Priority, bytes: u64, what: T) {
        self.queued += bytes;
        self.queues[priority as usize].push_back((bytes, what));
    }

    /// Starts sending the next one if the link is idle; says how long it takes.
    pub(crate) fn start(&mut self) -> Option<Duration> {
        if self.sending.is_some() {
            return None;
        }
        let [prefetch, on_demand] = &mut self.queues;
        let (bytes, what) = on_demand.pop_front().or_else(|| prefetch.pop_front())?;
        self.queued -= bytes;
        self.sending = Some(what);
        Some(self.time(bytes))
    }

    /// What was being sent has left.
    pub(crate) fn sent(&mut self) -> Option<T> {
        self.sending.take()
    }

    /// Takes out of the queue what is not wanted any more.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for queue in &mut self.queues {
            queue.retain(|(_, what)| keep(what));
        }
        self.queued = self.queues.iter().flatten().map(|(bytes, _)| bytes).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_on_demand_first() {
        let mut link = Link::new(8.0);
        link.push(Priority::Prefetch, 1_000_000, 'a');
        assert_eq!(link.start(), Some(Duration::from_secs(1)));
        link.push(Priority::Prefetch, 500_000, 'b');
        link.push(Priority::OnDemand, 500_000, 'c');
        link.push(Priority::Prefetch, 500_000, 'd');
        assert_eq!((link.start(), link.backlog()), (None, Duration::from_millis(1500)));
        link.retain(|&what| what != 'b');
        let mut order = Vec::new();
        while let Some(what) = link.sent() {
            order.push(what);
            link.start();
        }
        assert_eq!(order, ['a', 'c', 'd']);
    }
}
