//! The broker's control socket: JSON lines, never waited for while the guest has work.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};

/// One connection, non-blocking.
#[derive(Debug)]
pub(crate) struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// First byte of the buffer that was not yet handed out.
    start: usize,
}

impl Lines {
    /// Connects to the control socket.
    pub(crate) fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connecting to {}", path.display()))?;
        stream.set_nonblocking(true)?;
        Ok(Lines { stream, buffer: Vec::new(), start: 0 })
    }

    /// Sends one command. Commands are shorter than any socket buffer, so this does not block.
    pub(crate) fn send(&mut self, command: &serde_json::Value) -> anyhow::Result<()> {
        let mut line = command.to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes()).context("sending a command to the broker")
    }

    /// The next line, if a whole one is there.
    pub(crate) fn next(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            if let Some(length) = self.buffer[self.start..].iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&self.buffer[self.start..self.start + length]).into_owned();
                self.start += length + 1;
                return Ok(Some(line));
            }
            self.buffer.drain(..self.start);
            self.start = 0;
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn fill(&mut self) -> anyhow::Result<bool> {
        let mut part = [0; 16384];
        match self.stream.read(&mut part) {
            Ok(0) => bail!("the broker closed its control socket"),
            Ok(count) => {
                self.buffer.extend_from_slice(&part[..count]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error).context("reading from the broker"),
        }
    }
}

impl AsFd for Lines {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("non-blocking");
        let mut lines = Lines { stream: ours, buffer: Vec::new(), start: 0 };
        theirs.write_all(b"one\ntw").expect("write");
        assert_eq!(lines.next().expect("read").as_deref(), Some("one"));
        assert_eq!(lines.next().expect("read"), None);
        theirs.write_all(b"o\nthree\n").expect("write");
        assert_eq!(lines.next().expect("read").as_deref(), Some("two"));
        assert_eq!(lines.next().expect("read").as_deref(), Some("three"));
        drop(theirs);
        lines.next().expect_err("closed");
    }
}
