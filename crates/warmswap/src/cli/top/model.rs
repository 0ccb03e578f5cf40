//! What is shown, as plain values made of what brokers answer. Everything that came from outside is checked here: what is of another form
//! than expected is not there, text is cut and holds no control characters.

use serde_json::Value;
use warmswap_predict::{Feature, Unit};

use crate::cli::profile::{MISSING, Profile, amount};
use crate::cli::{plain, show};

/// Characters of a text that are kept.
const TEXT_MAX: usize = 400;
/// Rings that are listed.
const RINGS_MAX: usize = 64;
/// Journal lines that are kept.
pub(super) const EVENTS_MAX: usize = 12;

/// One device as its broker last told it.
#[derive(Clone, Debug, Default)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) state: String,
    /// Why there is nothing to be told.
    pub(super) message: Option<String>,
    pub(super) kind: String,
    pub(super) vmm: String,
    pub(super) socket: String,
    pub(super) phase: String,
    pub(super) primary: Backend,
    pub(super) shadow: Backend,
    /// Why there is no shadow, or why it is not ready.
    pub(super) shadow_note: Option<String>,
    pub(super) recovery: String,
    pub(super) fence: String,
    pub(super) rings: Vec<Ring>,
    /// How many there were, and the last one.
    pub(super) failovers: String,
    /// Why the last one was made.
    pub(super) last_cause: Option<String>,
    /// What an operator has to know: halted, misconfigured.
    pub(super) troubles: Vec<String>,
    /// How likely a failure is held to be, if anybody predicts it.
    pub(super) risk: Option<f64>,
    pub(super) profile: Option<Profile>,
    /// The last lines of the journal.
    pub(super) events: Vec<String>,
}

/// A process in a role.
#[derive(Clone, Debug, Default)]
pub(super) struct Backend {
    pub(super) pid: Option<u64>,
    pub(super) generation: Option<u64>,
    pub(super) state: Option<String>,
}

/// A ring.
#[derive(Clone, Debug, Default)]
pub(super) struct Ring {
    pub(super) index: Option<u64>,
    pub(super) size: Option<u64>,
    pub(super) inflight: Option<u64>,
    pub(super) observer: String,
}

/// The beginning of a text, that a terminal takes for nothing else.
pub(super) fn clean(text: &str) -> String {
    let end = text.char_indices().nth(TEXT_MAX).map_or(text.len(), |(at, _)| at);
    plain::clean(&text[..end])
}

fn text_of(value: &Value) -> Option<String> {
    value.as_str().map(clean)
}

fn word(value: &Value) -> String {
    text_of(value).unwrap_or_else(|| MISSING.to_owned())
}

/// A number as it is, or that it is missing.
pub(super) fn number(value: Option<u64>) -> String {
    value.map_or_else(|| MISSING.to_owned(), |value| value.to_string())
}

impl Backend {
    fn read(value: &Value) -> Backend {
        Backend {
            pid: value["pid"].as_u64(),
            generation: value["generation"].as_u64(),
            state: text_of(&value["state"]),
        }
    }

    pub(super) fn state(&self) -> &str {
        self.state.as_deref().unwrap_or(MISSING)
    }
}

impl Device {
    /// A device whose broker has told nothing.
    pub(super) fn absent(name: &str, state: &str, message: &str) -> Device {
        Device::read(name, &serde_json::json!({"state": state, "message": message}), None)
    }

    /// Reads the answers of its broker.
    pub(super) fn read(name: &str, status: &Value, profile: Option<&Value>) -> Device {
        let rings = status["rings"].as_array().map_or(&[][..], Vec::as_slice);
        let trouble = |key: &str| text_of(&status[key]).map(|why| format!("{key}: {why}"));
        let last = &status["last_failover"];
        Device {
            name: clean(name),
            state: word(&status["state"]),
            message: text_of(&status["message"]),
            kind: word(&status["type"]),
            vmm: word(&status["vmm"]),
            socket: word(&status["socket"]),
            phase: word(&status["phase"]),
            primary: Backend::read(&status["primary"]),
            shadow: Backend::read(&status["shadow"]),
            shadow_note: text_of(&status["shadow_note"]),
            recovery: word(&status["recovery_level"]),
            fence: word(&status["fence_level"]),
            rings: rings
                .iter()
                .take(RINGS_MAX)
                .map(|ring| Ring {
                    index: ring["index"].as_u64(),
                    size: ring["size"].as_u64(),
                    inflight: ring["inflight"].as_u64(),
                    observer: word(&ring["observer"]),
                })
                .collect(),
            failovers: clean(&show::failovers(status)),
            last_cause: text_of(&last["cause"]),
            troubles: ["halted", "misconfigured", "refusal"].into_iter().filter_map(trouble).collect(),
            risk: risk(profile),
            profile: profile.map(Profile::read),
            events: Vec::new(),
        }
    }

