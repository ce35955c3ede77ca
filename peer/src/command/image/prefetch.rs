//! What an image shall have read early: options of several verbs.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use shoal_rafs::PrefetchList;

use super::Failure;

#[derive(Debug, clap::Args)]
pub(super) struct PrefetchFrom {
    /// Paths to read early, in order: a file with one on each line, from the image's root; `-` is standard input. A directory
    /// means all below it; `*` and `?` stand for parts of a name, a backslash takes that from them.
    #[arg(long, value_name = "FILE", conflicts_with = "prefetch_trace")]
    prefetch: Option<PathBuf>,
    /// Read early what `shoal mount --trace FILE` saw, in the order of its first access.
    #[arg(long, value_name = "FILE")]
    prefetch_trace: Option<PathBuf>,
}

impl PrefetchFrom {
    /// Whether the list comes from standard input.
    pub(super) fn is_standard_input(&self) -> bool {
        self.prefetch.as_deref() == Some(Path::new("-"))
    }

    /// The list, if one was given.
    pub(super) fn list(&self) -> Result<Option<PrefetchList>, Failure> {
        let (path, list) = match (&self.prefetch, &self.prefetch_trace) {
            (Some(path), _) if self.is_standard_input() => (path, PrefetchList::paths(std::io::stdin().lock())),
            (Some(path), _) => (path, PrefetchList::paths(open(path)?)),
            (None, Some(path)) => (path, PrefetchList::trace(open(path)?)),
            (None, None) => return Ok(None),
        };
        Ok(Some(list.map_err(|e| format!("{}: {}", path.display(), crate::chain(&e)))?))
    }
}

fn open(path: &Path) -> Result<impl Read, Failure> {
    Ok(File::open(path).map_err(|e| format!("cannot open {}: {e}", path.display()))?)
}
