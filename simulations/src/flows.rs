//! Transfers that share links: each gets its max-min fair part of the links that it crosses.
//!
//! An allocation is max-min fair when no flow can be given more without taking from one that has no more. Equivalently
//! every link has a *level*, the most that it grants to one flow, and every flow runs at the lowest level on its path
//! (Bertsekas and Gallager, *Data Networks*, section 6.5). So a change is worked out link by link: a flow that comes,
//! goes or changes its rate makes the links on its path look at themselves; one that is overfull, or has room for a
//! flow that it holds back, computes its level anew, and only the links of the flows whose rates that changes look at
//! themselves in turn. What a change does not reach costs nothing.
//!
//! The approximation is one number, the `tolerance`: a link with less than this part of its rate free does not look
//! for somebody to give it to, and a flow is not raised by less than this part of its own rate. It stops the ripples of
//! a change from running through the whole swarm. A link is never above its rate.

mod due;

use std::collections::VecDeque;

use shoal_scheduler::Time;

use self::due::Due;

/// Part of a link's rate that may stay unused, and of a flow's rate by which it may be off, in a simulation.
pub(crate) const TOLERANCE: f64 = 0.05;
/// Links on the path of a flow at most: node, rack and zone at both ends.
pub(crate) const MAX_HOPS: usize = 6;
/// Part of a link's rate that is rounding and no excess.
const ROUNDING: f64 = 1e-9;
/// Levels computed at most until all is settled, for each link that there is: a guard against a cycle of roundings.
const MAX_ROUNDS: usize = 1000;

/// Names a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LinkId(u32);

/// Names a flow; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FlowId {
    slot: u32,
    turn: u32,
}

/// The links that a flow crosses, at most [`MAX_HOPS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Path {
    links: [LinkId; MAX_HOPS],
    len: u8,
}

impl Path {
    /// No link at all.
    pub(crate) const EMPTY: Self = Self { links: [LinkId(0); MAX_HOPS], len: 0 };

    /// Adds a link, if there is one.
    ///
    /// # Panics
    /// When there are more than [`MAX_HOPS`].
    pub(crate) fn push(&mut self, link: Option<LinkId>) {
        if let Some(link) = link {
            self.links[usize::from(self.len)] = link;
            self.len += 1;
        }
    }

    pub(crate) fn links(&self) -> &[LinkId] {
        &self.links[..usize::from(self.len)]
    }

    /// What it crosses beside a hop.
    fn beside(&self, hop: usize) -> Beside {
        match self.links() {
            [_] => Beside::Nothing,
            &[a, b] => Beside::One(if hop == 0 { b } else { a }),
            _ => Beside::Several,
        }
    }
}

/// What else a flow crosses.
#[derive(Debug, Clone, Copy)]
enum Beside {
    Nothing,
    One(LinkId),
    /// See its path.
    Several,
}

/// A flow as one of its links knows it: enough to work out a level without a look at every flow.
#[derive(Debug, Clone, Copy)]
struct Crossing {
    slot: u32,
    /// Which hop of the flow the link is.
    hop: u8,
    beside: Beside,
}

#[derive(Debug)]
struct Link {
    bytes_per_s: f64,
    /// What it grants to one flow at most; infinite while nobody is held back.
    level: f64,
    /// Sum of the rates of its flows.
    load: f64,
    flows: Vec<Crossing>,
    /// Waits to be looked at.
    queued: bool,
    /// Computes its level whether or not it seems to need it.
    forced: bool,
}

impl Link {
    fn needs_level(&self, tolerance: f64) -> bool {
        let overfull = self.load > self.bytes_per_s * (1.0 + ROUNDING);
        let slack = self.level.is_finite() && self.load < self.bytes_per_s * (1.0 - tolerance);
        self.forced || overfull || slack
    }
}

