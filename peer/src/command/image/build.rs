//! `shoal image build`: from a directory or a tar to a bootstrap and a blob.

use std::{
    fs::File,
    io::{IsTerminal, Read},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Mutex,
    time::{Duration, Instant},
};

use clap::{ValueEnum, error::ErrorKind};
use indicatif::{ProgressBar, ProgressStyle};
use shoal_proto::Algorithm;
use shoal_rafs::{ArchiveLimits, BuildOptions, BuildReport, Builder, Compressor, Progress};

use super::{Failure, human_bytes, open, prefetch::PrefetchFrom, print_json};
use crate::command::bad_usage;

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
pub(super) enum DigesterName {
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
    /// Directory to write the blob to, named by its sha256.
    #[arg(long)]
    blob_dir: PathBuf,
    /// How chunks are compressed; a chunk that does not shrink is stored as it is.
    #[arg(long, value_enum, default_value = "zstd")]
    compressor: CompressorName,
    /// Level of zstd, -7 (fast) to 22 (small); 3 if missing.
    #[arg(long, value_parser = clap::value_parser!(i32).range(-7..=22), allow_negative_numbers = true)]
    compression_level: Option<i32>,
    /// What names a chunk.
    #[arg(long, value_enum, default_value = "blake3")]
    digester: DigesterName,
    /// Bytes of a chunk: a power of two from 4096 to 16777216.
    #[arg(long, default_value = "1048576", value_name = "BYTES", value_parser = power_of_two)]
    chunk_size: u32,
    /// Compress small files together, in batches below so many bytes: a power of two from 4096 to the chunk size. Files of
    /// half as many bytes or more are compressed alone.
    #[arg(long, value_name = "BYTES", value_parser = power_of_two)]
    batch_size: Option<u32>,
    /// Put the bootstrap into the blob too, as layers in registries have it.
    #[arg(long, visible_alias = "inline-meta")]
    blob_inline_meta: bool,
    /// End the blob with the digests of its chunks and a table of contents, as layers in registries have it.
    #[arg(long)]
    blob_toc: bool,
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
        if self.compression_level.is_some() && !matches!(self.compressor, CompressorName::Zstd) {
            bad_usage(ErrorKind::ArgumentConflict, "--compression-level is for --compressor zstd");
        }
        if self.batch_size.is_some_and(|batch_size| batch_size > self.chunk_size) {
            bad_usage(ErrorKind::ValueValidation, "--batch-size must not exceed --chunk-size");
        }
        let source_type = self.source_type();
        let writes_chunks = self.batch_size.is_some() || self.blob_inline_meta || self.blob_toc;
        if source_type == SourceType::TargzRef && (writes_chunks || !self.chunk_dict.is_empty()) {
            bad_usage(
                ErrorKind::ArgumentConflict,
                "--batch-size, --blob-inline-meta, --blob-toc and --chunk-dict are for blobs that are written, which \
                 --source-type targz-ref does not",
            );
        }
        let report = match source_type {
            SourceType::Directory => self.directory()?,
            SourceType::Tar | SourceType::TargzRef => self.archive(source_type)?,
        };
        if self.json {
            print_json(&report)?;
        } else {
            print_report(&report);
        }
        Ok(ExitCode::SUCCESS)
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

    fn directory(&self) -> Result<BuildReport, Failure> {
        let watcher = Watcher::new(None)?;
        let bar = watcher.bar.clone();
        let builder = self.builder()?.on_progress(move |progress| watcher.show(progress));
        let report = builder.build(&self.source, &self.bootstrap, &self.blob_dir);
        bar.finish_and_clear();
        Ok(report?)
    }

