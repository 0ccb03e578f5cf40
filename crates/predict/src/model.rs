//! The failure model of one component: window in, verdict out.
//!
//! ```text
//! record ─▶ Seen ─▶ what load explains (knowledge) ─▶ residuals in deviations ─▶ changes ─┐
//!        ├▶ bounded resources (exhaust) ──────────────────────────────────────────────────┼▶ inputs ─▶ hazard ─▶ risk
//!        └▶ laws that need no learning ───────────────────────────────────────────────────┘     └▶ evidence ─▶ alarm
//! ```
//! Learning is gated and delayed. Windows that are unusual as a whole teach nothing. What others teach is a candidate first, waits for
//! [`COMMIT_EVERY`] windows, and is accepted after as many again if no alarm came meanwhile; an alarm rolls both back. So a failing primary
//! cannot teach the model that failing is normal. How far what is accepted has moved since the beginning is a sign itself: a fault so slow that
//! every step of it is usual.
//!
//! Fixed in size; no allocation, no clock. Time is counted in windows.

use crate::evidence::Evidence;
use crate::exhaust::Exhaustion;
use crate::inputs::{INPUT_COUNT, INPUTS, Input};
use crate::knowledge::{Knowledge, Seen};
use crate::outcomes::{Kind, MISSES, OUTCOME_COUNT, OUTCOMES};
use crate::record::Record;
use crate::scale::Scale;
use crate::schema::Feature;
use crate::trained::Trained;
use crate::verdict::{Alarm, Cause, Law, Verdict};

/// Windows of which what is usual is first learnt; until then what is learnt is accepted at once.
pub const WARM_AFTER: u64 = 40;
/// Windows that what was learnt waits before it is accepted, at least; twice that at most. Longer than the longest horizon.
pub const COMMIT_EVERY: u64 = 600;
/// Windows between false alarms, in the mean, for each kind of evidence while harm is within its tolerance: one in a thousand days of
/// windows of a second.
pub const WINDOWS_PER_FALSE_ALARM: f32 = 8.64e7;

/// Windows that a component's own level and deviation remember.
const MEMORY: f32 = 2_000.0;
/// Deviations beyond this count as this.
const SCORE_MAX: f32 = 10.0;
/// A window that is more unusual than this, in deviations over all outcomes, teaches nothing.
const GATE: f32 = 4.0;
/// Requests are slowed down by this much (a logarithm) at harm 1: four times.
const WHOLE_SLOWDOWN: f32 = 1.386_294_4;
/// What is borne with in any case: requests 1.15 times as slow, a risk of two in a hundred, and one request in a second that fails.
const LEAST_BORNE: [f32; 3] = [0.1, 0.02, 0.1];
/// Evidence of what a component does itself in health: so much more is borne with.
const OWN_MARGIN: f32 = 1.25;
/// No tolerance is greater.
const TOLERANCE_MAX: f32 = 0.6;
/// Windows of which a block is made whose mean tells what harm there is in health.
const BLOCK: u32 = 5;
/// A kick, interrupt or request that shows no effect for this long, in microseconds, is lost, unless latencies here are longer.
const LOST_US: f32 = 50_000.0;
/// A resource that will be used up within so many windows is soon used up.
const SOON: f32 = 30.0;
/// A backend that answers nothing, or one request not, for this long, in microseconds, stands still: a disk may think for a while.
const STALLED_US: f32 = 300_000.0;
/// Ticks on end for which what a law forbids has to last.
const LAW_TICKS: u32 = 2;
/// The block device below is where requests are, if it is busy for more than this part of the time.
const BELOW: f32 = 0.9;
/// Resources with a bound.
const RESOURCES: [Feature; 4] =
    [Feature::MemoryShare, Feature::DescriptorShare, Feature::ThreadShare, Feature::StoreShare];

/// Greatest distance of two points of a resource, in windows: a minute and two hours of windows of a second are looked at.
const STRIDES: [u32; 2] = [4, 512];
/// A drift that is borne with, as a part of [`WHOLE_SLOWDOWN`]: 1.3 times.
const DRIFT_BORNE: f32 = 0.19;

/// Memory is looked at in this, in bytes.
const ANON_UNIT: f32 = (1u32 << 30) as f32;
/// A backend that just began is still filling what it needs.
const STARTED_AFTER: u64 = 15;
/// One that had no processor for more than this share of the time is starved: it has lost nothing.
const STARVED: f32 = 0.2;
/// Part of harm that is left after a window without any.
const HARM_HELD: f32 = 0.85;
/// Requests that fail or are tried again, per second, at harm 1, as a logarithm to the base 2.
const WHOLE_ERRORS: f32 = 10.0;

/// Evidence or risk beyond which a verdict names causes.
const EXPLAINED: f32 = 0.1;

/// Changes of the scores of one kind of outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Change {
    usual: Scale,
    slow: f32,
    fast: f32,
}

