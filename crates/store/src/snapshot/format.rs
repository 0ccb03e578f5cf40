//! A snapshot as bytes.
//!
//! Little-endian: magic `wsSn`, format (u16), bytes of the body (u64), the body, a CRC-32 of all that. The body is sections, each a tag (u16),
//! its bytes (u32) and these. A section that is not known is passed over: a later version may have more. One that is there twice is refused.
//!
//! | tag | section | bytes |
//! |---|---|---|
//! | 1 | time, always | nanoseconds since the Unix epoch (u64) |
//! | 2 | device, always | text |
//! | 3, 4 | reason, software | text |
//! | 5 | configuration | names and values in turn, each its bytes (u32) and text |
//! | 6 | arguments | each its bytes (u32) and text |
//! | 7 | session | as it encodes itself |
//! | 8 | rings | each index (u32), size, avail, used, in flight (u16), exact (u8, 0 or 1) |
//! | 9 | windows | schema (u16), features (u16), each window as what is different from the one before it |
//! | 10 | recording | as it encodes itself |
//! | 11 | model | as it encodes itself |
//! | 12 | trained model | digest (u32) |
//! | 13 | verdict | four risks, harm, evidence (f32), windows learnt from (u64), alarm and reason (u8, 1 before a text with its bytes), causes: each a text with its bytes, share (f32) |

use warmswap_predict::{FEATURE_COUNT, Record, SCHEMA_VERSION};

use super::{Refusal, RingPosition, SNAPSHOT_BYTES_MAX, SNAPSHOT_WINDOWS_MAX, Snapshot, SnapshotVerdict};
use crate::codec::{Entry, State};
use crate::recording::{Recording, RecordingError};

/// First bytes of a snapshot.
const MAGIC: [u8; 4] = *b"wsSn";
/// Version of what follows.
const FORMAT: u16 = 1;
const HEADER: usize = 4 + 2 + 8;
const SUM: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    Time = 1,
    Device,
    Reason,
    Software,
    Configuration,
    Arguments,
    Session,
    Rings,
    Windows,
    Recording,
    Model,
    Trained,
    Verdict,
}

impl Section {
    const ALL: [Section; 13] = [
        Section::Time,
        Section::Device,
        Section::Reason,
        Section::Software,
        Section::Configuration,
        Section::Arguments,
        Section::Session,
        Section::Rings,
        Section::Windows,
        Section::Recording,
        Section::Model,
        Section::Trained,
        Section::Verdict,
    ];

    fn name(self) -> &'static str {
        match self {
            Section::Time => "time",
            Section::Device => "device",
            Section::Reason => "reason",
            Section::Software => "software",
            Section::Configuration => "configuration",
            Section::Arguments => "arguments",
            Section::Session => "session",
            Section::Rings => "rings",
            Section::Windows => "windows",
            Section::Recording => "recording",
            Section::Model => "model",
            Section::Trained => "trained model",
            Section::Verdict => "verdict",
        }
    }

    fn of(tag: u16) -> Option<Self> {
        Section::ALL.into_iter().find(|section| *section as u16 == tag)
    }
}

/// The snapshot as bytes.
///
/// # Errors
/// It has no device, or more in it than a snapshot may have.
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, Refusal> {
    if snapshot.device.is_empty() {
        return Err(Refusal::Missing(Section::Device.name()));
    }
    if snapshot.windows.len() > SNAPSHOT_WINDOWS_MAX {
        return Err(Refusal::Windows);
    }
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    put_sections(snapshot, &mut out);
    let body = (out.len() - HEADER) as u64;
    out[HEADER - 8..HEADER].copy_from_slice(&body.to_le_bytes());
    let sum = crc32fast::hash(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    // A length that did not fit its field is of more than this, and goes no further.
    if out.len() > SNAPSHOT_BYTES_MAX { Err(Refusal::Large { bytes: out.len() as u64 }) } else { Ok(out) }
}

fn put_sections(snapshot: &Snapshot, out: &mut Vec<u8>) {
    put_section(out, Section::Time, |out| out.extend_from_slice(&snapshot.unix_ns.to_le_bytes()));
    for (section, bytes) in [
        (Section::Device, snapshot.device.as_bytes()),
        (Section::Reason, snapshot.reason.as_bytes()),
        (Section::Software, snapshot.software.as_bytes()),
        (Section::Session, &snapshot.session),
        (Section::Model, &snapshot.model),
    ] {
        put_section(out, section, |out| out.extend_from_slice(bytes));
    }
    put_section(out, Section::Configuration, |out| {
        snapshot.configuration.iter().flat_map(|(name, value)| [name, value]).for_each(|text| put_text(out, text));
    });
    put_section(out, Section::Arguments, |out| snapshot.arguments.iter().for_each(|text| put_text(out, text)));
    put_section(out, Section::Rings, |out| snapshot.rings.iter().for_each(|ring| put_ring(out, ring)));
    put_section(out, Section::Windows, |out| put_windows(out, &snapshot.windows));
    put_section(out, Section::Trained, |out| out.extend_from_slice(&snapshot.trained_digest.to_le_bytes()));
    if let Some(recording) = &snapshot.recording {
        put_section(out, Section::Recording, |out| out.extend_from_slice(&recording.encode()));
    }
    if let Some(verdict) = &snapshot.verdict {
        put_section(out, Section::Verdict, |out| put_verdict(out, verdict));
    }
}

fn put_section(out: &mut Vec<u8>, section: Section, put: impl FnOnce(&mut Vec<u8>)) {
    out.extend_from_slice(&(section as u16).to_le_bytes());
    let start = out.len() + 4;
    out.extend_from_slice(&[0; 4]);
    put(out);
    let len = length(out.len() - start);
    out[start - 4..start].copy_from_slice(&len);
}

fn length(len: usize) -> [u8; 4] {
    u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes()
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&length(text.len()));
    out.extend_from_slice(text.as_bytes());
}

