//! An image on a node: how far its start is, and what neighbours are to hear of it.

use std::{collections::BTreeSet, sync::Arc};

use shoal_proto::{Bitfield, Priority};
use shoal_scheduler::{Time, is_pressing};

use crate::{
    images::Image,
    reading::{Left, Reading},
    topology::Index,
};

/// An image on a node. Seed peers have all of them and start none.
#[derive(Debug)]
pub(crate) struct Mount {
    pub(crate) image: Image,
    /// When it will be started.
    pub(crate) starts: Time,
    pub(crate) started: Option<Time>,
    pub(crate) first: Option<Time>,
    /// When all was there that its start reads.
    pub(crate) ready: Option<Time>,
    /// When all was there that is fetched.
    pub(crate) last: Option<Time>,
    pub(crate) failed_reads: u64,
    /// Pieces that neighbours have not heard of.
    pub(crate) news: Bitfield,
    /// Whether they should hear soon.
    pub(crate) has_pressing_news: bool,
    pub(crate) audience: Audience,
    reading: Arc<Reading>,
    left: Left,
    /// Wants open: prefetch, on-demand.
    open: [usize; 2],
    /// How far each is in its order.
    next: [usize; 2],
}

/// Who hears what is new, and when.
#[derive(Debug, Default)]
pub(crate) struct Audience {
    pub(crate) listeners: BTreeSet<Index>,
    /// When they are about to be told.
    pub(crate) tick: Option<Time>,
    /// When they were told last.
    pub(crate) told: Time,
}

impl Mount {
    /// An image of which these pieces are here.
    pub(crate) fn new(image: Image, starts: Time, reading: Arc<Reading>, present: &Bitfield) -> Self {
        Self {
            image,
            starts,
            started: None,
            first: None,
            ready: None,
            last: None,
            failed_reads: 0,
            news: Bitfield::new(present.len()),
            has_pressing_news: false,
            audience: Audience::default(),
            left: reading.left(present),
            reading,
            open: [0; 2],
            next: [0; 2],
        }
    }

    /// The image is mounted.
    pub(crate) fn start(&mut self, now: Time) {
        self.started = Some(now);
        self.note_progress(now);
    }

    /// The next piece that is to be wanted with this priority, if one may be wanted more.
    pub(crate) fn next(&mut self, priority: Priority, have: &Bitfield) -> Option<u32> {
        let class = priority as usize;
        let (order, most) = self.reading.order(priority);
        while self.open[class] < most
            && let Some(&piece) = order.get(self.next[class])
        {
            self.next[class] += 1;
            if !have.contains(piece) {
                self.open[class] += 1;
                return Some(piece);
            }
        }
        None
    }

    /// Wants of pieces that are not over.
    pub(crate) fn wants(&self) -> usize {
        self.open.iter().sum()
    }

    /// A want of a piece is over.
    pub(crate) fn ended(&mut self, priority: Priority, ok: bool) {
        self.open[priority as usize] -= 1;
        self.failed_reads += u64::from(!ok);
    }

    /// A piece came and makes so many that are `here`; `unheld` if no neighbour had it.
    pub(crate) fn got(&mut self, now: Time, piece: u32, unheld: bool, here: u32) {
        self.news.insert(piece);
        let news = self.news.count();
        self.has_pressing_news |= is_pressing(unheld, news, here.saturating_sub(news));
        self.first.get_or_insert(now);
        self.reading.got(piece, &mut self.left);
        self.note_progress(now);
    }

    fn note_progress(&mut self, now: Time) {
        if self.left.start == 0 {
            self.first.get_or_insert(now);
            self.ready.get_or_insert(now);
        }
        if self.left.all == 0 {
            self.last.get_or_insert(now);
        }
    }
}
