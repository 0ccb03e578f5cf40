//! The page of one device. It is drawn as long as it is, and what has no room is scrolled to.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph, Widget};
use warmswap_predict::{FEATURES, Feature, Role, Unit};

use super::list;
use super::model::{Backend, Device, cut, greatest, number};
use crate::cli::profile::{MISSING, WINDOWS_MAX, amount};

/// Lines of a chart with its frame.
const CHART_LINES: u16 = 8;
/// Columns that a chart needs.
const CHART_COLUMNS: u16 = 40;
/// Columns of a feature with its value.
const FEATURE_COLUMNS: u16 = 40;
/// What is greater than this is no measure of anything here; a chart has no room for it.
const DRAWN_MAX: f64 = 1e15;

/// A chart: its title, and the features with their names and colours.
type Plot = (&'static str, &'static [(Feature, &'static str, Color)]);

const PLOTS: [Plot; 5] = [
    ("requests", &[(Feature::Completions, "", Color::Cyan)]),
    ("latency", &[(Feature::LatencyP50, "p50", Color::Green), (Feature::LatencyP99, "p99", Color::Yellow)]),
    ("depth", &[(Feature::Depth, "", Color::Cyan)]),
    ("processors", &[(Feature::Cpu, "", Color::Magenta)]),
    ("memory", &[(Feature::Rss, "", Color::Blue)]),
];

/// A part of the page.
enum Part<'a> {
    Lines(Vec<Line<'a>>),
    Charts,
}

/// Draws the page from line `scroll` on; a greater one than there is shows the end. Answers the greatest.
pub(super) fn draw(device: &Device, scroll: u16, area: Rect, buffer: &mut Buffer) -> u16 {
    let width = area.width;
    let mut parts = vec![Part::Lines(identity(device, width))];
    if device.profile.is_some() {
        parts.push(Part::Charts);
    }
    parts.push(Part::Lines(events(device, width)));
    parts.push(Part::Lines(features(device, width)));

    let across = (width / CHART_COLUMNS).clamp(1, 3);
    let charts_height = (PLOTS.len() as u16).div_ceil(across) * CHART_LINES;
    let height = |part: &Part<'_>| match part {
        Part::Lines(lines) => u16::try_from(lines.len()).unwrap_or(u16::MAX),
        Part::Charts => charts_height,
    };
    let whole = Rect::new(0, 0, width, parts.iter().map(height).sum());
    let mut page = Buffer::empty(whole);
    let mut y = 0;
    for part in parts {
        let place = Rect { y, height: height(&part), ..whole };
        y += place.height;
        match part {
            Part::Lines(lines) => Paragraph::new(lines).render(place, &mut page),
            Part::Charts => charts(device, across, place, &mut page),
        }
    }
    let scroll_max = whole.height.saturating_sub(area.height);
    let from = scroll.min(scroll_max);
    for (to, line) in area.rows().zip(from..whole.height) {
        for x in 0..width {
            buffer[(to.x + x, to.y)] = page[(x, line)].clone();
        }
    }
    scroll_max
}

fn heading(text: &str) -> Line<'static> {
    Line::styled(text.to_uppercase(), Modifier::BOLD)
}

fn backend(role: &str, backend: &Backend) -> String {
    let Some(state) = &backend.state else { return format!("{role:<9} {MISSING}") };
    format!("{role:<9} {state}, process {}, generation {}", number(backend.pid), number(backend.generation))
}

fn identity(device: &Device, width: u16) -> Vec<Line<'static>> {
    let fit = |text: String| Line::from(cut(&text, usize::from(width)));
    let mut lines = vec![Line::from(vec![
        Span::styled(device.name.clone(), Modifier::BOLD),
        Span::raw("  "),
        Span::styled(device.state.clone(), list::style(device)),
        Span::raw(format!("  risk {}", amount(device.risk, Unit::Share))),
    ])];
    if let Some(message) = &device.message {
        lines.push(fit(message.clone()));
        return lines;
    }
    lines.extend(device.troubles.iter().map(|trouble| fit(trouble.clone())));
    lines.push(fit(format!("device    {}, VMM {}, socket {}", device.kind, device.vmm, device.socket)));
    lines.push(fit(backend("primary", &device.primary)));
    lines.push(fit(backend("shadow", &device.shadow)));
    if device.state != "protected"
        && let Some(note) = &device.shadow_note
    {
        lines.push(fit(format!("          {note}")));
    }
    lines.push(fit(format!("crash     recovery {}, fence {}, phase {}", device.recovery, device.fence, device.phase)));
    lines.push(fit(format!("failovers {}", device.failovers)));
    if let Some(cause) = &device.last_cause {
        lines.push(fit(format!("          {cause}")));
    }
    for ring in &device.rings {
        lines.push(fit(format!(
            "ring {:<4} {} entries, {} in flight, observer {}",
            number(ring.index),
            number(ring.size),
            number(ring.inflight),
            ring.observer
        )));
    }
    lines
}

