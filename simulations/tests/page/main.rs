//! The page of a report as a browser lays it out: nothing is cut off or empty, nothing is loaded, and what its plots say is what
//! the report says.

mod browser;
mod picture;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
};

use serde_json::Value;
use shoal_sim::{Report, Role, Scenario, html, run};

use self::{browser::Browser, picture::Picture};

/// As large as the page, which is not scrolled then.
const WINDOW: (u32, u32) = (1000, 3700);
/// A plot, pixels wide.
const WIDTH: f64 = 860.0;

/// Two zones, one with a name that takes room and that is no HTML.
fn report() -> Report {
    let text = include_str!("../../scenarios/calibrate-thin-link.toml");
    let text =
        text.replace("\"b\"", "'a <b>zone</b> & \"its\" name'").replace("calibrate-thin-link", "<i>thin</i> link");
    let scenario = Scenario::parse(&text).unwrap();
    let report = run(&scenario, 1, &());
    assert!(report.is_right() && report.complete == 8, "{report}");
    report
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("{key}: {value}"))
}

fn of_section<'a>(measured: &'a Value, key: &str, section: &str) -> Vec<&'a Value> {
    list(measured, key).iter().filter(|found| found["section"] == section).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// Reads a place off an axis, as a person would: from the labels beside it.
fn read_off(axis: &Value, place: f64) -> f64 {
    let labels = axis.as_array().unwrap().as_slice();
    let ((low, from), (high, to)) = match labels {
        [first, .., last] => ((number(&first[0]), number(&first[1])), (number(&last[0]), number(&last[1]))),
        _ => panic!("an axis without labels: {axis}"),
    };
    low + (place - from) / (to - from) * (high - low)
}

/// What the legend of a section says of a name.
fn legend_colour<'a>(measured: &'a Value, section: &str, name: &str) -> &'a str {
    let legends = of_section(measured, "legends", section);
    let legend = legends.iter().find(|legend| legend["name"].as_str().unwrap().starts_with(name));
    legend.unwrap_or_else(|| panic!("{name}: {legends:?}"))["colour"].as_str().unwrap()
}

/// The lines of that colour.
fn line<'a>(measured: &'a Value, section: &str, name: &str) -> Vec<&'a Value> {
    let colour = legend_colour(measured, section, name);
    let lines = of_section(measured, "plots", section).into_iter().flat_map(|plot| list(plot, "lines"));
    lines.filter(|line| line["colour"] == colour).collect()
}

/// Pixels of a plot in the colour that the legend gives to a name.
fn pixels(picture: &Picture, measured: &Value, section: &str, name: &str) -> usize {
    let plot = &of_section(measured, "plots", section)[0]["box"];
    let colour = legend_colour(measured, section, name);
    let numbers = colour.trim_start_matches("rgb(").trim_end_matches(')').split(", ");
    let colour: Vec<u8> = numbers.map(|number| number.parse().unwrap()).collect();
    let edge = |name: &str| number(&plot[name]) as usize;
    let places = (edge("top")..edge("bottom")).flat_map(|y| (edge("left")..edge("right")).map(move |x| (x, y)));
    places.filter(|&(x, y)| picture.at(x, y)[..] == colour[..]).count()
}

