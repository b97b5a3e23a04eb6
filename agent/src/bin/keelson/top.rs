//! `keelson top`

mod rates;
mod screen;

use std::time::Duration;

use clap::{Args, ValueEnum};
use keelson_api::proto::{InfoRequest, UsageRequest};
use keelson_api::{Kind, Object, TimeLimit, VirtualMachine};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use self::rates::{Rates, Row};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::line;

/// Show what guests use of this host, once a second.
///
/// Keys: q ends, c, m, d, n and a sort by processors, memory, disks, network and name.
#[derive(Args)]
pub struct Top {
    /// What to sort by.
    #[arg(short, long, value_enum, default_value_t)]
    sort: Sort,
    /// How long to wait between two looks.
    #[arg(short, long, default_value = "1s")]
    interval: TimeLimit,
    /// Print a table and end, after one interval.
    #[arg(long)]
    once: bool,
}

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// Processor time.
    #[default]
    Cpu,
    /// Memory.
    Memory,
    /// Bytes from and to storage.
    Disk,
    /// Bytes through interfaces.
    Network,
    /// The guest's name.
    Name,
}

/// What is on the screen.
struct View {
    /// The host, its processors and memory, for the first line.
    title: String,
    rows: Vec<Row>,
    sort: Sort,
}

impl Top {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let info = client.host.info(InfoRequest {}).await?.into_inner();
        let title = format!(
            "{}: {} CPUs, {} MiB",
            info.hostname,
            info.cpus,
            info.memory_bytes >> 20
        );
        let mut rates = Rates::default();
        let mut view = View {
            title,
            rows: look(client, &mut rates, self.sort).await?,
            sort: self.sort,
        };
        let interval = self.interval.duration().max(Duration::from_millis(100));
        if self.once {
            tokio::time::sleep(interval).await;
            view.rows = look(client, &mut rates, self.sort).await?;
            return screen::lines(&view).iter().try_for_each(|text| line(text));
        }
        let mut terminal = ratatui::try_init()?;
        let shown = follow(client, &mut rates, &mut view, interval, &mut terminal).await;
        ratatui::restore();
        shown
    }
}

async fn follow(
    client: &mut Client,
    rates: &mut Rates,
    view: &mut View,
    interval: Duration,
    terminal: &mut ratatui::DefaultTerminal,
) -> Result<(), Failure> {
    loop {
        terminal.draw(|frame| screen::draw(frame, view))?;
        let until = tokio::time::Instant::now() + interval;
        loop {
            let left = until.saturating_duration_since(tokio::time::Instant::now());
            let Some(key) = next_key(left).await? else {
                break;
            };
            match key {
                Key::End => return Ok(()),
                Key::Sort(sort) => {
                    view.sort = sort;
                    rates::sort(&mut view.rows, sort);
                }
                Key::Other => {}
            }
            terminal.draw(|frame| screen::draw(frame, view))?;
        }
        view.rows = look(client, rates, view.sort).await?;
    }
}

enum Key {
    End,
    Sort(Sort),
    /// Also when the window has another size.
    Other,
}

/// Waits for a key; `None` when the time is over.
async fn next_key(limit: Duration) -> Result<Option<Key>, Failure> {
    let waited = tokio::task::spawn_blocking(move || {
        let ready = event::poll(limit)?;
        ready.then(event::read).transpose()
    });
    let event = waited.await.map_err(anyhow::Error::from)??;
    Ok(event.map(|event| match event {
        Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
            KeyCode::Char('q') | KeyCode::Esc => Key::End,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Key::End,
            KeyCode::Char('c') => Key::Sort(Sort::Cpu),
            KeyCode::Char('m') => Key::Sort(Sort::Memory),
            KeyCode::Char('d') => Key::Sort(Sort::Disk),
            KeyCode::Char('n') => Key::Sort(Sort::Network),
            KeyCode::Char('a') => Key::Sort(Sort::Name),
            _ => Key::Other,
        },
        _ => Key::Other,
    }))
}

async fn look(client: &mut Client, rates: &mut Rates, sort: Sort) -> Result<Vec<Row>, Failure> {
    let guests = client.list(Kind::VirtualMachine).await?.into_iter();
    let guests: Vec<VirtualMachine> = guests
        .filter_map(|object| match object {
            Object::VirtualMachine(guest) => Some(guest),
            _ => None,
        })
        .collect();
    let usage = client.guests.usage(UsageRequest {}).await?.into_inner();
    let mut rows = rates.rows(&guests, &usage);
    rates::sort(&mut rows, sort);
    Ok(rows)
}
