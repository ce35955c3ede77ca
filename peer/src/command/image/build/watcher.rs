//! How far a build is, for whoever waits for it: on standard error.

use std::{
    io::{IsTerminal, Read},
    sync::Mutex,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use shoal_rafs::Progress;

use crate::command::{Failure, human_bytes};

/// Time between two lines of progress.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows how far a build is: a bar with an estimate on a terminal, otherwise a line now and then.
pub(super) struct Watcher {
    /// Hidden without a terminal.
    bar: ProgressBar,
    /// Whether the bar counts what is read of an archive, rather than bytes of files.
    archive: bool,
    /// When the last line was written.
    last_line: Option<Mutex<Instant>>,
}

impl Watcher {
    /// For a directory, or for an archive of which the length may be known.
    pub(super) fn new(archive: Option<Option<u64>>) -> Result<Self, Failure> {
        let bar = ProgressBar::new_spinner();
        if let Some(Some(len)) = archive {
            bar.set_length(len);
        }
        bar.set_style(style(bar.length().is_some())?);
        let last_line = (!std::io::stderr().is_terminal()).then(|| Mutex::new(Instant::now()));
        Ok(Self { bar, archive: archive.is_some(), last_line })
    }

    /// Counts what is read of the archive.
    pub(super) fn wrap<R: Read>(&self, stream: R) -> impl Read + use<R> {
        self.bar.wrap_read(stream)
    }

    /// Takes note of what the builder says.
    pub(super) fn show(&self, progress: Progress) {
        if let Some(last_line) = &self.last_line {
            return print_line(last_line, progress);
        }
        if !self.archive {
            if let (None, Some(total), Ok(style)) = (self.bar.length(), progress.total_bytes, style(true)) {
                self.bar.set_length(total);
                self.bar.set_style(style);
            }
            self.bar.set_position(progress.decoded_bytes);
        }
        self.bar.set_message(format!("encoded {}", human_bytes(progress.encoded_bytes)));
    }
}

fn style(length_known: bool) -> Result<ProgressStyle, Failure> {
    Ok(ProgressStyle::with_template(match length_known {
        true => "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left, {msg}",
        false => "{spinner} {bytes} {bytes_per_sec} {msg}",
    })?)
}

fn print_line(last_line: &Mutex<Instant>, progress: Progress) {
    let mut last_line = last_line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if last_line.elapsed() < LINE_INTERVAL {
        return;
    }
    *last_line = Instant::now();
    let total = progress.total_bytes.map_or_else(String::new, |total| format!(" of {}", human_bytes(total)));
    let (read, encoded) = (human_bytes(progress.decoded_bytes), human_bytes(progress.encoded_bytes));
    eprintln!("{read}{total} read, encoded {encoded}");
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
