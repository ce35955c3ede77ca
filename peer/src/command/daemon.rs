//! `shoal daemon`: the node daemon in the foreground.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use sd_notify::NotifyState;
use tokio_util::task::AbortOnDropHandle;

use super::{Failure, print_json, runtime, stop_signal, tell_systemd};
use crate::{
    config::Config,
    daemon,
    upgrade::{Candidate, Inheritance, Listener, Next, Understands},
};

/// How long what blocks on a disk or the kernel may go on when the daemon has stopped.
const RUNTIME_GRACE: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT, then withdraws what it announced, unmounts (or leaves the mounts, as configured) and
/// closes the store. With a keeper, the next daemon goes on with the mounts. `docs/shoal.toml` documents every option with its unit and default.
#[derive(Debug, clap::Args)]
pub(super) struct Daemon {
    /// Configuration file (TOML). Without it every option has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets one option over the file, for instance `--set zone=b` or `--set data.listen=127.0.0.1:0`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Shorthand for `--set data_dir=DIR`.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Shorthand for `--set socket=PATH`.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Shorthand for `--set role=ROLE`.
    #[arg(long, value_name = "node|seed")]
    role: Option<String>,
    /// Shorthand for `--set zone=ZONE`.
    #[arg(long)]
    zone: Option<String>,
    /// Prints the configuration that would be used, as TOML, and exits.
    #[arg(long)]
    print_config: bool,
    /// Says whether a daemon would start with this configuration and what it names, and exits. Disturbs none that runs.
    #[arg(long, conflicts_with = "print_config")]
    check_config: bool,
    /// With --check-config: print as JSON what this version goes on with when another one has left it, as `shoal ctl upgrade` asks.
    #[arg(long, requires = "check_config")]
    json: bool,
}

/// How a daemon ended.
enum End {
    Stopped,
    /// For this program, to which it leaves these.
    MakesWay(Candidate, Vec<Listener>),
}

impl Daemon {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let inheritance = Inheritance::take();
        let config = match self.config() {
            Ok(config) => config,
            Err(error) => return Err(no_start(error, inheritance)),
        };
        if self.print_config {
            print!("{}", toml::to_string(&config)?);
            return Ok(ExitCode::SUCCESS);
        }
        if self.check_config {
            daemon::Daemon::check(&config)?;
            if self.json {
                print_json(&Understands::here())?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        Self::serve(config, inheritance)
    }

    /// Runs the daemon until it is stopped, or this process becomes another version of it.
    fn serve(config: Config, mut inheritance: Inheritance) -> Result<ExitCode, Failure> {
        let runtime = runtime()?;
        let ended = runtime.block_on(run(config, &mut inheritance));
        // Before this process becomes another program: nobody else may start one.
        runtime.shutdown_timeout(RUNTIME_GRACE);
        let (candidate, listeners) = match ended {
            Ok(End::Stopped) => return Ok(ExitCode::SUCCESS),
            Ok(End::MakesWay(candidate, listeners)) => (candidate, listeners),
            Err(error) => return Err(no_start(error, inheritance)),
        };
        let failure = candidate.become_it(listeners);
        Err(failure.into())
    }

    fn config(&self) -> Result<Config, Failure> {
        let quoted = |key: &str, value: &str| format!("{key}={}", toml::Value::String(value.to_owned()));
        let path = |path: &PathBuf| path.display().to_string();
        let mut overrides = self.overrides.clone();
        overrides.extend(self.data_dir.as_ref().map(|dir| quoted("data_dir", &path(dir))));
        overrides.extend(self.socket.as_ref().map(|socket| quoted("socket", &path(socket))));
        overrides.extend(self.role.as_ref().map(|role| quoted("role", role)));
        overrides.extend(self.zone.as_ref().map(|zone| quoted("zone", zone)));
        Ok(Config::load(self.config.as_deref(), &overrides)?)
    }
}

/// Runs a daemon.
async fn run(config: Config, inheritance: &mut Inheritance) -> Result<End, Failure> {
    // Before anything else, so that a signal during the start is not lost.
    let stop = stop_signal();
    tokio::pin!(stop);
    let _alive = AbortOnDropHandle::new(tokio::spawn(show_life()));
    let mut daemon = tokio::select! {
        daemon = daemon::Daemon::start(config, inheritance) => daemon?,
        stop = &mut stop => {
            stop?;
            return Ok(End::Stopped);
        }
    };
    // It has what it was left, and need not fall back any more.
    *inheritance = Inheritance::default();
    tell_systemd(&[NotifyState::Ready]);
    let next = tokio::select! {
        stop = &mut stop => {
            stop?;
            tell_systemd(&[NotifyState::Stopping]);
            daemon.stop().await;
            return Ok(End::Stopped);
        }
        next = daemon.upgrade() => next,
    };
    match next {
        Next::Program(candidate) => {
            // The one without the other ends the service, since systemd 253.
            match NotifyState::monotonic_usec_now() {
                Ok(now) => tell_systemd(&[NotifyState::Reloading, now]),
                Err(error) => tracing::warn!("systemd is not told of the upgrade: {error}"),
            }
            Ok(End::MakesWay(candidate, daemon.leave().await))
        }
        Next::Supervisor => {
            tell_systemd(&[NotifyState::Stopping]);
            daemon.make_way().await;
            Ok(End::Stopped)
        }
    }
}

/// Tells systemd again and again that this process runs, if it wants to know: one that is stopped, or whose tasks get no turn, is killed
/// and started again. Until then its sockets take callers, who wait.
async fn show_life() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    loop {
        tell_systemd(&[NotifyState::Watchdog]);
        tokio::time::sleep(limit / 3).await;
    }
}

/// The daemon does not start. Where it was to take the place of another version, that one runs again, and this does not return.
fn no_start(error: Failure, inheritance: Inheritance) -> Failure {
    let failure = format!("version {} does not start: {}", env!("CARGO_PKG_VERSION"), crate::chain(&*error));
    inheritance.fall_back(&failure);
    error
}
