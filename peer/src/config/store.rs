//! `[store]`: how much is kept.

use serde::{Deserialize, Serialize};

use super::limits::size;
use crate::store::StoreLimits;

/// `[store]`: how much is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct StoreConfig {
    #[serde(with = "size")]
    pub max_bytes: u64,
    pub high_percent: u8,
    pub low_percent: u8,
    #[serde(with = "size")]
    pub keep_free_bytes: u64,
    pub keep_unmounted: bool,
}

impl Default for StoreConfig {
    fn default() -> Self {
        let StoreLimits { max_bytes, high_percent, low_percent, .. } = StoreLimits::default();
        Self { max_bytes, high_percent, low_percent, keep_free_bytes: 256 << 20, keep_unmounted: true }
    }
}

impl StoreConfig {
    /// A key that is out of range, and why.
    pub(super) fn fault(&self) -> Option<(&'static str, &'static str)> {
        let wrong = !(1..=100).contains(&self.high_percent);
        wrong.then_some(("store.high_percent", "must be 1 to 100"))
    }

    /// A key that does not go with another one.
    pub(super) fn order_fault(&self) -> Option<(&'static str, &'static str)> {
        let over = self.low_percent > self.high_percent;
        over.then_some(("store.low_percent", "must be at most store.high_percent"))
    }

    pub(crate) fn limits(&self) -> StoreLimits {
        let &Self { max_bytes, high_percent, low_percent, keep_free_bytes, .. } = self;
        StoreLimits { max_bytes, high_percent, low_percent, keep_free_bytes }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn marks_are_percent_and_the_low_one_is_below() {
        for (text, why) in [("store.low_percent=91", "must be at most"), ("store.high_percent=0", "must be 1 to 100")]
        {
            let error = Config::load(None, &[text.into()]).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let both = ["store.high_percent=7", "store.low_percent=5"].map(String::from);
        assert!(Config::load(None, &both).is_ok(), "what each is without the other does not count");
        let sizes = Config::load(None, &["store.max_bytes=\"20 GiB\"".into()]).unwrap();
        assert_eq!(sizes.store.limits().max_bytes, 20 << 30);
    }
}
