//! How fast `shoal image check` is, next to its limits: reading the blob from the disk alone, and decoding and verifying its pieces
//! alone, on all processors, when they are in memory. In one run, one after the other in each round.
//!
//! The image is a folder of this machine, or has chunks that are all different and compress to about half: they are decoded many
//! times faster than what is in images, so that the disk and the digest of the blob count for more.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;
use shoal::command::Failure;
use shoal_rafs::{Bootstrap, BuildOptions, Builder, Compressor, PieceTable};

use crate::{
    figures::median,
    half_compressible,
    machine::{drop_caches, finish},
    tar_header,
};

/// Bytes of each file of the image.
const FILE: usize = 16 << 20;
/// Pieces that a thread reads before it decodes them.
const BATCH: u32 = 16;

/// The figures, which are medians; the keys are a contract with scripts. Rates are of the content once decoded.
#[derive(Debug, Serialize)]
pub struct Report {
    compressor: String,
    image_bytes: u64,
    blob_bytes: u64,
    check_mib_s: f64,
    disk_mib_s: f64,
    decode_mib_s: f64,
    /// `check_mib_s` over the less of the two others.
    ratio: f64,
}

/// What the image holds.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// Files of 16 MiB.
    MadeUp {
        /// Of all together.
        mib: u64,
    },
    /// What lies there.
    Folder(&'a Path),
}

/// An image on the disk.
struct Image {
    bootstrap: PathBuf,
    blobs: PathBuf,
    blob: PathBuf,
    table: PieceTable,
    decoded_bytes: u64,
}

/// Measures `rounds` rounds of an image with the `shoal` binary given. It lies in the folder for temporary files.
///
/// # Errors
/// Needs root; or the image cannot be made or checked.
pub fn run(shoal: &Path, content: Content<'_>, compressor: Compressor, rounds: usize) -> Result<Report, Failure> {
    let folder = tempfile::Builder::new().prefix("shoal-image-check-").tempdir()?;
    eprintln!("check: building an image");
    let image = build(folder.path(), content, compressor)?;
    let (mut checks, mut disk, mut decode) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=rounds {
        drop_caches()?;
        let started = Instant::now();
        finish(
            Command::new(shoal)
                .args(["image", "check", "--bootstrap"])
                .arg(&image.bootstrap)
                .arg("--blob-dir")
                .arg(&image.blobs),
        )?;
        checks.push(image.rate(started.elapsed()));
        drop_caches()?;
        let started = Instant::now();
        read(&image.blob)?;
        disk.push(image.rate(started.elapsed()));
        decode.push(image.rate(decoding(&image)?));
        let last = [&checks, &disk, &decode].map(|rates| rates.last().copied().unwrap_or_default());
        eprintln!(
            "check: round {round} of {rounds}: {:.0} MiB/s; disk {:.0}, decoding {:.0} MiB/s",
            last[0], last[1], last[2]
        );
    }
    let [check_mib_s, disk_mib_s, decode_mib_s] = [checks, disk, decode].map(|rates| median(&rates));
    Ok(Report {
        compressor: compressor.to_string(),
        image_bytes: image.decoded_bytes,
        blob_bytes: image.table.encoded_size(),
        check_mib_s,
        disk_mib_s,
        decode_mib_s,
        ratio: check_mib_s / disk_mib_s.min(decode_mib_s),
    })
}

fn build(folder: &Path, content: Content<'_>, compressor: Compressor) -> Result<Image, Failure> {
    let (bootstrap, blobs) = (folder.join("bootstrap"), folder.join("blobs"));
    let builder = Builder::new(BuildOptions { compressor, ..BuildOptions::default() });
    let built = match content {
        Content::Folder(source) => builder.build(source, &bootstrap, &blobs)?,
        Content::MadeUp { mib } => {
            let (reader, writer) = io::pipe()?;
            let written = thread::spawn(move || write_tar(mib, writer));
            let built = builder.build_tar(reader, Path::new("tar"), &bootstrap, &blobs)?;
            written.join().map_err(|_| "the tar was not written")??;
            built
        }
    };
    let blob = blobs.join(built.blob.ok_or("an image without content")?.to_string());
    let table = Bootstrap::parse(fs::read(&bootstrap)?.into())?.piece_table(0, None)?;
    Ok(Image { bootstrap, blobs, blob, table, decoded_bytes: built.decoded_bytes })
}

/// A tar that is made as it is read.
fn write_tar(mib: u64, mut writer: impl Write) -> io::Result<()> {
    let content = half_compressible(FILE);
    for number in 0..(mib << 20).div_ceil(FILE as u64) {
        let mut content = content.clone();
        for (at, byte) in number.to_le_bytes().into_iter().enumerate() {
            content.iter_mut().skip(at).step_by(4096).for_each(|place| *place ^= byte);
        }
        writer.write_all(&tar_header(&format!("file-{number}"), FILE))?;
        writer.write_all(&content)?;
    }
    writer.write_all(&[0; 1024])
}

impl Image {
    /// MiB a second, if it took so long.
    fn rate(&self, took: Duration) -> f64 {
        self.decoded_bytes as f64 / f64::from(1 << 20) / took.as_secs_f64()
    }
}

fn read(file: &Path) -> io::Result<()> {
    let (mut file, mut buffer) = (File::open(file)?, vec![0; 1 << 20]);
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// How long all processors take to decode and verify all pieces, without what it takes to read them.
fn decoding(image: &Image) -> Result<Duration, Failure> {
    let (next, threads) = (AtomicU32::new(0), thread::available_parallelism()?.get());
    let one = || -> Result<Duration, String> {
        let file = File::open(&image.blob).map_err(|error| error.to_string())?;
        let mut busy = Duration::ZERO;
        loop {
            let first = next.fetch_add(BATCH, Relaxed);
            if first >= image.table.len() {
                return Ok(busy);
            }
            let mut batch = Vec::new();
            for number in first..first.saturating_add(BATCH) {
                let Some(piece) = image.table.piece(number) else { continue };
                let range = piece.encoded();
                let mut encoded = vec![0; (range.end - range.start) as usize];
                file.read_exact_at(&mut encoded, range.start).map_err(|error| error.to_string())?;
                batch.push((number, encoded));
            }
            let started = Instant::now();
            for (number, encoded) in batch {
                image.table.decode(number, &encoded).map_err(|error| error.to_string())?;
            }
            busy += started.elapsed();
        }
    };
    let busy: Result<Duration, String> = thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        all.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into()))).sum()
    });
    Ok(busy? / threads as u32)
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let mib = |bytes: u64| bytes >> 20;
        let (decoded, stored) = (mib(self.image_bytes), mib(self.blob_bytes));
        [
            format!("image of {decoded} MiB, {stored} MiB as {}; MiB/s of its content", self.compressor),
            format!("check         {:>6.0}", self.check_mib_s),
            format!("disk alone    {:>6.0}", self.disk_mib_s),
            format!("decode alone  {:>6.0}", self.decode_mib_s),
            format!("check is {:.2} x the slower of the two", self.ratio),
        ]
        .join("\n")
    }
}
