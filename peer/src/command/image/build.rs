//! `shoal image build`: from a directory or a tar to a bootstrap and a blob.

use std::{num::NonZeroUsize, path::PathBuf, process::ExitCode};

use clap::{ValueEnum, error::ErrorKind};
use shoal_proto::Algorithm;
use shoal_rafs::{ArchiveLimits, BuildOptions, BuildReport, Compressor, Encryption, Output};

use super::{Failure, human_bytes, prefetch::PrefetchFrom, print_json};
use crate::command::bad_usage;

mod job;
mod watcher;

pub(in crate::command) use job::{Job, SourceKind};

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum CompressorName {
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
pub(in crate::command) enum DigesterName {
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SourceType {
    /// A directory with everything below it.
    Directory,
    /// A tar, plain or compressed with gzip or zstd.
    Tar,
    /// A tar in gzip that stays as it is: only an index over it is made. Whoever reads the image needs the layer as well,
    /// in the directory of blobs under its sha256. Its chunks have digests by sha256; nothing is compressed.
    TargzRef,
    /// A plain tar that stays as it is, and is stored as the blob. Nothing is compressed, digests are by sha256. The kernel
    /// mounts bootstrap and tar without a daemon.
    TarTarfs,
}

impl SourceType {
    /// What it is called on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Tar => "tar",
            Self::TargzRef => "targz-ref",
            Self::TarTarfs => "tar-tarfs",
        }
    }

    /// Whether what is there already stays as it is, so that no chunk is stored.
    fn stays(self) -> bool {
        matches!(self, Self::TargzRef | Self::TarTarfs)
    }
}

