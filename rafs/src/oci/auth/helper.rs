//! Credential helpers: programs named `docker-credential-NAME` that look passwords up in a keychain.
//!
//! The protocol is that of docker-credential-helpers: `get`, the registry on standard input, a JSON object on standard
//! output. What a helper writes is never shown, since it may be a secret.

use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    process::{Command, Stdio},
};

use serde::Deserialize;

use super::{AuthfileError, Credentials};

/// Most bytes that are read of an answer.
const MAX_ANSWER: u64 = 64 * 1024;
/// What helpers say, on standard output and with an exit code of 1, when they have nothing for a registry.
const NOT_FOUND: &str = "credentials not found";
/// The user name that comes with an identity token, which is no password.
const TOKEN_USER: &str = "<token>";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Asks the helper called `name`, which must be found in PATH, for the credentials of a registry.
pub(super) fn ask(name: &str, registry: &str) -> Result<Option<Credentials>, AuthfileError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(plain) {
        return Err(failed(name, registry, "its name has other characters than letters, digits, '-', '_' and '.'"));
    }
    run(format!("docker-credential-{name}").as_ref(), name, registry)
}

fn run(program: &OsStr, name: &str, registry: &str) -> Result<Option<Credentials>, AuthfileError> {
    let (code, output) = talk(program, registry).map_err(|error| failed(name, registry, &error.to_string()))?;
    read(code, &output, name, registry)
}

fn read(code: Option<i32>, output: &[u8], name: &str, registry: &str) -> Result<Option<Credentials>, AuthfileError> {
    let failed = |reason: &str| failed(name, registry, reason);
    if code != Some(0) {
        return match String::from_utf8_lossy(output).contains(NOT_FOUND) {
            true => Ok(None),
            false => Err(failed("it ended with an error")),
        };
    }
    let answer: Answer = serde_json::from_slice(output).map_err(|_| failed("its answer is no JSON of a password"))?;
    if answer.username == TOKEN_USER {
        return Err(failed("it has an identity token, which is not supported"));
    }
    Ok(Some(Credentials { username: answer.username, password: answer.secret }))
}

fn talk(program: &OsStr, registry: &str) -> io::Result<(Option<i32>, Vec<u8>)> {
    let mut command = Command::new(program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // One that needs no registry to answer may have closed its end.
        let _ = writeln!(input, "{registry}");
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_ANSWER).read_to_end(&mut output)?;
    }
    Ok((child.wait()?.code(), output))
}

fn failed(name: &str, registry: &str, reason: &str) -> AuthfileError {
    let (helper, registry) = (name.chars().take(60).collect(), registry.to_owned());
    AuthfileError::Helper { helper, registry, reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the answer of a helper means: exit code and output.
    fn meaning(code: i32, output: &str) -> Result<Option<Credentials>, AuthfileError> {
        read(Some(code), output.as_bytes(), "test", "h.io")
    }

    #[test]
    fn answers_are_understood_and_never_quoted() {
        let credentials = Credentials { username: "user".to_owned(), password: "secret".to_owned() };
        let answer = r#"{"ServerURL":"h.io","Username":"user","Secret":"secret"}"#;
        assert_eq!(meaning(0, answer).unwrap(), Some(credentials));
        assert_eq!(meaning(1, "credentials not found in native keychain\n").unwrap(), None);
        let token = r#"{"Username":"<token>","Secret":"secret"}"#;
        for (code, output) in [(1, "secret"), (0, "secret"), (0, r#"{"Username":"secret"}"#), (0, token)] {
            let error = meaning(code, output).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(shown.contains("h.io") && !shown.contains("secret"), "{shown}");
        }
    }

    #[test]
    fn a_program_is_asked_on_its_standard_input() {
        // `cat get` has no such file; what it says goes nowhere.
        let (code, output) = talk("cat".as_ref(), "h.io").unwrap();
        assert_ne!(code, Some(0));
        assert!(output.is_empty());
    }

    #[test]
    fn names_lead_to_no_other_program() {
        for name in ["", "../x", "a b", "a/b", "$(x)"] {
            assert!(ask(name, "h.io").is_err(), "{name}");
        }
        let error = ask("no-such-helper", "h.io").unwrap_err().to_string();
        assert!(error.contains("no-such-helper") && error.contains("h.io"), "{error}");
    }
}
