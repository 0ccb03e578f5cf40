//! What is looked at, and what keys do to it: a state machine without a terminal.
//!
//! ```text
//! List ──Enter──▶ Device ──Esc──▶ List        ? opens help over either, any key closes it
//! ```

use super::model::Column;

/// A key, as far as it means something here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Up,
    Down,
    PageUp,
    PageDown,
    First,
    Last,
    Enter,
    Back,
    Sort,
    SortBack,
    Help,
    Quit,
    /// Any other.
    Other,
}

/// Which page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Page {
    List,
    Device(String),
}

/// What is looked at.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) page: Page,
    pub(super) help: bool,
    /// By name, so that it stays on its device when the order changes.
    pub(super) selected: Option<String>,
    pub(super) sort: Column,
    /// First line of the device page that is shown.
    pub(super) scroll: u16,
}

/// Lines that a page key goes.
const PAGE: u16 = 10;

impl View {
    pub(super) fn new(page: Page) -> View {
        View { page, help: false, selected: None, sort: Column::Name, scroll: 0 }
    }

    /// Index of the selected device in the list as it is shown; the first if the selected one is gone.
    pub(super) fn index(&self, shown: &[&str]) -> usize {
        shown.iter().position(|name| self.selected.as_deref() == Some(*name)).unwrap_or(0)
    }

    /// Takes a key, with the names in the list as it is shown. False: it is over.
    #[must_use]
    pub(super) fn key(&mut self, key: Key, shown: &[&str]) -> bool {
        if key == Key::Quit {
            return false;
        }
        if self.help || key == Key::Help {
            self.help = !self.help;
            return true;
        }
        match self.page {
            Page::List => self.key_on_list(key, shown),
            Page::Device(_) => self.key_on_device(key),
        }
        true
    }

    fn key_on_list(&mut self, key: Key, shown: &[&str]) {
        let (at, last) = (self.index(shown), shown.len().saturating_sub(1));
        let to = match key {
            Key::Up => at.saturating_sub(1),
            Key::Down => at + 1,
            Key::PageUp => at.saturating_sub(usize::from(PAGE)),
            Key::PageDown => at + usize::from(PAGE),
            Key::First => 0,
            Key::Last => last,
            Key::Enter => {
                if let Some(name) = shown.get(at) {
                    self.selected = Some((*name).to_owned());
                    self.page = Page::Device((*name).to_owned());
                    self.scroll = 0;
                }
                return;
            }
            Key::Sort => return self.sort_by(1),
            Key::SortBack => return self.sort_by(Column::SORTS.len() - 1),
            Key::Back | Key::Help | Key::Quit | Key::Other => return,
        };
        self.selected = shown.get(to.min(last)).map(|name| (*name).to_owned());
    }

    fn sort_by(&mut self, steps: usize) {
        let at = Column::SORTS.iter().position(|column| *column == self.sort).unwrap_or(0);
        self.sort = Column::SORTS[(at + steps) % Column::SORTS.len()];
    }

    fn key_on_device(&mut self, key: Key) {
        self.scroll = match key {
            Key::Up => self.scroll.saturating_sub(1),
            Key::Down => self.scroll.saturating_add(1),
            Key::PageUp => self.scroll.saturating_sub(PAGE),
            Key::PageDown => self.scroll.saturating_add(PAGE),
            Key::First => 0,
            // Drawing brings it back to what there is.
            Key::Last => u16::MAX,
            Key::Back => {
                if let Page::Device(name) = std::mem::replace(&mut self.page, Page::List) {
                    self.selected = Some(name);
                }
                0
            }
            Key::Enter | Key::Sort | Key::SortBack | Key::Help | Key::Quit | Key::Other => self.scroll,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: [&str; 3] = ["a", "b", "c"];

    fn press(view: &mut View, keys: &[Key], shown: &[&str]) -> bool {
        keys.iter().all(|key| view.key(*key, shown))
    }

    #[test]
    fn the_selection_moves_within_the_list_and_stays_on_its_device() {
        let mut view = View::new(Page::List);
        assert_eq!(view.index(&SHOWN), 0);
        assert!(press(&mut view, &[Key::Down], &SHOWN));
        assert_eq!(view.selected.as_deref(), Some("b"));
        assert_eq!(view.index(&["b", "c", "a"]), 0);
        assert!(press(&mut view, &[Key::Down, Key::Down, Key::PageDown], &SHOWN));
        assert_eq!(view.selected.as_deref(), Some("c"));
        assert!(press(&mut view, &[Key::PageUp, Key::Up], &SHOWN));
        assert_eq!(view.selected.as_deref(), Some("a"));
        assert!(press(&mut view, &[Key::Last, Key::First, Key::Other], &SHOWN));
        assert_eq!(view.selected.as_deref(), Some("a"));
        // The device goes away.
        assert_eq!(view.index(&["b", "c"]), 0);
    }

    #[test]
    fn enter_opens_a_device_and_escape_comes_back_to_it() {
        let mut view = View::new(Page::List);
        assert!(press(&mut view, &[Key::Down, Key::Enter], &SHOWN));
        assert_eq!(view.page, Page::Device("b".to_owned()));
        assert!(press(&mut view, &[Key::Down, Key::PageDown, Key::Up, Key::Enter, Key::Sort], &SHOWN));
        assert_eq!(view.scroll, PAGE);
        // The list behind has changed meanwhile.
        assert!(press(&mut view, &[Key::Back], &["c"]));
        assert_eq!((&view.page, view.selected.as_deref(), view.scroll), (&Page::List, Some("b"), 0));
        // Once more means nothing.
        assert!(press(&mut view, &[Key::Back], &SHOWN));
        assert_eq!(view.page, Page::List);
    }

    #[test]
    fn an_empty_list_takes_every_key() {
        let mut view = View::new(Page::List);
        let keys = [Key::Up, Key::Down, Key::PageDown, Key::First, Key::Last, Key::Enter, Key::Back, Key::Sort];
        assert!(press(&mut view, &keys, &[]));
        assert_eq!((&view.page, &view.selected), (&Page::List, &None));
    }

    #[test]
    fn the_sort_key_goes_round_both_ways() {
        let mut view = View::new(Page::List);
        assert!(press(&mut view, &[Key::Sort, Key::Sort], &SHOWN));
        assert_eq!(view.sort, Column::Requests);
        assert!(press(&mut view, &[Key::SortBack; 3], &SHOWN));
        assert_eq!(view.sort, Column::Risk);
        assert!(press(&mut view, &[Key::Sort], &SHOWN));
        assert_eq!(view.sort, Column::Name);
    }

    #[test]
    fn help_takes_one_key_and_quit_always_quits() {
        let mut view = View::new(Page::List);
        assert!(press(&mut view, &[Key::Help, Key::Enter], &SHOWN));
        assert_eq!((&view.page, view.help), (&Page::List, false));
        assert!(press(&mut view, &[Key::Help], &SHOWN));
        assert!(view.help);
        assert!(!press(&mut view, &[Key::Quit], &SHOWN));
    }
}
