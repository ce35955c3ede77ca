//! The plots of a report.

use plotters::style::{BLACK, RGBColor};

use super::{
    SENDERS,
    chart::{
        self, Axis, BLUE, GREEN, GREY, Line, ORANGE, PURPLE, PlotError, RED, SKY, Stroke, YELLOW, highest, legend,
        plain,
    },
    units,
};
use crate::{
    links::Class,
    report::{History, LinkUse, NodeHistory, Report, StartHistory},
    scenario::PAYLOAD_SHARE,
    series::Series,
};

/// Height of a plot, pixels; of the two of a node.
const HEIGHT: u32 = 340;
const NODE_HEIGHTS: (u32, u32) = (300, 180);
/// What is there at the end of a start that does not read everything.
const START: &str = "what the start reads";
/// Steps of a curve that can be told apart.
const STEPS: usize = 1000;
/// Steps of lines that cross each other, at most.
const LINK_STEPS: usize = 64;
/// Of what comes from each of the [`SENDERS`].
const SOURCE_COLOURS: [RGBColor; 3] = [RED, ORANGE, BLUE];
/// Of the links of zones; no more of them are shown.
const ZONE_COLOURS: [RGBColor; 5] = [PURPLE, SKY, GREY, BLACK, YELLOW];

/// How many nodes had something by when.
fn curve(times_s: &[f64]) -> Vec<(f64, f64)> {
    let each = times_s.len().div_ceil(STEPS).max(1);
    let mut points = vec![(0.0, 0.0)];
    for at in (0..times_s.len()).filter(|at| (at + 1) % each == 0 || at + 1 == times_s.len()) {
        let before = points.last().map_or(0.0, |point| point.1);
        points.extend([(times_s[at], before), (times_s[at], (at + 1) as f64)]);
    }
    points
}

/// Values over time as steps.
fn steps(slices: impl Iterator<Item = (f64, f64, f64)>) -> Vec<(f64, f64)> {
    slices.flat_map(|(start, end, value)| [(start, value), (end, value)]).collect()
}

fn upright(name: &str, colour: RGBColor, at_s: f64, height: f64) -> Line {
    Line { name: name.to_owned(), colour, stroke: Stroke::Thin, points: vec![(at_s, 0.0), (at_s, height)] }
}

fn seconds(max: f64) -> Axis<'static> {
    Axis { name: "seconds", max, label: plain }
}

/// Of lines of one name that follow each other only the first is named.
fn legend_of<'a>(lines: impl IntoIterator<Item = &'a Line>) -> String {
    let mut entries: Vec<_> = lines.into_iter().map(|line| (line.colour, line.name.as_str())).collect();
    entries.dedup();
    legend(entries)
}

fn plot(x: &Axis<'_>, y: &Axis<'_>, lines: &[Line]) -> Result<String, PlotError> {
    Ok(legend_of(lines) + &chart::svg(HEIGHT, |area| chart::lines(area, x, y, lines))?)
}

/// Starts with first bytes, with all that they read, and with everything, over time.
pub(super) fn completion(report: &Report) -> Result<String, PlotError> {
    let (history, starts, bound) = (&report.history, report.starts as f64, report.fluid_bound_seconds);
    let curve = |name: &str, colour, times: Vec<f64>| Line {
        name: name.to_owned(),
        colour,
        stroke: Stroke::Thick,
        points: curve(&times),
    };
    let mut lines = vec![
        upright(&format!("fluid bound, {bound:.2} s"), GREY, bound, starts),
        curve("first bytes", SKY, history.times(|start| start.first_s)),
        curve(START, GREEN, history.times(|start| start.start_s)),
        curve("everything", BLUE, history.times(|start| start.complete_s)),
    ];
    // Where a start reads all that is fetched, one curve would hide the other.
    if report.start_seconds == report.complete_seconds {
        lines.retain(|line| line.name != START);
    }
    let y = Axis { name: "starts", max: starts.max(1.0) * 1.05, label: plain };
    plot(&seconds(highest(&lines, |point| point.0) * 1.02), &y, &lines)
}

