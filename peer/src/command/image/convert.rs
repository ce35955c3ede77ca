//! `shoal image convert`: from an OCI or Docker image to a Nydus image, or back.

use std::{num::NonZeroUsize, path::PathBuf, process::ExitCode};

use clap::error::ErrorKind;
use indicatif::{ProgressBar, ProgressStyle};
use shoal_rafs::{
    BuildOptions,
    oci::{
        ConvertEvent, ConvertOptions, ConvertReport, CopiedBlobs, LayerCompression, Location, OpenLocation, Platform,
        Recipients, Reference, Registry, ReverseReport, convert, reverse,
    },
};

use super::{
    Failure,
    build::{CompressorName, DigesterName, MAX_ENCRYPTED_CHUNK, encryption, power_of_two},
    human_bytes, print_json,
    registry::{BackendArgs, DecryptionArgs, EncryptionArgs, RegistryArgs},
    runtime,
};
use crate::command::{bad_usage, stop_signal};

/// Layers are converted as they come, several at a time; only an archive is stored first. What was finished before a cut
/// is not done again with the same --state or --cache. The tag is written last.
#[derive(Debug, clap::Args)]
pub(in crate::command) struct Convert {
    /// `host[:port]/repo:tag`, `oci:DIR[:tag]`, or `oci-archive:FILE[:tag]`, where FILE may be `-`.
    source: Location,
    /// Likewise.
    target: Location,
    /// Convert only this platform of an index, as in linux/arm64; may be given several times. All of them if missing.
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Vec<Platform>,
    /// Put both under the tag: the source's manifests for clients that know nothing of Nydus, and the Nydus ones.
    #[arg(long)]
    merge_index: bool,
    /// Convert no gzip layer: push an index over it, from which the registry's own layer is read lazily as it is. Layers that
    /// are no gzip, or that have sparse files, are converted. Where the target is another repository, the source's image is put
    /// beside it.
    #[arg(long, conflicts_with_all = ["reverse", "blob_backend"])]
    oci_ref: bool,
    /// Make the Nydus manifest a referrer of the source's. With --oci-ref there is one for each layer: nodes with
    /// `snapshotter.lazy_oci` then pull the unmodified image lazily.
    #[arg(long)]
    with_referrer: bool,
    /// Folder in which records of converted layers are kept, a few percent of their size.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// An image of such records with their blobs, in a registry or a layout; read first, then brought up to date.
    #[arg(long, value_name = "REF")]
    cache: Option<Reference>,
    /// An earlier Nydus image, of the same chunk size: chunks that it has are read from its blobs, which are mounted from its
    /// repository where the registry can do that, and are not stored again.
    #[arg(long, value_name = "REF")]
    chunk_dict: Option<Reference>,
    /// The other way: a Nydus image becomes an OCI image of tar layers with the same tree, one for each Nydus layer if every
    /// blob holds the tree of its layer, otherwise one for all.
    #[arg(long, conflicts_with_all = [
        "merge_index", "with_referrer", "state", "cache", "chunk_dict", "memory", "compressor", "compression_level", "digester",
        "chunk_size", "batch_size", "blob_toc", "threads", "encryption_key",
    ])]
    reverse: bool,
    /// With --reverse: how layers are compressed.
    #[arg(long, value_enum, default_value = "gzip", requires = "reverse")]
    layer_compression: LayerCompressionName,
    /// Memory in MiB for the chunks of layers that are converted at the same time; names and chunk tables come on top.
    #[arg(long, value_name = "MIB", default_value_t = ConvertOptions::default().memory_bytes >> 20)]
    memory: u64,
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
    /// End blobs with the digests of their chunks and a table of contents, as the converters of Nydus do: nydusd verifies chunks
    /// of such blobs alone.
    #[arg(long, conflicts_with = "encrypt")]
    blob_toc: bool,
    /// Threads that hash and compress each layer, one for each core if missing.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Encrypt all blobs, each with a key of its own, so that no two conversions of an image give the same.
    #[arg(long, requires = "encryption_key", conflicts_with_all = ["reverse", "oci_ref", "merge_index", "cache"])]
    encrypt: bool,
    #[command(flatten)]
    encryption: EncryptionArgs,
    #[command(flatten)]
    decryption: DecryptionArgs,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    registry: RegistryArgs,
}

/// How tar layers are compressed.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum LayerCompressionName {
    /// Every client can read it.
    Gzip,
    /// Smaller and quicker to unpack.
    Zstd,
}

impl From<LayerCompressionName> for LayerCompression {
    fn from(name: LayerCompressionName) -> Self {
        match name {
            LayerCompressionName::Gzip => Self::Gzip,
            LayerCompressionName::Zstd => Self::Zstd,
        }
    }
}

/// What was done, either way.
enum Report {
    Converted(ConvertReport),
    Reversed(ReverseReport),
}

