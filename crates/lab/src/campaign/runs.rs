//! What a campaign leaves behind: labels, one JSON object a line in `runs.jsonl`, and the windows of each run in a file of its name.
//!
//! `NAME.records.gz` is what [`Record::encode`] makes of each window, one after the other, compressed; `NAME.ticks.gz` the same of its ticks,
//! for runs whose plan wants them. A run counts once its label is
//! written, which comes last: what was killed in between is made again.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use warmswap_predict::{Grain, RECORD_BYTES, Record};

/// File of the labels.
const LABELS: &str = "runs.jsonl";
/// File of the labels of runs that were void.
const VOID: &str = "void.jsonl";
/// A run has fewer bytes of records than this: hours of windows.
const BYTES_MAX: u64 = 256 << 20;

/// A run: one device from its start to its failure, or to the end of the time it was given.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// What happened.
    pub(crate) label: Label,
    /// The windows of its profile, oldest first.
    pub(crate) windows: Vec<Record>,
}

/// What happened in a run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Label {
    /// Number within the campaign, with zeros in front: the order of names is the order of the plan.
    pub(crate) name: String,
    /// What was injected.
    pub(crate) kind: String,
    /// How it came: step, ramp, ...
    pub(crate) form: String,
    /// Whether it was meant to harm.
    pub(crate) fault: bool,
    /// Whether anything of it could be known before the failure.
    pub(crate) precursor: bool,
    /// The backend.
    pub(crate) backend: String,
    /// What the guest asked for.
    pub(crate) workload: String,
    /// Seed of the run.
    pub(crate) seed: u64,
    /// Length of a window, in milliseconds.
    pub(crate) window_ms: u64,
    /// When the injection began, in nanoseconds since the Unix epoch.
    pub(crate) onset_unix_ns: Option<u64>,
    /// When the guest had lost its disk, as it saw it itself.
    pub(crate) failure_unix_ns: Option<u64>,
    /// What the guest saw.
    pub(crate) failure: Option<String>,
    /// Feature of the resource that the injection exhausts.
    pub(crate) exhausts: Option<String>,
    /// When that resource was at its bound.
    pub(crate) exhaustion_unix_ns: Option<u64>,
    /// Features that name the cause: any of them is right.
    pub(crate) causes: Vec<String>,
}

impl Label {
    /// Whether the guest lost its disk to something that nobody injected, the machine's other work most likely. Such a run is neither a
    /// failure nor its absence.
    pub(super) fn is_void(&self) -> bool {
        let before = self.failure_unix_ns.zip(self.onset_unix_ns).is_some_and(|(failure, onset)| failure < onset);
        self.failure.is_some() && (!self.fault || before)
    }
}

/// Every run of a campaign, in the order of its plan.
///
/// # Errors
/// A label or a record cannot be read; the error names the file and where in it.
pub(crate) fn read(dir: &Path) -> anyhow::Result<Vec<Run>> {
    let run = |label: Label| Ok(Run { windows: read_records(&records_path(dir, &label.name), Grain::Window)?, label });
    read_labels(dir)?.into_iter().map(run).collect()
}

/// The ticks of a run, oldest first; none where its plan did not want them.
///
/// # Errors
/// As [`read`].
#[allow(dead_code, reason = "part of the interface: for whoever asks how soon something was seen")]
pub(crate) fn read_ticks(dir: &Path, label: &Label) -> anyhow::Result<Vec<Record>> {
    let path = ticks_path(dir, &label.name);
    if path.exists() { read_records(&path, Grain::Tick) } else { Ok(Vec::new()) }
}

/// The labels alone, in the order of the plan. A line without an end was being written when the campaign was killed: it does not count.
pub(super) fn read_labels(dir: &Path) -> anyhow::Result<Vec<Label>> {
    let path = dir.join(LABELS);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let label = |(row, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}, line {}", path.display(), row + 1))
    };
    let mut labels: Vec<Label> = whole.lines().enumerate().map(label).collect::<anyhow::Result<_>>()?;
    labels.sort_by(|one, other| one.name.cmp(&other.name));
    let twice = labels.windows(2).find(|pair| pair[0].name == pair[1].name);
    ensure!(twice.is_none(), "{}: run {} is there twice", path.display(), twice.map_or("", |pair| &pair[0].name));
    Ok(labels)
}

