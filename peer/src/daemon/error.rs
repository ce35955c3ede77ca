//! Why the daemon did not start, or did not do what a member asked.

use std::{net::SocketAddr, path::PathBuf};

use shoal_rafs::oci::{AuthfileError, KeyError, RegistryError};

use crate::{
    control::ControlError,
    data::DataError,
    identity::IdentityError,
    membership::{MembershipError, RevocationError},
    mounts::MountsError,
    snapshotter::SnapshotError,
    store::StoreError,
};

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory.
    #[error("cannot open the store")]
    Store(#[from] StoreError),
    /// The node's key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate of membership or the cluster's key.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// Who was revoked is not known.
    #[error("cannot read the revocations in {path}")]
    Revocations {
        /// The data directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The registry client's options.
    #[error("cannot set up the registry client")]
    Registry(#[from] RegistryError),
    /// The file with registry credentials.
    #[error(transparent)]
    Authfile(#[from] AuthfileError),
    /// A private key for encrypted images cannot be used.
    #[error("registry.decryption_keys")]
    DecryptionKey(#[from] KeyError),
    /// The control plane.
    #[error("cannot start the control plane")]
    Control(#[from] ControlError),
    /// An address that is no multiaddress.
    #[error("{key}: {text:?} is not a multiaddress such as /ip4/192.0.2.1/tcp/4801")]
    Address {
        /// The option.
        key: &'static str,
        /// Its value.
        text: String,
    },
    /// The data plane.
    #[error("cannot start the data plane")]
    Data(#[from] DataError),
    /// The mounts of the last run.
    #[error("cannot read which mounts there were")]
    Mounts(#[from] MountsError),
    /// The snapshots of the last run.
    #[error("cannot be containerd's snapshotter")]
    Snapshots(#[from] Box<SnapshotError>),
    /// The control socket, or containerd's.
    #[error("cannot listen on {path}")]
    Socket {
        /// The socket.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The metrics endpoint, or the mirror.
    #[error("cannot listen on {address}")]
    Http {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// Why a revocation was not passed on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RevokeError {
    #[error(transparent)]
    Revocation(#[from] RevocationError),
    #[error(transparent)]
    Control(#[from] ControlError),
}