    /// The current value of a feature.
    pub(super) fn value(&self, feature: Feature) -> Option<f64> {
        self.profile.as_ref()?.current()?.value(feature)
    }

    /// The same for people.
    pub(super) fn shown(&self, feature: Feature) -> String {
        amount(self.value(feature), feature.spec().unit)
    }

    /// The course of a feature over the last windows, the oldest first.
    pub(super) fn course(&self, feature: Feature) -> Vec<Option<f64>> {
        self.profile.as_ref().map_or_else(Vec::new, |profile| profile.course(feature))
    }

    /// Whether it needs somebody's attention.
    pub(super) fn alarm(&self) -> Alarm {
        match self.state.as_str() {
            "protected" => Alarm::None,
            "starting" | "failing-over" => Alarm::Passing,
            "unprotected" | "silent" => Alarm::Warning,
            _ => Alarm::Error,
        }
    }
}

/// How much a state asks for attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alarm {
    None,
    Passing,
    Warning,
    Error,
}

/// A column of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Name,
    State,
    Primary,
    Shadow,
    Requests,
    Bytes,
    Depth,
    P50,
    P99,
    Max,
    Errors,
    Cpu,
    Memory,
    Oldest,
    Risk,
    RequestsCourse,
    P99Course,
}

impl Column {
    /// All in their order.
    pub(super) const ALL: [Column; 17] = [
        Column::Name,
        Column::State,
        Column::Primary,
        Column::Shadow,
        Column::Requests,
        Column::Bytes,
        Column::Depth,
        Column::P50,
        Column::P99,
        Column::Max,
        Column::Errors,
        Column::Cpu,
        Column::Memory,
        Column::Oldest,
        Column::Risk,
        Column::RequestsCourse,
        Column::P99Course,
    ];

    /// By which the list can be sorted, in the order in which the key goes through them.
    pub(super) const SORTS: [Column; 13] = [
        Column::Name,
        Column::State,
        Column::Requests,
        Column::Bytes,
        Column::Depth,
        Column::P50,
        Column::P99,
        Column::Max,
        Column::Errors,
        Column::Cpu,
        Column::Memory,
        Column::Oldest,
        Column::Risk,
    ];

    pub(super) fn title(self) -> &'static str {
        match self {
            Column::Name => "DEVICE",
            Column::State => "STATE",
            Column::Primary => "PRIMARY",
            Column::Shadow => "SHADOW",
            Column::Requests => "REQ/S",
            Column::Bytes => "BYTES/S",
            Column::Depth => "DEPTH",
            Column::P50 => "P50",
            Column::P99 => "P99",
            Column::Max => "MAX",
            Column::Errors => "ERR/S",
            Column::Cpu => "CPU",
            Column::Memory => "MEMORY",
            Column::Oldest => "OLDEST",
            Column::Risk => "RISK",
            Column::RequestsCourse => "REQ ▂▅█",
            Column::P99Course => "P99 ▂▅█",
        }
    }

    /// The feature that it shows.
    pub(super) fn feature(self) -> Option<Feature> {
        Some(match self {
            Column::Requests | Column::RequestsCourse => Feature::Completions,
            Column::Bytes => Feature::Bytes,
            Column::Depth => Feature::Depth,
            Column::P50 => Feature::LatencyP50,
            Column::P99 | Column::P99Course => Feature::LatencyP99,
            Column::Max => Feature::LatencyMax,
            Column::Errors => Feature::Errors,
            Column::Cpu => Feature::Cpu,
            Column::Memory => Feature::Rss,
            Column::Oldest => Feature::OldestAge,
            Column::Name | Column::State | Column::Primary | Column::Shadow | Column::Risk => return None,
        })
    }

    /// What stands in it.
    pub(super) fn cell(self, device: &Device, width: usize) -> String {
        match self {
            Column::Name => cut(&device.name, width),
            Column::State => cut(&device.state, width),
            Column::Primary => number(device.primary.pid),
            Column::Shadow => device.shadow.state().to_owned(),
            Column::Risk => amount(device.risk, Unit::Share),
            Column::RequestsCourse => sparkline(&device.course(Feature::Completions), width),
            Column::P99Course => sparkline(&device.course(Feature::LatencyP99), width),
            // The head says per second already.
            Column::Requests | Column::Bytes | Column::Errors => {
                let shown = self.feature().map_or_else(String::new, |feature| device.shown(feature));
                shown.trim_end_matches("/s").to_owned()
            }
            _ => self.feature().map_or_else(String::new, |feature| device.shown(feature)),
        }
    }
}

