//! The figures of all rounds, and what is said of them.

use serde::Serialize;

use crate::figures::{median, spread};

/// One value a round; seconds, where it does not say bytes.
#[derive(Debug, Default)]
pub struct Report {
    pub(super) oci_total: Vec<f64>,
    pub(super) lazy_cold: Vec<f64>,
    pub(super) lazy_warm_peer: Vec<f64>,
    pub(super) lazy_local: Vec<f64>,
    pub(super) lazy_cold_4x: Vec<f64>,
    pub(super) lazy_cold_cri: Vec<f64>,
    pub(super) lazy_eight_slowest: Vec<f64>,
    pub(super) oci_total_400mbit: Vec<f64>,
    pub(super) lazy_cold_400mbit: Vec<f64>,
    /// Of `lazy_cold`.
    pub(super) bytes_fetched: Vec<u64>,
    pub(super) bytes_read: Vec<u64>,
    /// Of eight nodes: what the registry sent by what one needs.
    pub(super) eight_registry_ratio: Vec<f64>,
}

/// The medians; the keys are a contract with scripts.
#[derive(Debug, Clone, Serialize)]
pub struct Medians {
    oci_total: f64,
    lazy_cold: f64,
    lazy_warm_peer: f64,
    lazy_local: f64,
    lazy_cold_4x: f64,
    lazy_cold_cri: f64,
    lazy_eight_slowest: f64,
    oci_total_400mbit: f64,
    lazy_cold_400mbit: f64,
    bytes_fetched: u64,
    bytes_read: u64,
    eight_registry_ratio: f64,
}

impl Report {
    fn series(&self) -> [(&'static str, &[f64]); 9] {
        [
            ("oci_total", &self.oci_total),
            ("lazy_cold", &self.lazy_cold),
            ("lazy_warm_peer", &self.lazy_warm_peer),
            ("lazy_local", &self.lazy_local),
            ("lazy_cold_4x", &self.lazy_cold_4x),
            ("lazy_cold_cri", &self.lazy_cold_cri),
            ("lazy_eight_slowest", &self.lazy_eight_slowest),
            ("oci_total_400mbit", &self.oci_total_400mbit),
            ("lazy_cold_400mbit", &self.lazy_cold_400mbit),
        ]
    }

    /// The last round, in one line.
    pub(super) fn last(&self) -> String {
        let one = |(name, values): (&str, &[f64])| format!("{name} {:.2} s", values.last().unwrap_or(&f64::NAN));
        self.series().map(one).join(", ")
    }

    /// What to publish. Zeros before the first round.
    pub fn medians(&self) -> Medians {
        Medians {
            oci_total: median(&self.oci_total),
            lazy_cold: median(&self.lazy_cold),
            lazy_warm_peer: median(&self.lazy_warm_peer),
            lazy_local: median(&self.lazy_local),
            lazy_cold_4x: median(&self.lazy_cold_4x),
            lazy_cold_cri: median(&self.lazy_cold_cri),
            lazy_eight_slowest: median(&self.lazy_eight_slowest),
            oci_total_400mbit: median(&self.oci_total_400mbit),
            lazy_cold_400mbit: median(&self.lazy_cold_400mbit),
            bytes_fetched: median(&self.bytes_fetched),
            bytes_read: median(&self.bytes_read),
            eight_registry_ratio: median(&self.eight_registry_ratio),
        }
    }

    /// For people: each figure with its spread, and next to the ordinary way.
    pub fn table(&self) -> String {
        let [near, far] = [&self.oci_total, &self.oci_total_400mbit].map(|ordinary| median(ordinary));
        let line = |(name, values): (&str, &[f64])| {
            let (least, most) = spread(values);
            let median = median(values);
            let ordinary = if name.ends_with("_400mbit") { far } else { near };
            format!("{name:<18} {median:>7.2} s  {least:.2} to {most:.2}  {:>5.1} x", ordinary / median)
        };
        let Medians { bytes_fetched, bytes_read, eight_registry_ratio, .. } = self.medians();
        let mut lines = vec![format!("{:<18} {:>9}  {}  faster", "", "median", "least to most")];
        lines.extend(self.series().map(line));
        lines.push(format!("a cold start fetched {bytes_fetched} bytes; {bytes_read} bytes of files were read"));
        lines.push(format!(
            "for eight nodes at once the registry sent {eight_registry_ratio:.3} x what one of them needs"
        ));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_all_rounds() {
        let report = Report {
            oci_total: vec![20.0, 10.0, 30.0],
            lazy_cold: vec![1.0; 3],
            oci_total_400mbit: vec![30.0; 3],
            lazy_cold_400mbit: vec![2.0; 3],
            ..Report::default()
        };
        let table = report.table();
        assert!(table.contains("lazy_cold             1.00 s  1.00 to 1.00   20.0 x"), "{table}");
        assert!(
            table.contains("lazy_cold_400mbit     2.00 s  2.00 to 2.00   15.0 x"),
            "each next to its own: {table}"
        );
        assert_eq!(serde_json::to_value(report.medians()).expect("JSON")["oci_total"], 20.0);
    }
}
