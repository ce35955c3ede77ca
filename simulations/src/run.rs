//! Runs a scenario, whatever its policy.

use shoal_scheduler::Time;

use crate::{
    baseline,
    report::Report,
    scenario::{Policy, Scenario},
    swarm,
};

/// Hears how far a run has come.
pub trait Progress {
    /// So much virtual time has passed, and so many bytes have arrived at nodes that read.
    fn report(&self, now: Time, bytes: u64);
}

/// Nobody listens.
impl Progress for () {
    fn report(&self, _now: Time, _bytes: u64) {}
}

/// Runs a scenario to its end, or until nothing moves any more. The same scenario and seed give the same report; the order of
/// zones and groups in the file does not matter.
pub fn run(scenario: &Scenario, seed: u64, progress: &dyn Progress) -> Report {
    let scenario = scenario.in_order();
    let outcome = match scenario.policy {
        Policy::Shoal | Policy::Seeds => swarm::run(&scenario, seed, progress),
        Policy::Registry | Policy::WholeBlob => baseline::run(&scenario, seed),
    };
    Report::new(&scenario, seed, outcome)
}
