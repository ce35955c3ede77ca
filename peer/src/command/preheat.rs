//! `shoal preheat`: has nodes fetch an image before it is needed there.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use shoal_proto::control::{PreheatGroup, PreheatNode, PreheatProgress, PreheatRequest};

use super::{Failure, human_bytes, print_json, runtime};
use crate::api::{connect, said};

/// Has nodes of the cluster fetch a whole image and pin it for a time, through any node. By default the seed peers.
///
/// With --wait it goes on until all that were meant have it, and exits with 1 if one could not, or is not heard of.
#[derive(Debug, clap::Args)]
pub(super) struct Preheat {
    /// `host[:port]/repo[:tag][@sha256:..]`.
    reference: String,
    #[command(flatten)]
    choice: Choice,
    /// Wait until all have it.
    #[arg(long)]
    wait: bool,
    /// How long the image is pinned there.
    #[arg(long = "for", value_name = "DURATION", default_value = "1d", value_parser = humantime::parse_duration)]
    lifetime: Duration,
    /// Print JSON, at the end.
    #[arg(long)]
    json: bool,
    /// The socket of the daemon that is asked.
    #[arg(long, default_value = "/run/shoal.sock", env = "SHOAL_SOCKET")]
    socket: PathBuf,
}

/// Who is meant.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct Choice {
    /// The seed peers.
    #[arg(long)]
    seeds: bool,
    /// Every node.
    #[arg(long)]
    all: bool,
    /// The nodes of a zone.
    #[arg(long)]
    zone: Option<String>,
    /// So many nodes, the same each time for the same image: 64 at most, as many as a message names. For more there are zones.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    count: Option<u32>,
}

impl Preheat {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let (wait, json) = (self.wait, self.json);
        let last = runtime()?.block_on(self.follow())?;
        match json {
            true => print_json(&last)?,
            false => print(&last, wait),
        }
        let missed = |node: &PreheatNode| !node.trouble.is_empty() || (wait && !node.over);
        Ok(if last.nodes.iter().any(missed) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    async fn follow(self) -> Result<PreheatProgress, Failure> {
        let mut client = connect(&self.socket).await?;
        let mut progress = client.preheat(self.request()).await.map_err(|s| said(&s))?.into_inner();
        let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {msg}")?;
        let bar = ProgressBar::no_length().with_style(style);
        let mut last = None;
        while let Some(now) = progress.message().await.map_err(|s| said(&s))? {
            let done = now.nodes.iter().filter(|node| node.over).count();
            bar.set_length(now.nodes.iter().map(|node| node.bytes).sum());
            bar.set_position(now.nodes.iter().map(|node| node.present_bytes).sum());
            bar.set_message(format!("{done} of {} nodes", now.nodes.len()));
            last = Some(now);
        }
        bar.finish_and_clear();
        last.ok_or_else(|| "the daemon ended before the preheat began".into())
    }

    fn request(self) -> PreheatRequest {
        let Choice { seeds: _, all, zone, count } = self.choice;
        let group = match (all, &zone, count) {
            (true, ..) => PreheatGroup::All,
            (_, Some(_), _) => PreheatGroup::Zone,
            (.., Some(_)) => PreheatGroup::Count,
            _ => PreheatGroup::Seeds,
        };
        PreheatRequest {
            reference: self.reference,
            group: group.into(),
            zone: zone.unwrap_or_default(),
            count: count.unwrap_or_default(),
            seconds: self.lifetime.as_secs(),
            wait: self.wait,
        }
    }
}

fn print(last: &PreheatProgress, wait: bool) {
    println!("{}", last.reference);
    for node in &last.nodes {
        let state = match (node.over, node.trouble.as_str()) {
            (_, trouble) if !trouble.is_empty() => trouble.to_owned(),
            (true, _) => human_bytes(node.present_bytes),
            (false, _) if wait => "not heard of to the end".to_owned(),
            (false, _) => "asked".to_owned(),
        };
        println!("{} {state}", node.peer);
    }
}
