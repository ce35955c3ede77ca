//! The ways to have an image in a folder, and how each is made cold.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use futures::StreamExt;
use shoal::{
    api::{self, ControlClient},
    command::Failure,
    processes::NodeProcess,
};
use shoal_proto::control::{EvictRequest, MountMode, MountRequest, PrefetchRequest, StatusRequest, UnmountRequest};
use shoal_rafs::NativeMount;
use tonic::transport::Channel;

use super::{
    Image, bare, fio,
    peer::{self, Peer},
    reads::{self, Figures},
};
use crate::machine::drop_caches;

/// What the kernel's EROFS driver mounts.
pub(super) struct Files {
    pub(super) bootstrap: PathBuf,
    pub(super) blobs: Vec<PathBuf>,
}

/// A node beside a registry.
pub(super) struct Daemon {
    node: NodeProcess,
    registry: SocketAddr,
}

/// A way to have an image in a folder.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    Fuse(&'a Daemon),
    Native(&'a Daemon),
    /// With a folder to mount in.
    Erofs(&'a Path),
    Ext4,
    /// Files of the same sizes in memory, with a folder to mount in: read hot, as nothing else says anything.
    Bare(&'a Path),
    /// The field's daemon.
    Peer(&'a Peer),
}

/// An image in a folder. Dropping it takes away what is not the daemon's.
struct Placed {
    root: PathBuf,
    mount: Mount,
}

enum Mount {
    /// The daemon's, or none.
    Elsewhere,
    Erofs {
        _mount: NativeMount,
    },
    Bare {
        _mount: bare::Mounted,
    },
    Peer(peer::Mounted),
}

/// Who reads the large file: fio, or this program.
#[derive(Clone, Copy)]
pub(super) struct Tools {
    pub(super) fio: bool,
}

impl Tools {
    fn sequential(self, file: &Path) -> Result<f64, Failure> {
        if self.fio { fio::sequential(file) } else { reads::sequential(file) }
    }

    fn random(self, file: &Path, seed: u64) -> Result<f64, Failure> {
        if self.fio { fio::random(file, seed) } else { reads::random(file, seed) }
    }
}

impl Way<'_> {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Fuse(_) => "fuse",
            Self::Native(_) => "native",
            Self::Erofs(_) => "erofs",
            Self::Ext4 => "ext4",
            Self::Bare(_) => "bare_fuse",
            Self::Peer(_) => "peer",
        }
    }

    /// One round.
    pub(super) async fn measure(
        &self,
        many: &Image,
        large: &Image,
        tools: Tools,
        seed: u64,
    ) -> Result<Figures, Failure> {
        let mut figures = Figures::default();
        if self.forget(many).await? {
            drop_caches()?;
            let started = Instant::now();
            let placed = self.place(many).await?;
            reads::all(&placed.root, &many.names)?;
            figures.cold_all_seconds = Some(started.elapsed().as_secs_f64());
            self.take_away(placed).await?;
            self.forget(many).await?;
        }
        drop_caches()?;
        let before = self.received(None).await?;
        let placed = self.place(many).await?;
        if !self.is_memory() {
            figures.cold_open_ms = reads::opens(&placed.root, &many.names, seed)?;
            let after = self.received(Some(&placed)).await?;
            figures.cold_open_bytes_fetched = before.zip(after).map(|(before, after)| after - before);
            self.complete(many, &placed).await?;
            drop_caches()?;
            figures.parallel_all_seconds = Some(reads::parallel(&placed.root, &many.names)?);
            drop_caches()?;
        }
        let local = reads::all(&placed.root, &many.names)?;
        figures.hot_all_seconds = Some(reads::all(&placed.root, &many.names)?);
        if !self.is_memory() {
            figures.local_all_seconds = Some(local);
            drop_caches()?;
            figures.find_seconds = Some(reads::find(&placed.root)?);
        }
        self.take_away(placed).await?;

        let placed = self.place(large).await?;
        self.complete(large, &placed).await?;
        let file = placed.root.join(&large.names[0]);
        drop_caches()?;
        let local = tools.sequential(&file)?;
        // Whatever has just read it, its pages are there then.
        reads::sequential(&file)?;
        figures.hot_seq_read_mib_s = Some(reads::sequential(&file)?);
        if !self.is_memory() {
            figures.seq_read_mib_s = Some(local);
            drop_caches()?;
            figures.rand_read_iops = Some(tools.random(&file, seed)?);
        }
        self.take_away(placed).await?;
        Ok(figures)
    }

    /// Whether there is no disk in it.
    fn is_memory(&self) -> bool {
        matches!(self, Self::Bare(_))
    }

    fn daemon(&self) -> Option<&Daemon> {
        match self {
            Self::Fuse(daemon) | Self::Native(daemon) => Some(daemon),
            Self::Erofs(_) | Self::Ext4 | Self::Bare(_) | Self::Peer(_) => None,
        }
    }

    /// Has nothing of an image any more, beside the registry; false where it is never anywhere else.
    async fn forget(&self, image: &Image) -> Result<bool, Failure> {
        match self {
            Self::Fuse(daemon) | Self::Native(daemon) => daemon.forget(image).await.map(|()| true),
            Self::Peer(peer) => peer.forget(image).map(|()| true),
            Self::Erofs(_) | Self::Ext4 | Self::Bare(_) => Ok(false),
        }
    }

    async fn place(&self, image: &Image) -> Result<Placed, Failure> {
        match self {
            Self::Fuse(daemon) => daemon.mount(image, MountMode::Fuse).await,
            Self::Native(daemon) => {
                daemon.fetch(image).await?;
                daemon.mount(image, MountMode::Native).await
            }
            Self::Erofs(folder) => {
                let root = folder.join("erofs");
                fs::create_dir_all(&root)?;
                let mount = NativeMount::new(&image.files.bootstrap, &image.files.blobs, &root)?;
                Ok(Placed { root, mount: Mount::Erofs { _mount: mount } })
            }
            Self::Ext4 => Ok(Placed { root: image.source.clone(), mount: Mount::Elsewhere }),
            Self::Bare(folder) => {
                let mount = bare::Mounted::new(image, folder)?;
                Ok(Placed { root: mount.root().to_owned(), mount: Mount::Bare { _mount: mount } })
            }
            Self::Peer(peer) => {
                let mount = peer.mount(image)?;
                Ok(Placed { root: mount.root().to_owned(), mount: Mount::Peer(mount) })
            }
        }
    }

    /// Has everything on this machine.
    async fn complete(&self, image: &Image, placed: &Placed) -> Result<(), Failure> {
        match self {
            Self::Fuse(daemon) | Self::Native(daemon) => daemon.fetch(image).await,
            // It keeps what is read.
            Self::Peer(_) => reads::all(&placed.root, &image.names).map(drop),
            Self::Erofs(_) | Self::Ext4 | Self::Bare(_) => Ok(()),
        }
    }

    async fn take_away(&self, placed: Placed) -> Result<(), Failure> {
        match self.daemon() {
            Some(daemon) => daemon.unmount(&placed.root).await,
            None => Ok(()),
        }
    }

    /// Bytes that came from the registry so far, for the field's daemon what it says itself; none without a daemon.
    async fn received(&self, placed: Option<&Placed>) -> Result<Option<f64>, Failure> {
        match self {
            Self::Fuse(daemon) | Self::Native(daemon) => Ok(Some(daemon.received().await? as f64)),
            // Its process is not there before it mounts.
            Self::Peer(_) => match placed.map(|placed| &placed.mount) {
                Some(Mount::Peer(mounted)) => mounted.bytes_fetched().map(|bytes| Some(bytes as f64)),
                _ => Ok(Some(0.0)),
            },
            Self::Erofs(_) | Self::Ext4 | Self::Bare(_) => Ok(None),
        }
    }
}