#[test]
fn a_browser_shows_what_the_report_says() {
    let Some(browser) = Browser::find("a page in a browser", WINDOW) else { return };
    let report = report();
    let page = html::page(&report, None).unwrap();
    let measured = browser.measure(&page);

    let sections: Vec<_> = list(&measured, "plots").iter().map(|plot| plot["section"].as_str().unwrap()).collect();
    assert_eq!(sections, ["completion", "egress", "links", "served", "node"]);
    for plot in list(&measured, "plots") {
        let edge = |name: &str| number(&plot["box"][name]);
        assert_eq!(edge("right") - edge("left"), WIDTH, "{plot}");
        assert!(edge("bottom") - edge("top") >= 100.0, "{plot}");
        assert_eq!(plot["cut"], Value::Array(Vec::new()), "texts outside of {}", plot["section"]);
    }
    assert_eq!(measured["outside"], Value::Array(Vec::new()));
    let (width, height) = (number(&measured["page"]["width"]), number(&measured["page"]["height"]));
    assert!(width <= f64::from(WINDOW.0) && height <= f64::from(WINDOW.1), "{width} x {height}");
    assert_eq!(measured["requests"], Value::Array(Vec::new()));

    let completion = of_section(&measured, "plots", "completion")[0];
    let everything = line(&measured, "completion", "everything");
    let end = list(everything[0], "points").last().unwrap();
    let (when, count) = (read_off(&completion["x"], number(&end[0])), read_off(&completion["y"], number(&end[1])));
    assert!((count - 8.0).abs() < 0.1, "the curve ends at {count} nodes");
    let last = report.complete_seconds.max;
    assert!((when / last - 1.0).abs() < 0.01, "the curve ends after {when} s, the run after {last}");
    let egress = of_section(&measured, "plots", "egress")[0];
    let sent = list(line(&measured, "egress", "sent by the registry")[0], "points").last().unwrap();
    let images: f64 = report.registry_images_per_zone.values().sum();
    let read = read_off(&egress["y"], number(&sent[1]));
    assert!((read / images - 1.0).abs() < 0.02, "{read} images in the plot, {images} in the report");
    let used = report.link_use.iter().filter(|(_, part)| **part > 0.0);
    used.for_each(|(class, _)| assert_eq!(line(&measured, "links", class).len(), 1, "{class}"));
    assert!(report.link_use["into zone a"] > 0.1, "{:?}", report.link_use);

    let times = of_section(&measured, "tables", "times")[0];
    let zones: Vec<_> = list(times, "rows").iter().map(|row| row[0].as_str().unwrap()).collect();
    assert_eq!(&zones[2..5], ["all", "a", "a <b>zone</b> & \"its\" name"]);
    let all = &list(times, "rows")[2];
    let cell = |at: usize| all[at].as_str().unwrap().parse::<f64>().unwrap();
    assert_eq!((cell(1), cell(13)), (8.0, (last * 100.0).round() / 100.0), "{all}");

    let picture = browser.picture(&page);
    assert_eq!((picture.width, picture.height), (WINDOW.0 as usize, WINDOW.1 as usize));
    for (section, name, least) in [
        ("completion", "first bytes", 300),
        ("completion", "everything", 1000),
        ("egress", "sent by the registry", 300),
        ("links", "node downlinks", 500),
        ("served", "registry", 3000),
        ("served", "seed peers of the zone", 3000),
        ("served", "nodes of the zone", 3000),
        ("node", "from seed peers", 3000),
        ("node", "from nodes", 3000),
        ("node", "pieces wanted", 500),
    ] {
        let found = pixels(&picture, &measured, section, name);
        assert!(found >= least, "{section}: {found} pixels of {name}");
    }
}