/// Parts of the state that are of one backend process, and end with it.
#[derive(Clone, Debug)]
struct Volatile {
    changes: [Change; Kind::COUNT],
    /// The slowdown of late, and over a longer time.
    slowdown: (f32, f32),
    /// Each over a short and over a long time.
    resources: [[Exhaustion; 2]; RESOURCES.len()],
    /// Against harm, risk, errors, drift.
    evidence: [Evidence; 4],
    /// The last means of a block of harm and of risk, in the making.
    blocks: [f32; 3],
    block: u32,
    /// Shares as they were read last: some are read once a second only.
    shares: [f32; RESOURCES.len()],
    /// Memory that is not of files, in [`ANON_UNIT`]s: what leaks.
    anon: Exhaustion,
    /// Share that the page cache did not have, as it was told last.
    misses: f32,
    /// For how long a kick and an interrupt had no effect, a request and all of them no answer, at the end of the last window, in microseconds.
    overdue: [f32; 4],
    /// The first, third and fourth of these at the last ticks, and for how many ticks they have grown.
    tick_overdue: [(f32, u32); 3],
    /// How busy the block device below was when that was told last.
    disk_busy: f32,
    /// Harm, held for a while.
    harm: f32,
    /// Windows of this process.
    windows: u64,
}

impl Default for Volatile {
    fn default() -> Self {
        Volatile {
            changes: [Change::default(); Kind::COUNT],
            slowdown: (0.0, 0.0),
            resources: [STRIDES.map(Exhaustion::new); RESOURCES.len()],
            evidence: [Evidence::default(); 4],
            blocks: [0.0; 3],
            block: 0,
            shares: [f32::NAN; RESOURCES.len()],
            anon: Exhaustion::new(STRIDES[0]),
            misses: 0.0,
            overdue: [0.0; 4],
            tick_overdue: [(0.0, 0); 3],
            disk_busy: 0.0,
            harm: 0.0,
            windows: 0,
        }
    }
}

/// The failure model of one component.
#[derive(Clone, Debug)]
pub struct Model {
    accepted: Knowledge,
    waiting: Knowledge,
    candidate: Knowledge,
    anchor: Knowledge,
    volatile: Volatile,
    /// Greatest harm and risk of a block in health, decaying.
    own: [f32; 3],
    /// Longest age of a request in health, in microseconds, decaying.
    longest_us: f32,
    windows: u64,
    backend: u64,
    /// Windows until what waits is accepted.
    commit_in: u64,
    /// Windows for which nothing is learnt, after an alarm.
    held: u64,
    inputs: [f32; INPUT_COUNT],
    /// Residuals in deviations of the last window.
    scores: [f32; OUTCOME_COUNT],
    joint: f32,
    /// The last window, until it is learnt.
    seen: Option<Seen>,
}

/// What a model learnt of its component, whatever backend serves it: what outlives the process.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Learnt {
    /// Accepted, waiting, candidate, anchor.
    pub(crate) knowledge: [Knowledge; 4],
    pub(crate) own: [f32; 3],
    pub(crate) longest_us: f32,
    pub(crate) windows: u64,
    pub(crate) commit_in: u64,
    pub(crate) held: u64,
}

impl Learnt {
    /// Whether a model can have come to these numbers. What it knows has been checked where it was made.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        let harm = self.own.iter().all(|own| (0.0..=1.0).contains(own));
        let longest = self.longest_us.is_finite() && self.longest_us >= 0.0;
        // The next window counts one more.
        let counts = self.windows < u64::MAX && (1..=COMMIT_EVERY).contains(&self.commit_in);
        match (harm, longest, counts && self.held <= COMMIT_EVERY) {
            (false, ..) => Err("harm in health"),
            (_, false, _) => Err("longest latency"),
            (.., false) => Err("number of windows"),
            _ => Ok(()),
        }
    }
}

impl Model {
    /// One that knows nothing but what every component has in common.
    #[must_use]
    pub fn new(trained: &Trained) -> Self {
        let knowledge = Knowledge::new(trained);
        Model {
            accepted: knowledge.clone(),
            waiting: knowledge.clone(),
            candidate: knowledge.clone(),
            anchor: knowledge,
            volatile: Volatile::default(),
            own: [0.0; 3],
            longest_us: 0.0,
            windows: 0,
            backend: 0,
            commit_in: COMMIT_EVERY,
            held: 0,
            inputs: [0.0; INPUT_COUNT],
            scores: [f32::NAN; OUTCOME_COUNT],
            joint: 0.0,
            seen: None,
        }
    }

    /// What it learnt of the component, for storage.
    pub(crate) fn learnt(&self) -> Learnt {
        let knowledge = [&self.accepted, &self.waiting, &self.candidate, &self.anchor].map(Knowledge::clone);
        let Model { own, longest_us, windows, commit_in, held, .. } = *self;
        Learnt { knowledge, own, longest_us, windows, commit_in, held }
    }

