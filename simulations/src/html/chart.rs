//! Charts as SVG: axes with units, lines, areas, bars. What the colours mean stands above a chart, in HTML, where the browser
//! knows how wide words are.

use std::fmt::{Display, Write};

use plotters::{
    backend::SVGBackend,
    chart::ChartBuilder,
    coord::Shift,
    drawing::{DrawingArea, IntoDrawingArea},
    element::{Rectangle, Text},
    series::{AreaSeries, LineSeries},
    style::{
        BLACK, Color, IntoFont, RGBColor, TRANSPARENT, TextStyle, WHITE,
        text_anchor::{HPos, Pos, VPos},
    },
};

use super::escape;

/// Width of every chart, pixels.
pub(super) const WIDTH: u32 = 860;
/// Room for the words beside the axes, pixels.
const LEFT: u32 = 84;
const BELOW: u32 = 46;
/// Size of letters, in the unit of the library, which makes it 1.24 times smaller.
const LETTERS: i32 = 16;
/// Height of a bar and of what is between two, pixels.
const BAR: u32 = 22;
const BAR_GAP: u32 = 8;

/// Colours that are told apart by people who see fewer of them (Okabe, Ito: *Color Universal Design*, 2008).
pub(super) const RED: RGBColor = RGBColor(213, 94, 0);
pub(super) const ORANGE: RGBColor = RGBColor(230, 159, 0);
pub(super) const BLUE: RGBColor = RGBColor(0, 114, 178);
pub(super) const GREEN: RGBColor = RGBColor(0, 158, 115);
pub(super) const PURPLE: RGBColor = RGBColor(204, 121, 167);
pub(super) const SKY: RGBColor = RGBColor(86, 180, 233);
pub(super) const YELLOW: RGBColor = RGBColor(240, 228, 66);
pub(super) const GREY: RGBColor = RGBColor(110, 110, 110);

/// A plot could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PlotError(String);

impl PlotError {
    fn of(error: impl Display) -> Self {
        Self(error.to_string())
    }
}

/// Part of an SVG.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// How a line is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stroke {
    Thin,
    Thick,
    /// No line: all below is coloured.
    Area,
}

/// A line of a chart.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) colour: RGBColor,
    pub(super) stroke: Stroke,
    pub(super) points: Vec<(f64, f64)>,
}

/// An axis from 0.
#[derive(Debug)]
pub(super) struct Axis<'a> {
    pub(super) name: &'a str,
    pub(super) max: f64,
    /// How a value is written.
    pub(super) label: fn(f64) -> String,
}

/// The highest value of lines, or of one axis.
pub(super) fn highest<'a>(lines: impl IntoIterator<Item = &'a Line>, value: fn(&(f64, f64)) -> f64) -> f64 {
    // A chart of nothing still needs axes of some length.
    lines.into_iter().flat_map(|line| &line.points).map(value).fold(1e-3, f64::max)
}

