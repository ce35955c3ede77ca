//! Running one scenario with somebody watching, and writing what comes of it.

use std::{
    cell::Cell,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use shoal_sim::{Effort, Progress, Report, Scenario, run};

use super::Failure;

/// How often a line says how far a run is, where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A bar on the terminal, or else a line now and then.
struct Watched {
    bar: ProgressBar,
    told: Cell<Instant>,
}

impl Progress for Watched {
    fn report(&self, now: shoal_sim::Time, bytes: u64) {
        let message = format!("{:.1} s", now.as_secs_f64());
        if self.bar.is_hidden() && self.told.get().elapsed() >= LINE_EVERY {
            let percent = 100 * bytes / self.bar.length().unwrap_or_default().max(1);
            eprintln!("{percent}% of the bytes, {message} simulated, {:.0?} passed", self.bar.elapsed());
            self.told.set(Instant::now());
        }
        self.bar.set_message(message);
        self.bar.set_position(bytes);
    }
}

/// Runs a scenario; shows how far it is, and notes what it took.
pub(super) fn simulate(scenario: &Scenario, seed: u64) -> Report {
    let bytes = scenario.starts() as u64 * scenario.fetched_bytes();
    let style = ProgressStyle::with_template("{wide_bar} {percent}% of the bytes, {msg} simulated, {elapsed} passed");
    let bar = ProgressBar::new(bytes).with_style(style.expect("the template is well-formed"));
    bar.enable_steady_tick(Duration::from_millis(500));
    let watched = Watched { bar, told: Cell::new(Instant::now()) };
    let report = measured(scenario, seed, &watched);
    watched.bar.finish_and_clear();
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
