//! shoal

pub mod layout_server;
pub mod origin;