#[derive(Debug, clap::Args)]
pub(in crate::command) struct Build {
    /// What becomes the image: a directory, or a tar, plain or compressed with gzip or zstd; `-` reads a tar from
    /// standard input.
    #[arg(long)]
    source: PathBuf,
    /// What the source is. Told from the source if missing.
    #[arg(long, value_enum)]
    source_type: Option<SourceType>,
    /// Bootstrap file to write.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Directory to write the blob to, named by its sha256; with tar-tarfs that is the tar.
    #[arg(long)]
    blob_dir: PathBuf,
    /// How chunks are compressed; a chunk that does not shrink is stored as it is. zstd if missing, none where the source stays
    /// as it is.
    #[arg(long, value_enum)]
    compressor: Option<CompressorName>,
    /// Level of zstd, -7 (fast) to 22 (small); 3 if missing.
    #[arg(long, value_parser = clap::value_parser!(i32).range(-7..=22), allow_negative_numbers = true)]
    compression_level: Option<i32>,
    /// What names a chunk: blake3 if missing, sha256 where the source stays as it is.
    #[arg(long, value_enum)]
    digester: Option<DigesterName>,
    /// Bytes of a chunk: a power of two from 4096 to 16777216.
    #[arg(long, default_value = "1048576", value_name = "BYTES", value_parser = power_of_two)]
    chunk_size: u32,
    /// Compress small files together, in batches below so many bytes: a power of two from 4096 to the chunk size. Files of
    /// half as many bytes or more are compressed alone.
    #[arg(long, value_name = "BYTES", value_parser = power_of_two)]
    batch_size: Option<u32>,
    /// Put the bootstrap into the blob too, as layers in registries have it; with targz-ref, into the index.
    #[arg(long, visible_alias = "inline-meta")]
    blob_inline_meta: bool,
    /// End the blob with the digests of its chunks and a table of contents, as layers in registries have it.
    #[arg(long)]
    blob_toc: bool,
    /// Encrypt the blob, with a key of its own that is written into the bootstrap, so that the same source gives another image
    /// every time. Who has the bootstrap can read the image: push it with --encryption-key.
    #[arg(long, conflicts_with = "blob_inline_meta")]
    encrypt: bool,
    /// Bootstrap of an earlier image, or a blob with the bootstrap inside: chunks that it has are read from its blobs and
    /// not stored again. May be given several times; it must have the same chunk size.
    #[arg(long, value_name = "FILE")]
    chunk_dict: Vec<PathBuf>,
    #[command(flatten)]
    prefetch: PrefetchFrom,
    /// Threads that hash and compress, one for each core if missing. The image is the same for any number; memory is
    /// about 2 x THREADS + 2 chunks and THREADS + 2 batches, decoded and encoded.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Most names that a tar may have.
    #[arg(long, default_value_t = ArchiveLimits::default().names)]
    max_names: u64,
    /// Most bytes that a tar may have once decompressed, and all its files with their holes.
    #[arg(long, default_value_t = ArchiveLimits::default().bytes)]
    max_bytes: u64,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Build {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        if self.compression_level.is_some() && !matches!(self.compressor(), CompressorName::Zstd) {
            bad_usage(ErrorKind::ArgumentConflict, "--compression-level is for --compressor zstd");
        }
        if self.batch_size.is_some_and(|batch_size| batch_size > self.chunk_size) {
            bad_usage(ErrorKind::ValueValidation, "--batch-size must not exceed --chunk-size");
        }
        let source_type = self.source_type();
        if let Some(option) = source_type.stays().then(|| self.conflicting(source_type)).flatten() {
            let message = format!("{option} cannot be given with --source-type {}", source_type.name());
            bad_usage(ErrorKind::ArgumentConflict, &message);
        }
        if self.encrypt && self.chunk_size > MAX_ENCRYPTED_CHUNK {
            bad_usage(ErrorKind::ValueValidation, "--chunk-size must not exceed 8388608 with --encrypt");
        }
        let kind = match source_type {
            SourceType::Directory => SourceKind::Directory,
            SourceType::Tar => SourceKind::Tar,
            SourceType::TargzRef => SourceKind::GzipLayer,
            SourceType::TarTarfs => SourceKind::PlainTar { id: None },
        };
        let report = self.job(kind)?.run(Output::files(&self.bootstrap, &self.blob_dir))?;
        if self.json {
            print_json(&report)?;
        } else {
            report.notes.iter().for_each(|note| eprintln!("note: {note}"));
            print_report(&report);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn compressor(&self) -> CompressorName {
        self.compressor.unwrap_or(CompressorName::Zstd)
    }

    /// An option that asks for what is not done with a source that stays as it is.
    fn conflicting(&self, source_type: SourceType) -> Option<&'static str> {
        let compresses = !matches!(self.compressor, None | Some(CompressorName::None));
        let tar = source_type == SourceType::TarTarfs;
        let options = [
            (compresses, "a --compressor other than none"),
            (self.compression_level.is_some(), "--compression-level"),
            (matches!(self.digester, Some(DigesterName::Blake3)), "--digester blake3"),
            (self.batch_size.is_some(), "--batch-size"),
            (!self.chunk_dict.is_empty(), "--chunk-dict"),
            (self.encrypt, "--encrypt"),
            (tar && self.blob_inline_meta, "--blob-inline-meta"),
            (tar && self.blob_toc, "--blob-toc"),
        ];
        options.into_iter().find(|(given, _)| *given).map(|(_, option)| option)
    }

    fn source_type(&self) -> SourceType {
        let standard_input = self.source.as_os_str() == "-";
        if standard_input && self.prefetch.is_standard_input() {
            bad_usage(
                ErrorKind::ArgumentConflict,
                "standard input cannot be both the source and the list of --prefetch",
            );
        }
        match self.source_type {
            Some(SourceType::Directory) if standard_input => {
                bad_usage(ErrorKind::ArgumentConflict, "standard input cannot be a directory")
            }
            Some(source_type) => source_type,
            None if !standard_input && self.source.is_dir() => SourceType::Directory,
            None => SourceType::Tar,
        }
    }

    fn job(&self, kind: SourceKind) -> Result<Job, Failure> {
        Ok(Job {
            source: self.source.clone(),
            kind,
            options: BuildOptions {
                compressor: self.compressor().into(),
                algorithm: self.digester.unwrap_or(DigesterName::Blake3).into(),
                chunk_size: self.chunk_size,
                level: self.compression_level,
                batch_size: self.batch_size,
                inline_meta: self.blob_inline_meta,
                toc: self.blob_toc,
                encryption: encryption(self.encrypt),
                threads: self.threads,
                limits: ArchiveLimits { names: self.max_names, bytes: self.max_bytes },
            },
            chunk_dict: self.chunk_dict.clone(),
            prefetch: self.prefetch.list()?.unwrap_or_default(),
            watch: true,
        })
    }
}

/// Largest chunks of an encrypted blob, whose chunk table has room for no longer ones.
pub(in crate::command) const MAX_ENCRYPTED_CHUNK: u32 = 8 << 20;

/// What `--encrypt` means.
pub(in crate::command) fn encryption(encrypt: bool) -> Encryption {
    if encrypt { Encryption::FreshKey } else { Encryption::None }
}

/// Bytes of a chunk or a batch, decimal, or hexadecimal as others write them.
pub(in crate::command) fn power_of_two(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let in_range = |number: &u32| number.is_power_of_two() && (0x1000..=0x100_0000).contains(number);
    number.ok().filter(in_range).ok_or_else(|| "it must be a power of two from 4096 to 16777216".into())
}

/// What was built, for people.
pub(in crate::command) fn print_report(report: &BuildReport) {
    println!(
        "{} files, {} in {} chunks ({} unique), encoded {}",
        report.files,
        human_bytes(report.decoded_bytes),
        report.chunks,
        report.unique_chunks,
        human_bytes(report.encoded_bytes)
    );
    if report.shared_chunks > 0 {
        println!("{} chunks ({}) are in earlier images", report.shared_chunks, human_bytes(report.shared_bytes));
    }
    if let Some(blob) = report.blob {
        println!("blob {blob}");
    }
    if let Some(meta) = report.meta {
        println!("index of it {meta}");
    }
}
