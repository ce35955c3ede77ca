//! The command line of `nydus-image`, for programs that call it to build: BuildKit, nydusify, converters of the Nydus
//! snapshotter. `shoal` answers to it when it is called by that name, and as `shoal nydus-image`.
//!
//! It only translates: what is done is what `shoal image` does. What these programs ask for and is not done here is refused,
//! never left out in silence. They look for options in the help of `create`, so it shows all that work and no others.

use std::{
    ffi::OsStr,
    io::Read,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{CommandFactory, Parser, Subcommand, ValueEnum, error::ErrorKind};
use sha2::{Digest, Sha256};
use shoal_rafs::PrefetchList;

use super::Failure;

mod check;
mod create;
mod inspect;
mod merge;
mod output;
mod unpack;

/// The name of the program whose command line this is.
const NAME: &str = "nydus-image";

/// In lines, as those who look for a version expect it.
const VERSION: &str = concat!("\nVersion: \tv", env!("CARGO_PKG_VERSION"), "\nProgram: \tshoal");

/// Build, merge, check and unpack images as `nydus-image` does, for programs that call it.
#[derive(Debug, Parser)]
#[command(name = NAME, version = VERSION, arg_required_else_help = true, max_term_width = 118)]
pub(super) struct NydusImage {
    /// How much goes to standard error; SHOAL_LOG overrides it.
    #[arg(long, short = 'l', global = true, value_enum, default_value = "info")]
    log_level: LogLevel,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum LogLevel {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Build an image from a directory or a tar.
    Create(Box<create::Create>),
    /// Merge the bootstraps of layers into that of an image.
    Merge(merge::Merge),
    /// Verify a bootstrap and, with the blobs, every chunk. Exits 1 when something is wrong.
    Check(check::Check),
    /// Write a layer or an image as a tar.
    Unpack(unpack::Unpack),
    /// Show what a bootstrap says.
    Inspect(inspect::Inspect),
}

impl NydusImage {
    /// The command line, if this program was called by the name of the other.
    pub(super) fn by_name() -> Option<Self> {
        let program = std::env::args_os().next()?;
        (Path::new(&program).file_name() == Some(OsStr::new(NAME))).then(Self::parse)
    }

    /// The log level when `SHOAL_LOG` sets none.
    pub(super) fn default_log(&self) -> &'static str {
        match self.log_level {
            LogLevel::Trace => "trace",
            LogLevel::Debug => "debug",
            LogLevel::Info => "info",
            LogLevel::Warn => "warn",
            LogLevel::Error => "error",
        }
    }

    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        // Callers that want to hear of trouble alone get no progress either.
        let talkative = self.log_level <= LogLevel::Info;
        match self.verb {
            Verb::Create(verb) => verb.run(talkative),
            Verb::Merge(verb) => verb.run(),
            Verb::Check(verb) => verb.run(),
            Verb::Unpack(verb) => verb.run(),
            Verb::Inspect(verb) => verb.run(),
        }
    }
}

/// Ends the process for a usage that clap cannot judge.
fn refuse(kind: ErrorKind, message: &str) -> ! {
    NydusImage::command().error(kind, message).exit()
}

/// What to read early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrefetchPolicy {
    /// What the paths on standard input name.
    Fs,
    /// The same: what is read early lies together in either case.
    Blob,
    /// Nothing; standard input is not read.
    None,
}

impl PrefetchPolicy {
    fn list(self) -> Result<PrefetchList, Failure> {
        if self == Self::None {
            return Ok(PrefetchList::default());
        }
        let list = PrefetchList::paths(std::io::stdin().lock().by_ref());
        Ok(list.map_err(|e| format!("the paths to prefetch: {}", crate::chain(&e)))?)
    }
}

/// The file of a dictionary: `bootstrap=FILE`, or the file alone.
fn dictionary(text: &str) -> Result<PathBuf, String> {
    match text.split_once('=') {
        Some(("bootstrap", file)) => Ok(file.into()),
        Some((kind, _)) if !kind.contains('/') => Err(format!("{kind}: a dictionary is a bootstrap")),
        _ => Ok(text.into()),
    }
}

/// Lets `write` make a bootstrap at `path`, or without one in `dir`, where its sha256 becomes its name. Gives its path.
fn place_bootstrap<T>(
    path: Option<&Path>,
    dir: Option<&Path>,
    write: impl FnOnce(&Path) -> Result<T, Failure>,
) -> Result<(T, PathBuf), Failure> {
    if let Some(path) = path {
        return Ok((write(path)?, path.to_owned()));
    }
    let dir = dir.unwrap_or_else(|| refuse(ErrorKind::MissingRequiredArgument, "give --bootstrap or --blob-dir"));
    let failed = |e| format!("cannot write a bootstrap in {}: {e}", dir.display());
    std::fs::create_dir_all(dir).map_err(failed)?;
    let draft = tempfile::NamedTempFile::new_in(dir).map_err(failed)?.into_temp_path();
    let written = write(&draft)?;
    let path = dir.join(hex::encode(Sha256::digest(std::fs::read(&draft).map_err(failed)?)));
    draft.persist(&path).map_err(|e| failed(e.error))?;
    Ok((written, path))
}
