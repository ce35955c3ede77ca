//! The configuration of a running daemon: what it is, and what of it can be changed.

use toml::{Table, Value};

use super::{Config, ConfigError, invalid, merge, overlay, parse_table, refuse_unknown, whole};

impl Config {
    /// This configuration with each `KEY=VALUE` of `settings` over it, as a running daemon takes them.
    ///
    /// # Errors
    /// As [`load`](Self::load); and [`ConfigError::Fixed`] for a key that only a restart changes.
    pub fn changed(&self, settings: &[String]) -> Result<Self, ConfigError> {
        let mut table = self.table()?;
        for text in settings {
            let overlay = overlay(text, text)?;
            if let Some((key, _)) = leaves(&overlay).into_iter().find(|(key, _)| !is_adjustable(key)) {
                return Err(ConfigError::Fixed { key });
            }
            merge(&mut table, overlay);
        }
        whole(table)
    }

    /// The value of `key`, or of every key of the table `key`, or of all keys where it is empty, in the order of their names.
    ///
    /// # Errors
    /// There is no such key.
    pub fn values(&self, key: &str) -> Result<Vec<(String, Value)>, ConfigError> {
        let table = self.table()?;
        if !key.is_empty() {
            refuse_unknown(key, "", &parse_table(key, &format!("{key} = 0"))?, &table)?;
        }
        let within = |name: &str| name.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        let mut leaves = leaves(&table);
        leaves.retain(|(name, _)| key.is_empty() || within(name));
        leaves.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(leaves)
    }

    fn table(&self) -> Result<Table, ConfigError> {
        Table::try_from(self).map_err(|e| invalid("configuration", &e))
    }
}

/// Whether a running daemon can change this key.
pub fn is_adjustable(key: &str) -> bool {
    match key.split_once('.') {
        // The memory is divided when the data plane starts.
        Some(("limits", name)) => name != "answer_bytes",
        Some(("registry", name)) => ["concurrency", "prefetch_concurrency"].contains(&name),
        // What becomes of an unmounted image is told to each mount when it is made.
        Some(("store", name)) => name != "keep_unmounted",
        _ => false,
    }
}

/// Every key that is no table, with the tables it lies in, and its value.
fn leaves(table: &Table) -> Vec<(String, Value)> {
    let below = |(key, value): (&String, &Value)| match value {
        Value::Table(inner) => {
            leaves(inner).into_iter().map(|(name, value)| (format!("{key}.{name}"), value)).collect()
        }
        value => vec![(key.clone(), value.clone())],
    };
    table.iter().flat_map(below).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_daemon_takes_limits_and_nothing_else() {
        let settings = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let changed = |texts: &[&str]| Config::default().changed(&settings(texts)).map_err(|error| error.to_string());
        let config = changed(&["limits.upload=2 KiB", "registry.concurrency=3"]).unwrap();
        assert_eq!(changed(&["store.low_percent=5", "store.high_percent=7"]).unwrap().store.high_percent, 7);
        assert_eq!((config.limits.upload, config.registry.concurrency), (2048, 3));
        assert_eq!(config, config.changed(&[]).unwrap());
        for (texts, error) in [
            (["limits.upload=1", "zone=b"], "zone is read when the daemon starts"),
            (["limits.upload=1", "limits.answer_bytes=2 MiB"], "limits.answer_bytes is read when"),
            (["limits.upload=1", "limits.uplod=1"], "did you mean \"limits.upload\"?"),
            (["limits.upload=1", "limits.connections=0"], "limits.connections=0: limits.connections must be"),
            (["limits.upload=1", "limits"], "limits: expected KEY=VALUE"),
            (["store.max_bytes=1", "store.keep_unmounted=false"], "store.keep_unmounted is read when"),
            (["store.max_bytes=1", "store.high_percent=70"], "store.low_percent must be at most"),
        ] {
            let found = changed(&texts).unwrap_err();
            assert!(found.contains(error), "{found}");
        }
    }

    #[test]
    fn values_are_found_by_key_and_by_table() {
        let mut config = Config::default();
        config.labels.insert("rack".into(), "r1".into());
        let values = |key: &str| config.values(key);
        assert_eq!(values("limits.requests").unwrap(), [("limits.requests".to_owned(), Value::Integer(1024))]);
        assert_eq!(values("labels").unwrap(), [("labels.rack".to_owned(), Value::from("r1"))]);
        let all = values("").unwrap();
        assert!(all.is_sorted_by_key(|(key, _)| key.clone()) && all.iter().any(|(key, _)| key == "http.enabled"));
        let limits = values("limits").unwrap();
        assert!(limits.len() > 10 && limits.iter().all(|(key, _)| key.starts_with("limits.")));
        assert!(values("limit").unwrap_err().to_string().contains("did you mean \"limits\"?"));
        assert!(values("a b").is_err());
    }
}
