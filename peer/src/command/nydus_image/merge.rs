//! `nydus-image merge`.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, error::ErrorKind};
use shoal_proto::BlobId;
use shoal_rafs::{Bootstrap, ImageFile, LayerBlob, MergeOptions};

use super::{PrefetchPolicy, dictionary, output::Output, place_bootstrap, refuse};
use crate::command::{Failure, image::open};

/// Lists are separated by commas and have an entry for each source.
#[derive(Debug, Args)]
pub(super) struct Merge {
    /// Bootstraps of layers, the lowest first. A file that is named by a digest belongs to the blob of that name.
    #[arg(required = true)]
    sources: Vec<PathBuf>,
    /// Bootstrap file to write; without one it goes into the directory of blobs, under its sha256.
    #[arg(long, short = 'B', required_unless_present = "blob_dir")]
    bootstrap: Option<PathBuf>,
    /// Directory to write the bootstrap to if it has no file. Layers are then known by what they say of themselves.
    #[arg(long, short = 'D')]
    blob_dir: Option<PathBuf>,
    /// Bootstrap of the image that the sources are layers over.
    #[arg(long)]
    parent_bootstrap: Option<PathBuf>,
    /// Bootstrap of the earlier image that layers were deduplicated against, as bootstrap=FILE.
    #[arg(long, value_parser = dictionary)]
    chunk_dict: Option<PathBuf>,
    /// What is read early; the paths come from standard input.
    #[arg(long, value_enum, default_value = "none")]
    prefetch_policy: PrefetchPolicy,
    /// The sha256 of each layer's blob, or for a gzip layer that of its index.
    #[arg(long, value_delimiter = ',')]
    blob_digests: Vec<BlobId>,
    /// Names of the blobs.
    #[arg(long, value_delimiter = ',')]
    original_blob_ids: Vec<BlobId>,
    /// Bytes of what --blob-digests names.
    #[arg(long, value_delimiter = ',')]
    blob_sizes: Vec<u64>,
    /// The sha256 of its table of contents.
    #[arg(long, value_delimiter = ',')]
    blob_toc_digests: Vec<BlobId>,
    /// Bytes of its table of contents.
    #[arg(long, value_delimiter = ',')]
    blob_toc_sizes: Vec<u32>,
    /// JSON file to write with the blobs of the image.
    #[arg(long, short = 'J')]
    output_json: Option<PathBuf>,
}

impl Merge {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        self.check_lists();
        let mut options = MergeOptions { prefetch: Some(self.prefetch_policy.list()?), ..MergeOptions::default() };
        if let Some(path) = &self.chunk_dict {
            options.earlier_blobs = open(path)?.1.blobs().iter().map(|blob| blob.id).collect();
        }
        let mut layers = Vec::new();
        if let Some(path) = &self.parent_bootstrap {
            layers.push(open(path)?.1);
            options.blobs.push(LayerBlob::default());
        }
        for (position, path) in self.sources.iter().enumerate() {
            let (file, layer) = open(path)?;
            options.blobs.push(self.blob(position, &file, &layer, &options.earlier_blobs));
            layers.push(layer);
        }
        let write = |path: &Path| Ok(shoal_rafs::merge_with(&layers, &options, path)?);
        let (report, bootstrap) = place_bootstrap(self.bootstrap.as_deref(), self.blob_dir.as_deref(), write)?;
        report.not_prefetched.iter().for_each(|path| tracing::info!("{path}: no file to prefetch"));
        // There is a topmost layer, as there is a source.
        if let Some(topmost) = layers.last() {
            let output = Output::new(Some(&bootstrap), report.blobs, topmost.compressor());
            output.write(self.output_json.as_deref())?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn check_lists(&self) {
        for (name, len) in [
            ("--blob-digests", self.blob_digests.len()),
            ("--original-blob-ids", self.original_blob_ids.len()),
            ("--blob-sizes", self.blob_sizes.len()),
            ("--blob-toc-digests", self.blob_toc_digests.len()),
            ("--blob-toc-sizes", self.blob_toc_sizes.len()),
        ] {
            let sources = self.sources.len();
            if len != 0 && len != sources {
                let message = format!("{name} has {len} entries for {sources} sources");
                refuse(ErrorKind::WrongNumberOfValues, &message);
            }
        }
    }

    /// What is said of the blob that a source brought.
    fn blob(&self, position: usize, file: &ImageFile, layer: &Bootstrap, earlier: &HashSet<BlobId>) -> LayerBlob {
        // A name says nothing of several.
        let own = layer.blobs().iter().filter(|blob| !earlier.contains(&blob.id)).count();
        let named = file.id_in_name().filter(|_| self.bootstrap.is_some() && own == 1);
        LayerBlob {
            id: self.original_blob_ids.get(position).copied().or(named),
            file: self.blob_digests.get(position).copied(),
            file_size: self.blob_sizes.get(position).copied(),
            toc_digest: self.blob_toc_digests.get(position).map(|digest| *digest.as_bytes()),
            toc_size: self.blob_toc_sizes.get(position).copied(),
        }
    }
}
