//! A program that may take the daemon's place: examined, and run.

use std::{
    env,
    fs::{self, File},
    io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::timeout,
};

use super::{Inheritance, Listener, Understands, UpgradeError};

/// The program of this process.
const OWN: &str = "/proc/self/exe";
/// How long a program may take to say what it understands. It starts, and reads files.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most that is heard of what it says.
const MAX_SAID: u64 = 16 << 10;
/// Most of what it complains that is passed on: the end, where the reason is.
const MAX_COMPLAINT: usize = 1024;
/// Who may write besides the owner: nobody.
const OTHERS_WRITE: u32 = 0o022;

/// A program that runs, takes the configuration, and goes on where this one ends.
#[derive(Debug)]
pub(crate) struct Candidate {
    path: PathBuf,
    version: String,
    identity: Identity,
    /// The program of this process, to fall back to. Its file may have been replaced.
    current: File,
}

/// What changes when a file is replaced or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    changed: (i64, i64),
    length: u64,
}

impl Candidate {
    /// Examines `path`; none is where this process' own program was.
    pub(crate) async fn examine(path: Option<PathBuf>) -> Result<Self, UpgradeError> {
        let own = |source| UpgradeError::NotRun { path: OWN.into(), source };
        let current = File::open(OWN).map_err(own)?;
        let path = path.map_or_else(own_path, Ok).map_err(own)?;
        let identity = look(&path)?;
        let understands = ask(&path).await?;
        if look(&path)? != identity {
            let reason = "it was replaced while it was examined".to_owned();
            return Err(UpgradeError::Unfit { path, reason });
        }
        if let Some((what, ours)) = understands.lacks() {
            return Err(UpgradeError::Incompatible { path, version: understands.version, what, ours });
        }
        Ok(Self { path, version: understands.version, identity, current })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Becomes this program, with the arguments of this process and `listeners`. If that fails, becomes the present program once more:
    /// what this process has begun to leave it cannot take back. Returns why, if that fails, too. No other thread may start programs
    /// meanwhile.
    pub(crate) fn become_it(self, listeners: Vec<Listener>) -> String {
        let inheritance = Inheritance::new(listeners, self.current.into());
        let error = match look(&self.path) {
            Ok(identity) if identity == self.identity => {
                let mut command = Command::new(&self.path);
                command.args(env::args_os().skip(1));
                run(command, &inheritance)
            }
            Ok(_) => io::Error::other("it was replaced after it was examined"),
            Err(error) => io::Error::other(error.to_string()),
        };
        let failure = format!("{} does not run: {error}", self.path.display());
        inheritance.fall_back(&failure);
        failure
    }
}

/// Replaces this process. Returns only if that fails, and then nothing has changed.
pub(super) fn run(mut command: Command, inheritance: &Inheritance) -> io::Error {
    match inheritance.put_into(&mut command) {
        Ok(()) => {
            let error = command.exec();
            inheritance.keep_here();
            error
        }
        Err(error) => error,
    }
}

/// Where the program of this process was; another version may be there by now.
fn own_path() -> io::Result<PathBuf> {
    let path = env::current_exe()?;
    // What the kernel adds where the file was replaced.
    match path.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(path) => Ok(std::ffi::OsString::from_vec(path.to_vec()).into()),
        None => Ok(path),
    }
}

/// Whether it can be run, and nobody else has written it.
fn look(path: &Path) -> Result<Identity, UpgradeError> {
    let unfit = |reason: &str| UpgradeError::Unfit { path: path.to_owned(), reason: reason.to_owned() };
    if !path.is_absolute() {
        return Err(unfit("its path is not absolute"));
    }
    let metadata = fs::metadata(path).map_err(|error| unfit(&error.to_string()))?;
    let user = rustix::process::geteuid().as_raw();
    if !metadata.is_file() {
        return Err(unfit("it is no file"));
    }
    if metadata.mode() & 0o111 == 0 {
        return Err(unfit("it is not executable"));
    }
    if ![0, user].contains(&metadata.uid()) || metadata.mode() & OTHERS_WRITE != 0 {
        return Err(unfit("others than root and the daemon's user may have written it"));
    }
    let changed = (metadata.mtime(), metadata.mtime_nsec());
    Ok(Identity { device: metadata.dev(), inode: metadata.ino(), changed, length: metadata.len() })
}

