//! shoal

pub mod identity;
pub mod membership;
