//! `sweep`: a grid of runs on all cores.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use clap::Args;
use serde::Serialize;
use shoal_sim::{Report, Scenario, vary};

use super::{Failure, output, read, right};

/// `sweep`.
#[derive(Debug, Args)]
pub(crate) struct Sweep {
    /// The scenario, a TOML file.
    scenario: PathBuf,
    /// A key and its values, such as `image.piece_kib=512,1024`, `nodes.0.count=1,2,4` or `policy=shoal,registry`. May be
    /// given several times.
    #[arg(long, required = true, value_parser = Axis::parse)]
    vary: Vec<Axis>,
    /// Writes all reports there, with the values of each.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A key and the values that it takes.
#[derive(Debug, Clone)]
struct Axis {
    key: String,
    values: Vec<String>,
}

/// Values of the keys that are varied.
type Point = BTreeMap<String, String>;

/// One run of the grid.
#[derive(Debug, Serialize)]
struct Cell {
    set: Point,
    report: Report,
}

impl Axis {
    fn parse(text: &str) -> Result<Self, String> {
        let (key, values) = text.split_once('=').ok_or("not of the form key=value,value")?;
        let values: Vec<String> = values.split(',').map(str::to_owned).collect();
        if key.is_empty() || values.iter().any(String::is_empty) {
            return Err("a key or a value is empty".to_owned());
        }
        Ok(Self { key: key.to_owned(), values })
    }
}

impl Sweep {
    pub(super) fn run(self) -> Result<(), Failure> {
        let text = read(&self.scenario)?;
        let points = grid(&self.vary);
        let scenarios = points.iter().map(|point| {
            let mut scenario = Scenario::parse(&vary_all(&text, point)?)?;
            scenario.load_files(&self.scenario)?;
            Ok(scenario)
        });
        let scenarios: Vec<Scenario> = scenarios.collect::<Result<_, Failure>>()?;
        let reports = run_all(&scenarios);
        let cells: Vec<Cell> = points.into_iter().zip(reports).map(|(set, report)| Cell { set, report }).collect();
        print(&cells);
        if let Some(path) = &self.json {
            output::write(path, &output::to_json(&cells))?;
        }
        cells.iter().try_for_each(|cell| right(&cell.report))
    }
}

/// All combinations, the last key running fastest.
fn grid(axes: &[Axis]) -> Vec<Point> {
    axes.iter().fold(vec![Point::new()], |points, axis| {
        let with = |point: &Point, value: &String| {
            let mut point = point.clone();
            point.insert(axis.key.clone(), value.clone());
            point
        };
        points.iter().flat_map(|point| axis.values.iter().map(move |value| with(point, value))).collect()
    })
}

fn vary_all(text: &str, point: &Point) -> Result<String, Failure> {
    point.iter().try_fold(text.to_owned(), |text, (key, value)| {
        vary(&text, key, value).map_err(|why| Failure::Setting { setting: format!("{key}={value}"), why })
    })
}

/// Runs them on as many threads as there are cores, and gives the reports in order.
fn run_all(scenarios: &[Scenario]) -> Vec<Report> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(scenarios.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((at, scenario)) =
            Some(next.fetch_add(1, Relaxed)).and_then(|at| Some((at, scenarios.get(at)?)))
        {
            done.push((at, output::measured(scenario, scenario.seed, &())));
            eprintln!("shoal-sim: {} of {} done", at + 1, scenarios.len());
        }
        done
    };
    let mut done: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a run does not panic")).collect()
    });
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, report)| report).collect()
}

fn print(cells: &[Cell]) {
    println!("{:>9} {:>9} {:>9} {:>9} {:>12}", "p50 s", "last s", "x bound", "copies", "crossed MB");
    for Cell { set, report } in cells {
        let set: Vec<String> = set.iter().map(|(key, value)| format!("{key}={value}")).collect();
        println!(
            "{:>9.2} {:>9.2} {:>9.2} {:>9.3} {:>12.0}  {}",
            report.complete_seconds.p50,
            report.complete_seconds.max,
            report.complete_seconds.max / report.fluid_bound_seconds,
            report.copies_per_zone(),
            report.cross_zone_bytes as f64 / 1e6,
            set.join(" ")
        );
    }
}