fn events(device: &Device, width: u16) -> Vec<Line<'static>> {
    if device.events.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![Line::default(), heading("events")];
    lines.extend(device.events.iter().map(|event| Line::from(cut(event, usize::from(width)))));
    lines
}

/// The whole current window, by role, in as many columns as there is room for, each read downwards.
fn features(device: &Device, width: u16) -> Vec<Line<'static>> {
    if device.message.is_some() {
        return Vec::new();
    }
    let Some(profile) = &device.profile else {
        return vec![Line::default(), Line::from("no profile: this broker keeps none")];
    };
    let across = usize::from((width / FEATURE_COLUMNS).max(1));
    let mut lines = Vec::new();
    for role in [Role::Context, Role::Outcome, Role::Limit, Role::Quality] {
        lines.extend([Line::default(), heading(role.name())]);
        let of_role = Feature::ALL.into_iter().zip(FEATURES).filter(|(_, spec)| spec.role == role);
        let cells: Vec<String> =
            of_role.map(|(feature, spec)| format!("{:<26}{:>11}", spec.name, device.shown(feature))).collect();
        let high = cells.len().div_ceil(across);
        for row in 0..high {
            let line: Vec<&str> = cells.iter().skip(row).step_by(high).map(String::as_str).collect();
            lines.push(Line::from(line.join("   ")));
        }
    }
    if let Some(window) = profile.current() {
        lines.push(Line::default());
        lines.push(Line::from(format!(
            "window {} of backend {}, over {}; {} records lost",
            number(window.number),
            number(window.backend),
            amount(window.span_ms.map(|span| span * 1e3), Unit::Micros),
            number(profile.records_lost)
        )));
    }
    lines
}

fn charts(device: &Device, across: u16, area: Rect, buffer: &mut Buffer) {
    let wide = area.width / across;
    for (at, plot) in (0..).zip(&PLOTS) {
        let place = Rect::new(
            area.x + at % across * wide,
            area.y + at / across * CHART_LINES,
            wide,
            CHART_LINES.min(area.height),
        );
        chart(device, plot, place, buffer);
    }
}

/// What is there without a gap, each a line of its own.
fn pieces(values: &[Option<f64>]) -> Vec<Vec<(f64, f64)>> {
    // The latest is at the right edge.
    let first = WINDOWS_MAX.saturating_sub(values.len());
    let mut pieces = vec![Vec::new()];
    for (at, value) in (first..).zip(values) {
        match (value.filter(|value| *value < DRAWN_MAX), pieces.last_mut()) {
            (Some(value), Some(piece)) => piece.push((at as f64, value.max(0.0))),
            (None, Some(piece)) if !piece.is_empty() => pieces.push(Vec::new()),
            _ => (),
        }
    }
    pieces
}

fn chart(device: &Device, (title, lines): &Plot, area: Rect, buffer: &mut Buffer) {
    let courses: Vec<Vec<Option<f64>>> = lines.iter().map(|(feature, ..)| device.course(*feature)).collect();
    let top = courses.iter().map(|course| greatest(course)).fold(0.0, f64::max).min(DRAWN_MAX);
    let unit = lines.first().map_or(Unit::Count, |(feature, ..)| feature.spec().unit);
    let mut head = vec![Span::styled(format!(" {title} "), Modifier::BOLD)];
    for (feature, name, color) in *lines {
        let text = format!("{name} {} ", device.shown(*feature));
        head.push(Span::styled(text.trim_start().to_owned(), Style::new().fg(*color)));
    }
    let drawn: Vec<(Vec<(f64, f64)>, Color)> = lines
        .iter()
        .zip(&courses)
        .flat_map(|((_, _, color), course)| pieces(course).into_iter().map(|piece| (piece, *color)))
        .collect();
    let datasets = drawn
        .iter()
        .map(|(piece, color)| {
            Dataset::default()
                .marker(Marker::Braille)
                .graph_type(GraphType::Line)
                .style(Style::new().fg(*color))
                .data(piece)
        })
        .collect();
    let labels = ["0".to_owned(), amount(Some(top), unit)];
    // Nothing at all is drawn at the bottom.
    let bound = if top > 0.0 { top } else { 1.0 };
    Chart::new(datasets)
        .block(Block::bordered().title(Line::from(head)))
        .x_axis(Axis::default().bounds([0.0, (WINDOWS_MAX - 1) as f64]))
        .y_axis(Axis::default().bounds([0.0, bound]).labels(labels))
        .render(area, buffer);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_breaks_where_a_value_is_missing() {
        let absurd = Some(1e300);
        let values = [None, Some(1.0), Some(-2.0), None, None, Some(3.0), absurd];
        let pieces = pieces(&values);
        assert_eq!(pieces, [vec![(54.0, 1.0), (55.0, 0.0)], vec![(58.0, 3.0)], vec![]]);
    }
}
