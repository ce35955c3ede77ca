//! What it takes to convert an image in a registry, next to what that is made of: in one run, one after the other in each round.
//!
//! ```text
//! convert    shoal image convert, into a repository that has nothing
//! oci_ref    the same with --oci-ref
//! download   all layers from the registry to the disk
//! build      all layers from the disk to blobs on the disk, as convert builds them
//! upload     these blobs from the disk to the registry, into a repository that has nothing
//! ```
//!
//! The parts do all layers of the image at the same time, and begin with empty page caches, as the two conversions do. The
//! registry is Debian's `docker-registry` on this machine.

mod report;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Instant,
};

use futures::future::try_join_all;
use serde::Deserialize;
use shoal::{command::Failure, processes::DockerRegistryProcess};
use shoal_proto::ObjectId;
use shoal_rafs::{
    BuildOptions, Builder,
    oci::{Descriptor, Reference, Registry, RegistryOptions},
};

pub use self::report::Report;
use self::report::Round;
use crate::machine::{drop_caches, finish, measure};

/// What a manifest or an index says, as far as it is used.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    manifests: Vec<Named>,
    #[serde(default)]
    layers: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    digest: String,
    size: u64,
}

impl Named {
    fn id(&self) -> Result<ObjectId, Failure> {
        Ok(self.digest.strip_prefix("sha256:").ok_or("a digest that is no sha256")?.parse()?)
    }
}

/// What a run works with.
struct Bench<'a> {
    shoal: &'a Path,
    folder: &'a Path,
    host: String,
    registry: Registry,
    layers: Vec<Descriptor>,
}

/// Measures `rounds` rounds with the `shoal` binary given. `source` is what `shoal image copy` takes: an image for one platform,
/// in a registry, a layout or an archive. Everything lies in the folder for temporary files.
///
/// # Errors
/// Needs root and `docker-registry`; or a command failed.
pub async fn run(shoal: &Path, source: &str, rounds: usize) -> Result<Report, Failure> {
    if !DockerRegistryProcess::is_installed() {
        return Err("docker-registry is not installed".into());
    }
    let folder = tempfile::Builder::new().prefix("shoal-conversion-").tempdir()?;
    let server = DockerRegistryProcess::start(folder.path(), "")?;
    let host = server.address().to_string();
    let image = format!("{host}/source:1");
    eprintln!("conversion: copying {source}");
    finish(Command::new(shoal).args(["image", "copy", source, &image]))?;
    let registry = Registry::new(RegistryOptions::default())?;
    let layers = layers(&registry, &image.parse()?).await?;
    let bench = Bench { shoal, folder: folder.path(), host, registry, layers };
    let mut report = Report::new(bench.layers.iter().map(|layer| layer.size).sum());
    for number in 1..=rounds {
        let round = bench.round(number).await?;
        eprintln!("conversion: round {number} of {rounds}: {}", round.line());
        report.rounds.push(round);
    }
    Ok(report)
}

/// The layers of the image, or of the only one in an index, each once.
async fn layers(registry: &Registry, reference: &Reference) -> Result<Vec<Descriptor>, Failure> {
    let (mut id, _) = registry.resolve(reference).await?;
    let mut document: Document = serde_json::from_slice(&registry.manifest(reference.source(), id).await?)?;
    match document.manifests.as_slice() {
        [] => {}
        [only] => {
            id = only.id()?;
            document = serde_json::from_slice(&registry.manifest(reference.source(), id).await?)?;
        }
        several => return Err(format!("the image is for {} platforms, and should be for one", several.len()).into()),
    }
    let mut layers: Vec<Descriptor> = Vec::new();
    for layer in &document.layers {
        let layer = Descriptor { id: layer.id()?, size: layer.size };
        if layers.iter().all(|known| known.id != layer.id) {
            layers.push(layer);
        }
    }
    Ok(layers)
}

impl Bench<'_> {
    async fn round(&self, number: usize) -> Result<Round, Failure> {
        let target = |name: &str| format!("{}/{name}-{number}:1", self.host);
        let (convert_seconds, convert_peak_rss_bytes) = self.convert(&[], &target("full"))?;
        let (oci_ref_seconds, oci_ref_peak_rss_bytes) = self.convert(&["--oci-ref"], &target("ref"))?;
        let parts = self.folder.join("parts");
        fs::create_dir(&parts)?;
        drop_caches()?;
        let started = Instant::now();
        self.download(&parts).await?;
        let download_seconds = started.elapsed().as_secs_f64();
        drop_caches()?;
        let started = Instant::now();
        let blobs = self.build(&parts)?;
        let build_seconds = started.elapsed().as_secs_f64();
        drop_caches()?;
        let started = Instant::now();
        self.upload(&blobs, &target("parts").parse()?).await?;
        let upload_seconds = started.elapsed().as_secs_f64();
        fs::remove_dir_all(&parts)?;
        Ok(Round {
            convert_seconds,
            oci_ref_seconds,
            download_seconds,
            build_seconds,
            upload_seconds,
            convert_peak_rss_bytes,
            oci_ref_peak_rss_bytes,
        })
    }

    /// Seconds, and the most memory at a time.
    fn convert(&self, options: &[&str], target: &str) -> Result<(f64, u64), Failure> {
        drop_caches()?;
        let mut command = Command::new(self.shoal);
        command.args(["image", "convert"]).args(options).args([&format!("{}/source:1", self.host), target]);
        measure(&mut command, &self.folder.join("convert.log"))
    }

    async fn download(&self, parts: &Path) -> Result<(), Failure> {
        let source: Reference = format!("{}/source:1", self.host).parse()?;
        let each = self.layers.iter().enumerate().map(|(number, layer)| {
            let (file, source) = (layer_file(parts, number), source.source());
            async move {
                let mut file = tokio::fs::File::create(file).await?;
                self.registry.blob_to(source, layer, &mut file).await?;
                Ok::<_, Failure>(())
            }
        });
        try_join_all(each).await.map(drop)
    }

    /// The blobs that were built.
    fn build(&self, parts: &Path) -> Result<Vec<(Descriptor, PathBuf)>, Failure> {
        let one = |number: usize| -> Result<_, String> {
            let failed = |error: &dyn std::fmt::Display| error.to_string();
            let (layer, dir) = (layer_file(parts, number), parts.join(format!("blobs-{number}")));
            let stream = File::open(&layer).map_err(|error| failed(&error))?;
            let built = Builder::new(BuildOptions::default()).build_tar(
                stream,
                &layer,
                &parts.join(format!("boot-{number}")),
                &dir,
            );
            let built = built.map_err(|error| failed(&error))?;
            let blob = |id: shoal_proto::BlobId| {
                let descriptor = Descriptor { id: ObjectId::new(*id.as_bytes()), size: built.encoded_bytes };
                (descriptor, dir.join(id.to_string()))
            };
            Ok(built.blob.map(blob))
        };
        let built: Result<Vec<_>, String> = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.layers.len()).map(|number| scope.spawn(move || one(number))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err("a build panicked".into())))
                .collect()
        });
        Ok(built?.into_iter().flatten().collect())
    }

    async fn upload(&self, blobs: &[(Descriptor, PathBuf)], target: &Reference) -> Result<(), Failure> {
        let each = blobs.iter().map(|(blob, file)| self.registry.upload_blob(target.source(), blob, file));
        Ok(try_join_all(each).await.map(drop)?)
    }
}

fn layer_file(parts: &Path, number: usize) -> PathBuf {
    parts.join(format!("layer-{number}"))
}