fn put_ring(out: &mut Vec<u8>, ring: &RingPosition) {
    out.extend_from_slice(&ring.index.to_le_bytes());
    let numbers = [ring.size, ring.avail_idx, ring.used_idx, ring.in_flight];
    numbers.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
    out.push(u8::from(ring.exact));
}

fn put_windows(out: &mut Vec<u8>, windows: &[Record]) {
    out.extend_from_slice(&SCHEMA_VERSION.to_le_bytes());
    out.extend_from_slice(&(FEATURE_COUNT as u16).to_le_bytes());
    let mut state = State::default();
    windows.iter().for_each(|window| state.put(window, out));
}

fn put_verdict(out: &mut Vec<u8>, verdict: &SnapshotVerdict) {
    let values = verdict.risk.iter().chain([&verdict.harm, &verdict.evidence]);
    values.for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
    out.extend_from_slice(&verdict.learnt.to_le_bytes());
    for text in [&verdict.alarm, &verdict.reason] {
        out.push(u8::from(text.is_some()));
        text.iter().for_each(|text| put_text(out, text));
    }
    for (feature, share) in &verdict.causes {
        put_text(out, feature);
        out.extend_from_slice(&share.to_le_bytes());
    }
}

/// Reads what [`encode`] wrote, in this version or a later one of the same format. Windows and a recording of another version of the profile
/// are [passed over](Snapshot::passed_over): what is left says how to begin again.
///
/// # Errors
/// The bytes are no snapshot, or one of another format, or damaged, or larger than one may be.
pub fn decode(bytes: &[u8]) -> Result<Snapshot, Refusal> {
    let mut rest = body(bytes)?;
    let (mut snapshot, mut seen) = (Snapshot::default(), Vec::new());
    while !rest.is_empty() {
        let tag = u16::from_le_bytes(take(&mut rest).ok_or(Refusal::Short)?);
        let bytes = take_bytes(&mut rest).ok_or(Refusal::Short)?;
        let Some(section) = Section::of(tag) else { continue };
        if seen.contains(&section) {
            return Err(Refusal::Twice(section.name()));
        }
        seen.push(section);
        read_section(&mut snapshot, section, bytes)?;
    }
    match [Section::Time, Section::Device].into_iter().find(|section| !seen.contains(section)) {
        Some(section) => Err(Refusal::Missing(section.name())),
        None if snapshot.device.is_empty() => Err(Refusal::Missing(Section::Device.name())),
        None => Ok(snapshot),
    }
}

/// What is between header and checksum, if these are right.
fn body(bytes: &[u8]) -> Result<&[u8], Refusal> {
    let mut rest = bytes;
    if take(&mut rest).ok_or(Refusal::Short)? != MAGIC {
        return Err(Refusal::Magic);
    }
    let found = u16::from_le_bytes(take(&mut rest).ok_or(Refusal::Short)?);
    if found != FORMAT {
        return Err(Refusal::Format { found, expected: FORMAT });
    }
    let body = u64::from_le_bytes(take(&mut rest).ok_or(Refusal::Short)?);
    let (found, expected) = (bytes.len() as u64, body.saturating_add((HEADER + SUM) as u64));
    let larger = found.max(expected);
    if larger > SNAPSHOT_BYTES_MAX as u64 {
        return Err(Refusal::Large { bytes: larger });
    }
    if found != expected {
        return Err(Refusal::Length { found, expected });
    }
    let (summed, sum) = bytes.split_last_chunk::<SUM>().ok_or(Refusal::Short)?;
    if crc32fast::hash(summed).to_le_bytes() != *sum {
        return Err(Refusal::Checksum);
    }
    summed.get(HEADER..).ok_or(Refusal::Short)
}