/// Notes a run that is void, and will be made again.
pub(super) fn note_void(dir: &Path, label: &Label) -> anyhow::Result<()> {
    append(&dir.join(VOID), label)
}

/// Replaces all labels by these.
pub(super) fn write_labels(dir: &Path, labels: &[Label]) -> anyhow::Result<()> {
    let mut text = String::new();
    for label in labels {
        text += &serde_json::to_string(label)?;
        text.push('\n');
    }
    replace(&dir.join(LABELS), text.as_bytes())
}

/// Adds a run, with its ticks if there are any.
pub(super) fn add(dir: &Path, run: &Run, ticks: &[Record]) -> anyhow::Result<()> {
    replace(&records_path(dir, &run.label.name), &encode(&run.windows)?)?;
    if !ticks.is_empty() {
        replace(&ticks_path(dir, &run.label.name), &encode(ticks)?)?;
    }
    append(&dir.join(LABELS), &run.label)
}

fn append(path: &Path, label: &Label) -> anyhow::Result<()> {
    let line = serde_json::to_string(label)? + "\n";
    let file = File::options().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(line.as_bytes())).with_context(|| format!("writing {}", path.display()))
}

fn records_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.records.gz"))
}

fn ticks_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.ticks.gz"))
}

fn encode(windows: &[Record]) -> anyhow::Result<Vec<u8>> {
    let mut out = GzEncoder::new(Vec::new(), Compression::default());
    windows.iter().try_for_each(|window| out.write_all(&window.encode()))?;
    Ok(out.finish()?)
}

fn decode(bytes: &[u8], grain: Grain) -> anyhow::Result<Vec<Record>> {
    let mut raw = Vec::new();
    MultiGzDecoder::new(bytes).take(BYTES_MAX).read_to_end(&mut raw)?;
    ensure!(
        raw.len().is_multiple_of(RECORD_BYTES),
        "{} bytes are no whole number of records of {RECORD_BYTES}",
        raw.len()
    );
    let record = |(row, bytes): (usize, &[u8])| Record::decode(bytes).with_context(|| format!("record {row}"));
    let records = raw.chunks_exact(RECORD_BYTES).enumerate().map(record).collect::<anyhow::Result<Vec<_>>>()?;
    let other = records.iter().enumerate().find(|(_, it)| it.grain != grain);
    if let Some((row, other)) = other {
        bail!("record {row} is of a {}, expected one of a {}", other.grain.name(), grain.name());
    }
    Ok(records)
}

fn read_records(path: &Path, grain: Grain) -> anyhow::Result<Vec<Record>> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    decode(&bytes, grain).with_context(|| path.display().to_string())
}

