//! The membership step of a connection: right after noise has proved who the other side is, and before a multiplexer,
//! hence before any protocol, both sides show their membership and tell each other the verdict.
//!
//! ```text
//! both:  u16 length (big endian) | what membership.rs shows
//! both:  u8 verdict: 0 welcome, else the code of a Refusal
//! ```
//!
//! A refused side learns the reason and nothing else. Noise and this exchange are one upgrade with a name of its own,
//! so that a libp2p node that is no Shoal fails at the first message. The time limit is the transport's.

use std::{
    num::NonZeroUsize,
    sync::{Arc, PoisonError},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, future::BoxFuture};
use libp2p::{
    core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    identity::Keypair,
    noise,
};
use lru::LruCache;

use crate::{
    admission::Admission,
    identity::{self, IdentityError},
    membership::{self, Admitted, Refusal},
};

const PROTOCOL: &str = "/shoal/noise/1";
const WELCOME: u8 = 0;

/// Admitted peers are remembered between the upgrade and the swarm's event about the connection, which follows at
/// once; more than this many cannot be between the two.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Why a connection ended at the membership step.
#[derive(Debug, thiserror::Error)]
pub(super) enum AdmissionError {
    #[error("no secure channel")]
    Noise(#[from] noise::Error),
    #[error("the membership exchange was cut off")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("refused {peer}: {refusal}")]
    Refused { peer: libp2p::PeerId, refusal: Refusal },
    #[error("{peer} refused this node: {}", refusal.map_or("for a reason that this version does not know".into(),
        |refusal| refusal.to_string()))]
    RefusedByPeer { peer: libp2p::PeerId, refusal: Option<Refusal> },
}

/// What every connection of the node shares: its own membership, whose it believes, and who was let in.
#[derive(Debug)]
pub(super) struct Gate {
    admission: Admission,
    /// The upgrade of a connection runs in a task of its own and can hand nothing but the peer's identity to the
    /// swarm; the rest goes by here. Never held across an await.
    admitted: Mutex<LruCache<libp2p::PeerId, Admitted>>,
    refused: AtomicU64,
}

impl Gate {
    pub(super) fn new(admission: Admission) -> Self {
        let admitted = Mutex::new(LruCache::new(REMEMBERED));
        Self { admission, admitted, refused: AtomicU64::new(0) }
    }

    /// As what `peer` was let in.
    pub(super) fn admitted(&self, peer: &libp2p::PeerId) -> Option<Admitted> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner).get(peer).cloned()
    }

    /// How many connections were refused here, since the start.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    async fn exchange<S>(&self, peer: libp2p::PeerId, channel: &mut S) -> Result<(), AdmissionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let claimed = identity::from_libp2p(&peer)?;
        write_shown(channel, self.admission.own().shown()).await?;
        let verdict = match read_shown(channel).await? {
            Ok(shown) => self.admission.admit(&shown, &claimed, membership::unix_now()),
            Err(refusal) => Err(refusal),
        };
        if verdict.is_err() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        channel.write_all(&[verdict.as_ref().err().map_or(WELCOME, |refusal| *refusal as u8)]).await?;
        channel.flush().await?;
        // Read even by who refuses: closing with bytes unread would reset the connection under our own verdict.
        let mut theirs = [0];
        let told = channel.read_exact(&mut theirs).await;
        let admitted = verdict.map_err(|refusal| AdmissionError::Refused { peer, refusal })?;
        told?;
        if theirs != [WELCOME] {
            return Err(AdmissionError::RefusedByPeer { peer, refusal: Refusal::from_code(theirs[0]) });
        }
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner).put(peer, admitted);
        Ok(())
    }
}

/// Noise and the membership step, as one upgrade of a raw connection.
#[derive(Clone)]
pub(super) struct Step {
    noise: noise::Config,
    gate: Arc<Gate>,
}

impl Step {
    /// # Errors
    /// The key cannot sign noise's own keys.
    pub(super) fn new(keypair: &Keypair, gate: Arc<Gate>) -> Result<Self, noise::Error> {
        Ok(Self { noise: noise::Config::new(keypair)?, gate })
    }
}

impl UpgradeInfo for Step {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once(PROTOCOL)
    }
}

impl<T> InboundConnectionUpgrade<T> for Step
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Output = (libp2p::PeerId, noise::Output<T>);
    type Error = AdmissionError;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, socket: T, name: Self::Info) -> Self::Future {
        Box::pin(async move {
            let (peer, mut channel) = self.noise.upgrade_inbound(socket, name).await?;
            self.gate.exchange(peer, &mut channel).await?;
            Ok((peer, channel))
        })
    }
}

impl<T> OutboundConnectionUpgrade<T> for Step
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Output = (libp2p::PeerId, noise::Output<T>);
    type Error = AdmissionError;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, socket: T, name: Self::Info) -> Self::Future {
        Box::pin(async move {
            let (peer, mut channel) = self.noise.upgrade_outbound(socket, name).await?;
            self.gate.exchange(peer, &mut channel).await?;
            Ok((peer, channel))
        })
    }
}

async fn write_shown(channel: &mut (impl AsyncWrite + Unpin), shown: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(shown.len()).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    channel.write_all(&length.to_be_bytes()).await?;
    channel.write_all(shown).await?;
    channel.flush().await
}

/// The bytes that the peer shows; too many of them are refused before they are read.
async fn read_shown(channel: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Result<Vec<u8>, Refusal>> {
    let mut length = [0; 2];
    channel.read_exact(&mut length).await?;
    let length = usize::from(u16::from_be_bytes(length));
    if length > membership::MAX_BYTES {
        return Ok(Err(Refusal::TooLong));
    }
    let mut shown = vec![0; length];
    channel.read_exact(&mut shown).await?;
    Ok(Ok(shown))
}