impl Daemon {
    pub(super) async fn start(shoal: &Path, folder: &Path, registry: SocketAddr) -> Result<Self, Failure> {
        let settings = [
            ("control.listen", vec!["/ip4/127.0.0.1/tcp/0".to_owned()].into()),
            ("data.listen", "127.0.0.1:0".into()),
            ("http.enabled", false.into()),
            ("registry.plain_http", vec![registry.to_string()].into()),
            ("mounts.graduate_after", "0s".into()),
        ];
        let mut node = NodeProcess::start("node", folder, Command::new(shoal), &settings)?;
        node.ready().await?;
        Ok(Self { node, registry })
    }

    async fn client(&self) -> Result<ControlClient<Channel>, Failure> {
        self.node.client().await
    }

    fn reference(&self, image: &Image) -> String {
        format!("{}/app:{}", self.registry, image.tag)
    }

    async fn mount(&self, image: &Image, mode: MountMode) -> Result<Placed, Failure> {
        let root = self.node.mountpoint();
        let (reference, mountpoint) = (self.reference(image), root.display().to_string());
        let request = MountRequest { reference, mountpoint, mode: mode.into(), decode: false };
        self.client().await?.mount(request).await.map_err(|s| api::said(&s))?;
        Ok(Placed { root, mount: Mount::Elsewhere })
    }

    async fn unmount(&self, root: &Path) -> Result<(), Failure> {
        let request = UnmountRequest { mountpoint: root.display().to_string() };
        self.client().await?.unmount(request).await.map_err(|s| api::said(&s))?;
        Ok(())
    }

    /// Has all of an image fetched.
    async fn fetch(&self, image: &Image) -> Result<(), Failure> {
        let request = PrefetchRequest { reference: self.reference(image) };
        let progress = self.client().await?.prefetch(request).await.map_err(|s| api::said(&s))?;
        let mut progress = progress.into_inner();
        while let Some(step) = progress.next().await {
            step.map_err(|s| api::said(&s))?;
        }
        Ok(())
    }

    /// Has the store forget an image. The other one stays, so that each round finds its files where the last one did: on a
    /// virtual disk, what was written a moment ago is read more slowly.
    async fn forget(&self, image: &Image) -> Result<(), Failure> {
        let request = EvictRequest { reference: self.reference(image) };
        let evicted = self.client().await?.evict(request).await.map_err(|s| api::said(&s))?.into_inner();
        if evicted.held > 0 { Err(format!("{} is in use and cannot be forgotten", image.tag).into()) } else { Ok(()) }
    }

    async fn received(&self) -> Result<u64, Failure> {
        let status = self.client().await?.status(StatusRequest {}).await.map_err(|s| api::said(&s))?.into_inner();
        let total = status.total.unwrap_or_default();
        let parts = [total.bytes.unwrap_or_default(), total.objects.unwrap_or_default()];
        Ok(parts.iter().map(|by| by.peer + by.seed + by.registry).sum())
    }
}
