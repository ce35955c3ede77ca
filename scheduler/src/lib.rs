//! What to fetch, from whom, when: a pure state machine without IO, clock, threads or global randomness.
//!
//! The daemon drives it from sockets and the simulator from an event queue; both run the same lines:
//!
//! 1. [`handle_event`](Scheduler::handle_event) for everything that happened,
//! [`handle_timeout`](Scheduler::handle_timeout)
//!    when the time of [`poll_timeout`](Scheduler::poll_timeout) has come. Neither does more than take note, so hand
//!    over all that is there before going on: requests are joined over everything known at the next step.
//! 2. [`poll_action`](Scheduler::poll_action) until there is nothing left, and carry the actions out.
//! 3. Wait for the next event, or for [`poll_timeout`](Scheduler::poll_timeout), asked again after step 2.

mod answers;
mod blobs;
mod config;
mod event;
mod flights;
mod homes;
mod inflow;
mod peers;
mod requests;
mod scheduler;
mod source;
mod swarm;
mod time;
mod timer;
mod tracker;

pub use config::Config;
pub use event::{
    Action, BanReason, BlobKey, Event, Failure, Item, Origin, RequestId, Source, WantError, WantFailure, WantId, Why,
};
pub use scheduler::{Scheduler, Stats};
pub use time::Time;
pub use tracker::{Admission, Tracker, TrackerConfig};
