//! `warmswap top`: devices on a terminal, as they change.
//!
//! - `fetch`: asks the brokers, each on a thread of its own
//! - `model`: what they answered, as plain values
//! - `view`: what is looked at, and what keys do to it
//! - `list`, `device`: the pages, drawn into a buffer
//! - `terminal`: the terminal itself

mod device;
mod fetch;
mod list;
mod model;
mod terminal;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, TryRecvError};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Clear, Paragraph, Widget};

use super::{Control, Failure, show};
use fetch::Fetcher;
use model::{Alarm, Device, cut, sort};
use terminal::{Input, Screen};
use view::{Page, View};

/// What `--help` says below the options.
pub(super) const LEGEND: &str = "\
With one NAME its page is opened at once, otherwise the list.

KEYS  up, down, j, k: select, or scroll a page · Enter: the page of a device · Esc: back · s, S: sort by the next or the
  previous column · g, G: to the first, to the last · ?: help · q: quit
REQ/S to OLDEST tell of the last window that the broker measured of the primary; - is what it did not measure. P50, P99, MAX:
  latency from a request's submission to its completion · CPU: processors kept busy · OLDEST: age of the oldest request in
  flight · RISK: how likely a failure is held to be · ▂▅█: the last windows, each a part of the greatest
STATE  as in `warmswap status --help`

--once draws 80 columns and 24 lines, or as many as COLUMNS and LINES say. Exit code 4 if no broker answers";

/// Options of `warmswap top`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only these devices
    names: Vec<String>,
    #[command(flatten)]
    control: Control,
    /// Ask the brokers every so many seconds
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    every: Duration,
    /// Draw one frame as plain text and end
    #[arg(long)]
    once: bool,
}

/// Keys are waited for this long at a time; between, what brokers have answered is drawn.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A broker that has not answered for this long, and twice the time between questions, is shown as silent.
const SILENT_AFTER: Duration = Duration::from_secs(2);
/// Below this there is no room for a page.
const SIZE_MIN: (u16, u16) = (40, 8);
/// What `--once` draws.
const SIZE_ONCE: (u16, u16) = (80, 24);
/// The most that it draws.
const SIZE_MAX: u16 = 1_000;

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it takes a number of seconds".to_owned())?;
    if !(0.1..=3_600.0).contains(&seconds) {
        return Err("it takes 0.1 to 3600 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Everything that a frame is made of.
struct Scene<'a> {
    /// In the order in which they are shown.
    devices: Vec<&'a Device>,
    view: &'a View,
    /// Where the control sockets are.
    dir: &'a Path,
}

/// What is known of each device, and since when.
#[derive(Default)]
struct Known(BTreeMap<String, (Device, Instant)>);

impl Known {
    fn take(&mut self, device: Device, now: Instant) {
        self.0.insert(device.name.clone(), (device, now));
    }

    /// Devices whose broker has not answered for too long are silent: what was known of them is history.
    fn age(&mut self, now: Instant, after: Duration) -> bool {
        let mut changed = false;
        for (device, since) in self.0.values_mut() {
            let silence = now.saturating_duration_since(*since);
            if silence > after && device.message.is_none() {
                let text = format!("its broker has not answered for {} s", silence.as_secs());
                *device = Device::absent(&device.name, "silent", &text);
                changed = true;
            }
        }
        changed
    }

    fn shown(&self, view: &View) -> Vec<&Device> {
        let mut devices: Vec<&Device> = self.0.values().map(|(device, _)| device).collect();
        sort(&mut devices, view.sort);
        devices
    }
}

/// Runs the command.
pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    if !args.once && !terminal::is_there() {
        return Err(Failure::new(
            2,
            "top needs a terminal; --once prints one frame, and `status` and `show` are for scripts",
        ));
    }
    let dir = args.control.dir();
    let names = show::names(&args.names, &dir)?;
    let page = match args.names.as_slice() {
        [one] => Page::Device(one.clone()),
        _ => Page::List,
    };
    let view = View::new(page);
    let more = args.names.is_empty() && !args.once;
    let fetcher = Fetcher::start(&dir, &names, more, args.every)?;
    if args.once { once(&fetcher, &names, &view, &dir) } else { watch(&fetcher, view, &dir, args.every) }
}