/// Nodes that start several images each and read a part of them first.
#[test]
fn of_several_images_every_start_is_shown() {
    let Some(browser) = Browser::find("a page of several images", WINDOW) else { return };
    let text = include_str!("../../scenarios/many-images.toml");
    let text = text.replace("read = \"all\"", "read = { fraction = 0.25 }\nprefetch = \"all\"");
    let mut scenario = Scenario::parse(&text).unwrap();
    scenario.image.encoded_mib = 16.0;
    scenario.nodes.iter_mut().filter(|group| group.role == Role::Node).for_each(|group| group.count = 8);
    let report = run(&scenario, 1, &());
    assert!(report.is_right() && (report.nodes, report.starts, report.complete) == (16, 48, 16), "{report}");
    let measured = browser.measure(&html::page(&report, Some(5)).unwrap());
    assert_eq!(measured["outside"], Value::Array(Vec::new()));
    assert!(list(&measured, "plots").iter().all(|plot| plot["cut"] == Value::Array(Vec::new())), "{measured}");

    let completion = of_section(&measured, "plots", "completion")[0];
    for (name, last) in
        [("what the start reads", report.start_seconds.max), ("everything", report.complete_seconds.max)]
    {
        let end = list(line(&measured, "completion", name)[0], "points").last().unwrap();
        let (when, count) =
            (read_off(&completion["x"], number(&end[0])), read_off(&completion["y"], number(&end[1])));
        assert!((count - 48.0).abs() < 0.3, "{count} starts have {name}");
        assert!(when >= last * 0.99, "{name}: the curve ends after {when} s, the slowest start took {last}");
    }
    let egress = of_section(&measured, "plots", "egress")[0];
    let asked_for = report.images_per_zone.values().sum::<usize>() as f64;
    // The axes have the same colour and come first.
    let bound = line(&measured, "egress", "what each zone asks for").pop().unwrap();
    let bound = list(bound, "points").last().unwrap();
    let bound = read_off(&egress["y"], number(&bound[1]));
    assert!((bound / asked_for - 1.0).abs() < 0.02, "{bound} for {asked_for} images");

    let rows = list(of_section(&measured, "tables", "node")[0], "rows");
    let starts = &report.history.nodes[5].starts;
    assert_eq!((rows.len(), starts.len()), (4, 3), "{rows:?}");
    for (row, start) in rows[1..].iter().zip(starts) {
        let end = format!("{:.2}", start.at(|start| start.complete_s).unwrap());
        assert_eq!((&row[0], &row[4]), (&(start.image + 1).to_string().into(), &end.into()), "{row}");
    }
    for name in ["start", "first bytes", "what the start reads", "everything"] {
        // The axes have the colour of the first.
        if name != "start" {
            assert_eq!(line(&measured, "node", name).len(), 6, "{name}: one for each image in each of the two plots");
        }
        let legends = of_section(&measured, "legends", "node");
        assert_eq!(legends.iter().filter(|legend| legend["name"] == name).count(), 1, "{name}");
    }
}

#[test]
fn a_narrow_window_shows_all_of_it() {
    let Some(browser) = Browser::find("a page in a narrow window", (560, 2000)) else { return };
    let measured = browser.measure(&html::page(&report(), Some(3)).unwrap());
    let window = number(&measured["window"]);
    assert!(window < WIDTH, "{window}");
    assert!(number(&measured["page"]["width"]) <= window, "{}", measured["page"]);
    assert_eq!(measured["outside"], Value::Array(Vec::new()));
    let node = of_section(&measured, "plots", "node");
    assert!(node.len() == 1 && list(&measured, "plots").len() == 5, "{node:?}");
}

/// The tests above would notice.
#[test]
fn what_a_page_loads_or_cuts_off_is_found() {
    let Some(browser) = Browser::find("a page that loads something", WINDOW) else { return };
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut asked = [0; 1024];
        let length = stream.read(&mut asked).unwrap();
        stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
        String::from_utf8_lossy(&asked[..length]).into_owned()
    });
    let page = format!(
        "<!doctype html><html><body><section id=\"s\"><img src=\"http://{address}/x.png\"><p style=\"width:1200px\">wide</p>\
         <svg width=\"860\" height=\"100\"><text x=\"850\" y=\"50\">cut off</text></svg></section></body></html>"
    );
    let measured = browser.measure(&page);
    // If nobody came, somebody has to.
    let _ = TcpStream::connect(address).and_then(|mut stream| stream.write_all(b"nothing"));
    assert!(serving.join().unwrap().starts_with("GET /x.png"));
    assert_eq!(list(&measured, "requests").len(), 1, "{}", measured["requests"]);
    assert_eq!(list(&measured, "outside").len(), 1, "{}", measured["outside"]);
    assert_eq!(list(&measured, "plots")[0]["cut"][0], "cut off");
}