    /// One that has learnt this, and has seen nothing of any backend yet.
    pub(crate) fn of_learnt(trained: &Trained, learnt: Learnt) -> Self {
        let Learnt { knowledge: [accepted, waiting, candidate, anchor], own, longest_us, windows, commit_in, held } =
            learnt;
        let begun = Model::new(trained);
        Model { accepted, waiting, candidate, anchor, own, longest_us, windows, commit_in, held, ..begun }
    }

    /// Judges a window. Of another backend than the last one's, only what was learnt of the component is kept.
    pub fn predict(&mut self, trained: &Trained, record: &Record) -> Verdict {
        if self.backend != record.backend {
            self.backend = record.backend;
            self.volatile = Volatile::default();
        }
        let mut seen = Seen::of(record);
        // Told once a second only.
        let misses = &mut self.volatile.misses;
        *misses = record.get(Feature::ReadBytes).map_or(*misses, |_| seen.context[MISSES]);
        seen.context[MISSES] = *misses;
        self.volatile.windows += 1;
        let residuals = self.accepted.residuals(&seen, &trained.floors);
        self.scores = residuals.map(|(_, score)| score.clamp(-SCORE_MAX, SCORE_MAX));
        self.joint = joint(&self.scores);
        let slowdown = slowdown(&residuals);
        self.see_changes();
        self.see_resources(record);
        self.inputs = self.signs(record, &seen, slowdown);
        self.seen = Some(seen);
        let risk = trained.hazard.risk(&self.inputs, 0.0);
        self.see_evidence(trained, record, slowdown, risk[2]);
        let alarm = self.alarm(record);
        if alarm.is_some() {
            self.roll_back();
        }
        let evidence = self.volatile.evidence.iter().map(Evidence::value).fold(0.0, f32::max);
        let evidence = (libm::logf(1.0 + evidence) / libm::logf(WINDOWS_PER_FALSE_ALARM)).min(1.0);
        // Where there is nothing to explain that costs nothing.
        let explain = alarm.is_some() || evidence > EXPLAINED || risk[2] > EXPLAINED;
        Verdict {
            risk,
            harm: self.volatile.harm,
            evidence,
            alarm,
            causes: if explain { self.causes(trained, record) } else { [None; 3] },
            exhaustion: self.first_exhausted(),
            is_warm: self.windows >= WARM_AFTER,
        }
    }

    /// Learns the window that was judged last, if it may be learnt from. Once for each.
    pub fn train(&mut self, trained: &Trained) {
        let Some(seen) = self.seen.take() else { return };
        if self.held > 0 {
            self.held -= 1;
            return;
        }
        // The first windows of a backend are of its start.
        if self.joint >= GATE {
            return;
        }
        self.windows += 1;
        let warming = self.windows <= WARM_AFTER;
        let memory = if self.windows as f32 <= MEMORY { f32::INFINITY } else { MEMORY };
        self.candidate.learn(&seen, memory, &trained.floors);
        self.learn_usual();
        if warming {
            self.accepted.clone_from(&self.candidate);
            self.waiting.clone_from(&self.candidate);
            self.anchor.clone_from(&self.candidate);
            return;
        }
        self.commit_in -= 1;
        if self.commit_in == 0 {
            self.commit_in = COMMIT_EVERY;
            core::mem::swap(&mut self.accepted, &mut self.waiting);
            self.waiting.clone_from(&self.candidate);
        }
    }

    /// Sees a tick: what a law says need not wait for the end of the window. A kick that is not seen, and requests that are not answered, for
    /// longer than anything takes here and for several ticks on end. Interrupts are the guest's to take, and are judged with the window.
    pub fn see_tick(&mut self, record: &Record) -> Option<Law> {
        if self.backend != record.backend {
            return None;
        }
        let value = |feature| record.get(feature).unwrap_or(0.0);
        let busy = &mut self.volatile.disk_busy;
        *busy = record.get(Feature::DiskBusy).unwrap_or(*busy);
        let below = *busy > BELOW;
        let overdue = [Feature::KickOverdue, Feature::OldestAge, Feature::Gap].map(value);
        let span = 0.9 * record.span_us as f32;
        for (seen, overdue) in self.volatile.tick_overdue.iter_mut().zip(overdue) {
            let grows = overdue > 0.0 && overdue >= seen.0 + span;
            *seen = (overdue, if grows { seen.1 + 1 } else { 0 });
        }
        let limit = LOST_US.max(2.0 * self.longest_us);
        let lasts = |at: usize, limit: f32| {
            let (overdue, ticks) = self.volatile.tick_overdue[at];
            overdue > limit && ticks >= LAW_TICKS
        };
        let law = if value(Feature::RunDelay).max(value(Feature::Throttled)) > STARVED {
            None
        } else if lasts(0, limit) {
            Some(Law::KickIsSeen)
        } else if !below && lasts(2, limit.max(STALLED_US)) {
            Some(Law::AnythingIsCompleted)
        } else if !below && self.is_warm() && lasts(1, limit.max(STALLED_US)) && value(Feature::Completions) > 0.0 {
            Some(Law::RequestIsCompleted)
        } else {
            None
        };
        if law.is_some() {
            self.roll_back();
            self.seen = None;
        }
        law
    }

