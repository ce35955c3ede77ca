//! One build, whichever command line it was asked for by.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use shoal_proto::BlobId;
use shoal_rafs::{BuildOptions, BuildReport, Builder, Output, PrefetchList};

use super::watcher::Watcher;
use crate::command::{Failure, image::open};

/// What a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::command) enum SourceKind {
    /// A directory.
    Directory,
    /// A tar, plain or compressed.
    Tar,
    /// A tar in gzip that stays as it is.
    GzipLayer,
    /// A plain tar that stays as it is.
    PlainTar {
        /// What its blob is called, if not by its sha256.
        id: Option<BlobId>,
    },
}

/// What to build, from what, to where.
#[derive(Debug)]
pub(in crate::command) struct Job {
    /// A directory or an archive, which may be a FIFO; `-` is standard input.
    pub(in crate::command) source: PathBuf,
    pub(in crate::command) kind: SourceKind,
    pub(in crate::command) options: BuildOptions,
    /// Bootstraps of earlier images.
    pub(in crate::command) chunk_dict: Vec<PathBuf>,
    pub(in crate::command) prefetch: PrefetchList,
    /// Whether to tell how far it is.
    pub(in crate::command) watch: bool,
}

impl Job {
    /// Builds.
    ///
    /// # Errors
    /// Whatever made the build fail.
    pub(in crate::command) fn run(self, output: Output<'_>) -> Result<BuildReport, Failure> {
        let dictionary = self.chunk_dict.iter().map(|path| Ok(open(path)?.1)).collect::<Result<_, Failure>>()?;
        let builder = Builder::new(self.options).chunk_dictionary(dictionary).prefetch(self.prefetch);
        if self.kind == SourceKind::Directory {
            let builder = match self.watch {
                true => watched(builder, Watcher::new(None)?),
                false => builder,
            };
            return Ok(builder.build_to(&self.source, output)?);
        }
        let Archive { name, stream, len } = archive(&self.source)?;
        let (stream, builder): (Box<dyn Read>, _) = match self.watch {
            true => {
                let watcher = Watcher::new(Some(len))?;
                (Box::new(watcher.wrap(stream)), watched(builder, watcher))
            }
            false => (stream, builder),
        };
        Ok(match self.kind {
            SourceKind::GzipLayer => builder.build_reference_to(stream, name, output),
            SourceKind::PlainTar { id } => builder.build_tarfs_to(stream, name, output, id),
            SourceKind::Tar | SourceKind::Directory => builder.build_tar_to(stream, name, output),
        }?)
    }
}

fn watched(builder: Builder, watcher: Watcher) -> Builder {
    builder.on_progress(move |progress| watcher.show(progress))
}

/// An archive to be read once.
struct Archive<'a> {
    /// What errors call it.
    name: &'a Path,
    stream: Box<dyn Read>,
    /// Its bytes, if that is known.
    len: Option<u64>,
}

fn archive(source: &Path) -> Result<Archive<'_>, Failure> {
    if source.as_os_str() == "-" {
        let (name, stream) = (Path::new("standard input"), Box::new(std::io::stdin().lock()));
        return Ok(Archive { name, stream, len: None });
    }
    let opened = File::open(source).and_then(|file| Ok((file.metadata()?, file)));
    let (metadata, file) = opened.map_err(|e| format!("cannot open {}: {e}", source.display()))?;
    let len = Some(metadata.len()).filter(|_| metadata.is_file());
    Ok(Archive { name: source, stream: Box::new(file), len })
}
