//! A swarm in virtual time around the same scheduler that the daemon runs: what a rollout costs, before it is rolled
//! out.
//!
//! - [`Scenario`] says what swarm, image, workload, faults and policy; the cluster harness reads the same files.
//! - `topology` places the nodes and the links between them; `flows` shares the links among the transfers, max-min fairly.
//! - `images` has what is started where, `reading` what of it is read, and `mount` how far that is.
//! - `node` and `serving` are the shell around the scheduler, twin of the daemon's; `swarm` carries out what they want.
//! - `baseline` has the policies that need no scheduler; `tally` adds up, and [`Report`] says what it came to.
//!
//! The same scenario and seed give the same report, bit for bit. What is modelled, with which parameters, and what is
//! not, stands in `docs/simulator.md`.

mod baseline;
mod clock;
mod flows;
pub mod html;
mod images;
mod mount;
mod node;
mod reading;
mod report;
mod run;
mod scenario;
mod serving;
mod starts;
mod swarm;
mod tally;
mod topology;
mod vary;

pub use report::{Effort, History, Report, Spread};
pub use run::{Progress, run};
pub use scenario::{
    Costs, Fault, FaultKind, Image, Images, Nodes, PAYLOAD_SHARE, Policy, Prefetch, Read, Registry, Role, Scenario,
    ScenarioError, Shares, Workload, WorkloadKind, Zone,
};
pub use shoal_scheduler::Time;
pub use vary::vary;
