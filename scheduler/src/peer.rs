//! What is known of one connected peer: how near, how busy, how fast, how reliable.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use shoal_proto::{PeerId, Priority};

use crate::{
    BlobKey, Config, Item, Time,
    allowance::{Allowance, Rates},
};

/// Most pieces of one peer remembered as denied; beyond, the lowest are forgotten and may be asked for once more.
const MAX_DENIED: usize = 4096;
/// Pieces in a row that a peer was said to have and did not, after which it is left alone for a while like one that failed.
const MAX_BROKEN: u32 = 32;
/// Parts of a piece that allowances are counted in.
const QUARTERS: u32 = 4;
/// Rate assumed before anything was measured, bytes per second: a gigabit.
const FIRST_RATE: u64 = 125_000_000;

/// One connected peer.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    /// Whether it is in this node's zone.
    pub(crate) own_zone: bool,
    /// 0 is nearest.
    tier: u8,
    /// Random, so that not all nodes prefer the same of several equal peers.
    salt: u32,
    /// Pieces in flight at it.
    pub(crate) in_flight: u32,
    /// Encoded bytes of them.
    queued: u64,
    /// Prefetches that it may be asked for at a time, in quarters: a refusal halves what it had, a delivery adds one.
    /// Asked for all that a window allows, who is busy would refuse most of it, again and again.
    allowance: u32,
    /// Bytes per second, smoothed.
    rate: u64,
    /// Typical time between signs of life while it owes something, smoothed.
    gap: Duration,
    last_sign: Time,
    last_delivery: Time,
    failures: u32,
    /// Pieces that it was said to have and did not, since it last delivered one.
    broken: u32,
    /// Not asked before.
    pub(crate) closed_until: Time,
    /// Owes a sign of life; not asked until it gives one.
    suspect: bool,
    denied: BTreeSet<Item>,
    cannot_source: BTreeMap<BlobKey, Time>,
    /// What it may still be asked for within the limit of each peer, if there is one.
    pub(crate) download: Option<Box<Allowance>>,
    /// When prefetch, and on-demand, may be asked of it again within that limit.
    download_opens: [Time; 2],
}

impl Peer {
    /// One that has just been connected.
    pub(crate) fn new(now: Time, config: &Config, id: PeerId, tier: u8, own_zone: bool, salt: u32) -> Self {
        Self {
            id,
            own_zone,
            tier,
            salt,
            in_flight: 0,
            queued: 0,
            allowance: config.peer_window.saturating_mul(QUARTERS),
            rate: FIRST_RATE,
            gap: Duration::ZERO,
            last_sign: now,
            last_delivery: now,
            failures: 0,
            broken: 0,
            closed_until: Time::ZERO,
            suspect: false,
            denied: BTreeSet::new(),
            cannot_source: BTreeMap::new(),
            download: None,
            download_opens: [Time::ZERO; 2],
        }
    }

    /// In which order peers are tried: near first, then least time to wait, then by chance.
    pub(crate) fn order(&self) -> (u8, u16, u32) {
        (self.tier, self.cost(), self.salt)
    }

    /// How many more pieces of this priority it can take now.
    pub(crate) fn room(&self, now: Time, priority: Priority, config: &Config) -> u32 {
        if self.suspect || self.closed_until > now || self.download_opens[priority as usize] > now {
            return 0;
        }
        let window = self.window(priority, config);
        match priority {
            Priority::OnDemand => window,
            Priority::Prefetch => window.min((self.allowance / QUARTERS).max(1).saturating_sub(self.in_flight)),
        }
    }

    /// The same as far as its window goes, whatever it refused of late.
    pub(crate) fn window(&self, priority: Priority, config: &Config) -> u32 {
        let limit = match priority {
            Priority::OnDemand => config.peer_window,
            Priority::Prefetch => config.peer_window.saturating_sub(config.peer_reserve),
        };
        limit.max(1).saturating_sub(self.in_flight)
    }

    /// How much of it to ask for at a time.
    pub(crate) fn share(&self, priority: Priority) -> u64 {
        self.download.as_ref().map_or(u64::MAX, |download| download.share(priority))
    }

    /// Limits what it may be asked for.
    pub(crate) fn limit(&mut self, now: Time, rates: Rates) {
        if rates == Rates::default() {
            self.download = None;
        } else {
            self.download.get_or_insert_with(|| Box::new(Allowance::new(now, rates))).set(now, rates);
        }
    }

