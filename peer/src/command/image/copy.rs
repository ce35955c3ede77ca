//! `shoal image copy`: an image as it is from one place to another.

use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use shoal_rafs::oci::{CopyReport, Location, OpenLocation, Platform, copy};

use super::{Failure, human_bytes, print_json, registry::RegistryArgs, runtime};

/// Manifests, indexes and blobs keep their bytes, and so their digests. What the target has is not sent again, and what
/// another repository of its registry has is mounted from there.
#[derive(Debug, clap::Args)]
pub(in crate::command) struct Copy {
    /// `host[:port]/repo:tag`, `oci:DIR[:tag]`, or `oci-archive:FILE[:tag]`, where FILE may be `-`.
    source: Location,
    /// Likewise.
    target: Location,
    /// Of an index, copy only the manifest for this platform, as in linux/arm64.
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    #[command(flatten)]
    registry: RegistryArgs,
}

impl Copy {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        self.registry.refuse_two_outputs(&self.target);
        let (from, to) = (OpenLocation::source(&self.source)?, OpenLocation::target(&self.target)?);
        let registry = self.registry.client([from.reference(), to.reference()])?;
        let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {bytes} copied")?);
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        let watch = |_, size| bar.inc(size);
        let copied = copy(&registry, from.reference(), to.reference(), self.platform.as_ref(), watch);
        let mut report = runtime()?.block_on(copied)?;
        report.reference = to.told(&report.reference);
        bar.finish_and_clear();
        to.finish()?;
        if self.registry.json {
            print_json(&report)?;
        } else if !self.target.is_standard() {
            print_report(&report);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_report(report: &CopyReport) {
    println!("{}", report.reference);
    let [sent, mounted, existing] =
        [report.blobs.sent_bytes, report.blobs.mounted_bytes, report.blobs.existing_bytes].map(human_bytes);
    println!("{sent} sent, {mounted} mounted from another repository, {existing} were there already");
}
