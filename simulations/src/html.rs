//! A report as one page that needs nothing else: tables of figures next to what they cannot be better than, and plots as SVG.

mod chart;
mod plots;
mod units;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

pub use self::chart::PlotError;
use crate::{
    report::{Fairness, NodeHistory, Report, SeedLoad, Spread},
    tally::SOURCES,
};

const STYLE: &str = "\
    body{font:15px/1.45 sans-serif;max-width:900px;margin:2em auto;padding:0 20px;color:#222}\
    h1{margin-bottom:.2em}h2{margin:1.8em 0 .3em;font-size:1.25em}p{margin:.4em 0}\
    .table{overflow-x:auto}table{border-collapse:collapse;font-size:14px}\
    td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}\
    td:first-child,th:first-child{text-align:left}thead th{border-bottom:2px solid #888}\
    .legend span{margin-right:1.2em;white-space:nowrap}\
    .legend i{display:inline-block;width:14px;height:14px;margin-right:.4em;vertical-align:-2px}\
    svg{display:block;max-width:100%;height:auto}svg+.table{margin-top:1em}svg text{font-variant-numeric:tabular-nums}";

/// What stands for the [`SOURCES`](crate::SOURCES) in words.
const SENDERS: [&str; 3] = ["the registry", "seed peers", "nodes"];

/// The page. Its last plot is of the node of this number, of those that read; by default, of the one that was done last.
///
/// # Errors
/// [`PlotError`], of which none is known.
pub fn page(report: &Report, node: Option<usize>) -> Result<String, PlotError> {
    let title = escape(&report.scenario);
    let Report { seed, complete, alive, starts, .. } = report;
    let policy = serde_json::to_string(&report.policy).unwrap_or_default();
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
         <style>{STYLE}</style></head><body><h1>{title}</h1>\
         <p>Policy {}, seed {seed}. {complete} of {alive} living nodes have everything. {starts} starts, each of an image of {}.</p>",
        policy.trim_matches('"'),
        units::bytes(report.image_encoded_bytes as f64)
    );
    let mut section = |id: &str, heading: &str, says: &str, what: &str| {
        let _ = writeln!(page, "<section id=\"{id}\"><h2>{heading}</h2><p>{says}</p>{what}</section>");
    };
    let says = "Seconds from a start, which is that of one image on one node.";
    section("times", "Times", says, &times(report));
    section("costs", "Costs", "Each next to what no run can do better than.", &costs(report));
    section(
        "completion",
        "Starts over time",
        "No schedule has the last done before the bound.",
        &plots::completion(report)?,
    );
    let says = "A swarm without flaw reads the registry once for what is asked for in a zone.";
    section("egress", "Registry egress", says, &plots::egress(report)?);
    let says = "Of all links of a kind together: what they carried, in parts of what they can carry while nothing is wrong \
                with them. The bytes of a transfer are spread evenly over its time.";
    section("links", "Use of the links", says, &plots::link_use(report)?);
    let says = "What arrived in each zone.";
    section("served", "Who served whom", says, &(plots::served(report)? + &matrix(report)));
    let shown = node.or_else(|| report.history.last());
    if let Some(number) = shown
        && let Some(plot) = plots::node(&report.history, number)?
    {
        let shown = &report.history.nodes[number];
        let last = if node.is_none() { ", the last to have everything" } else { "" };
        let says = format!(
            "Of zone {}{last}. What it received, and pieces that it wanted and did not have; in the table seconds from the start of \
             the run.",
            escape(&shown.zone)
        );
        section("node", &format!("Node {number}"), &says, &(plot + &starts_of(shown)));
    }
    page.push_str("</body></html>\n");
    Ok(page)
}

fn cells(row: &mut String, cells: impl IntoIterator<Item = String>) {
    cells.into_iter().for_each(|cell| _ = write!(row, "<td>{cell}</td>"));
}

fn four(Spread { p50, p90, p99, max }: Spread, by: f64) -> [String; 4] {
    [p50, p90, p99, max].map(|value| format!("{:.2}", value / by))
}

/// How long nodes took, all of them and by zone.
fn times(report: &Report) -> String {
    let columns = "<th>p50</th><th>p90</th><th>p99</th><th>last</th>";
    let mut table = format!(
        "<div class=\"table\"><table><thead><tr><th></th><th></th><th colspan=\"4\">first bytes</th>\
         <th colspan=\"4\">what the start reads</th><th colspan=\"4\">everything</th></tr>\
         <tr><th>zone</th><th>nodes</th>{columns}{columns}{columns}</tr></thead><tbody>"
    );
    let mut row = |name: &str, nodes: usize, times: [Spread; 3]| {
        let _ = write!(table, "<tr><td>{}</td><td>{nodes}</td>", escape(name));
        cells(&mut table, times.into_iter().flat_map(|spread| four(spread, 1.0)));
        table.push_str("</tr>");
    };
    row("all", report.nodes, [report.first_seconds, report.start_seconds, report.complete_seconds]);
    for (zone, &nodes) in &report.nodes_per_zone {
        let of = |spreads: &BTreeMap<String, Spread>| spreads.get(zone).copied().unwrap_or_default();
        let times =
            [&report.first_seconds_per_zone, &report.start_seconds_per_zone, &report.complete_seconds_per_zone];
        row(zone, nodes, times.map(of));
    }
    let bound = report.fluid_bound_seconds;
    let _ = write!(table, "<tr><td colspan=\"10\">all, by the fluid bound of {bound:.2} s</td>");
    cells(&mut table, four(report.complete_seconds, bound));
    table.push_str("</tr></tbody></table></div>");
    table
}

