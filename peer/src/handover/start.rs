//! Starting a keeper: this program once more, as `shoal keeper`, in a session of its own.

use std::{
    fs::File,
    io,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use shoal_keeper::Client;

use super::HandoverOptions;

/// How long a keeper may take until it answers.
const LIMIT: Duration = Duration::from_secs(5);

/// Starts a keeper and connects to it.
///
/// # Errors
/// It does not start, or not in time; what it said is in its log, which the message names.
pub(super) fn keeper(options: &HandoverOptions) -> io::Result<Client> {
    // Also when the program's file has been replaced by another version.
    let mut command = Command::new("/proc/self/exe");
    command.arg("keeper").arg("--socket").arg(&options.socket);
    command.arg("--patience").arg(format!("{}ms", options.patience.as_millis()));
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&options.log)?);
    let mut child = command.spawn()?;
    let log = options.log.display();
    let deadline = Instant::now() + LIMIT;
    loop {
        match (Client::connect(&options.socket), child.try_wait()?) {
            (Ok(keeper), _) => {
                reap(child)?;
                return Ok(keeper);
            }
            (Err(_), Some(status)) => {
                return Err(io::Error::other(format!("the keeper ended with {status}, see {log}")));
            }
            (Err(error), None) if Instant::now() > deadline => {
                child.kill()?;
                child.wait()?;
                let why = crate::chain(&error);
                return Err(io::Error::other(format!("the keeper does not answer, see {log}: {why}")));
            }
            (Err(_), None) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Takes note of its end, should this process see it.
fn reap(mut child: Child) -> io::Result<()> {
    let wait = move || match child.wait() {
        Ok(status) => tracing::debug!("the keeper has ended with {status}"),
        Err(error) => tracing::debug!("the keeper cannot be waited for: {error}"),
    };
    thread::Builder::new().name("shoal-keeper".into()).spawn(wait).map(drop)
}