    fn archive(&self, source_type: SourceType) -> Result<BuildReport, Failure> {
        let (name, stream, len): (_, Box<dyn Read>, _) = if self.source.as_os_str() == "-" {
            (Path::new("standard input"), Box::new(std::io::stdin().lock()), None)
        } else {
            let opened = File::open(&self.source).and_then(|file| Ok((file.metadata()?, file)));
            let (metadata, file) = opened.map_err(|e| format!("cannot open {}: {e}", self.source.display()))?;
            let len = Some(metadata.len()).filter(|_| metadata.is_file());
            (self.source.as_path(), Box::new(file), len)
        };
        let watcher = Watcher::new(Some(len))?;
        let bar = watcher.bar.clone();
        let builder = self.builder()?.on_progress(move |progress| watcher.show(progress));
        let stream = bar.wrap_read(stream);
        let report = match source_type {
            SourceType::TargzRef => builder.build_reference(stream, name, &self.bootstrap, &self.blob_dir),
            _ => builder.build_tar(stream, name, &self.bootstrap, &self.blob_dir),
        };
        bar.finish_and_clear();
        Ok(report?)
    }

    fn builder(&self) -> Result<Builder, Failure> {
        let options = BuildOptions {
            compressor: self.compressor.into(),
            algorithm: self.digester.into(),
            chunk_size: self.chunk_size,
            level: self.compression_level,
            batch_size: self.batch_size,
            inline_meta: self.blob_inline_meta,
            toc: self.blob_toc,
            threads: self.threads,
            limits: ArchiveLimits { names: self.max_names, bytes: self.max_bytes },
        };
        let prefetch = self.prefetch.list()?.unwrap_or_default();
        let dictionary = self.chunk_dict.iter().map(|path| Ok(open(path)?.1)).collect::<Result<_, Failure>>()?;
        Ok(Builder::new(options).chunk_dictionary(dictionary).prefetch(prefetch))
    }
}

/// Bytes of a chunk or a batch, decimal, or hexadecimal as others write them.
fn power_of_two(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let in_range = |number: &u32| number.is_power_of_two() && (0x1000..=0x100_0000).contains(number);
    number.ok().filter(in_range).ok_or_else(|| "it must be a power of two from 4096 to 16777216".into())
}

fn print_report(report: &BuildReport) {
    report.notes.iter().for_each(|note| eprintln!("note: {note}"));
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

/// Time between two lines of progress.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows how far a build is: a bar with an estimate on a terminal, otherwise a line now and then. On standard error.
struct Watcher {
    /// Hidden without a terminal.
    bar: ProgressBar,
    /// Whether the bar counts what is read of an archive, rather than bytes of files.
    archive: bool,
    /// When the last line was written.
    last_line: Option<Mutex<Instant>>,
}

impl Watcher {
    /// For a directory, or for an archive of which the length may be known.
    fn new(archive: Option<Option<u64>>) -> Result<Self, Failure> {
        let bar = ProgressBar::new_spinner();
        if let Some(Some(len)) = archive {
            bar.set_length(len);
        }
        bar.set_style(style(bar.length().is_some())?);
        let last_line = (!std::io::stderr().is_terminal()).then(|| Mutex::new(Instant::now()));
        Ok(Self { bar, archive: archive.is_some(), last_line })
    }

    fn show(&self, progress: Progress) {
        if let Some(last_line) = &self.last_line {
            return print_line(last_line, progress);
        }
        if !self.archive {
            if let (None, Some(total), Ok(style)) = (self.bar.length(), progress.total_bytes, style(true)) {
                self.bar.set_length(total);
                self.bar.set_style(style);
            }
            self.bar.set_position(progress.decoded_bytes);
        }
        self.bar.set_message(format!("encoded {}", human_bytes(progress.encoded_bytes)));
    }
}

fn style(length_known: bool) -> Result<ProgressStyle, Failure> {
    Ok(ProgressStyle::with_template(match length_known {
        true => "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left, {msg}",
        false => "{spinner} {bytes} {bytes_per_sec} {msg}",
    })?)
}

fn print_line(last_line: &Mutex<Instant>, progress: Progress) {
    let mut last_line = last_line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if last_line.elapsed() < LINE_INTERVAL {
        return;
    }
    *last_line = Instant::now();
    let total = progress.total_bytes.map_or_else(String::new, |total| format!(" of {}", human_bytes(total)));
    let (read, encoded) = (human_bytes(progress.decoded_bytes), human_bytes(progress.encoded_bytes));
    eprintln!("{read}{total} read, encoded {encoded}");
}
