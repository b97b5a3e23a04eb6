//! A report as a page that needs nothing but a browser.

use std::fmt::Write as _;

use super::{Goal, Report};

const STYLE: &str = "body{font:15px/1.4 sans-serif;max-width:62em;margin:2em auto;padding:0 1em}\
    table{border-collapse:collapse;width:100%}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}\
    td:first-child,th:first-child{text-align:left}.yes{color:#1a7f37}.no{color:#b42318}\
    svg{width:100%;height:auto;font:12px sans-serif}svg .work{font-weight:bold}";
/// Of the peers, in their order.
const COLORS: [&str; 4] = ["#3266a8", "#c9822b", "#8a8a8a", "#5b9a68"];
/// Where bars begin, and how long the longest is, in the picture's units.
const LEFT: f64 = 180.0;
const LONGEST: f64 = 560.0;
const ROW: usize = 20;

/// The page: what was run, the goals, and a picture for each figure with its title.
pub fn page(report: &Report, peers: &[&str], plots: &[(&str, &str)]) -> String {
    let title = format!("perf {}", report.area);
    let mut page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8>\
         <meta name=viewport content='width=device-width'><title>{title}</title><style>{STYLE}</style>\n\
         <h1>{title}</h1>\n<p>{}, {}</p>\n<p>{}</p>\n<ul>",
        escape(&report.time),
        escape(&report.machine),
        escape(&report.method)
    );
    for (program, version) in &report.versions {
        let _ = write!(page, "<li>{} {}", escape(program), escape(version));
    }
    page.push_str("</ul>\n");
    page.push_str(&goals(&report.goals));
    if !plots.is_empty() {
        page.push_str(
            "<p>Bars are medians over the rounds, lines reach from the least to the most. The bars of each kind of \
             work have a scale of their own.</p>\n",
        );
    }
    for (figure, title) in plots {
        let bars = bars(report, peers, figure);
        if !bars.is_empty() {
            let _ = writeln!(page, "<h2>{}</h2>\n{bars}", escape(title));
        }
    }
    page
}

fn goals(goals: &[Goal]) -> String {
    if goals.is_empty() {
        return String::new();
    }
    let met = goals.iter().filter(|goal| goal.met).count();
    let mut table = format!(
        "<h2>Goals: {met} of {} met</h2>\n\
         <table><tr><th>goal<th>wanted<th>measured<th>spread<th>unit<th>met</tr>\n",
        goals.len()
    );
    for goal in goals {
        let met = if goal.met { "yes" } else { "no" };
        let _ = writeln!(
            table,
            "<tr><td>{}<td>{}<td>{:.2}<td>{:.2}–{:.2}<td>{}<td class={met}>{met}</tr>",
            escape(&goal.name),
            escape(&goal.goal),
            goal.measured,
            goal.spread.0,
            goal.spread.1,
            escape(goal.unit)
        );
    }
    table + "</table>\n"
}

/// Horizontal bars, one group for each kind of work, one bar for each peer; empty if nobody has the
/// figure.
fn bars(report: &Report, peers: &[&str], figure: &str) -> String {
    let mut rows = String::new();
    let mut row = 0;
    for work in report.works() {
        let measured: Vec<_> = peers
            .iter()
            .enumerate()
            .filter_map(|(at, peer)| Some((at, peer, report.spread(peer, work, figure)?)))
            .collect();
        if measured.is_empty() {
            continue;
        }
        let most = measured
            .iter()
            .map(|(.., (_, _, most))| *most)
            .fold(f64::MIN_POSITIVE, f64::max);
        let _ = write!(
            rows,
            "<text class=work x=0 y={}>{}</text>",
            row * ROW + 15,
            escape(work)
        );
        for (at, peer, (median, least, largest)) in measured {
            row += 1;
            let (y, color) = (row * ROW, COLORS.get(at).unwrap_or(&"#8a8a8a"));
            let long = |value: f64| value / most * LONGEST;
            let end = LEFT + long(largest);
            let _ = write!(
                rows,
                "<text x=10 y={text}>{peer}</text>\
                 <rect x={LEFT} y={top} width={width:.1} height=14 fill='{color}'/>\
                 <path d='M{from:.1} {middle}H{end:.1}' stroke='#222'/>\
                 <text x={after:.1} y={text}>{value}</text>",
                text = y + 14,
                peer = escape(peer),
                top = y + 3,
                width = long(median),
                from = LEFT + long(least),
                middle = y + 10,
                after = end + 6.0,
                value = amount(median)
            );
        }
        row += 1;
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<svg viewBox='0 0 860 {}' role=img>{rows}</svg>",
        row * ROW + 10
    )
}

/// A value with three or more digits that count, and thousands told apart.
fn amount(value: f64) -> String {
    if value < 1.0 {
        return format!("{value:.3}");
    }
    if value < 100.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::report::{Sample, Wanted};

    fn report() -> Report {
        let sample = |peer, work: &str, round, iops| Sample {
            peer,
            work: work.to_owned(),
            round,
            figures: BTreeMap::from([("iops", iops)]),
        };
        Report {
            area: "blk",
            time: "now".into(),
            machine: "2 cores <fast>".into(),
            versions: BTreeMap::from([("peer".into(), "1.0 & more".into())]),
            method: "a way".into(),
            samples: vec![
                sample("ours", "file", 0, 1000.0),
                sample("theirs", "file", 0, 500.0),
                sample("ours", "file", 1, 3000.0),
                sample("theirs", "file", 1, 1000.0),
                sample("ours", "null", 0, 2_000_000.0),
            ],
            goals: Vec::new(),
        }
    }

    #[test]
    fn each_kind_of_work_has_its_scale_and_the_rounds_their_spread() {
        let mut report = report();
        let peers = ("ours", "theirs");
        report.goal("iops".into(), peers, "file", "iops", Wanted::AtLeast(2.0));
        report.goal("more".into(), peers, "file", "iops", Wanted::AtLeast(9.0));
        let page = page(
            &report,
            &["ours", "theirs"],
            &[("iops", "IOPS"), ("none", "None")],
        );
        assert!(page.contains("2 cores &lt;fast>"), "{page}");
        assert!(page.contains("1.0 &amp; more"), "{page}");
        assert!(page.contains("Goals: 1 of 2 met"), "{page}");
        assert!(page.contains("<td>2.50<td>2.00–3.00<td>"), "{page}");
        // A median of 2,000 where the most is 3,000; and the only bar of its work.
        assert!(page.contains("width=373.3"), "{page}");
        assert!(page.contains("width=560.0"), "{page}");
        assert!(page.contains("2,000,000"), "{page}");
        assert!(page.contains("<h2>IOPS</h2>") && !page.contains("<h2>None</h2>"));
    }
}
