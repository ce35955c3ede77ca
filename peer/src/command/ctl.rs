//! `shoal ctl`: asks the node daemon over its Unix socket.

mod upgrade;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use shoal_proto::control::{
    BySource, EvictReply, EvictRequest, GetRequest, MountMode, MountRequest, PeerStatus, PeersRequest, PinRequest,
    PrefetchRequest, PullReply, PullRequest, RevokeRequest, SetRequest, Setting, StatusReply, StatusRequest,
    UnmountRequest, UnpinRequest,
};
use tonic::transport::Channel;

use super::{Failure, human_bytes, print_json, runtime};
use crate::api::{ControlClient, connect, said};

#[derive(Debug, clap::Args)]
pub(super) struct Ctl {
    /// The daemon's socket.
    #[arg(long, global = true, default_value = "/run/shoal.sock", env = "SHOAL_SOCKET")]
    socket: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Mount an image lazily; the mount outlives this command and comes back when the daemon starts again.
    Mount {
        /// `host[:port]/repo[:tag][@sha256:..]` or `oci:DIR[:tag]`.
        reference: String,
        /// An existing directory.
        mountpoint: PathBuf,
        /// How: `auto`, natively if the image is here and decoded, otherwise over FUSE; `native`, by the kernel's EROFS driver
        /// without the daemon, which takes all of the image unless `mounts.native_lazy` is set; `fuse`. Default: `mounts.mode`
        /// of the configuration.
        #[arg(long)]
        mode: Option<Mode>,
        /// Fetch all of the image first, and decode it for a native mount unless the mode is `fuse`.
        #[arg(long)]
        wait_complete: bool,
    },
    /// Unmount, and forget the mount.
    Umount {
        /// Where it is mounted.
        mountpoint: PathBuf,
    },
    /// Pull an image lazily into containerd, so that `ctr run --snapshotter shoal` starts it: no layer but the one with
    /// the bootstrap is read. The daemon must be containerd's snapshotter (`snapshotter.socket`).
    Rpull {
        /// `host[:port]/repo[:tag][@sha256:..]`.
        reference: String,
        /// containerd's namespace.
        #[arg(long, short, default_value = "default", env = "CONTAINERD_NAMESPACE")]
        namespace: String,
    },
    /// What is mounted, and where its bytes came from.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// The nodes that this one knows.
    Peers {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take in a revocation that `shoal cluster revoke` made, and pass it on to every node.
    Revoke {
        /// The revocation.
        file: PathBuf,
    },
    /// Change settings of the running daemon, at once and for what is under way too: `limits.*` but `limits.answer_bytes`,
    /// `registry.concurrency` and `registry.prefetch_concurrency`. Either all are changed or none. They are forgotten when
    /// the daemon stops; what is to last belongs in its configuration file.
    Set {
        /// For instance `limits.upload=20MiB` (bytes per second) or `limits.registry_requests=5`.
        #[arg(required = true, value_name = "KEY=VALUE", value_parser = setting)]
        settings: Vec<String>,
    },
    /// Print the settings in force.
    Get {
        /// A key, for which only its value is printed, or a section such as `limits`. Default: all.
        key: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Fetch the whole image; reads that somebody waits for go first.
    Prefetch {
        /// `host[:port]/repo[:tag][@sha256:..]` or `oci:DIR[:tag]`.
        reference: String,
    },
    /// Keep what is in the store of an image, and what comes, from being evicted. Fetches no blobs: see `prefetch`.
    Pin {
        /// `host[:port]/repo[:tag][@sha256:..]` or `oci:DIR[:tag]`.
        reference: String,
        /// End the pin by itself after this time, for instance `7d` or `12h`.
        #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration)]
        lifetime: Option<Duration>,
    },
    /// End the pin of a reference.
    Unpin {
        /// As it was pinned: see `shoal store usage`.
        reference: String,
    },
    /// Evict an image, or everything, but what a mount or a pin needs.
    Evict {
        /// `host[:port]/repo[:tag][@sha256:..]` or `oci:DIR[:tag]`.
        #[arg(required_unless_present = "all")]
        reference: Option<String>,
        /// Everything.
        #[arg(long, conflicts_with = "reference")]
        all: bool,
    },
    /// Have another version take the daemon's place while readers of its mounts go on. The new program is examined first: it must
    /// run, accept the present configuration, and go on with what this version leaves. Otherwise nothing happens. If it does not start
    /// all the same, this version goes on.
    Upgrade(upgrade::Upgrade),
}

/// How to mount.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Mode {
    Auto,
    Native,
    Fuse,
}

impl From<Mode> for MountMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Auto,
            Mode::Native => Self::Native,
            Mode::Fuse => Self::Fuse,
        }
    }
}

