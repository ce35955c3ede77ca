//! `shoal image convert`: from an OCI or Docker image to a Nydus image.

use std::{num::NonZeroUsize, path::PathBuf, process::ExitCode};

use indicatif::{ProgressBar, ProgressStyle};
use shoal_rafs::{
    BuildOptions,
    oci::{ConvertEvent, ConvertOptions, ConvertReport, Location, OpenLocation, Platform, Reference, convert},
};

use super::{
    Failure,
    build::{CompressorName, DigesterName},
    human_bytes, print_json,
    registry::RegistryArgs,
    runtime,
};
use crate::command::stop_signal;

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
    #[arg(long)]
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
    /// Memory in MiB for the chunks of layers that are converted at the same time; names and chunk tables come on top.
    #[arg(long, value_name = "MIB", default_value_t = ConvertOptions::default().memory_bytes >> 20)]
    memory: u64,
    /// How chunks are compressed; a chunk that does not shrink is stored as it is.
    #[arg(long, value_enum, default_value = "zstd")]
    compressor: CompressorName,
    /// What names a chunk.
    #[arg(long, value_enum, default_value = "blake3")]
    digester: DigesterName,
    /// Bytes of a chunk: a power of two from 4096 to 16777216.
    #[arg(long, default_value_t = BuildOptions::default().chunk_size)]
    chunk_size: u32,
    /// Threads that hash and compress each layer, one for each core if missing.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    #[command(flatten)]
    registry: RegistryArgs,
}

impl Convert {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        self.registry.refuse_two_outputs(&self.target);
        let (from, to) = (OpenLocation::source(&self.source)?, OpenLocation::target(&self.target)?);
        let registry = self.registry.client([from.reference(), to.reference()].into_iter().chain(&self.cache))?;
        let bar = ProgressBar::new(0);
        bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left")?);
        let watched = bar.clone();
        let watch = move |event| match event {
            ConvertEvent::Platform { layer_bytes } => watched.inc_length(layer_bytes),
            ConvertEvent::Read(bytes) => watched.inc(bytes),
            ConvertEvent::Layer(layer) if layer.reused => watched.inc(layer.source_bytes),
            ConvertEvent::Layer(_) => {}
        };
        let options = self.options();
        let report = runtime()?.block_on(async {
            tokio::select! {
                converted = convert(&registry, from.reference(), to.reference(), &options, watch) => Ok(converted?),
                // What is not finished is removed as the conversion is dropped.
                stopped = stop_signal() => Err::<_, Failure>(stopped.map_or_else(Failure::from, |()| "stopped".into())),
            }
        })?;
        bar.finish_and_clear();
        to.finish()?;
        if self.registry.json {
            print_json(&report)?;
        } else if !self.target.is_standard() {
            print_report(&report);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn options(&self) -> ConvertOptions {
        ConvertOptions {
            build: BuildOptions {
                compressor: self.compressor.into(),
                algorithm: self.digester.into(),
                chunk_size: self.chunk_size,
                threads: self.threads,
                ..BuildOptions::default()
            },
            platforms: self.platform.clone(),
            merge_index: self.merge_index,
            oci_ref: self.oci_ref,
            with_referrer: self.with_referrer,
            memory_bytes: self.memory.saturating_mul(1 << 20),
            state: self.state.clone(),
            cache: self.cache.clone(),
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
    }
    println!("{} read, {} sent", human_bytes(report.read_bytes), human_bytes(report.sent_bytes));
}
