//! shoal

pub mod control;
pub mod identity;
pub mod membership;