/// Writes a file under another name first: what is killed leaves no part of one.
fn replace(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    std::fs::write(&new, bytes).with_context(|| format!("writing {}", path.display()))?;
    std::fs::rename(&new, path).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use warmswap_predict::Feature;

    fn label(name: &str) -> Label {
        Label {
            name: name.to_owned(),
            kind: "latency".to_owned(),
            form: "ramp".to_owned(),
            fault: true,
            precursor: true,
            backend: "blk".to_owned(),
            workload: "read-qd1".to_owned(),
            seed: 7,
            window_ms: 200,
            onset_unix_ns: Some(1_790_000_000_123_456_789),
            failure_unix_ns: None,
            failure: None,
            exhausts: None,
            exhaustion_unix_ns: None,
            causes: vec!["latency_p50_us".to_owned()],
        }
    }

    fn run(name: &str, count: u64) -> Run {
        let windows = (0..count).map(|number| {
            let mut window = Record::new(Grain::Window, number, 1, number * 200_000_000, 200_000);
            window.set(Feature::Arrivals, (number != 1).then_some(number as f32));
            window
        });
        Run { label: label(name), windows: windows.collect() }
    }

    /// A directory that goes with the test.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("campaign-runs-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).expect("a directory");
            Dir(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn runs_come_back_whole_and_in_order_whichever_was_done_first() {
        let dir = Dir::new("order");
        for it in [run("00002", 3), run("00000", 0), run("00001", 500)] {
            add(&dir.0, &it, &[]).expect("added");
        }
        let back = read(&dir.0).expect("whole");
        assert_eq!(back.iter().map(|it| it.label.name.as_str()).collect::<Vec<_>>(), ["00000", "00001", "00002"]);
        assert_eq!(back.iter().map(|it| it.windows.len()).collect::<Vec<_>>(), [0, 500, 3]);
        assert_eq!((&back[2].label, &back[2].windows), (&run("00002", 3).label, &run("00002", 3).windows));
    }

    #[test]
    fn a_label_that_was_being_written_does_not_count_and_one_that_is_broken_is_named() {
        let dir = Dir::new("torn");
        add(&dir.0, &run("00000", 1), &[]).expect("added");
        let path = dir.0.join(LABELS);
        let whole = std::fs::read_to_string(&path).expect("labels");
        std::fs::write(&path, format!("{whole}{{\"name\":\"00001\"")).expect("torn");
        assert_eq!(read_labels(&dir.0).expect("one is whole").len(), 1);
        std::fs::write(&path, format!("{whole}{{\"name\":\"00001\"}}\n")).expect("broken");
        let error = format!("{:#}", read_labels(&dir.0).expect_err("the kind is missing"));
        assert!(error.contains("runs.jsonl, line 2") && error.contains("kind"), "{error}");
        std::fs::write(&path, format!("{whole}{whole}")).expect("twice");
        assert!(read_labels(&dir.0).expect_err("twice").to_string().contains("run 00000 is there twice"));
    }

    #[test]
    fn records_that_are_cut_or_no_windows_are_refused() {
        let whole = encode(&run("00000", 20).windows).expect("memory has room");
        assert_eq!(decode(&whole, Grain::Window).expect("whole").len(), 20);
        decode(&whole[..whole.len() - 9], Grain::Window).expect_err("cut");
        let tick = Record::new(Grain::Tick, 0, 1, 0, 20_000);
        let error = decode(&encode(&[tick]).expect("memory has room"), Grain::Window).expect_err("a tick").to_string();
        assert!(error.contains("record 0 is of a tick, expected one of a window"), "{error}");
    }

    #[test]
    fn ticks_are_kept_where_there_are_any() {
        let dir = Dir::new("ticks");
        let ticks = [0, 1].map(|number| Record::new(Grain::Tick, number, 1, number, 20_000));
        add(&dir.0, &run("00000", 3), &ticks).expect("added");
        add(&dir.0, &run("00001", 3), &[]).expect("added");
        assert_eq!(read_ticks(&dir.0, &label("00000")).expect("there"), ticks);
        assert_eq!(read_ticks(&dir.0, &label("00001")).expect("none"), []);
        assert_eq!(read(&dir.0).expect("whole").len(), 2);
    }

    #[test]
    fn a_guest_that_loses_its_disk_to_nobody_makes_a_run_void() {
        let onset = label("00000").onset_unix_ns.expect("it has one");
        let failed = |fault: bool, at: u64| Label {
            fault,
            failure_unix_ns: Some(at),
            failure: Some("gone".to_owned()),
            ..label("00000")
        };
        assert!(!label("00000").is_void() && !failed(true, onset + 1).is_void());
        assert!(failed(true, onset - 1).is_void() && failed(false, onset + 1).is_void());
    }

    #[test]
    fn labels_can_be_replaced() {
        let dir = Dir::new("replaced");
        write_labels(&dir.0, &[label("00001"), label("00000")]).expect("written");
        assert_eq!(read_labels(&dir.0).expect("read"), [label("00000"), label("00001")]);
    }
}