/// One frame, as text.
fn once(fetcher: &Fetcher, names: &[String], view: &View, dir: &Path) -> Result<u8, Failure> {
    fetcher.open(open_page(view));
    let until = Instant::now() + show::ANSWER_MAX;
    let mut known = Known::default();
    let asked = names.len().min(fetch::DEVICES_MAX);
    while known.0.len() < asked {
        match fetcher.reports.recv_deadline(until) {
            Ok(device) => known.take(device, Instant::now()),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    for name in &names[..asked] {
        if !known.0.contains_key(name) {
            known.take(Device::absent(name, "silent", "its broker does not answer"), Instant::now());
        }
    }
    let size = |variable: &str, usual: u16| {
        let asked = std::env::var(variable).ok().and_then(|text| text.parse().ok());
        asked.unwrap_or(usual).clamp(1, SIZE_MAX)
    };
    let area = Rect::new(0, 0, size("COLUMNS", SIZE_ONCE.0), size("LINES", SIZE_ONCE.1));
    let mut buffer = Buffer::empty(area);
    draw(&Scene { devices: known.shown(view), view, dir }, area, &mut buffer);
    let mut out = std::io::stdout().lock();
    for line in text(&buffer) {
        writeln!(out, "{line}")?;
    }
    let answered = known.0.values().any(|(device, _)| device.message.is_none());
    Ok(if answered { 0 } else { 4 })
}

/// The lines of a buffer without what is empty at their ends.
fn text(buffer: &Buffer) -> Vec<String> {
    let lines = buffer.area.rows().map(|row| {
        let cells: String = row.columns().map(|cell| buffer[(cell.x, cell.y)].symbol()).collect();
        cells.trim_end().to_owned()
    });
    lines.collect()
}

fn open_page(view: &View) -> Option<&str> {
    match &view.page {
        Page::Device(name) => Some(name),
        Page::List => None,
    }
}

/// Draws and takes keys until it is enough.
fn watch(fetcher: &Fetcher, mut view: View, dir: &Path, every: Duration) -> Result<u8, Failure> {
    let mut known = Known::default();
    let mut screen = Screen::take()?;
    let mut changed = true;
    loop {
        fetcher.open(open_page(&view));
        loop {
            match fetcher.reports.try_recv() {
                Ok(device) => {
                    known.take(device, Instant::now());
                    changed = true;
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(Failure::new(1, "the threads that ask have ended")),
            }
        }
        changed |= known.age(Instant::now(), SILENT_AFTER + every * 2);
        if std::mem::take(&mut changed) {
            let scene = Scene { devices: known.shown(&view), view: &view, dir };
            let mut scroll_max = None;
            screen.draw(|area, buffer| scroll_max = draw(&scene, area, buffer))?;
            view.scroll = scroll_max.map_or(view.scroll, |max| view.scroll.min(max));
        }
        match screen.input(LOOK_EVERY)? {
            Input::Nothing => (),
            Input::Resized => changed = true,
            Input::End => return Ok(0),
            Input::Key(key) => {
                let shown: Vec<&str> = known.shown(&view).iter().map(|device| device.name.as_str()).collect();
                if !view.key(key, &shown) {
                    return Ok(0);
                }
                changed = true;
            }
        }
    }
}

/// Draws a frame. Answers how far its page can be scrolled, if it can be.
fn draw(scene: &Scene<'_>, area: Rect, buffer: &mut Buffer) -> Option<u16> {
    if area.width < SIZE_MIN.0 || area.height < SIZE_MIN.1 {
        Line::from(format!("needs {}x{}", SIZE_MIN.0, SIZE_MIN.1)).render(area, buffer);
        return None;
    }
    let line = |y: u16| Rect { y, height: 1, ..area };
    let inner = Rect { y: area.y + 1, height: area.height - 2, ..area };
    let bar = Style::new().add_modifier(Modifier::REVERSED);
    Line::styled(padded(&title(scene), area.width), bar).render(line(area.y), buffer);
    Line::styled(padded(&keys(scene), area.width), bar).render(line(area.bottom() - 1), buffer);
    let scroll_max = match &scene.view.page {
        Page::List => {
            list::draw(scene, inner, buffer);
            None
        }
        Page::Device(name) => match scene.devices.iter().find(|device| device.name == *name) {
            Some(device) => Some(device::draw(device, scene.view.scroll, inner, buffer)),
            None => {
                Line::from("asking its broker").render(inner, buffer);
                None
            }
        },
    };
    if scene.view.help {
        help(inner, buffer);
    }
    scroll_max
}

fn padded(text: &str, width: u16) -> String {
    let width = usize::from(width);
    format!("{:<width$}", cut(text, width))
}

fn title(scene: &Scene<'_>) -> String {
    let count = |alarm: Alarm| scene.devices.iter().filter(|device| device.alarm() == alarm).count();
    let total = scene.devices.len();
    let mut text = format!(" warmswap top  {total} {}", if total == 1 { "device" } else { "devices" });
    let counts =
        [(Alarm::None, "protected"), (Alarm::Passing, "passing"), (Alarm::Warning, "warning"), (Alarm::Error, "error")];
    for (alarm, word) in counts {
        match count(alarm) {
            0 => (),
            some => text.push_str(&format!(", {some} {word}")),
        }
    }
    if total >= fetch::DEVICES_MAX {
        text.push_str(", no more are watched");
    }
    format!("{text}  {}", scene.dir.display())
}

fn keys(scene: &Scene<'_>) -> String {
    match scene.view.page {
        Page::List => {
            format!(" q quit  ? help  ↑↓ select  Enter open  s sort (by {})", scene.view.sort.title().to_lowercase())
        }
        Page::Device(_) => " q quit  ? help  ↑↓ scroll  Esc back".to_owned(),
    }
}

const HELP: [&str; 12] = [
    "up k, down j   select, scroll",
    "page, g, G     far, to the first, to the last",
    "Enter          the page of a device",
    "Esc            back to the list",
    "s, S           sort by the next column, the previous",
    "q              quit",
    "",
    "-              not measured",
    "CPU            processors kept busy",
    "OLDEST         age of the oldest request in flight",
    "RISK           how likely a failure is held to be",
    "▂▅█            the last windows, beside the greatest",
];

fn help(area: Rect, buffer: &mut Buffer) {
    let (width, height) = (area.width.min(58), area.height.min(HELP.len() as u16 + 2));
    let place = Rect::new(area.x + (area.width - width) / 2, area.y + (area.height - height) / 2, width, height);
    Clear.render(place, buffer);
    let lines: Vec<Line<'_>> = HELP.into_iter().map(Line::from).collect();
    Paragraph::new(lines).block(Block::bordered().title(" help ")).render(place, buffer);
}