/// What the registry had sent by when, in images.
pub(super) fn egress(report: &Report) -> Result<String, PlotError> {
    let (end_s, image) = (report.history.end_s, report.image_encoded_bytes.max(1) as f64);
    let mut points = vec![(0.0, 0.0)];
    let mut sent = 0;
    for (_, end, bytes) in report.registry_bytes_over_time.slices(end_s) {
        sent += bytes;
        points.push((end, sent as f64 / image));
    }
    points.push((end_s, sent as f64 / image));
    let asked_for = report.images_per_zone.values().sum::<usize>() as f64;
    let bound = asked_for * report.image_fetched_bytes as f64 / image;
    let name = format!("what each zone asks for, once: {} images", plain(bound));
    let bound = vec![(0.0, bound), (end_s, bound)];
    let lines = [
        Line { name, colour: GREY, stroke: Stroke::Thin, points: bound },
        Line { name: "sent by the registry".to_owned(), colour: RED, stroke: Stroke::Thick, points },
    ];
    let y = Axis { name: "images", max: highest(&lines, |point| point.1) * 1.05, label: plain };
    plot(&seconds(end_s.max(1e-3) * 1.02), &y, &lines)
}

/// Which part of what links can carry was used over time.
pub(super) fn link_use(report: &Report) -> Result<String, PlotError> {
    let end_s = report.history.end_s;
    let used = report.history.links.iter().filter(|link| link.carried.sum() > 0);
    let (mut of_zones, common): (Vec<_>, Vec<_>) =
        used.partition(|link| matches!(link.class, Class::Into(_) | Class::OutOf(_)));
    // Of many zones those with the least left.
    of_zones.sort_by(|a, b| b.mean(end_s).total_cmp(&a.mean(end_s)));
    let colour = |link: &LinkUse| match link.class {
        Class::Registry => RED,
        Class::SeedUp => ORANGE,
        Class::NodeUp => BLUE,
        _ => GREEN,
    };
    let common = common.into_iter().map(|link| (link, colour(link)));
    let lines: Vec<Line> = common
        .chain(of_zones.into_iter().zip(ZONE_COLOURS))
        .map(|(link, colour)| {
            let carried = link.carried.in_fewer(LINK_STEPS);
            let part = |(start, end, bytes)| (start, end, bytes as f64 / (link.bytes_per_s * (end - start)));
            let (rate, mean) = (units::bits(link.bytes_per_s / PAYLOAD_SHARE), link.mean(end_s) * 100.0);
            let name = format!("{}: {mean:.0}% of {rate}", link.name);
            Line { name, colour, stroke: Stroke::Thick, points: steps(carried.slices(end_s).map(part)) }
        })
        .collect();
    let y = Axis {
        name: "used",
        max: highest(&lines, |point| point.1).max(1.0) * 1.02,
        label: |part| format!("{:.0}%", part * 100.0),
    };
    plot(&seconds(end_s.max(1e-3) * 1.02), &y, &lines)
}

/// For each zone what it received, by who sent it.
pub(super) fn served(report: &Report) -> Result<String, PlotError> {
    const KINDS: [(RGBColor, &str); 5] = [
        (RED, "registry"),
        (ORANGE, "seed peers of the zone"),
        (BLUE, "nodes of the zone"),
        (PURPLE, "seed peers of other zones"),
        (SKY, "nodes of other zones"),
    ];
    let moved = &report.history.moved;
    let sum_of = |zone: &String| moved.iter().filter(|moved| moved.to == *zone).map(|moved| moved.bytes).sum::<u64>();
    let most = report.nodes_per_zone.keys().map(sum_of).max().unwrap_or(0).max(1) as f64;
    let (unit, name) = units::bytes_unit(most);
    let bars: Vec<_> = report
        .nodes_per_zone
        .keys()
        .map(|zone| {
            let mut parts = KINDS.map(|(colour, _)| (colour, 0.0));
            for moved in moved.iter().filter(|moved| moved.to == *zone) {
                let is_other = moved.from.as_ref().is_some_and(|from| from != zone);
                parts[moved.source + if is_other { 2 } else { 0 }].1 += moved.bytes as f64 / unit;
            }
            (zone.clone(), parts.to_vec())
        })
        .collect();
    let axis = format!("{name} received in the zone");
    let x = Axis { name: &axis, max: most / unit * 1.02, label: plain };
    Ok(legend(KINDS) + &chart::bars(&x, &bars)?)
}

/// Rates of a node by source, stacked: start and end of a slice, and in each of them the sums up to a source.
fn stacked(received: &[Series; 3], end_s: f64) -> [Vec<(f64, f64)>; 3] {
    let slice_s = received.iter().map(|series| series.slice_seconds).fold(0.0, f64::max);
    let received = received.each_ref().map(|series| series.joined(slice_s));
    let mut tops = [const { Vec::new() }; 3];
    for at in 0..received.iter().map(|series| series.values.len()).max().unwrap_or(0) {
        let (start, end) = (at as f64 * slice_s, ((at + 1) as f64 * slice_s).min(end_s));
        if end <= start {
            break;
        }
        let mut sum = 0;
        for (series, top) in received.iter().zip(&mut tops) {
            sum += series.values.get(at).copied().unwrap_or(0);
            let bits_per_s = sum as f64 * 8.0 / (end - start);
            top.extend([(start, bits_per_s), (end, bits_per_s)]);
        }
    }
    tops
}

