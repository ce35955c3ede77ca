//! Credential helpers: programs named `docker-credential-NAME` that look passwords up in a keychain.
//!
//! The protocol is that of docker-credential-helpers: `get`, the registry on standard input, a JSON object on standard
//! output. What a helper writes is never shown, since it may be a secret. It has half a minute, and is ended with all that it
//! has started when nobody waits for it any more. Nothing here blocks a thread.

use std::{ffi::OsStr, io, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};

use super::Credentials;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most bytes that are read of an answer.
const MAX_ANSWER: u64 = 64 * 1024;
/// What helpers say, on standard output and with an exit code of 1, when they have nothing for a registry.
const NOT_FOUND: &str = "credentials not found";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Asks the helper called `name`, which must be found in PATH, for the credentials of a registry. May be dropped at any time,
/// which ends the helper.
///
/// # Errors
/// What went wrong, in words that have nothing of the answer.
pub(super) async fn ask(name: &str, registry: &str) -> Result<Option<Credentials>, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(plain) {
        return Err("its name has other characters than letters, digits, '-', '_' and '.'".to_owned());
    }
    run(format!("docker-credential-{name}").as_ref(), registry, PATIENCE).await
}

async fn run(program: &OsStr, registry: &str, patience: Duration) -> Result<Option<Credentials>, String> {
    let talked = timeout(patience, talk(program, registry)).await;
    let (code, output) =
        talked.map_err(|_| format!("no answer for {patience:?}"))?.map_err(|error| error.to_string())?;
    read(code, &output).map_err(str::to_owned)
}

fn read(code: Option<i32>, output: &[u8]) -> Result<Option<Credentials>, &'static str> {
    if code != Some(0) {
        return match String::from_utf8_lossy(output).contains(NOT_FOUND) {
            true => Ok(None),
            false => Err("it ended with an error"),
        };
    }
    let answer: Answer = serde_json::from_slice(output).map_err(|_| "its answer is no JSON of a password")?;
    Ok(Some(Credentials { username: answer.username, password: answer.secret }))
}

/// A helper that runs, in a group of its own.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // There is no number any more once it has ended and was waited for.
        if let Some(group) = self.0.id().and_then(|id| Pid::from_raw(id as i32)) {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn talk(program: &OsStr, registry: &str) -> io::Result<(Option<i32>, Vec<u8>)> {
    let mut command = Command::new(program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut running = Running(command.process_group(0).kill_on_drop(true).spawn()?);
    if let Some(mut input) = running.0.stdin.take() {
        // One that needs no registry to answer may have closed its end.
        let _ = input.write_all(format!("{registry}\n").as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(stdout) = running.0.stdout.take() {
        stdout.take(MAX_ANSWER).read_to_end(&mut output).await?;
    }
    Ok((running.0.wait().await?.code(), output))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, time::Instant};

    use super::*;

    /// A program that nobody has open for writing, as one would that this process had written: it can be run at once.
    fn script(folder: &Path, text: &str) -> std::path::PathBuf {
        let (source, program) = (folder.join("source"), folder.join("helper"));
        fs::write(&source, format!("#!/bin/sh\n{text}\n")).unwrap();
        let copied = std::process::Command::new("install").arg("-m755").args([&source, &program]).status().unwrap();
        assert!(copied.success());
        program
    }

    async fn asked(text: &str, patience: Duration) -> Result<Option<Credentials>, String> {
        let folder = tempfile::tempdir().unwrap();
        run(script(folder.path(), text).as_os_str(), "h.io", patience).await
    }

    #[test]
    fn answers_are_understood_and_never_quoted() {
        let credentials = Credentials { username: "user".to_owned(), password: "secret".to_owned() };
        let answer = r#"{"ServerURL":"h.io","Username":"user","Secret":"secret"}"#;
        assert_eq!(read(Some(0), answer.as_bytes()).unwrap(), Some(credentials));
        assert_eq!(read(Some(1), b"credentials not found in native keychain\n").unwrap(), None);
        let token = read(Some(0), br#"{"Username":"<token>","Secret":"secret"}"#).unwrap();
        assert_eq!(token, Some(Credentials::identity_token("secret".to_owned())));
        for (code, output) in [(1, "secret"), (0, "secret"), (0, r#"{"Username":"secret"}"#)] {
            let error = read(Some(code), output.as_bytes()).unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_program_is_asked_on_its_standard_input() {
        let answer = r#"read registry; echo "{\"Username\": \"$1\", \"Secret\": \"of $registry\"}""#;
        let expected = Credentials { username: "get".to_owned(), password: "of h.io".to_owned() };
        assert_eq!(asked(answer, PATIENCE).await.unwrap(), Some(expected));
        assert_eq!(asked("echo credentials not found; exit 1", PATIENCE).await.unwrap(), None);
    }

    #[tokio::test]
    async fn one_that_says_nothing_is_ended_with_what_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let started = folder.path().join("started");
        let begun = Instant::now();
        let text = format!("sleep 600 & echo $! > {}; wait", started.display());
        let error = asked(&text, Duration::from_secs(2)).await.unwrap_err();
        assert!(error.contains("no answer") && begun.elapsed() < Duration::from_secs(300), "{error}");
        let pid: i32 = fs::read_to_string(started).unwrap().trim().parse().unwrap();
        let gone = || {
            // Whoever adopts it may not have waited for it yet.
            let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        };
        for _ in 0..1000 {
            if gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("process {pid} is still there");
    }

    #[tokio::test]
    async fn one_that_says_too_much_is_not_listened_to() {
        let error = asked("while :; do echo '                      '; done", PATIENCE).await.unwrap_err();
        assert!(error.contains("error"), "{error}");
    }

    #[tokio::test]
    async fn names_lead_to_no_other_program() {
        for name in ["", "../x", "a b", "a/b", "$(x)"] {
            assert!(ask(name, "h.io").await.unwrap_err().contains("characters"), "{name}");
        }
        assert!(ask("no-such-helper", "h.io").await.is_err());
    }
}