/// A number as people write it.
pub(super) fn plain(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// An SVG of a height.
pub(super) fn svg(height: u32, draw: impl FnOnce(&Area<'_>) -> Result<(), PlotError>) -> Result<String, PlotError> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE).map_err(PlotError::of)?;
    draw(&area)?;
    area.present().map_err(PlotError::of)?;
    drop(area);
    Ok(svg)
}

/// Draws lines over two axes; what comes later is above what came before.
pub(super) fn lines(area: &Area<'_>, x: &Axis<'_>, y: &Axis<'_>, lines: &[Line]) -> Result<(), PlotError> {
    let mut builder = ChartBuilder::on(area);
    builder.margin_top(10).margin_right(24).margin_left(6).x_label_area_size(BELOW).y_label_area_size(LEFT - 6);
    let mut chart = builder.build_cartesian_2d(0.0..x.max, 0.0..y.max).map_err(PlotError::of)?;
    // The grid goes below the areas, and the axes with it.
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(GREY)
        .label_style(("sans-serif", LETTERS))
        .axis_desc_style(("sans-serif", LETTERS + 1))
        .x_labels(10)
        .y_labels(6)
        .x_desc(x.name)
        .y_desc(y.name)
        .x_label_formatter(&|value| (x.label)(*value))
        .y_label_formatter(&|value| (y.label)(*value))
        .draw()
        .map_err(PlotError::of)?;
    for line in lines {
        let points = line.points.iter().copied();
        let width = match line.stroke {
            Stroke::Thin => 1,
            Stroke::Thick => 2,
            Stroke::Area => {
                let series = AreaSeries::new(points, 0.0, line.colour.filled());
                chart.draw_series(series).map_err(PlotError::of)?;
                continue;
            }
        };
        let series = LineSeries::new(points, line.colour.stroke_width(width));
        chart.draw_series(series).map_err(PlotError::of)?;
    }
    Ok(())
}

/// Draws bars of parts that follow each other, from left to right, each with a name before it.
pub(super) fn bars(x: &Axis<'_>, bars: &[(String, Vec<(RGBColor, f64)>)]) -> Result<String, PlotError> {
    let height = bars.len().max(1) as u32 * (BAR + BAR_GAP);
    svg(height + BELOW + 10, |area| {
        let mut builder = ChartBuilder::on(area);
        builder.margin_top(10).margin_right(24).x_label_area_size(BELOW).margin_left(LEFT + 40);
        let rows = 0.0..f64::from(height);
        let mut chart = builder.build_cartesian_2d(0.0..x.max, rows).map_err(PlotError::of)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .axis_style(GREY)
            .label_style(("sans-serif", LETTERS))
            .axis_desc_style(("sans-serif", LETTERS + 1))
            .x_desc(x.name)
            .x_label_formatter(&|value| (x.label)(*value))
            .draw()
            .map_err(PlotError::of)?;
        let style = TextStyle::from(("sans-serif", LETTERS).into_font()).pos(Pos::new(HPos::Right, VPos::Center));
        for (at, (name, parts)) in bars.iter().enumerate() {
            // The first bar is the uppermost.
            let top = f64::from(height) - f64::from(BAR_GAP) / 2.0 - at as f64 * f64::from(BAR + BAR_GAP);
            let bottom = top - f64::from(BAR);
            let mut left = 0.0;
            for &(colour, length) in parts.iter().filter(|(_, length)| *length > 0.0) {
                let part = Rectangle::new([(left, top), (left + length, bottom)], colour.filled());
                chart.draw_series([part]).map_err(PlotError::of)?;
                left += length;
            }
            let (x, y) = chart.backend_coord(&(0.0, top.midpoint(bottom)));
            area.draw(&Text::new(shortened(name), (x - 8, y), style.clone())).map_err(PlotError::of)?;
        }
        Ok(())
    })
}

/// A name that fits beside a chart.
fn shortened(name: &str) -> String {
    const MOST: usize = 15;
    if name.chars().count() <= MOST {
        return name.to_owned();
    }
    name.chars().take(MOST - 1).chain(['…']).collect()
}

/// What the colours of a chart mean.
pub(super) fn legend<'a>(entries: impl IntoIterator<Item = (RGBColor, &'a str)>) -> String {
    let mut legend = String::from("<p class=\"legend\">");
    for (RGBColor(r, g, b), name) in entries {
        // Writing to a string cannot fail.
        let _ = write!(legend, "<span><i style=\"background:rgb({r},{g},{b})\"></i>{}</span> ", escape(name));
    }
    legend.push_str("</p>");
    legend
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_short() {
        assert_eq!([0.0, 10.0, 0.25, 1e4, 1.0006].map(plain), ["0", "10", "0.25", "10000", "1.001"]);
        assert_eq!(
            (shortened("zone-a"), shortened("a-zone-with-a-name")),
            ("zone-a".into(), "a-zone-with-a-…".into())
        );
    }
}
