//! Text of bounded length, without allocation: what is said on stderr, and what is told to a child.

use std::fmt::{self, Write};

use rustix::event::{PollFd, PollFlags, Timespec};

/// Up to `N` bytes of text; what is more is left out.
pub(crate) struct Line<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Line<N> {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Line { bytes: [0; N], length: 0 }
    }

    /// Appends text.
    pub(crate) fn add(&mut self, text: fmt::Arguments<'_>) {
        // Appending never fails: it cuts off.
        let _cut = self.write_fmt(text);
    }

    /// What it holds.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl<const N: usize> Write for Line<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let count = text.len().min(N - self.length);
        self.bytes[self.length..][..count].copy_from_slice(&text.as_bytes()[..count]);
        self.length += count;
        Ok(())
    }
}

/// Says something on stderr in one line, and in one write, if whoever reads there has room for it: nobody is waited for.
pub(crate) fn say(text: fmt::Arguments<'_>) {
    let mut line = Line::<512>::new();
    line.add(format_args!("warmswap keeper: {text}"));
    line.length = line.length.min(511);
    line.add(format_args!("\n"));
    let stderr = std::io::stderr();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut room = [PollFd::new(&stderr, PollFlags::OUT)];
    if matches!(rustix::event::poll(&mut room, Some(&now)), Ok(1)) {
        // Nobody is left to be told.
        let _unheard = rustix::io::write(&stderr, line.bytes());
    }
}
