//! `shoal image`: build, check, unpack and push, with no daemon.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use bytes::Bytes;
use clap::{Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use shoal_proto::Algorithm;
use shoal_rafs::{
    BlobDirReader, Bootstrap, BuildOptions, Builder, CheckReport, Compressor, Problem,
    oci::{Authfile, Reference, Registry, PushOptions, RegistryOptions, push},
};

use super::{Failure, human_bytes, print_json, runtime};

#[derive(Debug, Subcommand)]
pub(super) enum Image {
    /// Build a bootstrap and a data blob from a directory.
    Build(Build),
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
            Self::Check(verb) => verb.run(),
            Self::Unpack(verb) => verb.run(),
            Self::Push(verb) => verb.run(),
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CompressorName {
    None,
    Lz4,
    Zstd,
}

impl From<CompressorName> for Compressor {
    fn from(name: CompressorName) -> Self {
        match name {
            CompressorName::None => Self::None,
            CompressorName::Lz4 => Self::Lz4,
            CompressorName::Zstd => Self::Zstd,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DigesterName {
    Blake3,
    Sha256,
}

impl From<DigesterName> for Algorithm {
    fn from(name: DigesterName) -> Self {
        match name {
            DigesterName::Blake3 => Self::Blake3,
            DigesterName::Sha256 => Self::Sha256,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Build {
    /// Directory whose tree becomes the image.
    #[arg(long)]
    source: PathBuf,
    /// Bootstrap file to write.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory to write the blob to, named by its sha256.
    #[arg(long)]
    blob_dir: PathBuf,
    /// How chunks are compressed; a chunk that does not shrink is stored as it is.
    #[arg(long, value_enum, default_value = "zstd")]
    compressor: CompressorName,
    /// What names a chunk.
    #[arg(long, value_enum, default_value = "blake3")]
    digester: DigesterName,
    /// Bytes of a chunk: a power of two from 4096 to 16777216.
    #[arg(long, default_value_t = 1 << 20)]
    chunk_size: u32,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Build {
    fn run(self) -> Result<ExitCode, Failure> {
        let options = BuildOptions {
            compressor: self.compressor.into(),
            algorithm: self.digester.into(),
            chunk_size: self.chunk_size,
        };
        let report = Builder::new(options).build(&self.source, &self.bootstrap, &self.blob_dir)?;
        if self.json {
            print_json(&report)?;
        } else {
            report.notes.iter().for_each(|note| eprintln!("note: {note}"));
            println!(
                "{} files, {} in {} chunks ({} unique), encoded {}",
                report.files,
                human_bytes(report.decoded_bytes),
                report.chunks,
                report.unique_chunks,
                human_bytes(report.encoded_bytes)
            );
            if let Some(blob) = report.blob {
                println!("blob {blob}");
            }
        }
        Ok(ExitCode::SUCCESS)
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
        if self.json { print_json(&report)? } else { print_check(&report) }
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
        let bootstrap = Bootstrap::parse(read_bootstrap(&self.bootstrap)?)
            .map_err(|e| format!("{}: {}", self.bootstrap.display(), crate::chain(&e)))?;
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
        report.notes.iter().for_each(|note| eprintln!("note: {note}"));
        Ok(ExitCode::SUCCESS)
    }
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
            plain_http: if self.plain_http { vec![self.reference.source().registry().to_owned()] } else { Vec::new() },
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