    /// Forgets what belongs to the backend that served: after a failover the next one is judged by what its predecessor was like in health.
    pub fn reset_volatile(&mut self) {
        self.volatile = Volatile::default();
        self.seen = None;
    }

    /// What the hazard was asked of last: [`INPUTS`] in their order.
    #[must_use]
    pub fn inputs(&self) -> &[f32; INPUT_COUNT] {
        &self.inputs
    }

    /// Windows learnt from.
    #[must_use]
    pub fn windows(&self) -> u64 {
        self.windows
    }

    fn is_warm(&self) -> bool {
        self.windows >= WARM_AFTER
    }

    /// An alarm: what was learnt since the last acceptance is not trusted, and nothing is learnt for a while.
    fn roll_back(&mut self) {
        self.candidate.clone_from(&self.accepted);
        self.waiting.clone_from(&self.accepted);
        (self.commit_in, self.held) = (COMMIT_EVERY, COMMIT_EVERY);
    }

    fn see_changes(&mut self) {
        let worst = worst(&self.scores);
        for (change, score) in self.volatile.changes.iter_mut().zip(worst) {
            let beyond = (score - change.usual.mean()) / change.usual.deviation(0.5);
            // Page's CUSUM, 1954, with a little forgetting: what stays within its usual bounds comes back to nothing.
            change.slow = (change.slow * 0.99 + beyond.clamp(-4.0, 4.0) - 0.5).clamp(0.0, 40.0);
            change.fast = (change.fast * 0.7 + beyond - 1.0).clamp(0.0, 40.0);
        }
    }

    fn learn_usual(&mut self) {
        let worst = worst(&self.scores);
        for (change, score) in self.volatile.changes.iter_mut().zip(worst) {
            let memory = if change.usual.count() < 200.0 { f32::INFINITY } else { MEMORY };
            change.usual.learn(score.min(SCORE_MAX / 2.0), memory, 0.5);
        }
    }

    fn see_resources(&mut self, record: &Record) {
        let Volatile { windows, resources, shares, anon, .. } = &mut self.volatile;
        for ((resource, share), feature) in resources.iter_mut().zip(shares).zip(RESOURCES) {
            *share = record.get(feature).unwrap_or(*share);
            if *windows > STARTED_AFTER {
                resource.iter_mut().for_each(|resource| resource.pass(record.get(feature)));
            }
        }
        if *windows > STARTED_AFTER {
            anon.pass(record.get(Feature::RssAnon).map(|bytes| bytes / ANON_UNIT));
        }
    }

    /// The inputs of the hazard.
    fn signs(&mut self, record: &Record, seen: &Seen, slowdown: f32) -> [f32; INPUT_COUNT] {
        let worst = worst(&self.scores);
        let (late, before) = &mut self.volatile.slowdown;
        let weight = if self.volatile.windows < 20 { 1.0 / self.volatile.windows as f32 } else { 0.05 };
        let trend = *late - *before;
        *late += 0.3 * (slowdown - *late);
        *before += weight * (slowdown - *before);
        let late = *late;
        let drift = self.drift(seen);
        let value = |feature| record.get(feature).unwrap_or(0.0);
        let against = |us: f32, usual: f32| libm::logf(1.0 + us / usual.max(1.0)).max(0.0);
        let most =
            |of: &dyn Fn(&Exhaustion) -> f32| self.resources().map(|(_, resource)| of(resource)).fold(0.0, f32::max);
        core::array::from_fn(|at| match INPUTS[at] {
            Input::Score(kind) => worst[kind as usize],
            Input::Sum(kind) => self.volatile.changes[kind as usize].slow,
            Input::Burst(kind) => self.volatile.changes[kind as usize].fast,
            Input::Slowdown => late,
            Input::Joint => self.joint,
            Input::Trend => trend,
            Input::Drift => drift,
            Input::Share => self.volatile.shares.into_iter().fold(0.0, f32::max),
            Input::Full10 => most(&|resource| if resource.grows() { resource.within(10.0) } else { 0.0 }),
            Input::Full60 => most(&|resource| if resource.grows() { resource.within(60.0) } else { 0.0 }),
            Input::Oldest => against(value(Feature::OldestAge), self.longest_us.max(LOST_US / 10.0)),
            Input::Stall => against(value(Feature::Gap), LOST_US),
            Input::Errors => value(Feature::ErrorShare),
            Input::Throttled => value(Feature::Throttled),
            Input::Unanswered => against(value(Feature::KickOverdue).max(value(Feature::CallOverdue)), LOST_US),
        })
    }

    /// How much slower requests are now than they were at the beginning, at this load: it sees what is accepted move away step by step.
    fn drift(&self, seen: &Seen) -> f32 {
        if !self.is_warm() {
            return 0.0;
        }
        let (mut sum, mut count) = (0.0, 0);
        for (at, outcome) in of_kind(Kind::Latency).map(|at| (at, seen.outcomes[at])) {
            if outcome.is_finite() && self.anchor.count(at) >= Scale::START {
                sum += outcome - self.anchor.expected(at, &seen.context);
                count += 1;
            }
        }
        if count == 0 { 0.0 } else { (sum / count as f32 / WHOLE_SLOWDOWN).clamp(0.0, 2.0) }
    }