#[derive(Debug)]
struct Flow<T> {
    turn: u32,
    path: Path,
    /// Where it stands in the list of each of its links.
    places: [u32; MAX_HOPS],
    /// Bytes left at `since`.
    left: f64,
    since: Time,
    bytes: u64,
    what: T,
}

impl<T> Flow<T> {
    fn due(&self, bytes_per_s: f64) -> u64 {
        if self.left <= 0.0 {
            return self.since.as_nanos();
        }
        // Saturates at the end of time for a flow that stands still.
        let nanos = self.left / bytes_per_s * 1e9;
        let whole = nanos as u64;
        self.since.as_nanos().saturating_add(whole).saturating_add(u64::from(nanos > whole as f64))
    }

    fn advance(&mut self, now: Time, bytes_per_s: f64) {
        self.left -= bytes_per_s * now.since(self.since).as_secs_f64();
        self.since = now;
    }
}

/// All flows and the links that they share. `T` is what the caller keeps with a flow.
#[derive(Debug)]
pub(crate) struct Flows<T> {
    tolerance: f64,
    links: Vec<Link>,
    /// What each link would grant to one more flow as far as it knows: looked at for every flow that another link holds.
    grants: Vec<f64>,
    flows: Vec<Option<Flow<T>>>,
    /// Bytes per second of each flow; 0 for a slot without one.
    rates: Vec<f64>,
    free: Vec<u32>,
    turn: u32,
    due: Due,
    /// Links that have to look at themselves.
    queue: VecDeque<LinkId>,
    /// For the limits of the flows of one link, kept to save an allocation.
    limits: Vec<f64>,
}

impl<T> Flows<T> {
    /// Without links and flows.
    pub(crate) fn new(tolerance: f64) -> Self {
        Self {
            tolerance,
            links: Vec::new(),
            grants: Vec::new(),
            flows: Vec::new(),
            rates: Vec::new(),
            free: Vec::new(),
            turn: 0,
            due: Due::default(),
            queue: VecDeque::new(),
            limits: Vec::new(),
        }
    }

    /// A new link of so many bytes per second.
    pub(crate) fn add_link(&mut self, bytes_per_s: f64) -> LinkId {
        self.links.push(Link {
            bytes_per_s,
            level: f64::INFINITY,
            load: 0.0,
            flows: Vec::new(),
            queued: false,
            forced: false,
        });
        self.grants.push(bytes_per_s);
        LinkId(self.links.len() as u32 - 1)
    }

    /// Changes what a link carries from now on; 0 stops all that crosses it.
    pub(crate) fn set_rate(&mut self, link: LinkId, bytes_per_s: f64) {
        self.link(link).bytes_per_s = bytes_per_s;
        self.grants[link.0 as usize] = self.links[link.0 as usize].level.min(bytes_per_s);
        self.force(link);
    }

    /// Bytes per second that a link carries at most.
    pub(crate) fn rate(&self, link: LinkId) -> f64 {
        self.links[link.0 as usize].bytes_per_s
    }

