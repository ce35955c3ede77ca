//! The figures of all rounds by way, and what is said of them.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{bars, reads::Figures};
use crate::figures::{median, percentile, spread};

/// The order in which ways are shown. `peer` is the field's daemon, where there is one.
const WAYS: [&str; 6] = ["fuse", "native", "erofs", "ext4", "bare_fuse", "peer"];

/// All rounds.
#[derive(Debug, Default)]
pub struct Report {
    files: usize,
    bytes: u64,
    /// Who read the large file.
    reader: String,
    /// The program of the field, if there was one.
    peer: Option<String>,
    rounds: BTreeMap<&'static str, Vec<Figures>>,
}

/// The medians of one way; the keys are a contract with scripts.
#[derive(Debug, Serialize)]
struct Medians {
    cold_all_seconds: Option<f64>,
    cold_open_ms: Option<Latencies>,
    cold_open_bytes_fetched: Option<f64>,
    local_all_seconds: Option<f64>,
    parallel_all_seconds: Option<f64>,
    hot_all_seconds: Option<f64>,
    find_seconds: Option<f64>,
    seq_read_mib_s: Option<f64>,
    hot_seq_read_mib_s: Option<f64>,
    rand_read_iops: Option<f64>,
}

/// Of the opens of all rounds.
#[derive(Debug, Serialize)]
struct Latencies {
    p50: f64,
    p95: f64,
    p99: f64,
}

impl Report {
    pub(super) fn new(files: usize, bytes: u64, reader: String, peer: Option<&Path>) -> Self {
        let peer = peer.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        Self { files, bytes, reader, peer, rounds: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, way: &'static str, figures: Figures) {
        self.rounds.entry(way).or_default().push(figures);
    }

    /// What to publish: the medians of each way, what the bars are and whether they hold, who read and what the peer is, and
    /// `rounds`, `files` and `bytes` of the tree.
    pub fn json(&self) -> Value {
        let rounds = self.rounds.values().map(Vec::len).min().unwrap_or_default();
        let mut all = Map::from_iter([
            ("rounds".to_owned(), json!(rounds)),
            ("files".to_owned(), json!(self.files)),
            ("bytes".to_owned(), json!(self.bytes)),
            ("large_file_read_by".to_owned(), json!(self.reader)),
            ("peer_program".to_owned(), json!(self.peer)),
            ("bars".to_owned(), json!(bars::outcomes(&self.rounds))),
        ]);
        all.extend(self.rounds.iter().map(|(way, rounds)| ((*way).to_owned(), json!(Medians::of(rounds)))));
        Value::Object(all)
    }

    /// For people: each figure with its spread.
    pub fn table(&self) -> String {
        let mut lines = vec![format!("{} files, {:.0} MiB; median (least to most)", self.files, mib(self.bytes))];
        let row = |name: &str, value: &dyn Fn(&Figures) -> Option<f64>| {
            let cells = WAYS.iter().filter_map(|way| {
                let values: Vec<f64> = self.rounds.get(way)?.iter().filter_map(value).collect();
                let (least, most) = spread(&values);
                Some(match values.is_empty() {
                    true => format!("{:>26}", "-"),
                    false => format!("{:>26}", format!("{:.3} ({least:.3} to {most:.3})", median(&values))),
                })
            });
            format!("{name:<22}{}", cells.collect::<String>())
        };
        let names = WAYS.iter().filter(|way| self.rounds.contains_key(*way)).map(|way| format!("{way:>26}"));
        lines.push(format!("{:<22}{}", "", names.collect::<String>()));
        let opens = |percent: usize| {
            move |round: &Figures| {
                let opens = &round.cold_open_ms;
                (!opens.is_empty()).then(|| percentile(opens, percent))
            }
        };
        lines.extend([
            row("cold, all, s", &|round| round.cold_all_seconds),
            row("cold, open p50, ms", &opens(50)),
            row("cold, open p95, ms", &opens(95)),
            row("cold, open p99, ms", &opens(99)),
            row("fetched for these, MiB", &|round| round.cold_open_bytes_fetched.map(|bytes| mib(bytes as u64))),
            row("local, all, s", &|round| round.local_all_seconds),
            row("local, all by 4, s", &|round| round.parallel_all_seconds),
            row("hot, all, s", &|round| round.hot_all_seconds),
            row("local, find -ls, s", &|round| round.find_seconds),
            row("local, large, MiB/s", &|round| round.seq_read_mib_s),
            row("hot, large, MiB/s", &|round| round.hot_seq_read_mib_s),
            row("local, random 4 KiB /s", &|round| round.rand_read_iops),
        ]);
        lines.push(format!("the large file, local, was read by {}", self.reader));
        lines.extend(bars::outcomes(&self.rounds).iter().map(|(name, outcome)| outcome.line(name)));
        lines.join("\n")
    }
}

impl Medians {
    fn of(rounds: &[Figures]) -> Self {
        let some = |value: fn(&Figures) -> Option<f64>| {
            let values: Option<Vec<f64>> = rounds.iter().map(value).collect();
            values.map(|values| median(&values))
        };
        let opens: Vec<f64> = rounds.iter().flat_map(|round| round.cold_open_ms.iter().copied()).collect();
        let [p50, p95, p99] = [50, 95, 99].map(|percent| percentile(&opens, percent));
        Self {
            cold_all_seconds: some(|round| round.cold_all_seconds),
            cold_open_ms: (!opens.is_empty()).then_some(Latencies { p50, p95, p99 }),
            cold_open_bytes_fetched: some(|round| round.cold_open_bytes_fetched),
            local_all_seconds: some(|round| round.local_all_seconds),
            parallel_all_seconds: some(|round| round.parallel_all_seconds),
            hot_all_seconds: some(|round| round.hot_all_seconds),
            find_seconds: some(|round| round.find_seconds),
            seq_read_mib_s: some(|round| round.seq_read_mib_s),
            hot_seq_read_mib_s: some(|round| round.hot_seq_read_mib_s),
            rand_read_iops: some(|round| round.rand_read_iops),
        }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_way_has_no_figure_for_is_null() {
        let mut report = Report::new(2, 3 << 20, "fio-3".into(), Some(Path::new("/bin/nydusd")));
        for seconds in [1.0, 3.0, 2.0] {
            let cold =
                Figures { cold_all_seconds: Some(seconds), cold_open_ms: vec![seconds; 9], ..Figures::default() };
            report.add("fuse", cold);
            report.add("ext4", Figures { hot_all_seconds: Some(seconds), ..Figures::default() });
        }
        let json = report.json();
        assert_eq!((&json["rounds"], &json["fuse"]["cold_all_seconds"]), (&3.into(), &2.0.into()));
        assert_eq!(
            (&json["fuse"]["cold_open_ms"]["p99"], &json["ext4"]["hot_all_seconds"]),
            (&3.0.into(), &2.0.into())
        );
        assert_eq!((&json["large_file_read_by"], &json["peer_program"]), (&"fio-3".into(), &"nydusd".into()));
        assert!(json["ext4"]["cold_all_seconds"].is_null() && json["ext4"]["cold_open_ms"].is_null());
        assert!(json["bars"].as_object().is_some_and(Map::is_empty) && json.get("native").is_none());
        let table = report.table();
        assert!(table.contains("2 files, 3 MiB") && table.contains("2.000 (1.000 to 3.000)"), "{table}");
    }
}
