//! containerd's own API: what of it the daemon serves, and what it asks.
//!
//! The schemas beside this module hold only what is needed. The crates there are would bring more than that:
//! `containerd-client` runs protoc at build time, and `containerd-snapshots` 0.3 an older tonic and prost besides.

mod client;
mod pull;

pub(crate) use self::services::snapshots::v1 as snapshots;
use self::services::{content::v1 as content, images::v1 as images, leases::v1 as leases};
pub(crate) use self::{
    client::Client,
    pull::{Pulled, pull},
};

/// Types that the services share.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, reason = "generated from types.proto")]
pub(crate) mod types {
    include!("generated/containerd.types.rs");
}

/// The services, nested as the generated code expects it.
#[allow(
    missing_docs,
    missing_debug_implementations,
    dead_code,
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    reason = "generated from the schemas in containerd/"
)]
mod services {
    pub(crate) mod snapshots {
        pub(crate) mod v1 {
            include!("generated/containerd.services.snapshots.v1.rs");
        }
    }
    pub(crate) mod content {
        pub(crate) mod v1 {
            include!("generated/containerd.services.content.v1.rs");
        }
    }
    pub(crate) mod images {
        pub(crate) mod v1 {
            include!("generated/containerd.services.images.v1.rs");
        }
    }
    pub(crate) mod leases {
        pub(crate) mod v1 {
            include!("generated/containerd.services.leases.v1.rs");
        }
    }
}
