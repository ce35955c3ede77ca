//! `shoal image stat`: what images have in common.

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;
use shoal_rafs::{ChunkCount, SharedChunks, SharingReport, sharing};

use super::{Failure, human_bytes, open, print_json};

/// Chunks are the same when their digests are; blobs are not read.
#[derive(Debug, clap::Args)]
pub(in crate::command) struct Stat {
    /// Bootstraps, or blobs with theirs inside.
    #[arg(required = true, num_args = 1..)]
    images: Vec<PathBuf>,
    /// Print it as JSON; docs/image-json.md says what is in it.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    files: Vec<String>,
    #[serde(flatten)]
    sharing: SharingReport,
}

impl Stat {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let images = self.images.iter().map(|path| {
            let (_, image) = open(path)?;
            match image.has_digests() {
                true => Ok(image),
                false => Err(format!("{}: its chunks have no digests to compare", path.display()).into()),
            }
        });
        let images = images.collect::<Result<Vec<_>, Failure>>()?;
        let files = self.images.iter().map(|path| path.display().to_string()).collect();
        let report = Report { files, sharing: sharing(&images) };
        if self.json {
            print_json(&report)?;
        } else {
            print_report(&report);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_report(Report { files, sharing }: &Report) {
    for (number, (file, count)) in (1..).zip(files.iter().zip(&sharing.images)) {
        println!("{number}  {file}: {}", text(count));
    }
    for pair in &sharing.pairs {
        println!("{} and {}: {}", pair.first + 1, pair.second + 1, shared_text(&pair.shared));
    }
    if files.len() > 2 {
        println!("all share {}", shared_text(&sharing.shared_by_all));
    }
    println!("together {}", text(&sharing.together));
}

fn shared_text(shared: &SharedChunks) -> String {
    format!("{}, {} of the chunks in the same blob", text(&shared.count), shared.in_same_blob)
}

fn text(count: &ChunkCount) -> String {
    let (decoded, encoded) = (human_bytes(count.decoded_bytes), human_bytes(count.encoded_bytes));
    let batched = match count.batched_chunks {
        0 => String::new(),
        chunks => format!(" without {chunks} chunks in batches"),
    };
    format!("{} chunks, {decoded}, encoded {encoded}{batched}", count.chunks)
}
