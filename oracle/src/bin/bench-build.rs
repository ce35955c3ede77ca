//! Builds one tree with Shoal and with `nydus-builder`, in turns, and says how fast each was.
//!
//! Every build is a process of its own, timed from outside, and removes what it wrote. The page cache holds the tree: it is
//! read once before. A figure is the median of the rounds, the ratio the median of the ratios of each round, so that what
//! disturbs the machine for a while disturbs both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use shoal_rafs::{BuildOptions, Builder, Compressor};

/// Both have it as their default.
const CHUNK_SIZE: u32 = 0x10_0000;

#[derive(Debug, Parser)]
struct Arguments {
    /// Tree to build.
    #[arg(long)]
    source: PathBuf,
    /// Where the figures go, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// A `nydus-image` to run in place of the library.
    #[arg(long)]
    peer_builder: Option<PathBuf>,
    /// Builds of each kind.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only build, with this compressor; says the most memory that was used.
    #[arg(long, hide = true)]
    only: Option<Compressor>,
    /// Where to build to then.
    #[arg(long, hide = true, default_value = ".")]
    output: PathBuf,
}

#[derive(Debug, serde::Serialize)]
struct Figures {
    ours_mib_s: f64,
    peer_mib_s: f64,
    ratio: f64,
    peak_rss_bytes: u64,
    source_bytes: u64,
    threads: usize,
    rounds: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(compressor) = arguments.only {
        let options = BuildOptions { compressor, chunk_size: CHUNK_SIZE, ..BuildOptions::default() };
        Builder::new(options).build(&arguments.source, &arguments.output.join("boot"), &arguments.output)?;
        println!("{}", peak_rss_bytes()?);
        return Ok(());
    }
    let source_bytes = read_all(&arguments.source)?;
    let mut all = BTreeMap::new();
    for compressor in [Compressor::None, Compressor::Lz4, Compressor::Zstd] {
        let figures = measure(&arguments, compressor, source_bytes)?;
        println!(
            "{compressor}: ours {:.0} MiB/s, theirs {:.0} MiB/s, ratio {:.2}, peak memory {} MiB",
            figures.ours_mib_s,
            figures.peer_mib_s,
            figures.ratio,
            figures.peak_rss_bytes >> 20
        );
        all.insert(compressor.to_string(), figures);
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn measure(arguments: &Arguments, compressor: Compressor, source_bytes: u64) -> Result<Figures> {
    let (mut ours, mut theirs, mut ratios, mut peak) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for _ in 0..arguments.rounds.max(1) {
        let (seconds, memory) = build_ours(arguments, compressor)?;
        let peer = build_theirs(arguments, compressor)?;
        peak = memory.max(peak);
        ratios.push(peer / seconds);
        ours.push(seconds);
        theirs.push(peer);
    }
    let mib = source_bytes as f64 / f64::from(1 << 20);
    Ok(Figures {
        ours_mib_s: mib / median(ours),
        peer_mib_s: mib / median(theirs),
        ratio: median(ratios),
        peak_rss_bytes: peak,
        source_bytes,
        threads: std::thread::available_parallelism()?.get(),
        rounds: arguments.rounds.max(1),
    })
}

/// Seconds, and the most memory in bytes.
fn build_ours(arguments: &Arguments, compressor: Compressor) -> Result<(f64, u64)> {
    let output = tempfile::tempdir()?;
    let started = Instant::now();
    let child = Command::new(std::env::current_exe()?)
        .args(["--only", &compressor.to_string()])
        .arg("--source")
        .arg(&arguments.source)
        .arg("--output")
        .arg(output.path())
        .output()?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    Ok((seconds, String::from_utf8(child.stdout)?.trim().parse()?))
}

/// Seconds.
fn build_theirs(arguments: &Arguments, compressor: Compressor) -> Result<f64> {
    let output = tempfile::tempdir()?;
    let beside = std::env::current_exe()?.with_file_name("peer-image");
    let program = arguments.peer_builder.as_deref().unwrap_or(&beside);
    let name = if compressor == Compressor::Lz4 { "lz4_block".into() } else { compressor.to_string() };
    let started = Instant::now();
    let status = Command::new(program)
        .args(["create", "--type", "dir-rafs", "--fs-version", "6", "--chunk-size", &format!("{CHUNK_SIZE:#x}")])
        .args(["--compressor", &name, "--bootstrap"])
        .arg(output.path().join("boot"))
        .arg("--blob-dir")
        .arg(output.path())
        .arg(&arguments.source)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .with_context(|| program.display().to_string())?;
    ensure!(status.success(), "{} failed", program.display());
    Ok(started.elapsed().as_secs_f64())
}

/// Bytes of all files, which are in the page cache then.
fn read_all(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let (kind, path) = entry.and_then(|entry| Ok((entry.file_type()?, entry.path())))?;
        if kind.is_dir() {
            bytes += read_all(&path)?;
        } else if kind.is_file() {
            bytes += std::io::copy(&mut std::fs::File::open(path)?, &mut std::io::sink())?;
        }
    }
    Ok(bytes)
}

/// The high-water mark of this process.
fn peak_rss_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