/// What a node received over time, by source, the sum of all first; and the unit of it.
fn received(node: &NodeHistory, end_s: f64) -> (Vec<Line>, &'static str) {
    let mut areas = Vec::new();
    for (source, points) in stacked(&node.trace.received, end_s).into_iter().enumerate().rev() {
        let (name, colour) = (format!("from {}", SENDERS[source]), SOURCE_COLOURS[source]);
        areas.push(Line { name, colour, stroke: Stroke::Area, points });
    }
    let (unit, name) = units::bits_unit(highest(&areas, |point| point.1));
    areas.iter_mut().flat_map(|line| &mut line.points).for_each(|point| point.1 /= unit);
    (areas, name)
}

/// When something was there, seconds from a start.
type SinceStart = fn(&StartHistory) -> Option<f64>;

/// When a node started its images, and how far each was when.
fn marks(node: &NodeHistory, height: f64) -> Vec<Line> {
    let kinds: [(&str, RGBColor, SinceStart); 4] = [
        ("start", GREY, |_| Some(0.0)),
        ("first bytes", PURPLE, |start| start.first_s),
        (START, SKY, |start| start.start_s.filter(|_| start.start_s != start.complete_s)),
        ("everything", BLACK, |start| start.complete_s),
    ];
    let mark = |(name, colour, since_start)| {
        let times = node.starts.iter().filter_map(move |start| start.at(since_start));
        times.map(move |at_s| upright(name, colour, at_s, height))
    };
    kinds.into_iter().flat_map(mark).collect()
}

/// What a node received over time, and what it waited for. Policies of whole images want no pieces.
pub(super) fn node(history: &History, number: usize) -> Result<Option<String>, PlotError> {
    let Some(node) = history.nodes.get(number) else { return Ok(None) };
    let end_s = history.end_s;
    let x = seconds(end_s.max(1e-3) * 1.02);
    let (mut areas, rate) = received(node, end_s);
    let y = Axis { name: rate, max: highest(&areas, |point| point.1) * 1.05, label: plain };
    let points = steps(node.trace.wants.slices(end_s).map(|(start, end, wants)| (start, end, wants as f64)));
    let line = Line { name: "pieces wanted".to_owned(), colour: GREEN, stroke: Stroke::Thick, points };
    let mut wants = if line.points.is_empty() { Vec::new() } else { vec![line] };
    let wanted = Axis { name: "pieces wanted", max: highest(&wants, |point| point.1).max(1.0) * 1.05, label: plain };
    let legend = legend_of(areas.iter().rev().chain(&wants).chain(&marks(node, 0.0)));
    let height = NODE_HEIGHTS.0 + if wants.is_empty() { 0 } else { NODE_HEIGHTS.1 };
    let svg = chart::svg(height, |area| {
        let (above, below) = area.split_vertically(NODE_HEIGHTS.0);
        areas.extend(marks(node, y.max));
        chart::lines(&above, &x, &y, &areas)?;
        if wants.is_empty() {
            return Ok(());
        }
        wants.extend(marks(node, wanted.max));
        chart::lines(&below, &x, &wanted, &wants)
    })?;
    Ok(Some(legend + &svg))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_of_many_steps_still_ends_at_their_count() {
        assert_eq!(curve(&[]), [(0.0, 0.0)]);
        assert_eq!(curve(&[1.0, 2.0]), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (2.0, 1.0), (2.0, 2.0)]);
        let times: Vec<f64> = (0..25_003).map(f64::from).collect();
        let points = curve(&times);
        assert!(points.len() <= 2 * STEPS + 3 && points.last() == Some(&(25_002.0, 25_003.0)), "{}", points.len());
        assert!(points.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1));
    }

    #[test]
    fn what_comes_from_several_is_stacked() {
        let series = |slice_seconds, values: &[u64]| Series { slice_seconds, values: values.to_vec() };
        let tops = stacked(&[series(1.0, &[1, 2]), series(2.0, &[4, 8]), series(2.0, &[])], 3.0);
        assert_eq!(tops[0], [(0.0, 12.0), (2.0, 12.0), (2.0, 0.0), (3.0, 0.0)]);
        assert_eq!(tops[1], [(0.0, 28.0), (2.0, 28.0), (2.0, 64.0), (3.0, 64.0)]);
        assert_eq!(tops[2], tops[1]);
    }
}