impl Ctl {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        runtime()?.block_on(async {
            let client = connect(&self.socket).await?;
            self.verb.run(client, &self.socket).await?;
            Ok(ExitCode::SUCCESS)
        })
    }
}

impl Verb {
    async fn run(self, mut client: ControlClient<Channel>, socket: &Path) -> Result<(), Failure> {
        match self {
            Self::Mount { reference, mountpoint, mode, wait_complete } => {
                // The daemon has another working directory.
                let mountpoint = absolute(&mountpoint)?;
                if wait_complete {
                    prefetch(client.clone(), reference.clone()).await?;
                }
                let mode = mode.map_or(MountMode::Configured, MountMode::from).into();
                let request = MountRequest { reference, mountpoint, mode, decode: wait_complete };
                let reply = client.mount(request).await.map_err(|s| said(&s))?;
                println!("{}", reply.into_inner().manifest);
            }
            Self::Umount { mountpoint } => {
                let request = UnmountRequest { mountpoint: absolute(&mountpoint)? };
                let reply = client.unmount(request).await.map_err(|s| said(&s))?.into_inner();
                if reply.detached {
                    println!("busy: detached, it goes away with its last reader");
                }
            }
            Self::Rpull { reference, namespace } => {
                let reply = client.pull(PullRequest { reference, namespace }).await.map_err(|s| said(&s))?;
                let PullReply { image, manifest } = reply.into_inner();
                println!("{image}\n{manifest}");
            }
            Self::Status { json } => {
                let status = client.status(StatusRequest {}).await.map_err(|s| said(&s))?.into_inner();
                if json { print_json(&status)? } else { print_status(&status) }
            }
            Self::Peers { json } => {
                let peers = client.peers(PeersRequest {}).await.map_err(|s| said(&s))?.into_inner();
                if json { print_json(&peers)? } else { peers.peers.iter().for_each(print_peer) }
            }
            Self::Revoke { file } => {
                let signed = std::fs::read(&file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
                revoke(client, signed).await?;
            }
            Self::Set { settings } => {
                let now = client.set(SetRequest { settings }).await.map_err(|s| said(&s))?.into_inner();
                now.settings.iter().for_each(print_setting);
            }
            Self::Get { key, json } => get(client, key.unwrap_or_default(), json).await?,
            Self::Prefetch { reference } => prefetch(client, reference).await?,
            Self::Pin { reference, lifetime } => {
                // A part of a second is one; nothing at all would be for ever.
                let seconds = lifetime.map_or(0, |time| time.as_secs().max(1));
                let reply = client.pin(PinRequest { reference, seconds }).await.map_err(|s| said(&s))?;
                println!("{}", reply.into_inner().manifest);
            }
            Self::Unpin { reference } => {
                let reply =
                    client.unpin(UnpinRequest { reference: reference.clone() }).await.map_err(|s| said(&s))?;
                if !reply.into_inner().unpinned {
                    return Err(format!("{reference} is not pinned").into());
                }
            }
            Self::Evict { reference, all: _ } => {
                let reference = reference.unwrap_or_default();
                let reply = client.evict(EvictRequest { reference }).await.map_err(|s| said(&s))?.into_inner();
                print_evicted(&reply);
            }
            Self::Upgrade(upgrade) => upgrade.run(client, socket).await?,
        }
        Ok(())
    }
}

/// Whether it looks like a setting; the daemon knows which there are.
fn setting(text: &str) -> Result<String, &'static str> {
    if text.contains('=') { Ok(text.to_owned()) } else { Err("expected KEY=VALUE") }
}

async fn get(mut client: ControlClient<Channel>, key: String, json: bool) -> Result<(), Failure> {
    let found = client.get(GetRequest { key: key.clone() }).await.map_err(|s| said(&s))?.into_inner();
    match &found.settings[..] {
        _ if json => print_json(&found)?,
        [one] if one.key == key => println!("{}", one.value),
        all => all.iter().for_each(print_setting),
    }
    Ok(())
}

fn print_setting(setting: &Setting) {
    println!("{} = {}", setting.key, setting.value);
}

fn absolute(path: &Path) -> Result<String, Failure> {
    let path = std::path::absolute(path)?;
    Ok(path.to_str().ok_or_else(|| format!("{} is not UTF-8", path.display()))?.to_owned())
}

