//! What a run costs: CPU time of its processes, and how busy the machine was with everything.

use std::{collections::BTreeMap, fs};

/// Clock ticks per second of the kernel's accounts; Linux has had this one for its users for ever.
const TICKS_PER_S: f64 = 100.0;

/// Figures of a run.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    /// CPU seconds of the run's processes, this program excepted.
    pub(super) cpu_seconds: f64,
    /// CPU seconds of this program, which reads and compares.
    pub(super) harness_cpu_seconds: f64,
    /// Part of the machine's CPU time that was used by anybody.
    pub(super) busy: f64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Meter {
    /// Ticks of each process at the start.
    processes: BTreeMap<u32, u64>,
    own: u64,
    machine: (u64, u64),
    /// Ticks of processes that were killed meanwhile.
    ended: u64,
}

impl Meter {
    pub(super) fn start(processes: impl Iterator<Item = u32>) -> Self {
        Self {
            processes: processes.map(|pid| (pid, ticks(pid))).collect(),
            own: ticks(std::process::id()),
            machine: machine(),
            ended: 0,
        }
    }

    /// Takes down what a process used that is about to be killed.
    pub(super) fn about_to_end(&mut self, pid: u32) {
        if let Some(before) = self.processes.remove(&pid) {
            self.ended += ticks(pid).saturating_sub(before);
        }
    }

    pub(super) fn stop(self) -> Usage {
        let used: u64 = self.processes.iter().map(|(pid, before)| ticks(*pid).saturating_sub(*before)).sum();
        let (busy, all) = machine();
        let (busy, all) = (busy.saturating_sub(self.machine.0), all.saturating_sub(self.machine.1));
        Usage {
            cpu_seconds: (used + self.ended) as f64 / TICKS_PER_S,
            harness_cpu_seconds: ticks(std::process::id()).saturating_sub(self.own) as f64 / TICKS_PER_S,
            busy: busy as f64 / all.max(1) as f64,
        }
    }
}

/// User and system time of a process; 0 if it is gone.
fn ticks(pid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|text| parse_stat(&text)).unwrap_or(0)
}

/// proc(5): fields 14 and 15, counted from 1; the second is the name in brackets, which may hold anything.
fn parse_stat(text: &str) -> Option<u64> {
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Ticks that the machine's CPUs were busy, and all ticks.
fn machine() -> (u64, u64) {
    fs::read_to_string("/proc/stat").ok().and_then(|text| parse_machine(&text)).unwrap_or((0, 0))
}

/// proc(5): the first line of /proc/stat; its fourth and fifth figures are idle time and waiting for disks.
fn parse_machine(text: &str) -> Option<(u64, u64)> {
    let figures = text.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace().take(8);
    let figures: Vec<u64> = figures.map(|figure| figure.parse().ok()).collect::<Option<_>>()?;
    let (all, idle) = (figures.iter().sum::<u64>(), figures.get(3)? + figures.get(4)?);
    Some((all - idle, all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_understood() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 9 0 100 1 1";
        assert_eq!(parse_stat(stat), Some(12));
        assert_eq!(parse_stat("42 (a"), None);
        assert_eq!(parse_machine("cpu  10 0 5 80 5 0 0 0 0 0\ncpu0 1"), Some((15, 100)));
        assert!(machine().1 > 0);
    }
}
