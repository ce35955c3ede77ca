//! `shoal image`: build, merge, check, unpack and push, with no daemon.

mod build;
mod merge;

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use bytes::Bytes;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use shoal_rafs::{
    BlobDirReader, Bootstrap, CheckReport, Problem,
    oci::{Authfile, PushOptions, Reference, Registry, RegistryOptions, push},
};

use super::{Failure, human_bytes, print_json, runtime};

#[derive(Debug, Subcommand)]
pub(super) enum Image {
    /// Build a bootstrap and a data blob from a directory or a tar.
    Build(build::Build),
    /// Merge the bootstraps of layers into that of an image.
    Merge(merge::Merge),
    /// Verify every structure of a bootstrap and, with the blobs, every chunk. Exits 1 when something is wrong.
    Check(Check),
    /// Write the tree of an image as a tar.
    Unpack(Unpack),
    /// Push an image to a registry or into an OCI layout.
    Push(Push),
}

impl Image {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Build(verb) => verb.run(),
            Self::Merge(verb) => verb.run(),
            Self::Check(verb) => verb.run(),
            Self::Unpack(verb) => verb.run(),
            Self::Push(verb) => verb.run(),
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// Bootstrap file.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory with the image's blobs; with it every chunk is decoded and verified.
    #[arg(long)]
    blob_dir: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Check {
    fn run(self) -> Result<ExitCode, Failure> {
        let report = shoal_rafs::check(read_bootstrap(&self.bootstrap)?, self.blob_dir.as_deref());
        if self.json {
            print_json(&report)?
        } else {
            print_check(&report)
        }
        Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Unpack {
    /// Bootstrap file.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory with the image's blobs.
    #[arg(long)]
    blob_dir: PathBuf,
    /// Tar to write; `-` is standard output.
    #[arg(long)]
    output: PathBuf,
}

impl Unpack {
    fn run(self) -> Result<ExitCode, Failure> {
        let bootstrap = open_bootstrap(&self.bootstrap)?;
        let reader = BlobDirReader::open(&bootstrap, &self.blob_dir)?;
        let out: Box<dyn Write> = if self.output.as_os_str() == "-" {
            Box::new(std::io::stdout().lock())
        } else {
            let create = File::create(&self.output);
            Box::new(create.map_err(|e| format!("cannot write {}: {e}", self.output.display()))?)
        };
        let mut out = BufWriter::with_capacity(1 << 20, out);
        let report = shoal_rafs::unpack(&bootstrap, &reader, &mut out)?;
        out.flush()?;
        for socket in &report.sockets {
            eprintln!("note: {socket} is a socket, which a tar cannot hold");
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn open_bootstrap(path: &Path) -> Result<Bootstrap, Failure> {
    let bootstrap = Bootstrap::parse(read_bootstrap(path)?);
    Ok(bootstrap.map_err(|e| format!("{}: {}", path.display(), crate::chain(&e)))?)
}

fn read_bootstrap(path: &Path) -> Result<Bytes, Failure> {
    Ok(std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?.into())
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

#[derive(Debug, clap::Args)]
pub(super) struct Push {
    /// Bootstrap file.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory with the image's blobs.
    #[arg(long)]
    blob_dir: PathBuf,
    /// `host[:port]/repo:tag`, or `oci:DIR:tag` for an OCI layout directory.
    reference: Reference,
    /// Speak plain HTTP to the registry. Loopback hosts are always spoken to so.
    #[arg(long)]
    plain_http: bool,
    /// A docker config.json with credentials.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// A PEM file with certificate authorities to trust besides the built-in ones.
    #[arg(long, value_name = "FILE")]
    ca_file: Vec<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Push {
    fn run(self) -> Result<ExitCode, Failure> {
        let registry = Registry::new(RegistryOptions {
            plain_http: if self.plain_http {
                vec![self.reference.source().registry().to_owned()]
            } else {
                Vec::new()
            },
            ca_files: self.ca_file,
            auth: self.authfile.as_deref().map(Authfile::load).transpose()?.unwrap_or_default(),
            ..RegistryOptions::default()
        })?;
        let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {bytes} {msg}")?);
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        let report = runtime()?.block_on(push(
            &registry,
            &self.bootstrap,
            &self.blob_dir,
            &self.reference,
            PushOptions::default(),
            |layer| {
                bar.inc(layer.size);
                bar.set_message(format!("sha256:{}", layer.id));
            },
        ))?;
        bar.finish_and_clear();
        if self.json {
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