/// Hands a signed revocation to the daemon, which tells all others.
pub(super) async fn revoke(mut client: ControlClient<Channel>, revocation: Vec<u8>) -> Result<(), Failure> {
    let reply = client.revoke(RevokeRequest { revocation }).await.map_err(|s| said(&s))?.into_inner();
    println!("{}", if reply.new { "revoked" } else { "was revoked before" });
    Ok(())
}

async fn prefetch(mut client: ControlClient<Channel>, reference: String) -> Result<(), Failure> {
    let mut progress = client.prefetch(PrefetchRequest { reference }).await.map_err(|s| said(&s))?.into_inner();
    let bar = ProgressBar::no_length()
        .with_style(ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}")?);
    let mut last = None;
    while let Some(now) = progress.message().await.map_err(|s| said(&s))? {
        bar.set_length(now.bytes);
        bar.set_position(now.present_bytes);
        last = Some(now);
    }
    bar.finish_and_clear();
    if let Some(last) = last {
        println!("{} of {} pieces, {}", last.present_pieces, last.pieces, human_bytes(last.present_bytes));
    }
    Ok(())
}

fn print_evicted(evicted: &EvictReply) {
    let EvictReply { blobs, objects, decoded, bytes, .. } = evicted;
    println!("{blobs} blobs, {objects} objects, {decoded} decoded forms, {}", human_bytes(*bytes));
    if evicted.held > 0 {
        println!("{} are in use, and stay", evicted.held);
    }
}

fn sources(by: &BySource) -> String {
    format!(
        "local {}  peer {}  seed {}  registry {}",
        human_bytes(by.local),
        human_bytes(by.peer),
        human_bytes(by.seed),
        human_bytes(by.registry)
    )
}

fn print_status(status: &StatusReply) {
    println!("shoal {} {} {} zone {}", status.version, status.role, status.peer, status.zone);
    if !status.upgrade_failure.is_empty() {
        println!("upgrade  failed: {}", status.upgrade_failure);
    }
    for address in &status.control_addresses {
        println!("control  {address}");
    }
    println!("data     {}", status.data_address);
    if !status.http_address.is_empty() {
        println!("http     {}", status.http_address);
    }
    if let Some(store) = &status.store {
        println!("store    {}", super::store::one_line(store));
    }
    if let Some(total) = &status.total {
        println!("bytes    {}", sources(&total.bytes.unwrap_or_default()));
        println!("objects  {}", sources(&total.objects.unwrap_or_default()));
        println!("rejected {} chunks, {}", total.rejected_chunks, human_bytes(total.rejected_bytes));
    }
    if let Some(starts) = status.start_traces.as_ref().filter(|starts| starts.images > 0) {
        println!("starts   {} of {} images, {}", starts.starts, starts.images, human_bytes(starts.bytes));
    }
    for mount in &status.mounts {
        let work = match mount.native {
            true if mount.reads == 0 => "native".to_owned(),
            true => {
                format!("native, {} asked for, {} failed reads", human_bytes(mount.read_bytes), mount.read_errors)
            }
            false => format!("{} read, {} failed reads", human_bytes(mount.read_bytes), mount.read_errors),
        };
        println!(
            "mount    {} {} ({} of {} pieces here, {work})",
            mount.mountpoint, mount.reference, mount.present_pieces, mount.pieces,
        );
        if let Some(traffic) = &mount.traffic {
            println!("         {}", sources(&traffic.bytes.unwrap_or_default()));
        }
    }
}

fn print_peer(peer: &PeerStatus) {
    let state = match (peer.banned_seconds, peer.connected) {
        (0, true) if peer.lease => format!("connected by {}, home", peer.transport),
        (0, true) => format!("connected by {}", peer.transport),
        (0, false) => "known".to_owned(),
        (seconds, _) => format!("banned for {seconds} s: {}", peer.ban_reason),
    };
    let faults = [
        (peer.violations, "violations"),
        (peer.wrong_bytes, "wrong answers"),
        (peer.stalls, "stalls"),
        (peer.broken_promises, "broken promises"),
        (peer.floods, "floods of notices"),
    ];
    let faults = faults.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
    let faults = match &faults.collect::<Vec<_>>()[..] {
        [] => String::new(),
        faults => format!(" {} (last: {})", faults.join(", "), peer.last_fault),
    };
    println!(
        "{} {} zone {} {state} received {} sent {} {}{faults}",
        peer.peer,
        peer.role,
        peer.zone,
        human_bytes(peer.received_bytes),
        human_bytes(peer.sent_bytes),
        peer.addresses.join(" ")
    );
}
