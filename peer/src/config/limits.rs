//! `[limits]`: what a node may spend, and how the parts that keep to it take it.
//!
//! Rates are bytes per second. They, and sizes in bytes, are numbers or texts such as "20 MiB".

use serde::{Deserialize, Serialize};
use shoal_scheduler::Rates;

use super::Config;
use crate::data;

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct LimitsConfig {
    #[serde(with = "size")]
    pub upload: u64,
    #[serde(with = "size")]
    pub upload_prefetch: u64,
    #[serde(with = "size")]
    pub upload_per_peer: u64,
    #[serde(with = "size")]
    pub upload_per_peer_prefetch: u64,
    #[serde(with = "size")]
    pub download: u64,
    #[serde(with = "size")]
    pub download_prefetch: u64,
    #[serde(with = "size")]
    pub download_per_peer: u64,
    #[serde(with = "size")]
    pub download_per_peer_prefetch: u64,
    #[serde(with = "size")]
    pub registry: u64,
    #[serde(with = "size")]
    pub registry_prefetch: u64,
    pub registry_requests: u32,
    pub registry_requests_prefetch: u32,
    pub connections: u32,
    pub requests: u32,
    pub requests_per_peer: u32,
    #[serde(with = "size")]
    pub answer_bytes: u64,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            upload: 0,
            upload_prefetch: 0,
            upload_per_peer: 0,
            upload_per_peer_prefetch: 0,
            download: 0,
            download_prefetch: 0,
            download_per_peer: 0,
            download_per_peer_prefetch: 0,
            registry: 0,
            registry_prefetch: 0,
            registry_requests: 0,
            registry_requests_prefetch: 0,
            connections: 4096,
            requests: 1024,
            requests_per_peer: 64,
            answer_bytes: 64 << 20,
        }
    }
}

impl LimitsConfig {
    /// The first key that is out of range, and what is wrong with it.
    pub(super) fn fault(&self) -> Option<(&'static str, &'static str)> {
        let faults = [
            ((1..=1 << 16).contains(&self.connections), "limits.connections", "must be 1 to 65536 connections"),
            ((1..=1 << 16).contains(&self.requests), "limits.requests", "must be 1 to 65536 requests"),
            ((1..=512).contains(&self.requests_per_peer), "limits.requests_per_peer", "must be 1 to 512 requests"),
            (
                (1 << 20..1 << 32).contains(&self.answer_bytes),
                "limits.answer_bytes",
                "must be 1 MiB to less than 4 GiB",
            ),
        ];
        faults.into_iter().find(|(holds, ..)| !holds).map(|(_, key, why)| (key, why))
    }
}

impl Config {
    /// What the data plane may spend.
    pub fn data_limits(&self) -> data::Limits {
        let limits = &self.limits;
        data::Limits {
            connections: limits.connections as usize,
            requests: limits.requests as usize,
            requests_per_peer: limits.requests_per_peer as usize,
            answer_bytes: u32::try_from(limits.answer_bytes).unwrap_or(u32::MAX),
            upload: Rates { all: limits.upload, prefetch: limits.upload_prefetch },
            upload_per_peer: Rates { all: limits.upload_per_peer, prefetch: limits.upload_per_peer_prefetch },
            ..data::Limits::default()
        }
    }

    /// What the scheduler may ask for. A few requests at the registry are kept for reads, however many prefetch may have.
    pub fn scheduler_limits(&self) -> shoal_scheduler::Limits {
        let (limits, registry) = (&self.limits, &self.registry);
        let reserve = shoal_scheduler::Limits::default().registry_reserve.min(registry.concurrency / 2);
        shoal_scheduler::Limits {
            download: Rates { all: limits.download, prefetch: limits.download_prefetch },
            download_per_peer: Rates { all: limits.download_per_peer, prefetch: limits.download_per_peer_prefetch },
            registry: Rates { all: limits.registry, prefetch: limits.registry_prefetch },
            registry_requests: Rates {
                all: limits.registry_requests.into(),
                prefetch: limits.registry_requests_prefetch.into(),
            },
            registry_slots: registry.concurrency,
            registry_reserve: registry.concurrency.saturating_sub(registry.prefetch_concurrency).max(reserve),
        }
    }
}

/// A number of bytes, or a text that says one.
pub(super) mod size {
    use std::fmt;

    use bytesize::ByteSize;
    use serde::{Deserializer, Serializer, de};

    /// What TOML's integers hold.
    const MOST: u64 = i64::MAX as u64;

    pub(in crate::config) fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(*bytes)
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        deserializer.deserialize_any(Size)
    }

    struct Size;

    impl de::Visitor<'_> for Size {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("bytes, as a number or a text such as \"20 MiB\"")
        }

        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<u64, E> {
            u64::try_from(bytes).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
        }

        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<u64, E> {
            if bytes <= MOST { Ok(bytes) } else { Err(E::invalid_value(de::Unexpected::Unsigned(bytes), &self)) }
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            let size: Result<ByteSize, _> = text.parse();
            let bytes = size.ok().map(|size| size.as_u64()).filter(|&bytes| bytes <= MOST);
            bytes.ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(settings: &[&str]) -> Result<Config, String> {
        let settings: Vec<_> = settings.iter().map(ToString::to_string).collect();
        Config::load(None, &settings).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_are_numbers_or_texts() {
        let config = load(&["limits.upload=20 MiB", "limits.registry=\"1.5 MB\"", "limits.download=7"]).unwrap();
        let limits = &config.limits;
        assert_eq!((limits.upload, limits.registry, limits.download), (20 << 20, 1_500_000, 7));
        for wrong in ["limits.upload=-1", "limits.upload=fast", "limits.upload=99999 PiB", "limits.upload=[]"] {
            let error = load(&[wrong]).unwrap_err();
            assert!(error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        for wrong in ["connections=0", "requests=70000", "requests_per_peer=0", "answer_bytes=5 GiB"] {
            let error = load(&[&format!("limits.{wrong}")]).unwrap_err();
            assert!(error.contains("must be 1"), "{error}");
        }
    }

    #[test]
    fn the_parts_are_told_what_was_configured() {
        let config = load(&["limits.upload_per_peer=5", "limits.requests=9", "limits.registry_requests=3"]).unwrap();
        let data = config.data_limits();
        assert_eq!((data.upload_per_peer, data.requests), (Rates { all: 5, prefetch: 0 }, 9));
        assert_eq!(Config::default().data_limits(), data::Limits::default());
        assert_eq!(config.scheduler_limits().registry_requests, Rates { all: 3, prefetch: 0 });
        for (slots, prefetch, reserve) in [(16, 12, 4), (16, 16, 2), (1, 1, 0), (2, 9, 1), (8, 1, 7)] {
            let (slots, prefetch) =
                (format!("registry.concurrency={slots}"), format!("registry.prefetch_concurrency={prefetch}"));
            let config = load(&[&slots, &prefetch]).unwrap();
            assert_eq!(config.scheduler_limits().registry_reserve, reserve, "{slots} {prefetch}");
        }
    }
}
