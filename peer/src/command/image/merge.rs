//! `shoal image merge`: the bootstraps of layers to that of an image.

use std::{path::PathBuf, process::ExitCode};

use shoal_rafs::{MergeOptions, MergeReport};

use super::{Failure, human_bytes, open, prefetch::PrefetchFrom, print_json};

/// Whiteouts of OCI and of overlayfs take names of lower layers away. A chunk that several layers have is read from the
/// blob of the lowest; blobs that are not needed are dropped. What layers want read early is wanted of the image. Blobs are
/// neither read nor written.
#[derive(Debug, clap::Args)]
pub(in crate::command) struct Merge {
    /// Bootstrap file to write.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Bootstraps of the layers, or blobs with theirs inside, the lowest first.
    #[arg(required = true)]
    layers: Vec<PathBuf>,
    #[command(flatten)]
    prefetch: PrefetchFrom,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Merge {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let layers = self.layers.iter().map(|layer| open(layer).map(|(_, bootstrap)| bootstrap));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let options = MergeOptions { prefetch: self.prefetch.list()?, ..MergeOptions::default() };
        let report = shoal_rafs::merge_with(&layers, &options, &self.bootstrap)?;
        if self.json {
            print_json(&report)?;
        } else {
            print_report(&report);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_report(report: &MergeReport) {
    println!(
        "{} names, {} in {} files, {} unique chunks",
        report.names,
        human_bytes(report.decoded_bytes),
        report.files,
        report.unique_chunks
    );
    report.not_prefetched.iter().for_each(|path| eprintln!("note: {path}: no file to prefetch"));
    println!("{} chunks ({}) shared by layers", report.shared_chunks, human_bytes(report.shared_bytes));
    report.blobs.iter().for_each(|blob| println!("blob {blob}"));
    report.dropped_blobs.iter().for_each(|blob| println!("dropped {blob}"));
}
