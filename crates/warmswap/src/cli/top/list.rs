//! The list page: a line for each device. Columns that have no room are left out, the least needed first.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, StatefulWidget, Table, TableState, Widget};

use super::Scene;
use super::model::{Alarm, Column, Device, cut};

/// The most needed first.
const NEEDED: [Column; 17] = [
    Column::Name,
    Column::State,
    Column::Requests,
    Column::P99,
    Column::Errors,
    Column::Cpu,
    Column::Memory,
    Column::Depth,
    Column::Bytes,
    Column::RequestsCourse,
    Column::P50,
    Column::Max,
    Column::Oldest,
    Column::Shadow,
    Column::Risk,
    Column::Primary,
    Column::P99Course,
];

/// A course has one character for a window, and there are no more windows.
const COURSE_MAX: u16 = 60;

fn width(column: Column, name: u16) -> u16 {
    match column {
        Column::Name => name,
        Column::State => 12,
        Column::Shadow => 11,
        Column::Primary | Column::Bytes | Column::Memory => 8,
        Column::P50 | Column::P99 | Column::Max | Column::Oldest => 7,
        Column::Requests => 6,
        Column::Depth | Column::Errors | Column::Cpu | Column::Risk => 5,
        Column::RequestsCourse | Column::P99Course => 8,
    }
}

/// The columns that have room, in their order, with their widths.
fn columns(room: u16, name: u16) -> Vec<(Column, u16)> {
    let mut left = room + 1;
    let mut chosen = Vec::new();
    for column in NEEDED {
        let wide = width(column, name) + 1;
        if wide <= left {
            left -= wide;
            chosen.push(column);
        }
    }
    let courses = [Column::RequestsCourse, Column::P99Course];
    let drawn = courses.iter().filter(|course| chosen.contains(course)).count() as u16;
    let more = left.checked_div(drawn).unwrap_or(0);
    let wide = |column: Column| match column {
        Column::RequestsCourse | Column::P99Course => (width(column, name) + more).min(COURSE_MAX),
        _ => width(column, name),
    };
    Column::ALL.into_iter().filter(|column| chosen.contains(column)).map(|column| (column, wide(column))).collect()
}

/// The colour of a state.
pub(super) fn style(device: &Device) -> Style {
    match device.alarm() {
        Alarm::None => Style::new().fg(Color::Green),
        Alarm::Passing => Style::new().fg(Color::Cyan),
        Alarm::Warning => Style::new().fg(Color::Yellow),
        Alarm::Error => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
    }
}

fn is_text(column: Column) -> bool {
    matches!(column, Column::Name | Column::State | Column::Shadow)
}

/// Draws the page.
pub(super) fn draw(scene: &Scene<'_>, area: Rect, buffer: &mut Buffer) {
    let longest = scene.devices.iter().map(|device| device.name.chars().count()).max().unwrap_or(0);
    let columns = columns(area.width, u16::try_from(longest.clamp(7, 20)).unwrap_or(20));
    let aligned = |column: Column, text: String| {
        let line = Line::from(text);
        if is_text(column) { line } else { line.right_aligned() }
    };
    let head = columns.iter().map(|(column, wide)| {
        let mark = if *column == scene.view.sort { "▾" } else { "" };
        Cell::from(aligned(*column, cut(&format!("{mark}{}", column.title()), usize::from(*wide))))
    });
    let rows = scene.devices.iter().map(|device| {
        Row::new(columns.iter().map(|(column, wide)| {
            let cell = Cell::from(aligned(*column, column.cell(device, usize::from(*wide))));
            if *column == Column::State { cell.style(style(device)) } else { cell }
        }))
    });
    let names: Vec<&str> = scene.devices.iter().map(|device| device.name.as_str()).collect();
    let selected = scene.view.index(&names);
    let table = Table::new(rows, columns.iter().map(|(_, wide)| Constraint::Length(*wide)))
        .header(Row::new(head).style(Modifier::BOLD))
        .column_spacing(1)
        .row_highlight_style(Modifier::REVERSED);
    let notes = notes(scene.devices.get(selected).copied());
    let [above, below] = split(area, u16::try_from(notes.len()).unwrap_or(0));
    let mut state = TableState::new().with_selected((!names.is_empty()).then_some(selected));
    StatefulWidget::render(table, above, buffer, &mut state);
    let notes: Vec<Line<'_>> = notes.into_iter().map(|note| Line::from(cut(&note, usize::from(area.width)))).collect();
    Paragraph::new(notes).render(below, buffer);
}

/// The last lines of an area, if there are more than they.
fn split(area: Rect, lines: u16) -> [Rect; 2] {
    let lines = lines.min(area.height.saturating_sub(3));
    let above = Rect { height: area.height - lines, ..area };
    [above, Rect { y: area.y + above.height, height: lines, ..area }]
}

/// What there is to say of the selected device.
fn notes(device: Option<&Device>) -> Vec<String> {
    let Some(device) = device else { return vec!["no device is guarded here".to_owned()] };
    let mut notes: Vec<String> = device.message.iter().chain(&device.troubles).cloned().collect();
    if device.state != "protected"
        && let Some(note) = &device.shadow_note
    {
        notes.push(format!("shadow: {note}"));
    }
    if device.message.is_none() && device.profile.is_none() {
        notes.push("no profile: this broker keeps none".to_owned());
    }
    notes.iter().map(|note| format!("{}: {note}", device.name)).collect()
}
