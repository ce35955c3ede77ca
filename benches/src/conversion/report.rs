//! The figures of all rounds, and what is said of them.

use serde::Serialize;

use crate::figures::{median, spread};

/// One round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    pub(super) convert_seconds: f64,
    pub(super) oci_ref_seconds: f64,
    pub(super) download_seconds: f64,
    pub(super) build_seconds: f64,
    pub(super) upload_seconds: f64,
    pub(super) convert_peak_rss_bytes: u64,
    pub(super) oci_ref_peak_rss_bytes: u64,
}

impl Round {
    pub(super) fn line(&self) -> String {
        let Self { convert_seconds, oci_ref_seconds, download_seconds, build_seconds, upload_seconds, .. } = self;
        format!(
            "convert {convert_seconds:.2} s, --oci-ref {oci_ref_seconds:.2} s; download {download_seconds:.2} s, \
             build {build_seconds:.2} s, upload {upload_seconds:.2} s"
        )
    }
}

/// All rounds.
#[derive(Debug)]
pub struct Report {
    image_bytes: u64,
    pub(super) rounds: Vec<Round>,
}

/// The medians; the keys are a contract with scripts.
#[derive(Debug, Clone, Serialize)]
pub struct Medians {
    image_bytes: u64,
    convert_seconds: f64,
    oci_ref_seconds: f64,
    download_seconds: f64,
    build_seconds: f64,
    upload_seconds: f64,
    convert_peak_rss_bytes: u64,
    oci_ref_peak_rss_bytes: u64,
    /// `convert_seconds` over the sum of the three parts; less is better.
    convert_to_parts_ratio: f64,
    /// `convert_seconds` over `oci_ref_seconds`; more is better.
    oci_ref_speedup: f64,
}

impl Report {
    /// Of an image whose layers have so many bytes.
    pub(super) fn new(image_bytes: u64) -> Self {
        Self { image_bytes, rounds: Vec::new() }
    }

    fn of<T>(&self, value: impl Fn(&Round) -> T) -> Vec<T> {
        self.rounds.iter().map(value).collect()
    }

    /// What to publish. Zeros before the first round.
    pub fn medians(&self) -> Medians {
        let seconds = |value: fn(&Round) -> f64| median(&self.of(value));
        let (convert, oci_ref) = (seconds(|round| round.convert_seconds), seconds(|round| round.oci_ref_seconds));
        let parts = seconds(|round| round.download_seconds + round.build_seconds + round.upload_seconds);
        Medians {
            image_bytes: self.image_bytes,
            convert_seconds: convert,
            oci_ref_seconds: oci_ref,
            download_seconds: seconds(|round| round.download_seconds),
            build_seconds: seconds(|round| round.build_seconds),
            upload_seconds: seconds(|round| round.upload_seconds),
            convert_peak_rss_bytes: median(&self.of(|round| round.convert_peak_rss_bytes)),
            oci_ref_peak_rss_bytes: median(&self.of(|round| round.oci_ref_peak_rss_bytes)),
            convert_to_parts_ratio: if parts > 0.0 { convert / parts } else { 0.0 },
            oci_ref_speedup: if oci_ref > 0.0 { convert / oci_ref } else { 0.0 },
        }
    }

    /// For people: each figure with its spread, and the ratios.
    pub fn table(&self) -> String {
        let medians = self.medians();
        let line = |name: &str, value: fn(&Round) -> f64| {
            let values = self.of(value);
            let (least, most) = spread(&values);
            format!("{name:<10} {:>8.2} s   {least:.2} to {most:.2}", median(&values))
        };
        let mib = |bytes: u64| bytes >> 20;
        [
            format!(
                "layers of {} MiB; medians of {} rounds, least to most",
                mib(self.image_bytes),
                self.rounds.len()
            ),
            line("convert", |round| round.convert_seconds),
            line("--oci-ref", |round| round.oci_ref_seconds),
            line("download", |round| round.download_seconds),
            line("build", |round| round.build_seconds),
            line("upload", |round| round.upload_seconds),
            format!(
                "convert takes {:.2} x download + build + upload, and {} MiB at most",
                medians.convert_to_parts_ratio,
                mib(medians.convert_peak_rss_bytes)
            ),
            format!(
                "--oci-ref is {:.2} x as fast, and takes {} MiB at most",
                medians.oci_ref_speedup,
                mib(medians.oci_ref_peak_rss_bytes)
            ),
        ]
        .join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_the_medians() {
        let round = |convert_seconds| Round {
            convert_seconds,
            oci_ref_seconds: 2.0,
            download_seconds: 1.0,
            build_seconds: 3.0,
            upload_seconds: 1.0,
            convert_peak_rss_bytes: 64 << 20,
            oci_ref_peak_rss_bytes: 32 << 20,
        };
        let report = Report { image_bytes: 480 << 20, rounds: [9.0, 4.0, 5.0].map(round).to_vec() };
        let medians = serde_json::to_value(report.medians()).expect("JSON");
        assert_eq!((&medians["convert_to_parts_ratio"], &medians["oci_ref_speedup"]), (&1.0.into(), &2.5.into()));
        let table = report.table();
        assert!(table.contains("convert        5.00 s   4.00 to 9.00") && table.contains("480 MiB"), "{table}");
        assert_eq!(Report::new(0).medians().oci_ref_speedup, 0.0);
    }
}