/// What else there is to say, each with what it cannot be better than.
fn costs(report: &Report) -> String {
    let image = report.image_encoded_bytes.max(1) as f64;
    let mut table = String::from(
        "<div class=\"table\"><table><thead><tr><th></th><th>this run</th><th>bound</th></tr></thead><tbody>",
    );
    let mut row = |name: &str, value: String, bound: &str| {
        let _ = write!(table, "<tr><td>{}</td><td>{value}</td><td>{bound}</td></tr>", escape(name));
    };
    for (zone, images) in &report.registry_images_per_zone {
        let name = match report.images_per_zone.get(zone) {
            None | Some(0 | 1) => format!("registry egress to zone {zone}, images"),
            Some(asked_for) => format!("registry egress to zone {zone}, in parts of its {asked_for} images"),
        };
        row(&name, format!("{images:.3}"), &format!("{:.3}", report.image_fetched_bytes as f64 / image));
    }
    for (source, sender) in SOURCES.iter().zip(SENDERS) {
        let bytes = report.received_bytes.get(*source).copied().unwrap_or(0) as f64;
        let images = bytes / image / report.nodes.max(1) as f64;
        row(&format!("received from {sender}, images a node"), format!("{images:.3}"), "");
    }
    row("from zone to zone, headers counted", units::bytes(report.cross_zone_bytes as f64), "0");
    row("bytes in vain", units::bytes(report.wasted_bytes as f64), "0");
    row("requests between nodes", report.requests.to_string(), "");
    row("of them refused", report.refused_requests.to_string(), "0");
    row("hedges: requests for what is under way already", report.hedged_requests.to_string(), "0");
    let SeedLoad { peers, mean_bytes, most_by_mean, mean_use, most_use, .. } = report.seed_load;
    if peers > 0 {
        let part = |part: f64| format!("{:.1}%", part * 100.0);
        row(&format!("sent by each of {peers} seed peers"), units::bytes(mean_bytes), "");
        row("by the most loaded, in parts of that", format!("{most_by_mean:.3}"), "1.0");
        row("use of the uplinks of seed peers", part(mean_use), "");
        row("of the most used", part(most_use), "");
    }
    let Fairness { jain_index, last_by_median } = report.fairness;
    row("fairness: Jain's index of download rates", format!("{jain_index:.4}"), "1.0");
    row("fairness: last start by the median", format!("{last_by_median:.3}"), "1.0");
    row("errors", report.read_errors.to_string(), "0");
    row("CPU of all daemons", format!("{:.1} s", report.cpu_seconds), "");
    table.push_str("</tbody></table></div>");
    table
}

/// How far each image of a node was when.
fn starts_of(node: &NodeHistory) -> String {
    let mut table = String::from(
        "<div class=\"table\"><table><thead><tr><th>image of rank</th><th>start</th><th>first bytes</th><th>what the start reads</th>\
         <th>everything</th></tr></thead><tbody>",
    );
    for start in &node.starts {
        let _ = write!(table, "<tr><td>{}</td>", u32::from(start.image) + 1);
        let times = [start.started_s, start.at(|s| s.first_s), start.at(|s| s.start_s), start.at(|s| s.complete_s)];
        cells(&mut table, times.map(|time| time.map_or("-".to_owned(), |time| format!("{time:.2}"))));
        table.push_str("</tr>");
    }
    table.push_str("</tbody></table></div>");
    table
}

/// A table of bytes by who sent them and where they went, shaded by their part of all.
fn matrix(report: &Report) -> String {
    let moved = &report.history.moved;
    let senders: BTreeSet<_> = moved.iter().map(|moved| (moved.source, &moved.from)).collect();
    let most = moved.iter().map(|moved| moved.bytes).max().unwrap_or(0).max(1) as f64;
    let (unit, name) = units::bytes_unit(most);
    let mut table = format!("<div class=\"table\"><table><thead><tr><th>{name} sent by</th>");
    report.nodes_per_zone.keys().for_each(|zone| _ = write!(table, "<th>to {}</th>", escape(zone)));
    table.push_str("</tr></thead><tbody>");
    for sender in senders {
        let of_sender: Vec<_> = moved.iter().filter(|moved| (moved.source, &moved.from) == sender).collect();
        let name = match sender {
            (source, Some(zone)) => format!("{} of {zone}", SENDERS[source]),
            (source, None) => SENDERS[source].to_owned(),
        };
        let _ = write!(table, "<tr><td>{}</td>", escape(&name));
        for zone in report.nodes_per_zone.keys() {
            let bytes = of_sender.iter().find(|moved| moved.to == *zone).map_or(0.0, |moved| moved.bytes as f64);
            let shade = bytes / most * 0.6;
            let _ = write!(table, "<td style=\"background:rgba(60,120,200,{shade:.3})\">{:.2}</td>", bytes / unit);
        }
        table.push_str("</tr>");
    }
    table.push_str("</tbody></table></div>");
    table
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
