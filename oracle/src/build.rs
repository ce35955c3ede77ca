//! Builds and merges images with `nydus-builder`, with the settings that its own command line program makes.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use nydus_api::ConfigV2;
use nydus_builder::attributes::Attributes;
use nydus_builder::{
    ArtifactStorage, BlobManager, BootstrapManager, BuildContext, Builder, ConversionType, DirectoryBuilder,
    Features, Merger, Prefetch, PrefetchPolicy, TarballBuilder,
};
use nydus_rafs::metadata::RafsVersion;
use nydus_storage::device::BlobFeatures;
use nydus_storage::meta::BatchContextGenerator;
use nydus_utils::{compress, digest};

/// What is used of the command line of `nydus-image`; the names of flags are its own.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build an image.
    Create(Create),
    /// Merge the bootstraps of layers.
    Merge(Merge),
}

impl Command {
    /// Does it.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Create(create) => create.run(),
            Self::Merge(merge) => merge.run(),
        }
    }
}

/// Builds an image.
#[derive(Debug, Args)]
pub struct Create {
    /// `dir-rafs`, `tar-rafs`, `targz-rafs`, `targz-ref`, `tar-tarfs`.
    #[arg(long = "type", default_value = "dir-rafs")]
    conversion: String,
    /// 5 or 6.
    #[arg(long, default_value = "6")]
    fs_version: String,
    /// `none`, `lz4_block` or `zstd`.
    #[arg(long, default_value = "zstd")]
    compressor: String,
    /// `blake3` or `sha256`.
    #[arg(long, default_value = "blake3")]
    digester: String,
    /// As `0x...`.
    #[arg(long, default_value = "0x100000")]
    chunk_size: String,
    /// As `0x...`; 0 for no batches.
    #[arg(long, default_value = "0x0")]
    batch_size: String,
    /// Put the bootstrap into the blob.
    #[arg(long)]
    blob_inline_meta: bool,
    /// `blob-toc` or nothing.
    #[arg(long, default_value = "")]
    features: String,
    /// Encrypt the blob.
    #[arg(long)]
    encrypt: bool,
    /// What to make of whiteouts: `none` keeps them as files, as converters do for layers.
    #[arg(long, default_value = "oci")]
    whiteout_spec: String,
    /// `fs` reads absolute paths, one a line, from standard input.
    #[arg(long, default_value = "none")]
    prefetch_policy: String,
    /// Bootstrap to write, unless it goes into the blob.
    #[arg(long)]
    bootstrap: Option<PathBuf>,
    /// Where the blob goes.
    #[arg(long)]
    blob_dir: PathBuf,
    /// Directory or tar.
    source: PathBuf,
}

fn hexadecimal(text: &str) -> Result<u32> {
    u32::from_str_radix(text.trim_start_matches("0x"), 16).with_context(|| format!("size {text}"))
}

fn config() -> Arc<ConfigV2> {
    let config = ConfigV2::default();
    config.internal.set_blob_accessible(true);
    Arc::new(config)
}

impl Create {
    fn run(self) -> Result<()> {
        let conversion: ConversionType = self.conversion.parse()?;
        let version = if self.fs_version == "5" { RafsVersion::V5 } else { RafsVersion::V6 };
        let tarfs = conversion == ConversionType::TarToTarfs;
        let (compressor, digester) = self.algorithms(conversion)?;
        let mut context = BuildContext::new(
            String::new(),
            version == RafsVersion::V6 && !tarfs,
            0,
            compressor,
            digester,
            true,
            self.whiteout_spec.parse()?,
            conversion,
            self.source.clone(),
            self.prefetch()?,
            Some(ArtifactStorage::FileDir((self.blob_dir.clone(), String::new()))),
            None,
            self.blob_inline_meta,
            Features::try_from(self.features.as_str())?,
            self.encrypt,
            Attributes::default(),
        );
        context.set_fs_version(version);
        context.set_chunk_size(hexadecimal(&self.chunk_size)?);
        context.set_batch_size(hexadecimal(&self.batch_size)?);
        context.set_configuration(config());
        if context.batch_size > 0 {
            context.blob_batch_generator = Some(Mutex::new(BatchContextGenerator::new(context.batch_size)?));
            context.blob_features.insert(BlobFeatures::BATCH | BlobFeatures::CHUNK_INFO_V2);
        }
        if matches!(conversion, ConversionType::TargzToRef | ConversionType::TarToRef) {
            context.blob_features.insert(BlobFeatures::CHUNK_INFO_V2 | BlobFeatures::SEPARATE);
        }
        if self.encrypt {
            context.blob_features.insert(BlobFeatures::CHUNK_INFO_V2 | BlobFeatures::ENCRYPTED);
        }
        let mut builder: Box<dyn Builder> = match conversion {
            ConversionType::DirectoryToRafs => Box::new(DirectoryBuilder::new()),
            _ => Box::new(TarballBuilder::new(conversion)),
        };
        let mut bootstrap = BootstrapManager::new(self.bootstrap.map(ArtifactStorage::SingleFile), None);
        builder.build(&mut context, &mut bootstrap, &mut BlobManager::new(digester, false)).context("build")?;
        Ok(())
    }

    /// An index over somebody else's file has fixed ones.
    fn algorithms(&self, conversion: ConversionType) -> Result<(compress::Algorithm, digest::Algorithm)> {
        Ok(match conversion {
            ConversionType::TargzToRef | ConversionType::TarToRef => {
                (compress::Algorithm::GZip, digest::Algorithm::Sha256)
            }
            ConversionType::TarToTarfs => (compress::Algorithm::None, digest::Algorithm::Sha256),
            _ => (self.compressor.parse()?, self.digester.parse()?),
        })
    }

    fn prefetch(&self) -> Result<Prefetch> {
        let policy = if self.prefetch_policy == "fs" { PrefetchPolicy::Fs } else { PrefetchPolicy::None };
        Prefetch::new(policy)
    }
}

/// Merges the bootstraps of layers.
#[derive(Debug, Args)]
pub struct Merge {
    /// Registry digests of the blobs, separated by commas, in the order of the sources.
    #[arg(long, value_delimiter = ',')]
    blob_digests: Option<Vec<String>>,
    /// Sizes of the blobs, likewise.
    #[arg(long, value_delimiter = ',')]
    blob_sizes: Option<Vec<u64>>,
    /// Bootstrap to write.
    #[arg(long)]
    bootstrap: PathBuf,
    /// Bootstraps, lowest first.
    #[arg(required = true)]
    sources: Vec<PathBuf>,
}

impl Merge {
    fn run(self) -> Result<()> {
        let config = config();
        config.internal.set_blob_accessible(false);
        let mut context = BuildContext { configuration: config.clone(), ..BuildContext::default() };
        let target = ArtifactStorage::SingleFile(self.bootstrap);
        Merger::merge(
            &mut context,
            None,
            self.sources,
            self.blob_digests,
            None,
            self.blob_sizes,
            None,
            None,
            target,
            None,
            config,
        )
        .context("merge")?;
        Ok(())
    }
}