impl Convert {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        self.registry.refuse_two_outputs(&self.target);
        if self.encrypt && self.chunk_size > MAX_ENCRYPTED_CHUNK {
            bad_usage(ErrorKind::ValueValidation, "--chunk-size must not exceed 8388608 with --encrypt");
        }
        if self.compression_level.is_some() && !matches!(self.compressor, CompressorName::Zstd) {
            bad_usage(ErrorKind::ArgumentConflict, "--compression-level is for --compressor zstd");
        }
        if self.batch_size.is_some_and(|batch_size| batch_size > self.chunk_size) {
            bad_usage(ErrorKind::ValueValidation, "--batch-size must not exceed --chunk-size");
        }
        let (from, to) = (OpenLocation::source(&self.source)?, OpenLocation::target(&self.target)?);
        let others = self.cache.iter().chain(&self.chunk_dict);
        // The Nydus image has the blobs.
        let rules = self.backend.rules(if self.reverse { from.reference() } else { to.reference() });
        let references = [from.reference(), to.reference()].into_iter().chain(others);
        let registry = self.registry.client_with(references, rules, self.decryption.keys()?)?;
        let recipients = self.encryption.recipients()?;
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left")?);
        let watched = bar.clone();
        let watch = move |event| match event {
            ConvertEvent::Platform { layer_bytes } => watched.inc_length(layer_bytes),
            ConvertEvent::Read(bytes) => watched.inc(bytes),
            ConvertEvent::Layer(layer) if layer.reused => watched.inc(layer.source_bytes),
            ConvertEvent::Layer(_) => {}
        };
        let mut report = runtime()?.block_on(async {
            tokio::select! {
                report = self.work(&registry, (from.reference(), to.reference()), recipients, watch) => report,
                // What is not finished is removed as the conversion is dropped.
                stopped = stop_signal() => Err::<_, Failure>(stopped.map_or_else(Failure::from, |()| "stopped".into())),
            }
        })?;
        bar.finish_and_clear();
        match &mut report {
            Report::Converted(ConvertReport { reference, .. })
            | Report::Reversed(ReverseReport { reference, .. }) => {
                *reference = to.told(reference);
            }
        }
        to.finish()?;
        match &report {
            Report::Converted(report) if self.registry.json => print_json(report)?,
            Report::Reversed(report) if self.registry.json => print_json(report)?,
            _ if self.target.is_standard() => {}
            Report::Converted(report) => print_report(report),
            Report::Reversed(report) => print_reversed(report),
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn work(
        &self,
        registry: &Registry,
        (from, to): (&Reference, &Reference),
        recipients: Option<Recipients>,
        watch: impl Fn(ConvertEvent) + Send + Sync + 'static,
    ) -> Result<Report, Failure> {
        if self.reverse {
            let compression = self.layer_compression.into();
            return Ok(Report::Reversed(reverse(registry, from, to, &self.platform, compression, watch).await?));
        }
        Ok(Report::Converted(convert(registry, from, to, &self.options(recipients), watch).await?))
    }

    fn options(&self, recipients: Option<Recipients>) -> ConvertOptions {
        ConvertOptions {
            build: BuildOptions {
                compressor: self.compressor.into(),
                algorithm: self.digester.into(),
                level: self.compression_level,
                chunk_size: self.chunk_size,
                batch_size: self.batch_size,
                toc: self.blob_toc,
                threads: self.threads,
                encryption: encryption(self.encrypt),
                ..BuildOptions::default()
            },
            platforms: self.platform.clone(),
            merge_index: self.merge_index,
            oci_ref: self.oci_ref,
            with_referrer: self.with_referrer,
            memory_bytes: self.memory.saturating_mul(1 << 20),
            state: self.state.clone(),
            cache: self.cache.clone(),
            chunk_dict: self.chunk_dict.clone(),
            recipients,
            blob_backend: self.backend.blob_backend.clone(),
        }
    }
}

fn print_report(report: &ConvertReport) {
    println!("{}", report.reference);
    for image in &report.images {
        let reused = image.layers.iter().filter(|layer| layer.reused).count();
        let indexed = match image.layers.iter().filter(|layer| layer.indexed).count() {
            0 => String::new(),
            indexed => format!(", {indexed} read as they are"),
        };
        println!(
            "{}: {} layers ({reused} converted before{indexed}), {} encoded",
            image.platform,
            image.layers.len(),
            human_bytes(image.encoded_bytes)
        );
        let CopiedBlobs { sent_bytes, mounted_bytes, existing_bytes } = image.dictionary;
        let shared = sent_bytes + mounted_bytes + existing_bytes;
        if shared > 0 {
            println!(
                "  with blobs of the dictionary of {}, {} of them sent",
                human_bytes(shared),
                human_bytes(sent_bytes)
            );
        }
    }
    println!("{} read, {} sent", human_bytes(report.read_bytes), human_bytes(report.sent_bytes));
}

fn print_reversed(report: &ReverseReport) {
    println!("{}", report.reference);
    for image in &report.images {
        let what = if image.per_layer { "as they were in the Nydus image" } else { "with the whole tree" };
        println!("{}: {} layers {what}", image.platform, image.layers.len());
        image.left_out.iter().for_each(|path| eprintln!("note: {path} is a socket, which a tar cannot hold"));
    }
    println!("{} read, {} sent", human_bytes(report.read_bytes), human_bytes(report.sent_bytes));
}
