//! How bytes reach the swarm: TCP, noise with the membership step, yamux. Nothing else, so that there is no way in
//! that leaves the membership step out.

use std::{net::IpAddr, sync::Arc, time::Duration};

use libp2p::{
    Transport,
    core::{ConnectedPoint, muxing::StreamMuxerBox, transport::Boxed, upgrade::Version},
    identity::Keypair,
    noise, tcp, yamux,
};

use super::{
    addresses,
    admission::{Gate, Step},
};
use crate::membership::{MembershipError, Policy};

/// From the first byte to a multiplexed connection of a member. A stranger can hold a slot this long.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(10);

/// Streams of one connection at a time; the protocols of this plane use a handful.
const MAX_STREAMS: usize = 128;

/// # Errors
/// The key cannot sign noise's own keys.
pub(super) fn transport(
    keypair: &Keypair,
    gate: Arc<Gate>,
    reach: Reach,
) -> Result<Boxed<(libp2p::PeerId, StreamMuxerBox)>, noise::Error> {
    let mut yamux = yamux::Config::default();
    yamux.set_max_num_streams(MAX_STREAMS);
    let admission = Step::new(keypair, gate)?;
    let transport = tcp::tokio::Transport::new(tcp::Config::new().nodelay(true))
        .and_then(move |socket, endpoint| std::future::ready(reach.check(&endpoint).map(|()| socket)))
        .upgrade(Version::V1Lazy)
        .authenticate(admission)
        .multiplex(yamux)
        .timeout(UPGRADE_TIMEOUT)
        .boxed();
    Ok(transport)
}

/// Which addresses this node talks to: in an open cluster its own machine's only.
#[derive(Debug, Clone)]
pub(super) struct Reach {
    pub(super) policy: Policy,
    pub(super) insecure_open: bool,
}

impl Reach {
    pub(super) fn permits(&self, address: IpAddr) -> Result<(), MembershipError> {
        self.policy.permits(address, self.insecure_open)
    }

    /// Names are resolved late and peers are told of by others, so the address is checked again on the connection.
    fn check(&self, endpoint: &ConnectedPoint) -> Result<(), MembershipError> {
        match addresses::ip(endpoint.get_remote_address()) {
            Some(address) => self.permits(address),
            None => Ok(()),
        }
    }
}