    /// Starts a transfer; one of no links is done at once.
    pub(crate) fn start(&mut self, now: Time, path: Path, bytes: u64, what: T) -> FlowId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flows.push(None);
            self.rates.push(0.0);
            self.flows.len() as u32 - 1
        });
        self.turn += 1;
        let mut places = [0; MAX_HOPS];
        for (hop, (&link, place)) in path.links().iter().zip(&mut places).enumerate() {
            let flows = &mut self.link(link).flows;
            *place = flows.len() as u32;
            flows.push(Crossing { slot, hop: hop as u8, beside: path.beside(hop) });
        }
        let left = if path.len == 0 { 0.0 } else { bytes as f64 };
        let vacant = self.vacant(path);
        let bytes_per_s = vacant.unwrap_or(0.0);
        let flow = Flow { turn: self.turn, path, places, left, since: now, bytes, what };
        self.due.set(slot, flow.due(bytes_per_s));
        self.rates[slot as usize] = bytes_per_s;
        self.flows[slot as usize] = Some(flow);
        match vacant {
            Some(rate) => path.links().iter().for_each(|&link| self.link(link).load += rate),
            None => path.links().first().into_iter().for_each(|&link| self.force(link)),
        }
        FlowId { slot, turn: self.turn }
    }

    /// What a new flow gets if that leaves everyone else what they have: the level of a link that has just that much room.
    /// Mostly it takes the place of one that was done a moment ago, and nothing needs to be worked out anew.
    fn vacant(&self, path: Path) -> Option<f64> {
        let links = || path.links().iter().map(|link| &self.links[link.0 as usize]);
        let rate = path.links().iter().map(|link| self.grants[link.0 as usize]).fold(f64::INFINITY, f64::min);
        let fits = links().all(|link| link.load + rate <= link.bytes_per_s * (1.0 + ROUNDING));
        let bound = |link: &Link| link.level == rate && link.load + rate >= link.bytes_per_s * (1.0 - self.tolerance);
        (fits && links().any(bound)).then_some(rate)
    }

    /// Stops a transfer; gives what was kept with it and the bytes that came through.
    pub(crate) fn cancel(&mut self, now: Time, id: FlowId) -> Option<(T, u64)> {
        let flow = self.flows.get_mut(id.slot as usize)?.as_mut().filter(|flow| flow.turn == id.turn)?;
        flow.advance(now, self.rates[id.slot as usize]);
        let came = flow.bytes.saturating_sub(flow.left.max(0.0) as u64);
        self.take_out(id.slot).map(|flow| (flow.what, came))
    }

    /// Whether a transfer is under way and makes progress, as of the last time that something happened.
    pub(crate) fn is_moving(&self, id: FlowId) -> bool {
        let flow = self.flows.get(id.slot as usize).and_then(Option::as_ref);
        flow.is_some_and(|flow| flow.turn == id.turn && self.rates[id.slot as usize] > 0.0)
    }

    /// When the next transfer is done, as things stand.
    pub(crate) fn next(&mut self, now: Time) -> Option<Time> {
        self.settle(now);
        while let Some((nanos, slot)) = self.due.first() {
            let due = self.flows[slot as usize].as_ref()?.due(self.rates[slot as usize]);
            if due <= nanos {
                return Some(Time::from_nanos(nanos).max(now));
            }
            // It was slowed down since its time was entered.
            self.due.set(slot, due);
        }
        None
    }

    /// Takes one transfer that is done by now.
    pub(crate) fn finish(&mut self, now: Time) -> Option<T> {
        let next = self.next(now).filter(|&next| next <= now && next < Time::MAX)?;
        let slot = self.due.first().filter(|&(nanos, _)| nanos <= next.as_nanos())?.1;
        self.take_out(slot).map(|flow| flow.what)
    }

    fn take_out(&mut self, slot: u32) -> Option<Flow<T>> {
        let flow = self.flows[slot as usize].take()?;
        let bytes_per_s = std::mem::take(&mut self.rates[slot as usize]);
        self.due.remove(slot);
        self.free.push(slot);
        for (&link, &place) in flow.path.links().iter().zip(&flow.places) {
            let at = &mut self.links[link.0 as usize];
            at.flows.swap_remove(place as usize);
            at.load = if at.flows.is_empty() { 0.0 } else { at.load - bytes_per_s };
            if let Some(moved) = at.flows.get(place as usize)
                && let Some(flow) = &mut self.flows[moved.slot as usize]
            {
                flow.places[usize::from(moved.hop)] = place;
            }
            self.look_at(link);
        }
        Some(flow)
    }

    fn link(&mut self, link: LinkId) -> &mut Link {
        &mut self.links[link.0 as usize]
    }

    fn look_at(&mut self, link: LinkId) {
        let at = &mut self.links[link.0 as usize];
        if !at.queued && at.needs_level(self.tolerance) {
            at.queued = true;
            self.queue.push_back(link);
        }
    }

    fn force(&mut self, link: LinkId) {
        self.link(link).forced = true;
        self.look_at(link);
    }

    /// Works out all that changed since the last time.
    fn settle(&mut self, now: Time) {
        let mut rounds = self.links.len() * MAX_ROUNDS;
        while let Some(link) = self.queue.pop_front() {
            let at = &mut self.links[link.0 as usize];
            at.queued = false;
            if at.needs_level(self.tolerance) && rounds > 0 {
                rounds -= 1;
                self.level(now, link);
            }
        }
    }

    /// Computes a link's level, and the rates of its flows from it.
    fn level(&mut self, now: Time, link: LinkId) {
        let flows = std::mem::take(&mut self.link(link).flows);
        let mut limits = std::mem::take(&mut self.limits);
        limits.extend(flows.iter().map(|crossing| self.limit(crossing)));
        let rate = self.link(link).bytes_per_s;
        let level = water_level(rate, &limits);
        let mut load = 0.0;
        for (crossing, &limit) in flows.iter().zip(&limits) {
            let granted = limit.min(level);
            load += granted;
            if granted != self.rates[crossing.slot as usize] {
                self.grant(now, crossing, granted);
            }
        }
        limits.clear();
        self.limits = limits;
        let at = self.link(link);
        (at.flows, at.level, at.load, at.forced) = (flows, level, load, false);
        self.grants[link.0 as usize] = level.min(rate);
    }

    /// What the other links of a flow grant it; its own rate if they would raise it by next to nothing.
    fn limit(&self, crossing: &Crossing) -> f64 {
        let grants = |link: LinkId| self.grants[link.0 as usize];
        let limit = match crossing.beside {
            Beside::Nothing => f64::INFINITY,
            Beside::One(link) => grants(link),
            Beside::Several => {
                let flow = self.flows[crossing.slot as usize].as_ref();
                let links = flow.into_iter().flat_map(|flow| flow.path.links().iter().enumerate());
                let others = links.filter(|&(hop, _)| hop != usize::from(crossing.hop));
                others.map(|(_, &link)| grants(link)).fold(f64::INFINITY, f64::min)
            }
        };
        let held = self.rates[crossing.slot as usize];
        if limit > held && limit <= held * (1.0 + self.tolerance) { held } else { limit }
    }

    fn grant(&mut self, now: Time, crossing: &Crossing, bytes_per_s: f64) {
        let &Crossing { slot, hop, .. } = crossing;
        let Some(flow) = &mut self.flows[slot as usize] else { return };
        let held = std::mem::replace(&mut self.rates[slot as usize], bytes_per_s);
        let change = bytes_per_s - held;
        flow.advance(now, held);
        let path = flow.path;
        // Who was slowed down is looked at again when it would have been done.
        if change > 0.0 {
            let due = flow.due(bytes_per_s);
            if self.due.of(slot).is_none_or(|entered| due < entered) {
                self.due.set(slot, due);
            }
        }
        for (at, &link) in path.links().iter().enumerate() {
            if at != usize::from(hop) {
                self.link(link).load += change;
                self.look_at(link);
            }
        }
    }
}

/// The level at which flows that take at most their limits fill a rate; infinite if they do not fill it.
fn water_level(rate: f64, limits: &[f64]) -> f64 {
    let (mut left, mut count) = (rate, limits.len());
    let mut level = 0.0;
    // Each turn sets aside those that take less than an equal part; what is left over raises the level of the others.
    loop {
        if count == 0 {
            return f64::INFINITY;
        }
        let part = left.max(0.0) / count as f64;
        // Without a branch for each, of which half would be mispredicted.
        let (mut sum, mut found) = (0.0, 0);
        for &limit in limits {
            sum += if limit <= part { limit } else { 0.0 };
            found += usize::from(limit <= part);
        }
        if part <= level || limits.len() - found == count {
            return part.max(level);
        }
        (left, count, level) = (rate - sum, limits.len() - found, part);
    }
}

#[cfg(test)]
mod tests;
