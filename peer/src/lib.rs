//! shoal

pub mod data;
pub mod identity;
pub mod membership;
