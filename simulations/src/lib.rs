//! A swarm in virtual time around the same scheduler that the daemon runs: what a rollout costs, before it is rolled
//! out.
//!
//! - [`Scenario`] says what swarm, image, workload, faults and policy; the cluster harness reads the same files.
//! - `topology` places the nodes and the links between them; `flows` shares the links among the transfers, max-min fairly.
//! - `images` has what is started where, `reading` what of it is read, and `mount` how far that is.
//! - `node`, `requests` and `serving` are the shell around the scheduler, twin of the daemon's; `swarm` carries out what they
//!   want.
//! - `baseline` has the policies that need no scheduler; `tally` adds up, by the classes of `links` and in the `series` of time,
//!   and [`Report`] says what it came to, [`html`] with plots.
//!
//! The same scenario and seed give the same report, bit for bit. What is modelled, with which parameters, and what is
//! not, stands in `docs/simulator.md`.

mod baseline;
mod clock;
mod flows;
pub mod html;
mod images;
mod links;
mod mount;
mod node;
mod reading;
mod report;
mod requests;
mod run;
mod scenario;
mod series;
mod serving;
mod starts;
mod swarm;
mod tally;
mod topology;
mod vary;

pub use report::{Effort, Fairness, History, LinkUse, Moved, NodeHistory, Report, SeedLoad, Spread, StartHistory};
pub use run::{Progress, run};
pub use scenario::{
    Costs, Fault, FaultKind, Image, Images, Nodes, PAYLOAD_SHARE, Policy, Prefetch, Read, Registry, Role, Scenario,
    ScenarioError, Shares, Workload, WorkloadKind, Zone,
};
pub use series::Series;
pub use shoal_scheduler::Time;
pub use tally::{SOURCES, Trace};
pub use vary::vary;
