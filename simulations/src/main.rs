//! `shoal-sim`: what a rollout costs, before it is rolled out.

mod command;

use std::{env, os::unix::process::CommandExt, process::ExitCode};

use clap::Parser;

use self::command::Command;

/// Runs swarms in virtual time around Shoal's own scheduler.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// Where glibc reads from what its allocator is to do; only before a program starts.
const TUNABLES: &str = "GLIBC_TUNABLES";

/// Starts this program once more with an allocator that asks for huge pages: a large swarm is gigabytes that are touched all
/// over, and with small ones a good part of the time goes into finding them. Who has set the variable is left alone. Comes
/// back if it cannot be done; it is only slower then.
fn use_huge_pages() {
    if env::var_os(TUNABLES).is_none()
        && let Ok(program) = env::current_exe()
    {
        let mut again = std::process::Command::new(program);
        let _ = again.args(env::args_os().skip(1)).env(TUNABLES, "glibc.malloc.hugetlb=1").exec();
    }
}

fn main() -> ExitCode {
    use_huge_pages();
    match Arguments::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("shoal-sim: {failure}");
            ExitCode::FAILURE
        }
    }
}
