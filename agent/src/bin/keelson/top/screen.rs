//! How `keelson top` looks.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{self, Table};

use super::rates::Row;
use super::{Sort, View};

const HEADER: [&str; 9] = [
    "NAME", "PHASE", "CPUS", "CPU", "MEMORY", "READ/s", "WRITE/s", "RECV/s", "SENT/s",
];

/// Draws all of it.
pub fn draw(frame: &mut Frame<'_>, view: &View) {
    let [title, table, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Line::from(summary(view)).bold(), title);
    let rows = view.rows.iter().map(|row| widgets::Row::new(cells(row)));
    let mut widths = [Constraint::Length(11); HEADER.len()];
    widths[0] = Constraint::Min(12);
    let sorted = sorted_column(view.sort);
    let header = HEADER.iter().enumerate().map(|(at, name)| {
        let style = if at == sorted {
            Style::new().add_modifier(Modifier::UNDERLINED)
        } else {
            Style::new()
        };
        widgets::Cell::new(*name).style(style)
    });
    let header = widgets::Row::new(header).reversed();
    frame.render_widget(Table::new(rows, widths).header(header), table);
    let text = "q quit   sort by: c CPU  m memory  d disks  n network  a name";
    frame.render_widget(Line::from(text).dim(), keys);
}

/// The same as plain lines.
pub fn lines(view: &View) -> Vec<String> {
    let mut lines = vec![summary(view)];
    let row = |cells: [String; 9]| {
        let [name, rest @ ..] = cells;
        let rest = rest.iter().map(|cell| format!("{cell:<11}"));
        let text = format!("{name:<20} {}", rest.collect::<String>());
        text.trim_end().to_owned()
    };
    lines.push(row(HEADER.map(str::to_owned)));
    lines.extend(view.rows.iter().map(|one| row(cells(one))));
    lines
}

fn summary(view: &View) -> String {
    let sum = |value: fn(&Row) -> u64| view.rows.iter().map(value).sum::<u64>();
    format!(
        "{}; {} guests use {} of a CPU and {}",
        view.title,
        view.rows.len(),
        percent(sum(|row| row.cpu_permille)),
        bytes(sum(|row| row.memory))
    )
}

fn cells(row: &Row) -> [String; 9] {
    [
        row.name.clone(),
        row.phase.clone(),
        row.cpus.to_string(),
        percent(row.cpu_permille),
        bytes(row.memory),
        bytes(row.read),
        bytes(row.written),
        bytes(row.received),
        bytes(row.sent),
    ]
}

fn sorted_column(sort: Sort) -> usize {
    match sort {
        Sort::Name => 0,
        Sort::Cpu => 3,
        Sort::Memory => 4,
        Sort::Disk => 5,
        Sort::Network => 7,
    }
}

fn percent(permille: u64) -> String {
    format!("{}.{}%", permille / 10, permille % 10)
}

fn bytes(count: u64) -> String {
    let units = [("G", 30), ("M", 20), ("K", 10)];
    for (unit, shift) in units {
        if count >> shift >= 10 {
            return format!("{}{unit}", count >> shift);
        }
    }
    format!("{count}B")
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn view() -> View {
        View {
            title: "host: 2 CPUs, 512 MiB".into(),
            sort: Sort::Cpu,
            rows: vec![Row {
                name: "web".into(),
                phase: "Running".into(),
                cpus: 2,
                cpu_permille: 1234,
                memory: 200 << 20,
                read: 20_480,
                ..Row::default()
            }],
        }
    }

    #[test]
    fn it_shows_what_guests_use() {
        let mut terminal = Terminal::new(TestBackend::new(110, 6)).unwrap();
        terminal.draw(|frame| draw(frame, &view())).unwrap();
        let shown = terminal.backend().to_string();
        for text in [
            "1 guests use 123.4% of a CPU",
            "web",
            "Running",
            "200M",
            "20K",
            "q quit",
        ] {
            assert!(shown.contains(text), "no {text:?} in {shown}");
        }
        // A window that is too small is no reason to fail.
        let mut terminal = Terminal::new(TestBackend::new(3, 1)).unwrap();
        terminal.draw(|frame| draw(frame, &view())).unwrap();
    }

    #[test]
    fn plain_lines_say_the_same() {
        let lines = lines(&view());
        assert_eq!(lines.len(), 3);
        assert!(
            lines[2].starts_with("web ") && lines[2].contains("123.4%"),
            "{lines:?}"
        );
    }
}
