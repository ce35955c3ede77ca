//! A swarm in virtual time around the same scheduler that the daemon runs.
//!
//! A small world for now: every link sends one piece after the other, the registry is one link, latency is a constant
//! for each pair of zones, nobody lies. What is simulated exactly is who asks whom for what, because that is the
//! daemon's own code: `node.rs` is the twin of the daemon's driver.
//!
//! The same scenario and seed give the same report, byte for byte.

mod link;
mod node;
mod report;
mod scenario;
mod setup;
mod world;

pub use report::{Registry, Report, Spread};
pub use scenario::{
    Fault, FaultKind, Image, Nodes, Read, Role, Scenario, ScenarioError, Shares, Workload, WorkloadKind, Zone,
};
pub use world::run;