    fn see_evidence(&mut self, trained: &Trained, record: &Record, slowdown: f32, risk: f32) {
        if !self.is_warm() {
            return;
        }
        // Held: what stands still every few windows does harm in between as well.
        self.volatile.harm = slowdown.max(visible(record)).max(HARM_HELD * self.volatile.harm);
        let harm = [self.volatile.harm, risk, troubled(record)];
        // Health has no errors, whatever component it is of.
        let borne = [trained.tolerances[0], trained.tolerances[1], 0.0];
        // What others of its kind do in health counts as long as little is known of this one.
        let unknown = (1.0 - self.windows as f32 / COMMIT_EVERY as f32).max(0.0);
        for at in 0..3 {
            let tolerance = LEAST_BORNE[at].max(unknown * borne[at]).max(OWN_MARGIN * self.own[at]).min(TOLERANCE_MAX);
            self.volatile.evidence[at].see(harm[at], tolerance);
            self.volatile.blocks[at] += harm[at] / BLOCK as f32;
        }
        let drift = INPUTS.iter().position(|input| *input == Input::Drift).map_or(0.0, |at| self.inputs[at]);
        // Only what has been accepted meanwhile: what was not is harm.
        self.volatile.evidence[3].see((drift - slowdown).max(0.0), DRIFT_BORNE);
        self.volatile.block += 1;
        if self.volatile.block < BLOCK {
            return;
        }
        let blocks = core::mem::take(&mut self.volatile.blocks);
        self.volatile.block = 0;
        // What is well within an alarm is taken for health: a component that is like that always has a tolerance of its own.
        let quiet = self.joint < GATE && self.held == 0;
        for (own, block) in self.own.iter_mut().zip(blocks) {
            *own = if quiet && block < TOLERANCE_MAX / 2.0 { (*own * 0.999).max(block) } else { *own };
        }
    }

    fn alarm(&mut self, record: &Record) -> Option<Alarm> {
        if let Some(law) = self.broken_law(record) {
            return Some(Alarm::Law(law));
        }
        let soon = self.resources().filter(|(_, resource)| resource.grows() && resource.within(SOON) > 0.9);
        if let Some((feature, _)) = soon.max_by(|one, two| one.1.within(SOON).total_cmp(&two.1.within(SOON))) {
            return Some(Alarm::Exhaustion(feature));
        }
        let reasons = [Alarm::Harm, Alarm::Risk, Alarm::Errors, Alarm::Drift];
        let enough = |evidence: &Evidence| evidence.value() >= WINDOWS_PER_FALSE_ALARM;
        let alarm = reasons.into_iter().zip(&self.volatile.evidence).find(|(_, evidence)| enough(evidence))?.0;
        self.volatile.evidence.iter_mut().for_each(Evidence::clear);
        if alarm == Alarm::Drift {
            // Said once for each step.
            self.anchor.clone_from(&self.accepted);
        }
        Some(alarm)
    }

    fn broken_law(&mut self, record: &Record) -> Option<Law> {
        let value = |feature| record.get(feature).unwrap_or(0.0);
        let limit = LOST_US.max(2.0 * self.longest_us);
        let starved = value(Feature::RunDelay).max(value(Feature::Throttled)) > STARVED;
        let overdue = [Feature::KickOverdue, Feature::CallOverdue, Feature::OldestAge, Feature::Gap].map(value);
        // What has had no effect for a whole window and longer, not what was late again and again.
        let span = 0.9 * record.span_us as f32;
        let lasts = |at: usize, limit: f32| overdue[at] > limit && overdue[at] >= self.volatile.overdue[at] + span;
        let (kick, call) = (lasts(0, limit), lasts(1, limit));
        // Where the device below is the one that has not answered, the backend waits like everybody else.
        let below = value(Feature::DiskBusy) > BELOW;
        let (request, all) = (!below && lasts(2, limit.max(STALLED_US)), !below && lasts(3, limit.max(STALLED_US)));
        self.volatile.overdue = overdue;
        let law = if starved {
            None
        } else if kick {
            Some(Law::KickIsSeen)
        } else if call {
            Some(Law::InterruptIsTaken)
        } else if all {
            Some(Law::AnythingIsCompleted)
        } else if self.is_warm() && request && value(Feature::Completions) > 0.0 {
            Some(Law::RequestIsCompleted)
        } else {
            None
        };
        if law.is_none() && self.joint < GATE {
            // Of those that ended: one that never does is not what is usual.
            let longest = value(Feature::LatencyMax).max(value(Feature::LatencyP999));
            self.longest_us = (self.longest_us * 0.999).max(longest);
        }
        law
    }

