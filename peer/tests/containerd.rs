//! The stories of those who run containers, behind a real containerd and runc: real images from a registry, the daemon as
//! proxy plugin, containers that are started by `ctr`.
//!
//! A program of its own, because it takes longer than the other stories, and needs packages that they don't.

#[path = "stories/support.rs"]
#[allow(dead_code, reason = "shared with the other stories, which use more of it")]
mod support;

#[path = "stories/registry_server.rs"]
#[allow(dead_code, reason = "shared with the other stories, which use more of it")]
mod registry_server;

#[path = "containerd/bed.rs"]
mod bed;
#[path = "containerd/hosts.rs"]
mod hosts;
#[path = "containerd/image.rs"]
mod image;
#[path = "containerd/pod.rs"]
mod pod;

#[path = "containerd/application.rs"]
mod application;
#[path = "containerd/cri.rs"]
mod cri;
#[path = "containerd/filled.rs"]
mod filled;
#[path = "containerd/graduated.rs"]
mod graduated;
#[path = "containerd/kept.rs"]
mod kept;
#[path = "containerd/lazy.rs"]
mod lazy;
#[path = "containerd/many_nodes.rs"]
mod many_nodes;
#[path = "containerd/mirror.rs"]
mod mirror;
#[path = "containerd/one_tag.rs"]
mod one_tag;
#[path = "containerd/ordinary.rs"]
mod ordinary;
#[path = "containerd/pull_credentials.rs"]
mod pull_credentials;
#[path = "containerd/restart.rs"]
mod restart;
#[path = "containerd/unmarked.rs"]
mod unmarked;
#[path = "containerd/unmodified.rs"]
mod unmodified;
#[path = "containerd/untrue.rs"]
mod untrue;
#[path = "containerd/whole_chain.rs"]
mod whole_chain;
