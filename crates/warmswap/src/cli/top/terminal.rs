//! The terminal: it is given back as it was, however the program ends.

use std::io::{self, IsTerminal, Stdout, stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};
use ratatui::crossterm::{cursor, execute};
use ratatui::layout::Rect;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::view::Key;

/// Signals that end the program in order.
const SIGNALS: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// A terminal that is ours for as long as this value lives.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    ended: Arc<AtomicBool>,
    _given_back: GiveBack,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    Nothing,
    Key(Key),
    /// It has another size.
    Resized,
    /// A signal asks for the end.
    End,
}

/// Gives the terminal back when it is dropped.
struct GiveBack;

impl Drop for GiveBack {
    fn drop(&mut self) {
        give_back();
    }
}

/// Whether the terminal is ours. Giving it back twice would put the cursor where it was, over what was said since.
static OURS: AtomicBool = AtomicBool::new(false);

fn give_back() {
    if !OURS.swap(false, Ordering::AcqRel) {
        return;
    }
    // A terminal that is gone needs nothing back.
    let _gone = disable_raw_mode();
    let _gone = execute!(stdout(), LeaveAlternateScreen, cursor::Show);
}

/// Whether there is a terminal to draw on.
pub(super) fn is_there() -> bool {
    stdout().is_terminal()
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// There is none, or it does not do what is needed.
    pub(super) fn take() -> io::Result<Screen> {
        let ended = Arc::new(AtomicBool::new(false));
        for signal in SIGNALS {
            signal_hook::flag::register(signal, Arc::clone(&ended))?;
        }
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // Before the message, which would be lost with the alternate screen.
            give_back();
            before(panic);
        }));
        let given_back = GiveBack;
        OURS.store(true, Ordering::Release);
        enable_raw_mode()?;
        execute!(stdout(), EnterAlternateScreen, cursor::Hide)?;
        let terminal = Terminal::new(CrosstermBackend::new(stdout()))?;
        Ok(Screen { terminal, ended, _given_back: given_back })
    }

    /// Draws a frame.
    pub(super) fn draw(&mut self, draw: impl FnOnce(Rect, &mut Buffer)) -> io::Result<()> {
        self.terminal.draw(|frame| draw(frame.area(), frame.buffer_mut()))?;
        Ok(())
    }

    /// Waits for something to happen, for at most so long.
    pub(super) fn input(&self, wait: Duration) -> io::Result<Input> {
        if self.ended.load(Ordering::Relaxed) {
            return Ok(Input::End);
        }
        if !event::poll(wait)? {
            return Ok(Input::Nothing);
        }
        Ok(match event::read()? {
            Event::Key(key) if key.kind != KeyEventKind::Release => Input::Key(key_of(key)),
            Event::Resize(..) => Input::Resized,
            _ => Input::Nothing,
        })
    }
}

fn key_of(key: KeyEvent) -> Key {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return match key.code {
            // The terminal makes no signal of it now.
            KeyCode::Char('c') => Key::Quit,
            _ => Key::Other,
        };
    }
    match key.code {
        KeyCode::Up | KeyCode::Char('k') => Key::Up,
        KeyCode::Down | KeyCode::Char('j') => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown | KeyCode::Char(' ') => Key::PageDown,
        KeyCode::Home | KeyCode::Char('g') => Key::First,
        KeyCode::End | KeyCode::Char('G') => Key::Last,
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc | KeyCode::Backspace => Key::Back,
        KeyCode::Char('s') => Key::Sort,
        KeyCode::Char('S') => Key::SortBack,
        KeyCode::Char('?') => Key::Help,
        KeyCode::Char('q') => Key::Quit,
        _ => Key::Other,
    }
}
