//! `shoal image push`: an image in files to a registry or an OCI layout.

use std::{path::PathBuf, process::ExitCode};

use indicatif::{ProgressBar, ProgressStyle};
use shoal_rafs::oci::{DecryptionKeys, PushOptions, Reference, push};

use super::{
    Failure, human_bytes, print_json,
    registry::{BackendArgs, EncryptionArgs, RegistryArgs},
    runtime,
};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Push {
    /// Bootstrap file.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory with the image's blobs; those that the registry has already may be missing.
    #[arg(long)]
    blob_dir: PathBuf,
    /// `host[:port]/repo:tag`, or `oci:DIR:tag` for an OCI layout directory.
    reference: Reference,
    #[command(flatten)]
    encryption: EncryptionArgs,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

impl Push {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let (rules, keys) = (self.backend.rules(&self.reference), DecryptionKeys::default());
        let registry = self.registry.client_with([&self.reference], rules, keys)?;
        let recipients = self.encryption.recipients()?;
        let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {bytes} {msg}")?);
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        let report = runtime()?.block_on(push(
            &registry,
            &self.bootstrap,
            &self.blob_dir,
            &self.reference,
            PushOptions { recipients, blob_backend: self.backend.blob_backend.clone(), ..PushOptions::default() },
            |layer| {
                bar.inc(layer.size);
                bar.set_message(format!("sha256:{}", layer.id));
            },
        ))?;
        bar.finish_and_clear();
        if self.registry.json {
            print_json(&report)?;
        } else {
            println!("{}", report.reference);
            println!(
                "{}, {} of it was there already",
                human_bytes(report.encoded_bytes),
                human_bytes(report.existing_bytes)
            );
        }
        Ok(ExitCode::SUCCESS)
    }
}