    /// Takes note of what it may be asked for now. Gives the next time at which more may be, if something has to wait.
    pub(crate) fn poll_download(&mut self, now: Time) -> Option<Time> {
        let mut poll = |priority| self.download.as_mut()?.poll(now, priority).err();
        let polled = [poll(Priority::Prefetch), poll(Priority::OnDemand)];
        self.download_opens = polled.map(|at| at.unwrap_or(Time::ZERO));
        polled.into_iter().flatten().min()
    }

    /// Whether it said that it does not have the piece, and not otherwise since.
    pub(crate) fn denies(&self, item: Item) -> bool {
        self.denied.contains(&item)
    }

    pub(crate) fn deny(&mut self, item: Item) {
        if self.denied.len() >= MAX_DENIED {
            self.denied.pop_first();
        }
        self.denied.insert(item);
    }

    /// It has these pieces after all.
    pub(crate) fn announced(&mut self, pieces: impl Iterator<Item = Item>) {
        if !self.denied.is_empty() {
            pieces.for_each(|item| _ = self.denied.remove(&item));
        }
    }

    /// It does not have a piece that it was said to have. True when that has happened too often: whoever says again and again
    /// that it has everything, and has nothing, would be asked each time before those that have it.
    pub(crate) fn broke_promise(&mut self) -> bool {
        self.broken += 1;
        self.broken.is_multiple_of(MAX_BROKEN)
    }

    pub(crate) fn cannot_source(&mut self, blob: BlobKey, until: Time) {
        if self.cannot_source.len() >= MAX_DENIED {
            self.cannot_source.pop_first();
        }
        self.cannot_source.insert(blob, until);
    }

    pub(crate) fn may_source(&self, blob: BlobKey, now: Time) -> bool {
        self.cannot_source.get(&blob).is_none_or(|&until| until <= now)
    }

    /// How long it may be silent.
    pub(crate) fn patience(&self, priority: Priority, config: &Config) -> Duration {
        let least = match priority {
            Priority::OnDemand => config.progress,
            Priority::Prefetch => config.prefetch_progress,
        };
        (self.gap * 4).clamp(least, config.max_progress.max(least))
    }

    /// Whether it gave a sign of life within this time.
    pub(crate) fn was_alive(&self, now: Time, within: Duration) -> bool {
        now.since(self.last_sign) < within
    }

    /// Takes in more pieces.
    pub(crate) fn load(&mut self, now: Time, pieces: u32, bytes: u64) {
        if self.in_flight == 0 {
            self.last_sign = now;
            self.last_delivery = now;
        }
        self.in_flight += pieces;
        self.queued += bytes;
    }

    /// Pieces left its hands, one way or another.
    pub(crate) fn unload(&mut self, pieces: u32, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(pieces);
        self.queued = self.queued.saturating_sub(bytes);
    }

    /// It gave a sign of life.
    pub(crate) fn sign(&mut self, now: Time) {
        self.gap = (self.gap * 7 + now.since(self.last_sign)) / 8;
        self.last_sign = now;
        self.suspect = false;
    }

    /// It refused a request.
    pub(crate) fn refused(&mut self) {
        self.allowance = self.allowance.min(self.in_flight * QUARTERS) / 2;
    }

    /// It delivered.
    pub(crate) fn delivered(&mut self, now: Time, bytes: u64) {
        self.allowance = self.allowance.saturating_add(1);
        let nanos = u64::try_from(now.since(self.last_delivery).as_nanos()).unwrap_or(u64::MAX).max(1000);
        self.last_delivery = now;
        let rate = bytes.saturating_mul(1_000_000_000) / nanos;
        self.rate = (self.rate - self.rate / 8 + rate / 8).max(1);
        self.failures = 0;
        self.broken = 0;
        self.sign(now);
    }

    /// It failed; returns how many times in a row.
    pub(crate) fn failed(&mut self) -> u32 {
        self.failures += 1;
        self.suspect = false;
        self.failures
    }

    pub(crate) fn suspect(&mut self) {
        self.suspect = true;
    }

    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect
    }

    /// How often it failed in a row, while it is left alone for that.
    pub(crate) fn failures(&self, now: Time) -> u32 {
        if self.closed_until > now { self.failures } else { 0 }
    }

    /// Expected milliseconds until a further megabyte would be here, on a scale of eight steps for each doubling: it changes
    /// with every piece, and peers that differ by less are as good as each other.
    fn cost(&self) -> u16 {
        let millis = self.queued.saturating_add(1 << 20).saturating_mul(1000) / self.rate.max(1);
        match millis.checked_ilog2() {
            Some(doublings @ 3..) => (doublings << 3 | (millis >> (doublings - 3) & 7) as u32) as u16,
            _ => millis as u16,
        }
    }
}
