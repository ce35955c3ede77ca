//! `nydus-image create`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, ValueEnum, error::ErrorKind};
use shoal_proto::BlobId;
use shoal_rafs::{BlobTarget, Bootstrap, BuildOptions, BuildReport, Compressor, MergeOptions, Output, PrefetchList};

use super::{PrefetchPolicy, dictionary, output, place_bootstrap, refuse};
use crate::command::{
    Failure,
    image::{DigesterName, Job, MAX_ENCRYPTED_CHUNK, SourceKind, encryption, open, power_of_two, print_build_report},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SourceType {
    /// A directory with everything below it.
    #[value(name = "dir-rafs", alias = "directory")]
    Directory,
    /// A tar, plain or compressed with gzip or zstd.
    #[value(name = "tar-rafs")]
    Tar,
    /// The same.
    #[value(name = "targz-rafs")]
    TarGz,
    /// A tar in gzip that stays as it is: only an index over it is made.
    #[value(name = "targz-ref")]
    TarGzRef,
    /// A plain tar that stays as it is, and is not copied: only a bootstrap over it is made, which the kernel mounts.
    #[value(name = "tar-tarfs")]
    TarTarfs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CompressorName {
    None,
    #[value(name = "lz4_block")]
    Lz4Block,
    Zstd,
}

impl From<CompressorName> for Compressor {
    fn from(name: CompressorName) -> Self {
        match name {
            CompressorName::None => Self::None,
            CompressorName::Lz4Block => Self::Lz4,
            CompressorName::Zstd => Self::Zstd,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WhiteoutSpec {
    Oci,
    Overlayfs,
    None,
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// What becomes the image: a directory, or a tar, which may be a FIFO.
    source: PathBuf,
    /// What the source is.
    #[arg(long = "type", short = 't', alias = "source-type", value_enum, default_value = "dir-rafs")]
    source_type: SourceType,
    /// Bootstrap file to write; without one it goes into the directory of blobs, under its sha256.
    #[arg(
        long,
        short = 'B',
        required_unless_present_any = ["blob_dir", "blob_inline_meta"],
        conflicts_with = "blob_inline_meta"
    )]
    bootstrap: Option<PathBuf>,
    /// Blob file to write. A FIFO is written from front to back while the image is built.
    #[arg(long, short = 'b', required_unless_present = "blob_dir")]
    blob: Option<PathBuf>,
    /// What the blob of tar-tarfs is called; its sha256 if missing.
    #[arg(long)]
    blob_id: Option<BlobId>,
    /// Directory to write the blob to, under its sha256.
    #[arg(long, short = 'D')]
    blob_dir: Option<PathBuf>,
    /// Put the bootstrap into the blob, and nowhere else.
    #[arg(long, alias = "inline-bootstrap")]
    blob_inline_meta: bool,
    /// End the blob with the digests of its chunks and a table of contents.
    #[arg(long, value_parser = ["blob-toc"])]
    features: Option<String>,
    /// Bytes of a chunk: a power of two from 0x1000 to 0x1000000.
    #[arg(long, default_value = "0x100000", value_parser = power_of_two)]
    chunk_size: u32,
    /// Compress small chunks together, in batches below so many bytes: a power of two from 0x1000 to the chunk size, or 0.
    #[arg(long, default_value = "0", value_parser = batch_size)]
    batch_size: u32,
    /// How chunks are compressed: zstd if missing, none where the source stays as it is.
    #[arg(long, value_enum)]
    compressor: Option<CompressorName>,
    /// What names a chunk: blake3 if missing, sha256 where the source stays as it is.
    #[arg(long, value_enum)]
    digester: Option<DigesterName>,
    /// Version of the format. Images of version 5 are read, and not written.
    #[arg(long, short = 'v', default_value = "6", value_parser = ["5", "6"])]
    fs_version: String,
    /// Bootstrap of an earlier image, as bootstrap=FILE: chunks that it has are not stored again.
    #[arg(long, value_parser = dictionary)]
    chunk_dict: Option<PathBuf>,
    /// Bootstrap of the image that the source is a layer over.
    #[arg(long, conflicts_with = "blob_inline_meta")]
    parent_bootstrap: Option<PathBuf>,
    /// How a layer over a parent takes names away: both ways are understood. Without a parent all stays as it is.
    #[arg(long, value_enum, default_value = "oci")]
    whiteout_spec: WhiteoutSpec,
    /// What is read early; the paths come from standard input.
    #[arg(long, value_enum, default_value = "none")]
    prefetch_policy: PrefetchPolicy,
    /// JSON file to write with what was built.
    #[arg(long, short = 'J')]
    output_json: Option<PathBuf>,
    /// Chunks are always aligned.
    #[arg(long)]
    aligned_chunk: bool,
    /// The same source always gives the same image.
    #[arg(long)]
    repeatable: bool,
    /// Encrypt the blob. Its key is in the bootstrap, which cannot be put into the blob then. Not listed: converters take what
    /// the help lists for what works, and always want the bootstrap inside.
    #[arg(long, short = 'E', hide = true)]
    encrypt: bool,
}

impl Create {
    pub(super) fn run(self, talkative: bool) -> Result<ExitCode, Failure> {
        self.check_usage();
        let prefetch = self.prefetch_policy.list()?;
        let parent = self.parent_bootstrap.as_deref().map(|path| Ok::<_, Failure>(open(path)?.1)).transpose()?;
        let (blobs, bootstrap) = if self.blob_inline_meta {
            (self.build(prefetch, None, talkative)?, None)
        } else {
            let write = |path: &Path| match &parent {
                Some(parent) => self.over(parent, prefetch, path, talkative),
                None => self.build(prefetch, Some(path), talkative),
            };
            let (blobs, path) = place_bootstrap(self.bootstrap.as_deref(), self.blob_dir.as_deref(), write)?;
            (blobs, Some(path))
        };
        output::Output::new(bootstrap.as_deref(), blobs, self.compressor()).write(self.output_json.as_deref())?;
        Ok(ExitCode::SUCCESS)
    }

    fn check_usage(&self) {
        if self.encrypt && self.blob_inline_meta {
            let message = "--encrypt with --blob-inline-meta would put the key into the blob that it opens";
            refuse(ErrorKind::ArgumentConflict, message);
        }
        if self.encrypt && matches!(self.source_type, SourceType::TarGzRef | SourceType::TarTarfs) {
            refuse(ErrorKind::ArgumentConflict, "--encrypt: what targz-ref and tar-tarfs are made of stays as it is");
        }
        if self.encrypt && self.chunk_size > MAX_ENCRYPTED_CHUNK {
            refuse(ErrorKind::ValueValidation, "--chunk-size must not exceed 0x800000 with --encrypt");
        }
        if self.fs_version != "6" {
            refuse(ErrorKind::InvalidValue, "--fs-version: images of version 5 are read, and not written");
        }
        if self.batch_size > self.chunk_size {
            refuse(ErrorKind::ValueValidation, "--batch-size must not exceed --chunk-size");
        }
        if let Some(option) = self.conflicting() {
            let message = format!("{option} cannot be given where the source stays as it is");
            refuse(ErrorKind::ArgumentConflict, &message);
        }
        if self.blob_id.is_some() && self.source_type != SourceType::TarTarfs {
            refuse(ErrorKind::ArgumentConflict, "--blob-id is for tar-tarfs: other blobs are named by their sha256");
        }
        if self.parent_bootstrap.is_some() && self.whiteout_spec == WhiteoutSpec::None {
            refuse(ErrorKind::ArgumentConflict, "a layer over a parent takes away what its whiteouts say");
        }
    }

    /// An option that asks for what is not done with a source that stays as it is.
    fn conflicting(&self) -> Option<&'static str> {
        let tar = self.source_type == SourceType::TarTarfs;
        if !tar && self.source_type != SourceType::TarGzRef {
            return None;
        }
        let compresses = !matches!(self.compressor, None | Some(CompressorName::None));
        let options = [
            (compresses, "a --compressor other than none"),
            (matches!(self.digester, Some(DigesterName::Blake3)), "--digester blake3"),
            (self.batch_size > 0, "--batch-size"),
            (self.chunk_dict.is_some(), "--chunk-dict"),
            (tar && self.blob_inline_meta, "--blob-inline-meta"),
            (tar && self.features.is_some(), "--features blob-toc"),
            (tar && self.blob.is_some(), "--blob"),
        ];
        options.into_iter().find(|(given, _)| *given).map(|(_, option)| option)
    }

    /// Builds the source; gives the names of the image's blobs, that of its own blob last.
    fn build(
        &self,
        prefetch: PrefetchList,
        bootstrap: Option<&Path>,
        talkative: bool,
    ) -> Result<Vec<String>, Failure> {
        let job = Job {
            source: self.source.clone(),
            kind: match self.source_type {
                SourceType::Directory => SourceKind::Directory,
                SourceType::Tar | SourceType::TarGz => SourceKind::Tar,
                SourceType::TarGzRef => SourceKind::GzipLayer,
                SourceType::TarTarfs => SourceKind::PlainTar { id: self.blob_id },
            },
            options: BuildOptions {
                compressor: self.compressor.unwrap_or(CompressorName::Zstd).into(),
                algorithm: self.digester.unwrap_or(DigesterName::Blake3).into(),
                chunk_size: self.chunk_size,
                batch_size: Some(self.batch_size).filter(|size| *size > 0),
                inline_meta: self.blob_inline_meta,
                toc: self.features.is_some(),
                encryption: encryption(self.encrypt),
                ..BuildOptions::default()
            },
            chunk_dict: self.chunk_dict.iter().cloned().collect(),
            prefetch,
            watch: talkative,
        };
        let blob = match (&self.blob, &self.blob_dir) {
            _ if self.source_type == SourceType::TarTarfs => BlobTarget::Nowhere,
            (Some(file), _) => BlobTarget::File(file),
            (None, Some(dir)) => BlobTarget::Dir(dir),
            (None, None) => return Err("neither --blob nor --blob-dir is given".into()),
        };
        let report = job.run(Output { bootstrap, blob })?;
        report.notes.iter().for_each(|note| tracing::warn!("{note}"));
        if talkative {
            print_build_report(&report);
        }
        let BuildReport { blob, shared_blobs, .. } = report;
        Ok(shared_blobs.iter().chain(&blob).map(ToString::to_string).collect())
    }

    /// Builds the source and puts it over its parent.
    fn over(
        &self,
        parent: &Bootstrap,
        prefetch: PrefetchList,
        bootstrap: &Path,
        talkative: bool,
    ) -> Result<Vec<String>, Failure> {
        let work = tempfile::tempdir()?;
        let layer = work.path().join("layer");
        let built = self.build(PrefetchList::default(), Some(&layer), talkative)?;
        let options = MergeOptions { prefetch: Some(prefetch), ..MergeOptions::default() };
        let merged = shoal_rafs::merge_with(&[parent.clone(), Bootstrap::open(&layer)?], &options, bootstrap)?;
        // Callers look for the new blob at the end.
        let (mut blobs, new): (Vec<_>, Vec<_>) =
            merged.blobs.into_iter().partition(|blob| Some(blob) != built.last());
        blobs.extend(new);
        Ok(blobs)
    }

    fn compressor(&self) -> Compressor {
        match self.source_type {
            SourceType::TarGzRef => Compressor::Gzip,
            SourceType::TarTarfs => Compressor::None,
            SourceType::Directory | SourceType::Tar | SourceType::TarGz => {
                self.compressor.unwrap_or(CompressorName::Zstd).into()
            }
        }
    }
}

fn batch_size(text: &str) -> Result<u32, String> {
    match text {
        "0" | "0x0" => Ok(0),
        _ => power_of_two(text),
    }
}
