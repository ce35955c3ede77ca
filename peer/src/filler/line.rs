//! The line to the keeper, over which events come and answers go.
//!
//! The keeper reads the group, and it alone gives the kernel answers, as long as it lives. When it dies, events that it has passed
//! on are still waiting in the kernel. For a few seconds they are answered from here, by the numbers that they had in the keeper;
//! then another keeper is given the group, which first denies what is left: its own events may get the same numbers.

use std::{
    collections::HashMap,
    os::fd::RawFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use shoal_keeper::{Client, ClientError, Group, Taker, Told, Verdict};

use super::Inner;

/// Time between attempts to find a keeper. While there is none every reader waits.
const RETRY: Duration = Duration::from_millis(50);
/// How long what a dead keeper has passed on is waited for.
const DIRECT_LIMIT: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// Locked for a look or an answer.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// While a keeper is there.
    taker: Option<Arc<Taker>>,
    /// Which connection it is; ids of an earlier one mean nothing.
    era: u64,
    /// Events that were not answered, by id.
    waiting: HashMap<u64, RawFd>,
    /// Answers that the keeper has not taken, since it died.
    unsent: Vec<(RawFd, Verdict)>,
    /// The keeper has died, and there is no other yet.
    direct: bool,
    closed: bool,
}

impl Line {
    /// Whether a keeper has the group.
    pub(super) fn is_open(&self) -> bool {
        self.lock().taker.is_some()
    }

    /// Ends it; says whether a keeper has the group.
    pub(super) fn close(&self) -> bool {
        let mut state = self.lock();
        state.closed = true;
        let taker = state.taker.take();
        if let Some(taker) = &taker {
            taker.shut();
        }
        taker.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Begins with a connection; gives its era.
    fn opened(&self, taker: &Arc<Taker>) -> u64 {
        let mut state = self.lock();
        state.taker = (!state.closed).then(|| taker.clone());
        state.era
    }

    fn told(&self, era: u64, id: u64, number: RawFd) {
        let mut state = self.lock();
        if state.era == era {
            state.waiting.insert(id, number);
        }
    }

    /// Answers an event of an era, if that has not ended.
    fn answer(&self, group: &Group, era: u64, id: u64, allow: bool) {
        let verdict = if allow { Verdict::Allow } else { Verdict::Deny };
        let mut state = self.lock();
        if state.era != era {
            return;
        }
        let Some(number) = state.waiting.remove(&id) else { return };
        match &state.taker {
            Some(taker) if taker.answer(id, verdict).is_ok() => {}
            // Whether the keeper is dead will be seen in a moment.
            _ if !state.direct => state.unsent.push((number, verdict)),
            _ => answer_directly(group, number, verdict),
        }
        self.changed.notify_all();
    }

    /// The connection has ended. If the keeper is `dead`, answers what it has passed on.
    fn lost(&self, group: &Group, dead: bool) {
        let mut state = self.lock();
        state.taker = None;
        if dead && !state.closed {
            state.direct = true;
            for (number, verdict) in std::mem::take(&mut state.unsent) {
                answer_directly(group, number, verdict);
            }
            let waits = |state: &mut State| !state.waiting.is_empty() && !state.closed;
            let waited = self.changed.wait_timeout_while(state, DIRECT_LIMIT, waits);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.direct = false;
        state.era += 1;
        state.waiting.clear();
        state.unsent.clear();
    }
}

impl Inner {
    /// Finds a keeper, has it guard the group, and takes its events; gives the era with it.
    pub(super) fn connect(&self) -> Result<(Arc<Taker>, u64), ClientError> {
        self.handover.check();
        self.guard()?;
        let taker = Arc::new(Client::connect(self.handover.socket())?.take()?);
        let era = self.line.opened(&taker);
        Ok((taker, era))
    }

    /// Sees to events until the line is closed, of one keeper after the other.
    pub(super) fn serve(self: Arc<Self>, first: (Arc<Taker>, u64)) {
        let mut first = Some(first);
        let mut trouble = String::new();
        while !self.line.is_closed() {
            match first.take().map_or_else(|| self.connect(), Ok) {
                Ok((taker, era)) => {
                    trouble.clear();
                    self.take_all(&taker, era);
                    let dead = !self.keeper_lives();
                    if !self.line.is_closed() {
                        tracing::warn!(dead, "the keeper tells of no more events");
                    }
                    self.line.lost(&self.group, dead);
                }
                Err(error) => {
                    let error = crate::chain(&error);
                    if trouble != error {
                        tracing::error!("nobody else guards what was not read of native mounts: {error}");
                        trouble = error;
                    }
                    thread::sleep(RETRY);
                }
            }
        }
    }

    /// Whether the keeper that had the group still has it.
    fn keeper_lives(&self) -> bool {
        let group = Client::connect(self.handover.socket()).and_then(|mut keeper| keeper.group());
        matches!(group, Ok(Some(_)))
    }

    fn take_all(self: &Arc<Self>, taker: &Taker, era: u64) {
        loop {
            match taker.next() {
                Ok(Some(Told { id, number, event })) => {
                    self.line.told(era, id, number);
                    let inner = self.clone();
                    self.handle(event, move |allow| inner.line.answer(&inner.group, era, id, allow));
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!("{}", crate::chain(&error));
                    return taker.shut();
                }
            }
        }
    }
}

fn answer_directly(group: &Group, number: RawFd, verdict: Verdict) {
    // It may have been answered by the keeper, or its reader have been killed.
    if let Err(error) = group.answer(number, verdict) {
        tracing::debug!("an event of a dead keeper: {error}");
    }
}
