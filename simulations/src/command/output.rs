//! Running one scenario with somebody watching, and writing what comes of it.

use std::{
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use shoal_sim::{Effort, Progress, Report, Scenario, run};

use super::Failure;

/// A bar on the terminal, if there is one.
struct Bar(ProgressBar);

impl Progress for Bar {
    fn report(&self, now: shoal_sim::Time, bytes: u64) {
        self.0.set_message(format!("{:.1} s", now.as_secs_f64()));
        self.0.set_position(bytes);
    }
}

/// Runs a scenario; shows how far it is on a terminal, and notes what it took.
pub(super) fn simulate(scenario: &Scenario, seed: u64) -> Report {
    let bytes = scenario.readers() as u64 * scenario.encoded_bytes();
    let style = ProgressStyle::with_template("{wide_bar} {percent}% of the bytes, {msg} simulated, {elapsed} passed");
    let bar = ProgressBar::new(bytes).with_style(style.expect("the template is well-formed"));
    bar.enable_steady_tick(Duration::from_millis(500));
    let bar = Bar(bar);
    let report = measured(scenario, seed, &bar);
    bar.0.finish_and_clear();
    report
}

/// Runs a scenario and notes what it took.
pub(super) fn measured(scenario: &Scenario, seed: u64, progress: &dyn Progress) -> Report {
    let started = Instant::now();
    let mut report = run(scenario, seed, progress);
    report.effort = Effort { wall_seconds: started.elapsed().as_secs_f64(), peak_rss_bytes: peak_rss_bytes() };
    report
}

/// proc(5): the line `VmHWM:  123 kB` of /proc/self/status; 0 where there is none.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

pub(super) fn to_json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("a report has only text keys");
    text.push('\n');
    text
}

/// Writes a whole file or none.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let fail = |error| Failure::File { path: path.to_owned(), error };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(fail)?;
    file.write_all(text.as_bytes()).map_err(fail)?;
    file.persist(path).map(drop).map_err(|error| fail(error.error))
}
