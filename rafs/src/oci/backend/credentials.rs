//! The keys of an object storage: from a file of the form of `~/.aws/credentials`, or from the environment.

use std::{env, fmt, fs, io, path::Path};

/// Largest file that is read.
const MAX_FILE: u64 = 64 << 10;

/// Why a file of keys cannot be used. Never shows what is in it.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsFileError {
    /// It could not be read.
    #[error("cannot read the credentials {path}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// It has no key, or one without its secret.
    #[error("{path} has no aws_access_key_id with an aws_secret_access_key in [default]")]
    Incomplete {
        /// The file.
        path: String,
    },
}

/// A key and its secret.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Keys {
    pub(super) id: String,
    pub(super) secret: String,
    pub(super) token: Option<String>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").finish_non_exhaustive()
    }
}

impl Keys {
    /// Those of the file, without one those of the environment, if it has any.
    pub(super) fn find(file: Option<&Path>) -> Result<Option<Self>, CredentialsFileError> {
        let Some(path) = file else {
            let of = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
            let keys = of("AWS_ACCESS_KEY_ID").zip(of("AWS_SECRET_ACCESS_KEY"));
            return Ok(keys.map(|(id, secret)| Self { id, secret, token: of("AWS_SESSION_TOKEN") }));
        };
        let name = path.display().to_string();
        let failed = |source| CredentialsFileError::Read { path: name.clone(), source };
        if fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
            return Err(failed(io::Error::other("it is too large")));
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        Self::parse(&text).map(Some).ok_or(CredentialsFileError::Incomplete { path: name })
    }

    /// The keys before any section and in the section `default`.
    fn parse(text: &str) -> Option<Self> {
        let (mut id, mut secret, mut token, mut ours) = (None, None, None, true);
        for line in text.lines().map(str::trim) {
            if let Some(section) = line.strip_prefix('[') {
                ours = section.trim_end_matches(']').trim() == "default";
            } else if let Some((key, value)) = line.split_once('=').filter(|_| ours && !line.starts_with('#')) {
                let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
                match key.trim() {
                    "aws_access_key_id" => id = value,
                    "aws_secret_access_key" => secret = value,
                    "aws_session_token" => token = value,
                    _ => {}
                }
            }
        }
        Some(Self { id: id?, secret: secret?, token })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_from_the_default_section() {
        let keys = Keys::parse(
            "# a comment = x\n[other]\naws_access_key_id = no\n[default]\naws_access_key_id=AKID\n\
             aws_secret_access_key = s=cret/+\nregion = x\n[last]\naws_session_token = no\n",
        )
        .unwrap();
        assert_eq!((keys.id.as_str(), keys.secret.as_str(), &keys.token), ("AKID", "s=cret/+", &None));
        assert!(!format!("{keys:?}").contains("s=cret"), "{keys:?}");
        let keys = Keys::parse("aws_access_key_id=a\naws_secret_access_key=b\naws_session_token=c").unwrap();
        assert_eq!(keys.token.as_deref(), Some("c"));
        for text in ["", "aws_access_key_id=a", "[x]\naws_access_key_id=a\naws_secret_access_key=b", "garbage"] {
            assert_eq!(Keys::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_file_that_is_no_use_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "aws_secret_access_key=hidden").unwrap();
        let error = Keys::find(Some(file.path())).unwrap_err().to_string();
        assert!(error.contains(&file.path().display().to_string()) && !error.contains("hidden"), "{error}");
        assert!(matches!(Keys::find(Some(Path::new("/absent"))), Err(CredentialsFileError::Read { .. })));
    }
}