    /// Every view of every resource. A group's memory is mostly page cache, which fills it in health: it counts if other memory grows.
    fn resources(&self) -> impl Iterator<Item = (Feature, &Exhaustion)> {
        let leaks = self.volatile.anon.grows();
        let there = RESOURCES.into_iter().zip(&self.volatile.resources);
        let there = there.filter(move |(feature, _)| *feature != Feature::MemoryShare || leaks);
        there.flat_map(|(feature, views)| views.iter().map(move |view| (feature, view)))
    }

    /// The resource that will be used up first; of each what the last minute says, if it grew in that, or else the last hours.
    fn first_exhausted(&self) -> Option<(Feature, crate::exhaust::Forecast)> {
        let mut first: Option<(Feature, crate::exhaust::Forecast)> = None;
        let mut seen = None;
        for (feature, resource) in self.resources().filter(|(_, resource)| resource.grows()) {
            if seen.replace(feature) == Some(feature) {
                continue;
            }
            let Some(forecast) = resource.forecast() else { continue };
            if first.is_none_or(|(_, other)| forecast.windows < other.windows) {
                first = Some((feature, forecast));
            }
        }
        first
    }

    /// What speaks most for a failure: what each input adds to the risk, given to the feature behind it.
    fn causes(&self, trained: &Trained, record: &Record) -> [Option<Cause>; 3] {
        const MINUTE: usize = 2;
        let (mut of_kinds, mut of_all, mut resource) = ([0.0_f32; Kind::COUNT], 0.0, 0.0);
        for (at, value) in self.inputs.iter().copied().enumerate() {
            let weight = trained.hazard.contribution(at, MINUTE, value).max(0.0);
            match INPUTS[at].kind() {
                Some(kind) => of_kinds[kind as usize] += weight,
                None if matches!(INPUTS[at], Input::Share | Input::Full10 | Input::Full60) => resource += weight,
                None => of_all += weight,
            }
        }
        let weights = self.shared_out(&of_kinds, of_all);
        let sum = weights.iter().sum::<f32>() + resource;
        let mut causes = [None; 3];
        let mut put = |cause: Cause| {
            let place =
                causes.iter().position(|other: &Option<Cause>| other.is_none_or(|other| other.share < cause.share));
            if let Some(place) = place.filter(|_| cause.share > 0.0) {
                causes[place..].rotate_right(1);
                causes[place] = Some(cause);
            }
        };
        for (at, weight) in weights.into_iter().enumerate() {
            put(Cause { feature: OUTCOMES[at].0, residual: self.scores[at], share: weight / sum });
        }
        if let Some((feature, _)) = self.first_exhausted() {
            put(Cause { feature, residual: record.get(feature).unwrap_or(0.0), share: resource / sum });
        }
        causes
    }

    /// Gives weights of kinds, and of everything, to outcomes: most to the worst.
    fn shared_out(&self, of_kinds: &[f32; Kind::COUNT], of_all: f32) -> [f32; OUTCOME_COUNT] {
        let sixths = self.scores.map(sixth);
        let (mut sums, all) = ([0.0_f32; Kind::COUNT], sixths.iter().sum::<f32>());
        for (sixth, (_, kind)) in sixths.iter().zip(OUTCOMES) {
            sums[kind as usize] += sixth;
        }
        core::array::from_fn(|at| {
            let kind = OUTCOMES[at].1 as usize;
            let part = |of: f32, sum: f32| if sum > 0.0 { of * sixths[at] / sum } else { 0.0 };
            part(of_kinds[kind], sums[kind]) + part(of_all, all)
        })
    }
}

fn of_kind(kind: Kind) -> impl Iterator<Item = usize> {
    (0..OUTCOME_COUNT).filter(move |at| OUTCOMES[*at].1 == kind)
}

/// Of a score that is worse than expected the sixth power, of others nothing.
fn sixth(score: f32) -> f32 {
    if score > 0.0 { score * score * score * score * score * score } else { 0.0 }
}

/// The mean of sixth powers, between the mean square, in which one of many drowns, and the greatest, which is the noisiest.
fn joint(scores: &[f32; OUTCOME_COUNT]) -> f32 {
    let there = scores.iter().filter(|score| score.is_finite());
    let (sum, count) = there.fold((0.0, 0), |(sum, count), score| (sum + sixth(*score), count + 1));
    libm::powf(sum / count.max(1) as f32, 1.0 / 6.0)
}

/// The greatest score of each kind, at least 0.
fn worst(scores: &[f32; OUTCOME_COUNT]) -> [f32; Kind::COUNT] {
    let mut worst = [0.0; Kind::COUNT];
    for (score, (_, kind)) in scores.iter().zip(OUTCOMES) {
        // A missing one is greater than nothing.
        if *score > worst[kind as usize] {
            worst[kind as usize] = *score;
        }
    }
    worst
}

/// What a guest sees without knowing what is usual: the share of time without a completion while requests waited, requests that fail, requests
/// that had to be tried again.
fn visible(record: &Record) -> f32 {
    let value = |feature| record.get(feature).unwrap_or(0.0).max(0.0);
    let stalled = value(Feature::Gap) / (record.span_us as f32).max(1.0);
    stalled.max(value(Feature::ErrorShare)).max(troubled(record)).min(1.0)
}

