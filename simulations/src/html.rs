//! A report as one page that needs nothing else: a table, and plots as SVG.

use std::fmt::{Display, Write};

use plotters::{
    backend::SVGBackend,
    chart::ChartBuilder,
    drawing::IntoDrawingArea,
    element::PathElement,
    series::LineSeries,
    style::{Color, Palette, Palette99, RGBColor, WHITE},
};

use crate::report::Report;

/// Size of a plot, pixels.
const SIZE: (u32, u32) = (860, 340);

/// A plot could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PlotError(String);

impl PlotError {
    fn of(error: impl Display) -> Self {
        Self(error.to_string())
    }
}

/// A line of a plot.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The page.
///
/// # Errors
/// [`PlotError`], of which none is known.
pub fn page(report: &Report) -> Result<String, PlotError> {
    let title = escape(&report.scenario);
    let mut page = String::new();
    let style = "body{font:15px sans-serif;max-width:900px;margin:2em auto;color:#222}\
                 td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}\
                 pre{background:#f4f4f4;padding:1em;overflow:auto}";
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{style}</style></head><body><h1>{title}</h1><pre>{}</pre>",
        escape(&report.to_string())
    );
    let _ = write!(page, "<h2>Nodes complete over time</h2>{}", completion(report)?);
    let _ = write!(page, "<h2>What arrived, by who sent it</h2>{}", use_over_time(report)?);
    let _ = writeln!(page, "<h2>Who served whom</h2>{}</body></html>", served(report));
    Ok(page)
}

fn completion(report: &Report) -> Result<String, PlotError> {
    let ends = &report.history.completions_s;
    let steps = ends.iter().zip(1..).flat_map(|(&at, count)| [(at, f64::from(count - 1)), (at, f64::from(count))]);
    let bound = report.fluid_bound_seconds;
    let lines = [
        Line { name: "complete".to_owned(), points: [(0.0, 0.0)].into_iter().chain(steps).collect() },
        Line { name: "fluid bound".to_owned(), points: vec![(bound, 0.0), (bound, report.nodes as f64)] },
    ];
    plot(&lines, "nodes")
}

fn use_over_time(report: &Report) -> Result<String, PlotError> {
    let line = |(name, (slice_s, bytes)): (&String, &(f64, Vec<u64>))| {
        let gbit = |bytes: u64| bytes as f64 * 8e-9 / slice_s;
        let points = bytes.iter().enumerate().map(|(at, &bytes)| ((at as f64 + 0.5) * slice_s, gbit(bytes)));
        Line { name: name.clone(), points: points.collect() }
    };
    let lines: Vec<Line> = report.history.arrived.iter().map(line).collect();
    plot(&lines, "Gbit/s")
}

fn plot(lines: &[Line], unit: &str) -> Result<String, PlotError> {
    let points = || lines.iter().flat_map(|line| &line.points);
    // An empty plot still needs axes of some length.
    let x = points().map(|point| point.0).fold(1e-3, f64::max) * 1.02;
    let y = points().map(|point| point.1).fold(1e-3, f64::max) * 1.05;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(PlotError::of)?;
        let mut builder = ChartBuilder::on(&area);
        builder.margin(12).x_label_area_size(40).y_label_area_size(70);
        let mut chart = builder.build_cartesian_2d(0.0..x, 0.0..y).map_err(PlotError::of)?;
        chart.configure_mesh().x_desc("seconds").y_desc(unit).draw().map_err(PlotError::of)?;
        for (at, line) in lines.iter().enumerate() {
            let (r, g, b) = Palette99::COLORS[at % Palette99::COLORS.len()];
            let colour = RGBColor(r, g, b);
            let series = LineSeries::new(line.points.iter().copied(), colour.stroke_width(2));
            let drawn = chart.draw_series(series).map_err(PlotError::of)?;
            let sample = move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2));
            drawn.label(line.name.as_str()).legend(sample);
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).draw().map_err(PlotError::of)?;
        area.present().map_err(PlotError::of)?;
    }
    Ok(svg)
}

/// A table of bytes by who sent them and where they went, shaded by their part of all.
fn served(report: &Report) -> String {
    let moved = &report.history.moved;
    let senders: std::collections::BTreeSet<_> = moved.keys().map(|(from, _)| from).collect();
    let zones: Vec<&String> = report.registry_bytes_per_zone.keys().collect();
    let most = moved.values().copied().max().unwrap_or(1).max(1) as f64;
    let mut table = String::from("<table><tr><th>GB sent by</th>");
    zones.iter().for_each(|zone| _ = write!(table, "<th>to {}</th>", escape(zone)));
    for from in senders {
        let _ = write!(table, "</tr><tr><td>{}</td>", escape(from));
        for zone in &zones {
            let bytes = moved.get(&(from.clone(), (*zone).clone())).copied().unwrap_or(0) as f64;
            let shade = bytes / most * 0.6;
            let _ = write!(table, "<td style=\"background:rgba(60,120,200,{shade:.3})\">{:.2}</td>", bytes / 1e9);
        }
    }
    table.push_str("</tr></table>");
    table
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
