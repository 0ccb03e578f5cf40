//! Health snapshots of the devices of this process: when one is taken, what goes into it, and what a device begins with that left one.
//!
//! What was negotiated and where rings stand only the control thread knows. It is asked, is not waited for longer than a moment, and says
//! nothing while a failover runs: a snapshot then goes without.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use warmswap_core::RingStatus;
use warmswap_predict::{Alarm, Model};
use warmswap_store::{
    Newest, Recording, RingPosition, Snapshot, SnapshotError, SnapshotRetention, SnapshotVerdict, Snapshots, snapshot,
};

use super::predictor::{Predictor, trained};
use crate::driver::{Command, Commander};

/// Windows of a snapshot.
const WINDOWS: usize = 60;
/// How long the control thread is waited for.
const ANSWER_MAX: Duration = Duration::from_millis(100);

/// What a device was told when its broker was started.
#[derive(Clone, Debug, Default)]
pub(crate) struct Described {
    /// Names and values.
    pub(crate) configuration: Vec<(String, String)>,
    /// The command line.
    pub(crate) arguments: Vec<String>,
}

/// What the control thread says of a device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Negotiated {
    /// The session, encoded.
    pub(crate) session: Vec<u8>,
    /// Where its rings stand.
    pub(crate) rings: Vec<RingStatus>,
}

/// Takes snapshots.
#[derive(Debug)]
pub(crate) struct Snapshotter {
    dir: PathBuf,
    described: BTreeMap<String, Described>,
    /// Held while one is written.
    open: Mutex<BTreeMap<String, Snapshots>>,
}

/// What of a device's profile goes into a snapshot.
#[derive(Debug)]
pub(crate) struct Behaviour {
    pub(crate) windows: Vec<warmswap_predict::Record>,
    pub(crate) predictor: Option<Predictor>,
    pub(crate) recording: Option<Recording>,
}

impl Snapshotter {
    /// Takes them in a directory.
    pub(crate) fn new(dir: &Path, described: BTreeMap<String, Described>) -> Self {
        Snapshotter { dir: dir.to_path_buf(), described, open: Mutex::default() }
    }

    /// Whether a snapshot's windows are as long as those of the device now.
    fn has_windows_of(&self, device: &str, snapshot: &Snapshot) -> bool {
        let now = self.described.get(device).and_then(|it| window_ms(&it.configuration));
        now.is_none_or(|now| window_ms(&snapshot.configuration).is_none_or(|then| now == then))
    }

    /// Writes one. Returns where it is.
    pub(crate) fn take(
        &self,
        device: &str,
        (reason, unix_ns): (&str, u64),
        behaviour: Behaviour,
        commander: Option<&Commander>,
    ) -> Result<PathBuf, String> {
        let Described { configuration, arguments } = self.described.get(device).cloned().unwrap_or_default();
        let Negotiated { session, rings } = commander.and_then(|it| negotiated(it, device)).unwrap_or_default();
        let Behaviour { windows, predictor, recording } = behaviour;
        let last = windows.len().saturating_sub(WINDOWS);
        let snapshot = Snapshot {
            unix_ns,
            device: device.to_owned(),
            reason: reason.to_owned(),
            software: concat!("warmswap ", env!("CARGO_PKG_VERSION")).to_owned(),
            configuration,
            arguments,
            session,
            rings: rings.iter().map(position).collect(),
            windows: windows[last..].to_vec(),
            recording,
            model: predictor.as_ref().map(|it| it.model().encode(trained()).to_vec()).unwrap_or_default(),
            trained_digest: trained().digest(),
            verdict: predictor.as_ref().and_then(verdict),
            passed_over: Vec::new(),
        };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshots = match open.get(device) {
            Some(snapshots) => snapshots,
            None => {
                std::fs::create_dir_all(&self.dir).map_err(|error| format!("{}: {error}", self.dir.display()))?;
                let snapshots = Snapshots::open(&self.dir, device, SnapshotRetention::default());
                open.entry(device.to_owned()).or_insert(snapshots.map_err(|error| error.to_string())?)
            }
        };
        snapshots.write(&snapshot).map_err(|error| error.to_string())
    }

    /// What the newest snapshot of a device that can be gone on from had learnt; and why newer ones cannot.
    pub(crate) fn newest_model(&self, device: &str) -> Result<Newest<Model>, SnapshotError> {
        snapshot::newest_that(&self.dir, device, |snapshot| {
            if !self.has_windows_of(device, &snapshot) {
                return Err("its model learnt from windows of another length".to_owned());
            }
            // Before the first window nothing is learnt.
            (!snapshot.model.is_empty()).then(|| model_of(&snapshot)).transpose()
        })
    }
}

/// Length of the windows of a configuration.
pub(crate) fn window_ms(configuration: &[(String, String)]) -> Option<&str> {
    configuration.iter().find(|(name, _)| name == "window_ms").map(|(_, value)| value.as_str())
}

/// What a snapshot's model learnt.
pub(crate) fn model_of(snapshot: &Snapshot) -> Result<Model, String> {
    Model::decode(trained(), &snapshot.model).map_err(|error| error.to_string())
}

fn negotiated(commander: &Commander, device: &str) -> Option<Negotiated> {
    let (answer, said) = crossbeam_channel::bounded(1);
    commander.try_send(Command::Negotiated { device: Arc::from(device), answer }).then_some(())?;
    said.recv_timeout(ANSWER_MAX).ok()
}

fn position(ring: &RingStatus) -> RingPosition {
    RingPosition {
        index: ring.index,
        size: ring.size,
        avail_idx: ring.avail_idx,
        used_idx: ring.used_idx,
        in_flight: ring.inflight,
        exact: ring.observer == "exact",
    }
}

fn verdict(predictor: &Predictor) -> Option<SnapshotVerdict> {
    let verdict = predictor.verdict()?;
    let causes = verdict.causes.iter().flatten().map(|cause| (cause.feature.name().to_owned(), cause.share));
    Some(SnapshotVerdict {
        risk: verdict.risk,
        harm: verdict.harm,
        evidence: verdict.evidence,
        alarm: verdict.alarm.map(|alarm| Alarm::name(alarm).to_owned()),
        reason: verdict.alarm.map(|alarm| alarm.to_string()),
        causes: causes.collect(),
        learnt: predictor.learnt(),
    })
}
