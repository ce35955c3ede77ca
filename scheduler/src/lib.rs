//! What to fetch, from whom, when: a pure state machine without IO, clock, threads or global randomness.
//!
//! The daemon drives it from sockets and the simulator from an event queue; both run the same lines:
//!
//! 1. [`handle_event`](Scheduler::handle_event) for everything that happened,
//!    [`handle_timeout`](Scheduler::handle_timeout) when the time of [`poll_timeout`](Scheduler::poll_timeout) has come.
//!    Neither does more than take note, so hand over all that is there before going on: requests are joined over
//!    everything known at the next step.
//! 2. [`poll_action`](Scheduler::poll_action) until there is nothing left, and carry the actions out.
//! 3. Wait for the next event, or for [`poll_timeout`](Scheduler::poll_timeout), asked again after step 2.
//!
//! # What it promises
//!
//! - Every [`Event::Want`] ends with one [`Action::Complete`], at its deadline at the latest.
//! - A piece has one *flight*, whoever wants it and however often: it takes the highest priority of its waiters and
//!   outlives each of them. At most two requests are under way for it, the second a hedge, and never two of the
//!   registry. When its last waiter leaves, nobody is asked any more, but what is under way may arrive.
//! - Sources in order: a neighbour that announced the piece (nearest, then soonest done), its home, the next home in
//!   hash order, the registry. The registry is not read while a home says that it is at it, and for a prefetch not while
//!   a home is merely busy or silent for a moment. This node itself, where it comes first in that order, and whatever is
//!   wanted [`ForPeer`](Origin::ForPeer), asks no home.
//! - On-demand goes before prefetch in every queue, and has part of every window to itself.
//! - Nothing is asked for beyond the [`Limits`], which can be changed at any time.
//! - Nobody is asked again for what it said it does not have, until it announces it; nobody is asked who is banned.
//! - Everything is bounded: see [`Config`]. The same seed and events give the same actions.
//!
//! The other half of a node, whom to serve and whom to send on, is the [`Tracker`]; how often it tells its neighbours what
//! is new, [`announce_interval`].

mod allowance;
mod announce;
mod answers;
mod blobs;
mod config;
mod event;
mod flights;
mod holders;
mod homes;
mod inflow;
mod limits;
mod names;
mod need;
mod peer;
mod peers;
mod requests;
mod scheduler;
mod source;
mod swarm;
mod time;
mod timer;
mod tracker;
mod wants;

pub use allowance::{Allowance, Rates, Waits};
pub use announce::{PROMPT, announce_interval, is_pressing};
pub use config::Config;
pub use event::{
    Action, BanReason, BlobKey, Event, Failure, Item, Origin, RequestId, Source, WantError, WantFailure, WantId, Why,
};
pub use limits::{LimitWaits, Limits};
pub use scheduler::{Scheduler, Stats};
pub use time::Time;
pub use tracker::{Admission, Ask, Tracker, TrackerConfig};
