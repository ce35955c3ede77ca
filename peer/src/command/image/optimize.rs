//! `shoal image optimize`: what a start needs, together in a blob of its own.

use std::{path::PathBuf, process::ExitCode};

use clap::error::ErrorKind;
use shoal_rafs::{BuildOptions, Builder, Compressor, OptimizeReport};

use super::{Failure, ImageFiles, build::CompressorName, human_bytes, prefetch::PrefetchFrom, print_json};
use crate::command::bad_usage;

/// The chunks that a list or a trace means are copied, in its order, into a new blob; the rest of the image stays in the
/// blobs that it is in. Every chunk that is copied is verified.
#[derive(Debug, clap::Args)]
pub(in crate::command) struct Optimize {
    #[command(flatten)]
    image: ImageFiles,
    #[command(flatten)]
    prefetch: PrefetchFrom,
    /// Bootstrap file to write.
    #[arg(long)]
    output: PathBuf,
    /// Directory to write the new blob to, named by its sha256; that of the image's blobs if missing.
    #[arg(long)]
    output_blob_dir: Option<PathBuf>,
    /// How the new blob is compressed; as the image is if missing.
    #[arg(long, value_enum)]
    compressor: Option<CompressorName>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Optimize {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let list = self
            .prefetch
            .list()?
            .unwrap_or_else(|| bad_usage(ErrorKind::MissingRequiredArgument, "give --prefetch or --prefetch-trace"));
        let blob_dir =
            self.output_blob_dir.as_ref().or(self.image.blob_dir.as_ref()).unwrap_or_else(|| {
                bad_usage(ErrorKind::MissingRequiredArgument, "give --blob-dir or --output-blob-dir")
            });
        let (image, reader) = self.image.open()?;
        let compressor = match (self.compressor, image.compressor()) {
            (Some(name), _) => name.into(),
            // Read, never written.
            (None, Compressor::Gzip) => Compressor::Zstd,
            (None, compressor) => compressor,
        };
        let builder = Builder::new(BuildOptions { compressor, ..BuildOptions::default() }).prefetch(list);
        let report = builder.optimize(&image, &reader, &self.output, blob_dir)?;
        if self.json {
            print_json(&report)?;
        } else {
            print_report(&report);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_report(report: &OptimizeReport) {
    report.notes.iter().for_each(|note| eprintln!("note: {note}"));
    println!(
        "{} hot chunks, {}, from {} ranges to one of {}",
        report.hot_chunks,
        human_bytes(report.hot_bytes),
        report.ranges_before,
        human_bytes(report.encoded_bytes)
    );
    if let Some(blob) = report.blob {
        println!("blob {blob}");
    }
}
