//! `shoal image check`: an image in files, or one in a registry, a layout or an archive.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use shoal_rafs::{
    CheckReport, ImageFile, Problem,
    oci::{ImageCheckReport, Location, OpenLocation, Platform, check_image},
};

use super::{
    registry::{BackendArgs, DecryptionArgs, RegistryArgs},
    runtime,
};
use crate::command::{Failure, human_bytes, print_json};

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Check {
    /// A Nydus image: `host[:port]/repo:tag`, `oci:DIR[:tag]`, or `oci-archive:FILE[:tag]`. Its manifest, annotations,
    /// config, bootstrap and every chunk of its blobs are verified.
    #[arg(required_unless_present = "bootstrap", conflicts_with_all = ["bootstrap", "blob_dir"])]
    image: Option<Location>,
    /// The OCI or Docker image that it was converted from: the file trees must be equal.
    #[arg(long, value_name = "REF", requires = "image")]
    source: Option<Location>,
    /// Check only this platform of an index, as in linux/arm64; may be given several times.
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", requires = "image")]
    platform: Vec<Platform>,
    /// Bootstrap file, or a blob with the bootstrap inside.
    #[arg(long)]
    bootstrap: Option<PathBuf>,
    /// Directory with the image's blobs; with it every chunk is decoded and verified, without it those of a blob that has
    /// the bootstrap inside.
    #[arg(long)]
    blob_dir: Option<PathBuf>,
    #[command(flatten)]
    decryption: DecryptionArgs,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

impl Check {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let ok = match (&self.image, &self.bootstrap) {
            (Some(image), _) => self.image(image)?,
            (None, Some(bootstrap)) => self.files(bootstrap)?,
            (None, None) => return Err("neither an image nor a bootstrap is given".into()),
        };
        Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn image(&self, image: &Location) -> Result<bool, Failure> {
        let image = OpenLocation::source(image)?;
        let source = self.source.as_ref().map(OpenLocation::source).transpose()?;
        let source = source.as_ref().map(OpenLocation::reference);
        let rules = self.backend.rules(image.reference());
        let references = [image.reference()].into_iter().chain(source);
        let registry = self.registry.client_with(references, rules, self.decryption.keys()?)?;
        let report = check_image(&registry, image.reference(), source, &self.platform);
        let mut report = runtime()?.block_on(report)?;
        report.reference = image.told(&report.reference);
        if self.registry.json {
            print_json(&report)?
        } else {
            print_image(&report)
        }
        Ok(report.ok)
    }

    fn files(&self, bootstrap: &Path) -> Result<bool, Failure> {
        if self.backend.blob_backend.is_some() {
            let message = "--blob-backend is for an image in a registry, a layout or an archive";
            crate::command::bad_usage(clap::error::ErrorKind::ArgumentConflict, message);
        }
        let report = shoal_rafs::check_file(&ImageFile::open(bootstrap)?, self.blob_dir.as_deref());
        if self.registry.json {
            print_json(&report)?
        } else {
            print_check(&report);
            print_verdict(report.ok);
        }
        Ok(report.ok)
    }
}

fn print_image(report: &ImageCheckReport) {
    println!("{}", report.reference);
    for image in &report.images {
        println!("{} sha256:{}", image.platform, image.manifest);
        print_check(&image.image);
        if let Some(compared) = &image.compared {
            let (names, files) = (compared.names, compared.files);
            println!("compared with the source: {names} names, {} in {files} files", human_bytes(compared.bytes));
        }
        image.problems.iter().for_each(print_problem);
    }
    print_verdict(report.ok);
}

fn print_problem(Problem { place, problem }: &Problem) {
    println!("{place}: {problem}");
}

fn print_verdict(ok: bool) {
    println!("{}", if ok { "sound" } else { "NOT SOUND" });
}

/// What a check found, for people.
pub(in crate::command) fn print_check(report: &CheckReport) {
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
    report.problems.iter().for_each(print_problem);
    if report.problems_left_out > 0 {
        println!("and {} more problems", report.problems_left_out);
    }
}
