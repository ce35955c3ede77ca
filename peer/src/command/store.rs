//! `shoal store`: looks into a node's store, through its daemon, or, where none runs, directly.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, UNIX_EPOCH},
};

use clap::{Subcommand, error::ErrorKind};
use indicatif::{ProgressBar, ProgressStyle};
use shoal_proto::control::{
    BlobUsage, PinStatus, ScrubProgress, ScrubRequest, StoreStatus, StoreUsageReply, StoreUsageRequest,
};
use shoal_rafs::oci::open_bootstrap_layer;
use shoal_scheduler::Item;

use super::{Failure, bad_usage, human_bytes, image::DecryptionArgs, print_json, runtime};
use crate::{
    api::{connect, said},
    scrub,
    store::{Store as OpenStore, StoreOptions},
    usage,
};

/// The last second of the year 9999, beyond which there is no way to write a date.
const LAST_SECOND: u64 = 253_402_300_799;

#[derive(Debug, Subcommand)]
pub(super) enum Store {
    /// How full the store is, with which blobs, and what is pinned.
    Usage(Usage),
    /// Verify everything in the store again and drop what does not verify; exit with 1 if there was any.
    Scrub(Scrub),
}

/// Where the store is.
#[derive(Debug, clap::Args)]
struct Place {
    /// The daemon's socket.
    #[arg(long, default_value = "/run/shoal.sock", env = "SHOAL_SOCKET")]
    socket: PathBuf,
    /// Instead: the data directory of a node whose daemon does not run.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Usage {
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
pub(super) struct Scrub {
    #[command(flatten)]
    place: Place,
    /// What opens encrypted images. A daemon uses its own keys.
    #[command(flatten)]
    decryption: DecryptionArgs,
}

impl Store {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Usage(Usage { place }) => {
                let report = match &place.data_dir {
                    Some(dir) => usage::report(&open(dir)?)?,
                    None => ask_usage(&place.socket)?,
                };
                if place.json {
                    print_json(&report)?
                } else {
                    print_usage(&report)
                }
                Ok(ExitCode::SUCCESS)
            }
            Self::Scrub(Scrub { place, decryption }) => {
                let keys = decryption.keys()?;
                let mut bar = Bar::new()?;
                let open_layer = |layer, bytes, seal: &_| open_bootstrap_layer(layer, bytes, Some(seal), &keys);
                let result = match &place.data_dir {
                    Some(dir) => scrub::run(&open(dir)?, &open_layer, &mut bar)?,
                    None if !keys.is_empty() => bad_usage(
                        ErrorKind::MissingRequiredArgument,
                        "--decryption-key is for a store without a daemon: give --data-dir",
                    ),
                    None => ask_scrub(&place.socket, &mut bar)?,
                };
                bar.0.finish_and_clear();
                if place.json {
                    print_json(&result)?
                } else {
                    print_scrub(&result)
                }
                let damaged = damaged(&result) > 0;
                Ok(if damaged { ExitCode::FAILURE } else { ExitCode::SUCCESS })
            }
        }
    }
}

/// The store of a node that is not running, which a typing error must not make a new one.
fn open(data_dir: &Path) -> Result<OpenStore, Failure> {
    if !data_dir.join("index").is_dir() {
        return Err(format!("{} is not a data directory: it has no index", data_dir.display()).into());
    }
    Ok(OpenStore::open(data_dir, StoreOptions::default())?)
}

fn ask_usage(socket: &Path) -> Result<StoreUsageReply, Failure> {
    runtime()?.block_on(async {
        let reply = connect(socket).await?.store_usage(StoreUsageRequest {}).await;
        Ok(reply.map_err(|s| said(&s))?.into_inner())
    })
}

fn ask_scrub(socket: &Path, bar: &mut Bar) -> Result<ScrubProgress, Failure> {
    runtime()?.block_on(async {
        let reply = connect(socket).await?.scrub(ScrubRequest {}).await;
        let mut progress = reply.map_err(|s| said(&s))?.into_inner();
        let mut last = None;
        while let Some(now) = progress.message().await.map_err(|s| said(&s))? {
            bar.show(&now);
            last = Some(now);
        }
        last.ok_or_else(|| "the daemon ended before the scrub did".into())
    })
}

/// Shows how far a scrub is.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Result<Self, Failure> {
        let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}")?;
        Ok(Self(ProgressBar::no_length().with_style(style)))
    }

    fn show(&self, now: &ScrubProgress) {
        self.0.set_length(now.total_bytes);
        self.0.set_position(now.bytes);
    }
}

impl scrub::Listener for Bar {
    fn progress(&mut self, now: ScrubProgress) -> bool {
        self.show(&now);
        true
    }

    fn lost(&mut self, _: Item) {}
}

/// How full a store is, for people.
pub(super) fn one_line(store: &StoreStatus) -> String {
    let limit = match store.limit_bytes {
        0 => String::new(),
        limit => format!(" of {}", human_bytes(limit)),
    };
    format!(
        "{}{limit} on disk: {} in {} pieces of {} blobs, {} objects",
        human_bytes(store.disk_bytes),
        human_bytes(store.bytes),
        store.pieces,
        store.blobs,
        store.objects
    )
}

fn print_usage(report: &StoreUsageReply) {
    if let Some(store) = &report.store {
        println!("{}", one_line(store));
    }
    report.blobs.iter().for_each(print_blob);
    report.pins.iter().for_each(print_pin);
}

fn print_blob(blob: &BlobUsage) {
    let variant = if blob.variant == 0 { String::new() } else { format!(" variant {}", blob.variant) };
    let held = if blob.held { ", in use" } else { "" };
    println!("{}{variant} {}, used {}{held}", blob.blob, human_bytes(blob.disk_bytes), time(blob.last_use));
}

fn print_pin(pin: &PinStatus) {
    let until = if pin.until == 0 { String::new() } else { format!(" until {}", time(pin.until)) };
    println!("pinned {}{until}", pin.reference);
}

fn damaged(result: &ScrubProgress) -> u64 {
    result.damaged_objects + result.damaged_pieces + result.damaged_decoded
}

fn print_scrub(result: &ScrubProgress) {
    let (objects, pieces, decoded) = (result.objects, result.pieces, result.decoded);
    println!(
        "{objects} objects, {pieces} pieces and {decoded} decoded forms verified, {}",
        human_bytes(result.bytes)
    );
    if damaged(result) > 0 {
        let (objects, pieces, decoded) = (result.damaged_objects, result.damaged_pieces, result.damaged_decoded);
        println!("{objects} objects, {pieces} pieces and {decoded} decoded forms were damaged: dropped");
    }
    if result.unverified_pieces > 0 {
        println!(
            "{} pieces are of images whose bootstrap or key is not here: not verified",
            result.unverified_pieces
        );
    }
}

fn time(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds.min(LAST_SECOND))).to_string()
}