/// Has the program say what it understands; it reads the configuration for that.
async fn ask(path: &Path) -> Result<Understands, UpgradeError> {
    let not_run = |source| UpgradeError::NotRun { path: path.to_owned(), source };
    let refuses = |said: String| UpgradeError::Refuses { path: path.to_owned(), said };
    let mut command = tokio::process::Command::new(path);
    command.args(env::args_os().skip(1)).args(["--check-config", "--json"]);
    // It is not the service.
    command.env_remove("NOTIFY_SOCKET");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(not_run)?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(not_run(io::Error::other("it has no output")));
    };
    let ended = timeout(PATIENCE, async {
        let (said, complaint) = tokio::try_join!(hear(stdout), hear(stderr))?;
        Ok((said, complaint, child.wait().await?))
    });
    let (said, complaint, status) = match ended.await {
        Ok(ended) => ended.map_err(not_run)?,
        Err(_) => return Err(refuses(format!("it has said nothing for {} s", PATIENCE.as_secs()))),
    };
    if !status.success() {
        return Err(refuses(complaint_of(&complaint, &status.to_string())));
    }
    serde_json::from_slice(&said).map_err(|_| refuses("it does not say what it understands".into()))
}

/// What comes out of a pipe, which is broken when that is too much.
async fn hear(pipe: impl AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let mut heard = Vec::new();
    pipe.take(MAX_SAID).read_to_end(&mut heard).await?;
    Ok(heard)
}

/// The end of what a program has complained, in one line.
fn complaint_of(bytes: &[u8], status: &str) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let text = lines.join(" ");
    let cut = text.len().saturating_sub(MAX_COMPLAINT);
    let cut = (cut..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    if text.is_empty() { status.to_owned() } else { text[cut..].to_owned() }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn what_others_may_have_written_is_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shoal");
        let reason = |mode: u32| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            look(&path).err().map(|error| error.to_string())
        };
        assert!(look(&path).is_err(), "it is not there");
        fs::write(&path, "#!/bin/sh\n").unwrap();
        assert!(reason(0o644).unwrap().ends_with("it is not executable"));
        assert!(reason(0o775).unwrap().contains("others than root"));
        assert!(reason(0o757).unwrap().contains("others than root"));
        assert_eq!(reason(0o755), None);
        assert!(look(folder.path()).unwrap_err().to_string().ends_with("it is no file"));
        assert!(look(Path::new("shoal")).unwrap_err().to_string().ends_with("not absolute"));
    }

    /// Written by another process: what a thread of this one has open for writing, any other that forks has for a moment, too,
    /// and then it cannot be run.
    fn install(path: &Path, text: &str) {
        let mut install =
            Command::new("install").args(["-m755", "/dev/stdin"]).arg(path).stdin(Stdio::piped()).spawn().unwrap();
        install.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(install.wait().unwrap().success());
    }

    #[tokio::test]
    async fn what_a_program_says_is_passed_on_within_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shoal");
        let mut said = Vec::new();
        for script in [
            "echo no such key >&2; exit 1",
            "exit 3",
            "echo hello",
            "while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa; done",
        ] {
            install(&path, &format!("#!/bin/sh\n{script}\n"));
            said.push(Candidate::examine(Some(path.clone())).await.unwrap_err().to_string());
        }
        assert!(said[0].ends_with("refuses the present configuration: no such key"), "{said:?}");
        assert!(said[1].ends_with("exit status: 3"), "{said:?}");
        assert!(said[2].ends_with("does not say what it understands"), "{said:?}");
        assert!(said[3].contains("refuses"), "{said:?}");
        install(&path, "neither a script nor anything else");
        assert!(matches!(Candidate::examine(Some(path)).await, Err(UpgradeError::NotRun { .. })));
    }

    #[test]
    fn only_the_end_of_a_long_complaint_is_passed_on() {
        let long = "é".repeat(MAX_COMPLAINT);
        let kept = complaint_of(format!("first\n{long}\n").as_bytes(), "");
        assert!(kept.len() <= MAX_COMPLAINT && kept.ends_with('é') && !kept.contains("first"));
        assert_eq!(complaint_of(b"\n \n", "exit status: 2"), "exit status: 2");
    }
}
