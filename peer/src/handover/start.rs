//! Starting a keeper: this program once more, as `shoal keeper`, in a session of its own.

use std::{
    fs::{self, File},
    io,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use shoal_keeper::Client;

use super::HandoverOptions;

/// How long a keeper may take until it answers.
const LIMIT: Duration = Duration::from_secs(5);

/// Bytes of its log from which on the next keeper begins another one. A keeper says a few lines, and one more for each thing that goes
/// wrong.
const MAX_LOG: u64 = 1 << 20;

/// Starts a keeper and connects to it.
///
/// # Errors
/// It does not start, or not in time; what it said is in its log, which the message names.
pub(super) fn keeper(options: &HandoverOptions) -> io::Result<Client> {
    // Also when the program's file has been replaced by another version.
    let mut command = Command::new("/proc/self/exe");
    command.arg("keeper").arg("--socket").arg(&options.socket);
    command.arg("--patience").arg(format!("{}ms", options.patience.as_millis()));
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log_file(&options.log)?);
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

/// What a keeper says goes behind what earlier ones have said: that is what explains why there is another one. The file of a log that has
/// become too long is left to the name with `.old` behind, so that both together are bounded.
fn log_file(path: &Path) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|log| log.len() > MAX_LOG) {
        let mut old = path.as_os_str().to_owned();
        old.push(".old");
        fs::rename(path, old)?;
    }
    File::options().create(true).append(true).open(path)
}

/// Takes note of its end, should this process see it.
fn reap(mut child: Child) -> io::Result<()> {
    let wait = move || match child.wait() {
        Ok(status) => tracing::debug!("the keeper has ended with {status}"),
        Err(error) => tracing::debug!("the keeper cannot be waited for: {error}"),
    };
    thread::Builder::new().name("shoal-keeper".into()).spawn(wait).map(drop)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_the_last_keeper_said_is_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("keeper.log"), folder.path().join("keeper.log.old"));
        for line in ["first\n", "second\n"] {
            log_file(&path).unwrap().write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "first\nsecond\n");
        for round in 0..3 {
            let long = vec![b'a' + round; MAX_LOG as usize + 1];
            log_file(&path).unwrap().write_all(&long).unwrap();
            drop(log_file(&path).unwrap());
            assert_eq!(fs::metadata(&path).unwrap().len(), 0);
            assert!(fs::read(&old).unwrap().ends_with(&long));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