/// Puts the devices into the order of a column: names upwards, troubles first, numbers downwards with the missing ones last.
pub(super) fn sort(devices: &mut [&Device], by: Column) {
    let value = |device: &Device| match by {
        Column::State => Some(f64::from(device.alarm() as u8)),
        Column::Risk => device.risk,
        _ => by.feature().and_then(|feature| device.value(feature)),
    };
    devices.sort_by(|left, right| {
        let (before, after) = (value(left), value(right));
        let order = match (before, after) {
            (Some(before), Some(after)) => after.total_cmp(&before),
            _ => after.is_some().cmp(&before.is_some()),
        };
        order.then_with(|| left.name.cmp(&right.name))
    });
}

/// As much of a text as fits, marked if that is not all.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept = text.chars().take(width.saturating_sub(1));
    kept.chain((width > 0).then_some('…')).collect()
}

/// The last values as bars of their part of the greatest; a gap where one is missing.
pub(super) fn sparkline(values: &[Option<f64>], width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let values = &values[values.len().saturating_sub(width)..];
    let greatest = greatest(values);
    let bar = |value: &Option<f64>| match value {
        None => ' ',
        // The cast saturates.
        Some(value) if greatest > 0.0 => BARS[((value / greatest * 7.0).round() as usize).min(7)],
        Some(_) => BARS[0],
    };
    let bars: String = values.iter().map(bar).collect();
    format!("{bars:>width$}")
}

/// The greatest value, at least nothing.
pub(super) fn greatest(values: &[Option<f64>]) -> f64 {
    values.iter().flatten().copied().fold(0.0, f64::max)
}

/// The probability of a failure within a minute of windows, as the broker's failure model has it.
fn risk(profile: Option<&Value>) -> Option<f64> {
    let risk = profile?["verdict"]["risk_within_windows"]["60"].as_f64();
    risk.filter(|risk| (0.0..=1.0).contains(risk))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn hostile_answers_show_as_missing() {
        let hostile = [
            json!(null),
            json!([1, 2]),
            json!({"state": 3, "primary": "x", "shadow": [], "rings": {"a": 1}, "last_failover": 7, "risk": "high"}),
            json!({"rings": [null, 1, "x", {"index": -1, "size": 1e300}], "failovers": [], "risk": 1e308, "halted": {}}),
            json!({"primary": {"pid": -5, "state": 5}, "last_failover": {"kind": "crash", "blackout_us": "x"}}),
        ];
        for status in hostile {
            let device = Device::read("disk", &status, Some(&status));
            assert_eq!(device.state, "-");
            assert_eq!(device.risk, None);
            for column in Column::ALL {
                for width in [0, 1, 8, 40] {
                    let cell = column.cell(&device, width);
                    assert!(column == Column::Name || ["-", "…", ""].contains(&cell.trim()), "{column:?} {cell}");
                }
            }
        }
    }

    #[test]
    fn text_from_outside_is_cut_and_cannot_steer_a_terminal() {
        let status = json!({"state": "\u{1b}[2Jgone\n", "message": "x".repeat(100_000)});
        let device = Device::read("di\u{7}sk", &status, None);
        assert_eq!((device.name.as_str(), device.state.as_str()), ("di sk", " [2Jgone "));
        assert_eq!(device.message.map(|text| text.len()), Some(TEXT_MAX));
    }

    #[test]
    fn sparklines_end_at_the_latest_value_and_leave_gaps() {
        assert_eq!(sparkline(&[Some(0.0), None, Some(7.0), Some(3.5)], 6), "  ▁ █▅");
        assert_eq!(sparkline(&[Some(1.0), Some(8.0), Some(8.0)], 2), "██");
        assert_eq!(sparkline(&[Some(0.0), Some(-4.0)], 2), "▁▁");
        assert_eq!(sparkline(&[Some(f64::MAX), Some(1.0)], 2), "█▁");
        assert_eq!(sparkline(&[], 3), "   ");
        assert_eq!(sparkline(&[Some(1.0)], 0), "");
    }

    #[test]
    fn texts_are_cut_visibly() {
        assert_eq!((cut("disk", 4).as_str(), cut("disks", 4).as_str(), cut("x", 0).as_str()), ("disk", "dis…", ""));
    }

    #[test]
    fn lists_are_sorted_with_what_matters_first() {
        let device = |name: &str, state: &str, requests: Value| {
            let profile = json!({"windows": [{"values": {"completions_per_s": requests}}]});
            Device::read(name, &json!({ "state": state }), Some(&profile))
        };
        let devices = [
            device("c", "protected", json!(5)),
            device("a", "halted", json!(null)),
            device("d", "protected", json!(50)),
            device("b", "silent", json!("x")),
        ];
        let order = |by: Column| {
            let mut sorted: Vec<&Device> = devices.iter().collect();
            sort(&mut sorted, by);
            sorted.iter().map(|device| device.name.as_str()).collect::<String>()
        };
        assert_eq!(order(Column::Name), "abcd");
        assert_eq!(order(Column::State), "abcd");
        assert_eq!(order(Column::Requests), "dcab");
        assert_eq!(order(Column::Risk), "abcd");
    }
}