/// Requests that fail or have to be tried again, as harm.
fn troubled(record: &Record) -> f32 {
    let value = |feature| record.get(feature).unwrap_or(0.0).max(0.0);
    let troubled = value(Feature::Errors) + value(Feature::Retries) + value(Feature::Malformed);
    (libm::log2f(1.0 + troubled) / WHOLE_ERRORS).min(1.0)
}

/// How much slower requests are than expected, as a part of [`WHOLE_SLOWDOWN`], 0 to 1: the mean over the latencies that are there.
fn slowdown(residuals: &[(f32, f32); OUTCOME_COUNT]) -> f32 {
    let there = of_kind(Kind::Latency).map(|at| residuals[at].0).filter(|residual| residual.is_finite());
    let (sum, count) = there.fold((0.0, 0), |(sum, count), residual| (sum + residual, count + 1));
    if count == 0 { 0.0 } else { (sum / count as f32 / WHOLE_SLOWDOWN).clamp(0.0, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Grain;

    const STATE_MAX: usize = 16 * 1024;
    const _: () = assert!(size_of::<Model>() <= STATE_MAX, "a model of a component");

    /// A component under a steady load that can be made ill.
    struct Component {
        trained: Trained,
        model: Model,
        window: u64,
        noise: u64,
    }

    impl Component {
        fn new() -> Self {
            let trained = Trained::prior();
            Component { model: Model::new(&trained), trained, window: 0, noise: 1 }
        }

        /// Between 1 - part and 1 + part.
        fn about(&mut self, part: f32) -> f32 {
            self.noise = self.noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            1.0 + part * ((self.noise >> 40) as f32 / (1 << 23) as f32 - 1.0)
        }

        fn record(&mut self, load: f32, change: &dyn Fn(&mut Record)) -> Record {
            let mut record = Record::new(Grain::Window, self.window, 1, self.window * 1_000_000_000, 1_000_000);
            self.window += 1;
            let latency = 100.0 * libm::sqrtf(load) * self.about(0.1);
            for (feature, value) in [
                (Feature::Arrivals, 5_000.0 * load),
                (Feature::Completions, 5_000.0 * load),
                (Feature::Depth, load),
                (Feature::Size, 4_096.0),
                (Feature::WriteShare, 0.3),
                (Feature::LatencyMean, latency),
                (Feature::LatencyP50, latency * self.about(0.05)),
                (Feature::LatencyP99, latency * 3.0 * self.about(0.3)),
                (Feature::LatencyMax, latency * 5.0 * self.about(0.5)),
                (Feature::OldestAge, latency * 5.0),
                (Feature::Cpu, 0.2 * load * self.about(0.1)),
                (Feature::CpuPerRequest, 40.0 * self.about(0.1)),
                (Feature::MemoryShare, 0.4),
                (Feature::DescriptorShare, 0.05),
            ] {
                record.set(feature, Some(value));
            }
            change(&mut record);
            record
        }

        fn see(&mut self, load: f32, change: &dyn Fn(&mut Record)) -> Verdict {
            let record = self.record(load, change);
            let verdict = self.model.predict(&self.trained, &record);
            self.model.train(&self.trained);
            verdict
        }
    }

    fn healthy(_: &mut Record) {}

    fn slower(by: f32) -> impl Fn(&mut Record) {
        move |record| {
            for feature in [Feature::LatencyMean, Feature::LatencyP50, Feature::LatencyP99, Feature::LatencyMax] {
                let value = record.get(feature).expect("it was set");
                record.set(feature, Some(value * by));
            }
        }
    }

    #[test]
    fn health_raises_no_alarm_whatever_the_load() {
        let mut component = Component::new();
        for window in 0..5_000_u32 {
            let load = if window < 200 { 1.0 } else { 1.0 + (window / 50 % 7) as f32 };
            let verdict = component.see(load, &healthy);
            assert_eq!(verdict.alarm, None, "window {window}: {verdict:?} {:?}", component.model.inputs());
        }
    }

    #[test]
    fn a_slowdown_is_found_soon_after_it_is_more_than_is_borne_with_and_named() {
        let mut component = Component::new();
        (0..300).for_each(|_| assert_eq!(component.see(2.0, &healthy).alarm, None));
        let found = (1..200).find_map(|step| {
            let by = 1.0 + 0.02 * step as f32;
            component.see(2.0, &slower(by)).alarm.map(|alarm| (alarm, by))
        });
        let (alarm, by) = found.expect("it is found");
        assert!(matches!(alarm, Alarm::Harm | Alarm::Risk) && by < 2.2, "{alarm:?} at {by}");
        let verdict = component.see(2.0, &slower(by));
        let cause = verdict.causes[0].expect("there is one");
        let latencies = [Feature::LatencyMean, Feature::LatencyP50, Feature::LatencyP99, Feature::LatencyMax];
        assert!(latencies.contains(&cause.feature), "{cause:?}");
    }

    #[test]
    fn a_slow_poison_is_found_before_it_is_half_as_slow_again() {
        let mut component = Component::new();
        (0..700).for_each(|_| assert_eq!(component.see(2.0, &healthy).alarm, None));
        // A hundredth in 200 windows: slower than learning.
        let found = (0..20_000).find(|step| component.see(2.0, &slower(1.0 + *step as f32 * 5e-5)).alarm.is_some());
        let by = 1.0 + found.expect("it is found") as f32 * 5e-5;
        assert!(by < 1.5, "found at {by}");
    }

    #[test]
    fn a_leak_is_announced_well_before_its_end() {
        let mut component = Component::new();
        (0..200).for_each(|_| assert_eq!(component.see(2.0, &healthy).alarm, None));
        let leak = |step: u32| {
            move |record: &mut Record| {
                record.set(Feature::MemoryShare, Some(0.4 + step as f32 / 500.0));
                record.set(Feature::RssAnon, Some(1e7 + step as f32 * 1e6));
            }
        };
        let found = (0..300).find(|step| component.see(2.0, &leak(*step)).alarm.is_some());
        let left = 300 - found.expect("it is announced");
        assert!((20..150).contains(&left), "{left} windows before");
        let verdict = component.see(2.0, &leak(300 - left));
        assert_eq!(verdict.alarm, Some(Alarm::Exhaustion(Feature::MemoryShare)));
        let (feature, forecast) = verdict.exhaustion.expect("it grows");
        assert_eq!(feature, Feature::MemoryShare);
        assert!((forecast.windows / left as f32 - 1.0).abs() < 0.15, "{forecast:?}, {left} in truth");
    }

    #[test]
    fn a_lost_kick_needs_no_learning() {
        let mut component = Component::new();
        let lost = |us: f32| move |record: &mut Record| record.set(Feature::KickOverdue, Some(us));
        assert_eq!(component.see(1.0, &lost(200_000.0)).alarm, None, "it may only be late");
        assert_eq!(component.see(1.0, &lost(1_200_000.0)).alarm, Some(Alarm::Law(Law::KickIsSeen)));
    }

    #[test]
    fn a_law_need_not_wait_for_the_end_of_the_window() {
        let mut component = Component::new();
        (0..50).for_each(|_| assert_eq!(component.see(1.0, &healthy).alarm, None));
        let mut tick = |feature: Feature, us: f32, busy: f32| {
            let mut tick = Record::new(Grain::Tick, 0, 1, 0, 100_000);
            tick.set(feature, Some(us));
            tick.set(Feature::Completions, Some(100.0));
            tick.set(Feature::DiskBusy, Some(busy));
            component.model.see_tick(&tick)
        };
        assert_eq!(
            [40e3, 140e3, 240e3].map(|us| tick(Feature::KickOverdue, us, 0.0)),
            [None, None, Some(Law::KickIsSeen)]
        );
        assert_eq!([90e3, 10e3, 110e3].map(|us| tick(Feature::KickOverdue, us, 0.0)), [None; 3], "it moved");
        let gaps = [150e3, 250e3, 350e3];
        assert_eq!(gaps.map(|us| tick(Feature::Gap, us, 0.0)), [None, None, Some(Law::AnythingIsCompleted)]);
        assert_eq!(tick(Feature::Gap, 0.0, 0.0), None);
        assert_eq!(gaps.map(|us| tick(Feature::Gap, us, 1.0)), [None; 3], "the disk is what has not answered");
        let ages = [150e3, 250e3, 350e3];
        assert_eq!(ages.map(|us| tick(Feature::OldestAge, us, 0.0)), [None, None, Some(Law::RequestIsCompleted)]);
    }

    #[test]
    fn what_is_learnt_before_an_alarm_is_not_kept_and_another_backend_begins_with_what_is_known() {
        let mut component = Component::new();
        (0..1_000).for_each(|_| assert_eq!(component.see(2.0, &healthy).alarm, None));
        let before = component.model.accepted.clone();
        assert!((0..100).any(|_| component.see(2.0, &slower(3.0)).alarm.is_some()));
        assert_eq!(component.model.candidate, before, "nothing of it is kept");
        let mut record = component.record(2.0, &healthy);
        record.backend = 2;
        let verdict = component.model.predict(&component.trained, &record);
        assert!(verdict.is_warm && verdict.alarm.is_none() && verdict.evidence < 0.1, "{verdict:?}");
    }

    #[test]
    fn any_record_is_borne_with() {
        let mut component = Component::new();
        for value in [f32::NAN, f32::INFINITY, -1.0, 1e38, 0.0] {
            for _ in 0..60 {
                let verdict = component.see(1.0, &|record: &mut Record| {
                    Feature::ALL.into_iter().for_each(|feature| record.set(feature, Some(value)));
                });
                assert!(verdict.risk.iter().all(|risk| risk.is_finite()), "{value}: {verdict:?}");
            }
        }
    }
}
