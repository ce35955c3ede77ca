//! `shoal mirror`: has containerd ask the node's mirror before the registry.

use std::{
    fs, io,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Subcommand, error::ErrorKind};
use serde::Serialize;

use super::{Failure, bad_usage, print_json};
use crate::mirror::hosts::{Author, Namespace, author, render};

#[derive(Debug, Subcommand)]
pub(super) enum Mirror {
    /// Write containerd's hosts.toml so that it asks the mirror first and the registry when that fails.
    Configure(Configure),
}

/// A hosts.toml that this command did not write, or that was changed since, is never touched: then nothing is changed anywhere,
/// and the exit code is 1. containerd reads the files at the next pull; its own configuration must have
/// `config_path = "/etc/containerd/certs.d"` for the CRI's registries.
#[derive(Debug, clap::Args)]
pub(super) struct Configure {
    /// containerd's folder of registry configurations.
    #[arg(long, value_name = "DIR", default_value = "/etc/containerd/certs.d")]
    certs_dir: PathBuf,
    /// A registry, `host[:port]`, with `http://` in front where it has no TLS; may be given several times. Without any, the
    /// file for all registries that have none of their own.
    #[arg(long, value_name = "HOST")]
    registry: Vec<String>,
    /// Where the daemon's mirror listens: `mirror.listen` of its configuration.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:4804")]
    mirror: SocketAddr,
    /// Take back what was written; without --registry, for all registries.
    #[arg(long)]
    remove: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What became of one file.
#[derive(Debug, Serialize)]
struct Outcome {
    file: PathBuf,
    done: Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Done {
    Written,
    Unchanged,
    Removed,
    Absent,
}

impl Mirror {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let Self::Configure(configure) = self;
        let outcomes = configure.run()?;
        if configure.json {
            print_json(&outcomes)?;
        } else {
            for Outcome { file, done } in outcomes {
                let done = match done {
                    Done::Written => "written",
                    Done::Unchanged => "as it should be",
                    Done::Removed => "removed",
                    Done::Absent => "not there",
                };
                println!("{}: {done}", file.display());
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Configure {
    fn run(&self) -> Result<Vec<Outcome>, Failure> {
        let namespaces = self.registry.iter().map(|text| text.parse::<Namespace>());
        let mut namespaces = namespaces
            .collect::<Result<Vec<_>, _>>()
            .unwrap_or_else(|error| bad_usage(ErrorKind::ValueValidation, &error.to_string()));
        if self.remove {
            let folders = match namespaces.is_empty() {
                true => self.all_of_ours()?,
                false => namespaces.iter().map(|namespace| self.certs_dir.join(namespace.to_string())).collect(),
            };
            return remove(&folders);
        }
        if namespaces.is_empty() {
            namespaces.push(Namespace::Default);
        }
        let files: Vec<_> = namespaces
            .iter()
            .map(|namespace| (self.certs_dir.join(namespace.to_string()), render(namespace, self.mirror)))
            .collect();
        // All of them before the first is written.
        for (folder, _) in &files {
            existing(folder)?;
        }
        files.iter().map(|(folder, text)| write(folder, text)).collect()
    }

    /// The folders whose file is this program's and unchanged.
    fn all_of_ours(&self) -> Result<Vec<PathBuf>, Failure> {
        let entries = match fs::read_dir(&self.certs_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(format!("cannot read {}: {error}", self.certs_dir.display()).into()),
        };
        let mut folders = Vec::new();
        for entry in entries {
            let folder = entry?.path();
            let text = fs::read_to_string(folder.join("hosts.toml"));
            if text.is_ok_and(|text| author(&text) != Author::Other) {
                folders.push(folder);
            }
        }
        folders.sort();
        Ok(folders)
    }
}

/// The file in `folder`, if it may be replaced or is not there.
fn existing(folder: &Path) -> Result<Option<String>, Failure> {
    let file = folder.join("hosts.toml");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot read {}: {error}", file.display()).into()),
    };
    let whose = match author(&text) {
        Author::Ours => return Ok(Some(text)),
        Author::Changed => "was changed since `shoal mirror configure` wrote it",
        Author::Other => "was not written by `shoal mirror configure`",
    };
    Err(format!("{} {whose}: move it away, or add the mirror to it by hand; nothing was changed", file.display())
        .into())
}

/// Writes the file whole, or not at all.
fn write(folder: &Path, text: &str) -> Result<Outcome, Failure> {
    let file = folder.join("hosts.toml");
    if existing(folder)?.as_deref() == Some(text) {
        return Ok(Outcome { file, done: Done::Unchanged });
    }
    let written = fs::create_dir_all(folder).and_then(|()| {
        let mut new = tempfile::Builder::new().permissions(mode(0o644)).tempfile_in(folder)?;
        new.write_all(text.as_bytes())?;
        new.as_file().sync_all()?;
        new.persist(&file).map_err(|error| error.error)
    });
    written.map_err(|error| format!("cannot write {}: {error}", file.display()))?;
    Ok(Outcome { file, done: Done::Written })
}

fn mode(bits: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(bits)
}

/// Removes the files in these folders, and those folders in which nothing is left.
fn remove(folders: &[PathBuf]) -> Result<Vec<Outcome>, Failure> {
    for folder in folders {
        existing(folder)?;
    }
    let remove = |folder: &PathBuf| {
        let file = folder.join("hosts.toml");
        if existing(folder)?.is_none() {
            return Ok(Outcome { file, done: Done::Absent });
        }
        fs::remove_file(&file).map_err(|error| format!("cannot remove {}: {error}", file.display()))?;
        // Whoever has put something else there keeps the folder.
        let _ = fs::remove_dir(folder);
        Ok(Outcome { file, done: Done::Removed })
    };
    folders.iter().map(remove).collect()
}
