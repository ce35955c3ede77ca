//! The command line. Each verb has a file below `command/`; this one holds what they share.

mod cluster;
mod ctl;
mod daemon;
mod demo;
mod identity;
mod image;
mod keeper;
mod mirror;
mod mount;
mod nydus_image;
mod preheat;
mod serve_layout;
mod store;

use std::{error::Error, process::ExitCode};

use clap::{Parser, Subcommand};
use sd_notify::NotifyState;

/// What a verb ends with: the text goes to standard error after `shoal: `, and the exit code is 1.
pub type Failure = Box<dyn Error + Send + Sync>;

/// Lazy container images whose chunks come from other nodes.
///
/// Log lines go to standard error; SHOAL_LOG sets their level (for instance `debug` or `shoal=debug,libp2p=info`).
#[derive(Debug, Parser)]
#[command(name = "shoal", version, arg_required_else_help = true, max_term_width = 118)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build, check, unpack and push RAFS v6 images.
    #[command(subcommand, arg_required_else_help = true)]
    Image(image::Image),
    NydusImage(nydus_image::NydusImage),
    /// Mount an image lazily in the foreground, without a daemon, until SIGTERM or SIGINT.
    Mount(mount::Mount),
    /// Run the node daemon.
    Daemon(daemon::Daemon),
    /// Keep the daemon's mounts alive while it is restarted.
    Keeper(keeper::Keeper),
    /// Make a cluster's key, and decide with it who may join.
    #[command(subcommand, arg_required_else_help = true)]
    Cluster(cluster::Cluster),
    /// Print the identity of the node.
    Identity(identity::Identity),
    /// Talk to the node daemon.
    Ctl(ctl::Ctl),
    /// Have nodes fetch an image before it is needed there.
    Preheat(preheat::Preheat),
    /// Look into a node's store, through its daemon or without one.
    #[command(subcommand, arg_required_else_help = true)]
    Store(store::Store),
    /// Have containerd pull through the node daemon.
    #[command(subcommand, arg_required_else_help = true)]
    Mirror(mirror::Mirror),
    /// Serve an OCI layout directory as a read-only registry.
    ServeLayout(serve_layout::ServeLayout),
    /// Run a registry, a seed peer and nodes on this machine, mount an image on each and compare every byte.
    Demo(demo::Demo),
}

impl Cli {
    /// The command line of this process. Called by the name `nydus-image`, it is that of the verb.
    pub fn of_process() -> Self {
        match nydus_image::NydusImage::by_name() {
            Some(verb) => Self { verb: Verb::NydusImage(verb) },
            None => Self::parse(),
        }
    }

    /// The log level when `SHOAL_LOG` sets none: a daemon reports, a tool speaks up only when something is wrong.
    pub fn default_log(&self) -> &'static str {
        match &self.verb {
            Verb::NydusImage(verb) => verb.default_log(),
            Verb::Daemon(_) => "info,libp2p=warn,quinn=warn",
            Verb::Keeper(_) => "info",
            _ => "warn",
        }
    }

    /// Carries the command out.
    ///
    /// # Errors
    /// Whatever made the verb fail; `main` prints it with its causes.
    pub fn run(self) -> Result<ExitCode, Failure> {
        match self.verb {
            Verb::Image(verb) => verb.run(),
            Verb::NydusImage(verb) => verb.run(),
            Verb::Mount(verb) => verb.run(),
            Verb::Daemon(verb) => verb.run(),
            Verb::Keeper(verb) => verb.run(),
            Verb::Cluster(verb) => verb.run(),
            Verb::Identity(verb) => verb.run(),
            Verb::Ctl(verb) => verb.run(),
            Verb::Preheat(verb) => verb.run(),
            Verb::Store(verb) => verb.run(),
            Verb::Mirror(verb) => verb.run(),
            Verb::ServeLayout(verb) => verb.run(),
            Verb::Demo(verb) => verb.run(),
        }
    }
}

/// Ends the process as clap does for arguments that it refuses itself: a message with the usage, and code 2.
fn bad_usage(kind: clap::error::ErrorKind, message: &str) -> ! {
    <Cli as clap::CommandFactory>::command().error(kind, message).exit()
}

/// A runtime for the verbs that do network I/O.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// Resolves when the process is asked to stop: SIGTERM, SIGINT or SIGHUP.
async fn stop_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

/// For a unit of `Type=notify`; elsewhere nobody is told.
fn tell_systemd(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("cannot notify systemd: {error}");
    }
}

/// Prints `value` as one JSON document on standard output.
fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

/// `n` bytes for people: `12.3 MiB`.
fn human_bytes(n: u64) -> String {
    indicatif::HumanBytes(n).to_string()
}
