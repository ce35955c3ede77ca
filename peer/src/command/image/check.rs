//! `shoal image check`.

use std::{path::PathBuf, process::ExitCode};

use shoal_rafs::{CheckReport, ImageFile, Problem};

use crate::command::{Failure, human_bytes, print_json};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Check {
    /// Bootstrap file, or a blob with the bootstrap inside.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory with the image's blobs; with it every chunk is decoded and verified, without it those of a blob that has
    /// the bootstrap inside.
    #[arg(long)]
    blob_dir: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let report = shoal_rafs::check_file(&ImageFile::open(&self.bootstrap)?, self.blob_dir.as_deref());
        if self.json {
            print_json(&report)?
        } else {
            print_check(&report)
        }
        Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn print_check(report: &CheckReport) {
    println!(
        "bootstrap {}, chunks of {}, {} names, {} xattrs, files of {}",
        human_bytes(report.bootstrap_bytes),
        human_bytes(report.chunk_size.into()),
        report.names,
        report.xattrs,
        human_bytes(report.decoded_bytes)
    );
    for blob in &report.blobs {
        println!(
            "blob {} {}: {} of {} named chunks verified",
            blob.id,
            human_bytes(blob.encoded_size),
            blob.verified_chunks,
            blob.named_chunks
        );
    }
    for Problem { place, problem } in &report.problems {
        println!("{place}: {problem}");
    }
    if report.problems_left_out > 0 {
        println!("and {} more problems", report.problems_left_out);
    }
    println!("{}", if report.ok { "sound" } else { "NOT SOUND" });
}
