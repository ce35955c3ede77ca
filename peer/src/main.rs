//! The `shoal` binary: arguments, logging, one exit point. Bad usage exits 2, failure exits 1.

use std::{io::IsTerminal, process::ExitCode};

use shoal::command::Cli;
use tracing_subscriber::EnvFilter;

/// Heaps of glibc's allocator, at most. Left alone it makes eight for each processor, and a chunk freed by another thread
/// than it was made for stays in its heap: a seed peer serving four nodes at full rate had 164 MiB resident, with two
/// heaps 105 MiB, and was no slower. More threads than these seldom allocate at the same instant.
#[cfg(target_env = "gnu")]
const MAX_HEAPS: usize = 8;

#[cfg(target_env = "gnu")]
fn limit_heaps() {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: called before any other thread exists; it sets a number in the allocator and touches no memory of ours.
    // It refuses by returning 0, which leaves the default: worse, not wrong.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, processors.clamp(2, MAX_HEAPS) as libc::c_int) };
}

fn main() -> ExitCode {
    #[cfg(target_env = "gnu")]
    limit_heaps();
    let cli = Cli::of_process();
    let filter = EnvFilter::try_from_env("SHOAL_LOG").unwrap_or_else(|_| EnvFilter::new(cli.default_log()));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("shoal: {}", shoal::chain(&*error));
            ExitCode::FAILURE
        }
    }
}
