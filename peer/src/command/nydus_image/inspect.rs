//! `nydus-image inspect`.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use serde::Serialize;

use crate::command::{Failure, image::open, print_json};

#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// Bootstrap file, or a blob with the bootstrap inside.
    #[arg(required_unless_present = "file")]
    bootstrap: Option<PathBuf>,
    /// The same.
    #[arg(long = "bootstrap", short = 'B', id = "file", conflicts_with = "bootstrap")]
    file: Option<PathBuf>,
    /// What to print, as JSON.
    #[arg(long, short = 'R', value_parser = ["blobs"])]
    request: String,
}

/// A blob, with the names of `nydus-image`.
#[derive(Serialize)]
struct BlobFacts {
    blob_id: String,
    compressed_size: u64,
    decompressed_size: u64,
    readahead_offset: u32,
    readahead_size: u32,
}

impl Inspect {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let path = self.file.as_deref().or(self.bootstrap.as_deref()).ok_or("no bootstrap is given")?;
        let (_, image) = open(path)?;
        let facts = image.blobs().iter().map(|blob| BlobFacts {
            blob_id: blob.id.to_string(),
            compressed_size: blob.encoded_size,
            decompressed_size: blob.decoded_size,
            // No blob of this format has such a part.
            readahead_offset: 0,
            readahead_size: 0,
        });
        print_json(&facts.collect::<Vec<_>>())?;
        Ok(ExitCode::SUCCESS)
    }
}
