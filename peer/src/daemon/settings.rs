//! The settings of the running daemon, and telling the parts when one changes.

use std::sync::{Mutex, PoisonError};

use shoal_proto::control::Setting;
use shoal_scheduler::{Event, Rates};
use toml::Value;

use crate::{
    config::{Config, ConfigError, is_adjustable},
    data::DataPlane,
    driver::DriverHandle,
    store::Store,
};

/// See the module.
pub(crate) struct Settings {
    /// Held for a copy or a store.
    config: Mutex<Config>,
    /// Held until a change has reached all parts.
    changing: tokio::sync::Mutex<()>,
    data: DataPlane,
    driver: DriverHandle,
    store: Store,
}

impl Settings {
    /// The parts were started with `config`.
    pub(super) fn new(config: Config, data: DataPlane, driver: DriverHandle, store: Store) -> Self {
        Self { config: Mutex::new(config), changing: tokio::sync::Mutex::default(), data, driver, store }
    }

    /// Changes settings, each `KEY=VALUE`: all of them, or none. Gives what they are now.
    ///
    /// # Errors
    /// See [`Config::changed`].
    pub(crate) async fn set(&self, settings: &[String]) -> Result<Vec<Setting>, ConfigError> {
        let _changing = self.changing.lock().await;
        let config = self.config().changed(settings)?;
        self.data.adjust(config.data_limits());
        self.store.adjust(config.store.limits());
        self.driver.event(Event::Limits(config.scheduler_limits())).await;
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config.clone();
        let mut now = Vec::new();
        for text in settings {
            let key = text.split_once('=').map_or(text.as_str(), |(key, _)| key.trim());
            tracing::info!("set {text}");
            now.extend(config.values(key)?.into_iter().map(setting));
        }
        Ok(now)
    }

    /// The value of `key`, of every key of the table `key`, or of all where it is empty.
    ///
    /// # Errors
    /// There is no such key.
    pub(crate) fn get(&self, key: &str) -> Result<Vec<Setting>, ConfigError> {
        Ok(self.config().values(key)?.into_iter().map(setting).collect())
    }

    /// Sets the metrics of the limits in force.
    pub(super) fn export(&self) {
        let config = self.config();
        let (data, scheduler) = (config.data_limits(), config.scheduler_limits());
        let limits = [
            ("upload", data.upload),
            ("upload_per_peer", data.upload_per_peer),
            ("download", scheduler.download),
            ("download_per_peer", scheduler.download_per_peer),
            ("registry", scheduler.registry),
            ("registry_requests", scheduler.registry_requests),
        ];
        for (limit, Rates { all, prefetch }) in limits {
            let gauge =
                |priority| metrics::gauge!("shoal_limit_per_second", "limit" => limit, "priority" => priority);
            gauge("all").set(all as f64);
            gauge("prefetch").set(prefetch as f64);
        }
    }

    fn config(&self) -> Config {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn setting((key, value): (String, Value)) -> Setting {
    let adjustable = is_adjustable(&key);
    Setting { key, value: value.to_string(), adjustable }
}
