//! The node: everything around the pure parts.
//!
//! ```text
//!   FUSE threads --read--> Reader --memory, store--> reply
//!                            |
//!                            | want                      (bounded channel)
//!                            v
//!   Exchange --events--> Driver, owns the Scheduler --actions--> fetch tasks --> peers (DataPlane)
//!      ^  ^                  ^                                      |      \---> registry (Registries)
//!      |  |                  '------------- outcomes ---------------'
//!      |  |                                                         '--verified--> Store
//!      |  '-- Control: libp2p swarm; who is there, leases, provider records
//!      '----- DataPlane: connections, interest, bitfields;  requests of others --> Server --> Store, or a want
//! ```
//!
//! One task owns the scheduler, one the libp2p swarm, one the exchange; each connection of the data plane has its own.
//! They talk over bounded channels. Whatever touches the disk runs on blocking threads.

pub mod admission;
pub mod api;
mod authfile;
pub mod command;
pub mod config;
mod contacts;
mod containerd;
pub mod control;
pub mod daemon;
pub mod data;
mod distribution;
pub mod driver;
mod evictions;
mod exchange;
mod fetch;
mod filler;
mod grpc;
mod handover;
pub mod identity;
mod image_service;
pub mod images;
pub mod index;
pub mod layout_server;
pub mod membership;
pub mod metrics;
mod mirror;
mod mounts;
mod native;
mod node;
pub mod origin;
mod pins;
mod plain;
mod prefetch;
mod preheat;
mod pressing_news;
pub mod processes;
mod pull_secrets;
mod reader;
mod scrub;
mod serve;
pub mod snapshotter;
mod starts;
pub mod store;
pub mod traffic;
mod upgrade;
mod usage;
mod watched_file;

pub use shoal_rafs::chain;