fn read_section(snapshot: &mut Snapshot, section: Section, bytes: &[u8]) -> Result<(), Refusal> {
    let refused = Refusal::Section(section.name());
    match section {
        Section::Time => snapshot.unix_ns = u64::from_le_bytes(bytes.try_into().map_err(|_| refused)?),
        Section::Device => snapshot.device = text(bytes).ok_or(refused)?,
        Section::Reason => snapshot.reason = text(bytes).ok_or(refused)?,
        Section::Software => snapshot.software = text(bytes).ok_or(refused)?,
        Section::Configuration => {
            snapshot.configuration =
                take_all(bytes, |rest| Some((take_text(rest)?, take_text(rest)?))).ok_or(refused)?;
        }
        Section::Arguments => snapshot.arguments = take_all(bytes, take_text).ok_or(refused)?,
        Section::Session => snapshot.session = bytes.to_vec(),
        Section::Rings => snapshot.rings = take_all(bytes, take_ring).ok_or(refused)?,
        Section::Windows => match windows(bytes) {
            Ok(windows) => snapshot.windows = windows,
            Err(other @ Refusal::Schema { .. }) => snapshot.passed_over.push(other),
            Err(error) => return Err(error),
        },
        Section::Recording => match Recording::decode(bytes) {
            Ok(recording) => snapshot.recording = Some(recording),
            Err(other @ (RecordingError::Format(_) | RecordingError::Schema(_))) => {
                snapshot.passed_over.push(other.into());
            }
            Err(error) => return Err(error.into()),
        },
        Section::Model => snapshot.model = bytes.to_vec(),
        Section::Trained => snapshot.trained_digest = u32::from_le_bytes(bytes.try_into().map_err(|_| refused)?),
        Section::Verdict => snapshot.verdict = Some(verdict(bytes).ok_or(refused)?),
    }
    Ok(())
}

fn windows(mut bytes: &[u8]) -> Result<Vec<Record>, Refusal> {
    let refused = Refusal::Section(Section::Windows.name());
    let (Some(found), Some(features)) = (take(&mut bytes), take(&mut bytes)) else { return Err(refused) };
    let (found, features) = (u16::from_le_bytes(found), u16::from_le_bytes(features));
    if found != SCHEMA_VERSION || usize::from(features) != FEATURE_COUNT {
        return Err(Refusal::Schema { found, features });
    }
    let (mut state, mut bytes, mut windows) = (State::default(), bytes.iter().copied(), Vec::new());
    while let Some(entry) = state.take(&mut bytes)? {
        // Runs are of a flight recorder: here they would be many windows from few bytes.
        if entry != Entry::Tick {
            return Err(refused);
        }
        if windows.len() == SNAPSHOT_WINDOWS_MAX {
            return Err(Refusal::Windows);
        }
        windows.push(state.record());
    }
    Ok(windows)
}

fn verdict(bytes: &[u8]) -> Option<SnapshotVerdict> {
    let mut rest = bytes;
    let mut values = [0.0; 6];
    for value in &mut values {
        *value = f32::from_le_bytes(take(&mut rest)?);
    }
    let [one, two, three, four, harm, evidence] = values;
    let learnt = u64::from_le_bytes(take(&mut rest)?);
    let (alarm, reason) = (take_optional(&mut rest)?, take_optional(&mut rest)?);
    let causes = take_all(rest, |rest| Some((take_text(rest)?, f32::from_le_bytes(take(rest)?))))?;
    Some(SnapshotVerdict { risk: [one, two, three, four], harm, evidence, alarm, reason, causes, learnt })
}

/// Items up to the end. Each takes bytes: there are no more of them than these have room for.
fn take_all<T>(mut bytes: &[u8], item: impl Fn(&mut &[u8]) -> Option<T>) -> Option<Vec<T>> {
    let mut items = Vec::new();
    while !bytes.is_empty() {
        items.push(item(&mut bytes)?);
    }
    Some(items)
}

fn take_ring(rest: &mut &[u8]) -> Option<RingPosition> {
    let index = u32::from_le_bytes(take(rest)?);
    let mut number = || take(rest).map(u16::from_le_bytes);
    let (size, avail_idx, used_idx, in_flight) = (number()?, number()?, number()?, number()?);
    Some(RingPosition { index, size, avail_idx, used_idx, in_flight, exact: take_flag(rest)? })
}

fn take_optional(rest: &mut &[u8]) -> Option<Option<String>> {
    if take_flag(rest)? { take_text(rest).map(Some) } else { Some(None) }
}

fn take_flag(rest: &mut &[u8]) -> Option<bool> {
    match take(rest)? {
        [0] => Some(false),
        [1] => Some(true),
        [_] => None,
    }
}

fn take_text(rest: &mut &[u8]) -> Option<String> {
    text(take_bytes(rest)?)
}

fn text(bytes: &[u8]) -> Option<String> {
    str::from_utf8(bytes).ok().map(str::to_owned)
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = u32::from_le_bytes(take(rest)?);
    let (now, later) = rest.split_at_checked(usize::try_from(len).ok()?)?;
    *rest = later;
    Some(now)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (now, later) = rest.split_first_chunk()?;
    *rest = later;
    Some(*now)
}
