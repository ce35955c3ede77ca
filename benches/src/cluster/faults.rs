//! What goes wrong, and when: the scenario's faults, done to real processes and links.

use std::time::{Duration, Instant};

use shoal::command::Failure;
use shoal_sim::{Fault, FaultKind, Scenario};
use tokio::time::sleep_until;

use super::{
    meter::Meter,
    network::{Host, Network},
    nodes::Nodes,
};

/// A link that is to be switched at some time.
enum Step<'a> {
    Begin(&'a Fault),
    JoinZone(String),
    JoinHost(Host),
}

/// Does what the scenario says at the times that it says, counted from `started`; ends after the last.
pub(super) async fn run(
    scenario: &Scenario,
    network: &Network,
    nodes: &mut Nodes,
    meter: &mut Meter,
    started: Instant,
) -> Result<(), Failure> {
    let mut steps: Vec<(f64, Step<'_>)> =
        scenario.faults.iter().map(|fault| (fault.at_s, Step::Begin(fault))).collect();
    loop {
        steps.sort_by(|a, b| b.0.total_cmp(&a.0));
        let Some((at, step)) = steps.pop() else { return Ok(()) };
        sleep_until((started + Duration::from_secs_f64(at)).into()).await;
        match step {
            Step::Begin(fault) => {
                eprintln!("cluster: {at} s: {:?} {:?} {:?}", fault.kind, fault.select, fault.zone);
                let joins = begin(scenario, fault, network, nodes, meter)?;
                steps.extend(joins.into_iter().map(|join| (at + fault.for_s, join)));
            }
            Step::JoinZone(zone) => network.switch_zone(&zone, true)?,
            Step::JoinHost(host) => network.switch_host(&host, true)?,
        }
    }
}

/// Begins a fault; gives what will end it.
fn begin<'a>(
    scenario: &Scenario,
    fault: &Fault,
    network: &Network,
    nodes: &mut Nodes,
    meter: &mut Meter,
) -> Result<Vec<Step<'a>>, Failure> {
    let mut ends = Vec::new();
    for zone in scenario.zones.iter().map(|zone| &zone.name) {
        if fault.select.is_none() && fault.zone.as_ref().is_none_or(|only| only == zone) {
            network.switch_zone(zone, false)?;
            ends.push(Step::JoinZone(zone.clone()));
            continue;
        }
        let mut fitting: Vec<_> = nodes
            .iter_mut()
            .filter(|node| node.alive && node.host.zone == *zone && fault.fits(zone, node.host.role))
            .collect();
        let count = fault.concerned(fitting.len());
        // The last ones: which nodes they are makes no difference to a swarm of equals.
        for node in fitting.iter_mut().rev().take(count) {
            match fault.kind {
                FaultKind::Kill => {
                    meter.about_to_end(node.process.id());
                    node.process.kill();
                    node.alive = false;
                }
                FaultKind::Cut => {
                    network.switch_host(&node.host, false)?;
                    ends.push(Step::JoinHost(node.host.clone()));
                }
                // Refused before anything is started.
                FaultKind::Slow | FaultKind::Poison => {}
            }
        }
    }
    Ok(ends)
}
