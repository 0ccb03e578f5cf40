//! What the host tells the guest (on the kernel command line) and what the guest tells the host (lines on the second
//! serial port): `LAB word key=value key=value …`.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};

use super::device::Device;

/// The word every line of the guest begins with.
const MARK: &str = "LAB";
/// What the guest writes into its kernel log at the start: a log without it was not read, and cannot count as clean.
pub(crate) const KERNEL_LOG_MARK: &str = "lab: the kernel log is being read";

/// How the guest loads its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Load {
    /// Rounds of fio over all depths and queue counts, one after the other.
    Rounds,
    /// Two fio at depth 16 that overlap, so that the disk is never idle.
    Steady,
}

/// The host's orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Orders {
    /// Seed of every load.
    pub(crate) seed: u64,
    /// What is loaded.
    pub(crate) device: Device,
    /// How to load a disk.
    pub(crate) load: Load,
}

impl Orders {
    /// The words for the kernel command line.
    pub(crate) fn to_command_line(self) -> String {
        let load = match self.load {
            Load::Rounds => "rounds",
            Load::Steady => "steady",
        };
        format!("lab.seed={} lab.device={} lab.load={load}", self.seed, self.device.name())
    }

    /// The orders in a kernel command line.
    pub(crate) fn from_command_line(line: &str) -> anyhow::Result<Self> {
        let find = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let seed = find("lab.seed").ok_or_else(|| anyhow::anyhow!("no lab.seed on the command line"))?.parse()?;
        let device = find("lab.device").and_then(Device::from_name);
        let device = device.ok_or_else(|| anyhow::anyhow!("no known lab.device on the command line"))?;
        let load = match find("lab.load") {
            Some("rounds") => Load::Rounds,
            Some("steady") => Load::Steady,
            other => anyhow::bail!("lab.load is {other:?}"),
        };
        Ok(Self { seed, device, load })
    }
}

/// A line of the guest, being built.
#[derive(Debug)]
pub(crate) struct Line(String);

impl Line {
    /// A line of the kind `word`.
    pub(crate) fn new(word: &str) -> Self {
        Self(format!("{MARK} {word}"))
    }

    /// Adds a field; blanks in the value become underscores, because a field is one word.
    pub(crate) fn with(mut self, key: &str, value: impl Display) -> Self {
        let value = value.to_string().split_whitespace().collect::<Vec<_>>().join("_");
        write!(self.0, " {key}={value}").expect("writing to a string cannot fail");
        self
    }

    /// The text, without a line end.
    pub(crate) fn text(&self) -> &str {
        &self.0
    }
}

/// A line of the guest, as read by the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heard {
    /// Its kind.
    pub(crate) word: String,
    fields: BTreeMap<String, String>,
}

impl Heard {
    /// Reads a line; `None` for anything that is not ours.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.trim().strip_prefix(MARK)?.split_whitespace();
        let word = words.next()?.to_owned();
        let fields =
            words.filter_map(|field| field.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        Some(Self { word, fields })
    }

    /// A field as text.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.fields.get(key).map(String::as_str)
    }

    /// A field as a number.
    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        self.text(key)?.parse().ok()
    }

    /// A field as a hexadecimal number.
    pub(crate) fn hex(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.text(key)?, 16).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_the_command_line() {
        let orders = Orders { seed: 42, device: Device::Rng, load: Load::Steady };
        let line = format!("console=ttyS0 {} quiet", orders.to_command_line());
        assert_eq!(Orders::from_command_line(&line).expect("our own line"), orders);
        Orders::from_command_line("console=ttyS0").unwrap_err();
    }

    #[test]
    fn a_line_is_read_as_it_was_built() {
        let line = Line::new("fio").with("round", 3).with("why", "bad header at 4096").with("sum", "ff");
        let heard = Heard::parse(line.text()).expect("our own line");
        assert_eq!((heard.word.as_str(), heard.number("round"), heard.hex("sum")), ("fio", Some(3), Some(255)));
        assert_eq!(heard.text("why"), Some("bad_header_at_4096"));
        assert_eq!(Heard::parse("[    5.0] random kernel text"), None);
    }
}
