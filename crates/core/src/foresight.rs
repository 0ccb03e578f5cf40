//! Whether a predicted failure is acted upon: the model can ask for a failover, only this can grant one.
//!
//! ```text
//! alarm ─▶ of this primary? acting allowed? a cause that a swap can cure? rested? budget? alone?
//!       ─▶ the shadow is asked to read, now        (the control group: it shares the storage, not the backend)
//!       ─▶ as slow as the primary: common cause    else: worth it? ─▶ failover
//! ```
//! A predicted failover costs the guest about a millisecond where it was wrong, and loses nothing. What bounds it is that it must not become a
//! habit: an hourly budget, a rest after each, and twice the rest after each that did not help.

use std::fmt;

use serde::{Deserialize, Serialize};
use warmswap_predict::{Alarm, Feature, Law};
use warmswap_zoo::{Animal, loose};

use crate::event::BackendId;
use crate::policy::{Limits, OnPrediction};
use crate::time::Nanos;

/// Reads of the shadow that are compared with what they usually take.
pub(crate) const READS: usize = 3;
/// Reads that take so many times as long as usual say that the shadow is slow, too.
const COMMON_FACTOR: f32 = 2.0;
/// The same where the primary does not answer at all: the shadow has to answer.
const COMMON_FACTOR_STOPPED: f32 = 10.0;
/// And at least so much longer: below that it is chance.
const COMMON_LEAST: Nanos = Nanos::from_micros(500);
/// One read that has been under way for so long, and longer than that, is enough: its end is not waited for.
const HANGING: Nanos = Nanos::from_millis(250);
/// Other devices of the host whose failure is predicted at the same time: so many and it is the host.
const OTHERS_MAX: u32 = 2;
/// A read of the shadow that took so long, and ten times as long as usual, is not slow by chance.
const SURELY_SLOW: Nanos = Nanos::from_millis(25);
/// One that ended so long before an alarm, two of those that are made anyway, was made while the primary did what the alarm is about.
const SAME_TIME: Nanos = Nanos::from_millis(2_000);
/// An hour.
const HOUR: Nanos = Nanos::from_millis(3_600_000);
/// A failover did not help if the next alarm comes within so many rests.
const HELPED_AFTER: u64 = 6;
/// The same reason is said again after this.
const SAID_AGAIN: Nanos = Nanos::from_millis(60_000);
/// What a kick that was given once more did is not seen sooner: a tick of the profile, and a half.
const LOOKED_AGAIN: Nanos = Nanos::from_millis(150);
/// What a swap costs the guest, until one was seen.
const SWAP_COST: Nanos = Nanos::from_millis(2);
/// What is usual is not learnt from reads so soon after an alarm.
const UNWELL_FOR: Nanos = Nanos::from_millis(10_000);

/// An alarm of the failure model, as policy has to know it.
#[derive(Clone, Debug, PartialEq)]
pub struct Foresight {
    /// The backend whose window it was.
    pub backend: BackendId,
    /// Why a failure is thought to be imminent.
    pub alarm: Alarm,
    /// How likely one is within the longest horizon, 0 to 1.
    pub risk: f32,
    /// What the guest suffers already, 0 to 1.
    pub harm: f32,
    /// What speaks most for it, if that is more than everything else together.
    pub cause: Option<Feature>,
    /// What speaks for it, in words.
    pub causes: String,
    /// Other devices of the host with an alarm of the last seconds.
    pub others: u32,
}

/// Why a predicted failure is not acted upon.
#[derive(Clone, Debug, PartialEq)]
pub enum Withheld {
    /// The operator wants reports only.
    ObserveOnly,
    /// A swap cannot help: both backends have the resource in common.
    SharedResource(Feature),
    /// Other devices have alarms as well.
    Host {
        /// How many.
        others: u32,
    },
    /// The last predicted failover is too recent.
    Cooling {
        /// For how long yet.
        left: Nanos,
    },
    /// There were enough within an hour.
    Budget {
        /// How many there may be.
        per_hour: u32,
    },
    /// The shadow is as slow as the primary.
    CommonCause {
        /// What its reads take now; none if they are not completed.
        took: Option<Nanos>,
        /// What they take usually.
        usual: Nanos,
    },
    /// The guest was given its interrupts once more, which is all that is needed if one was lost.
    GivenAgain,
    /// The backend was given the guest's kicks once more, which is all that is needed if one was lost.
    KickedAgain,
    /// The guest takes no interrupts: it does not run.
    GuestAbsent,
    /// What it would cost is more than what it would save.
    NotWorth {
        /// Probability of a failure, 0 to 1.
        risk: f32,
    },
    /// It cannot be made; why.
    Refused(String),
}

impl Withheld {
    /// The word used in every report.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Withheld::ObserveOnly => "observe-only",
            Withheld::SharedResource(_) => "shared-resource",
            Withheld::Host { .. } => "host",
            Withheld::Cooling { .. } => "cooling",
            Withheld::Budget { .. } => "budget",
            Withheld::CommonCause { .. } => "common-cause",
            Withheld::GivenAgain => "given-again",
            Withheld::KickedAgain => "kicked-again",
            Withheld::GuestAbsent => "guest-absent",
            Withheld::NotWorth { .. } => "not-worth",
            Withheld::Refused(_) => "refused",
        }
    }

    /// What somebody may do about it.
    #[must_use]
    pub fn next(&self) -> &'static str {
        match self {
            Withheld::ObserveOnly => "start without --observe to have it acted upon, or make the failover yourself",
            Withheld::SharedResource(_) => "make room: primary and shadow use it up together",
            Withheld::Host { .. } => "look at the host: several devices do not fail by themselves at the same time",
            Withheld::Cooling { .. } | Withheld::Budget { .. } => {
                "look at the device: one that alarms again after a swap has its fault elsewhere"
            }
            Withheld::CommonCause { .. } => "look at the storage: the fault lies below both backends",
            Withheld::GivenAgain => "nothing: if the next one is lost as well the shadow takes over",
            Withheld::KickedAgain => {
                "nothing, if it was one; look at the guest and its VMM if it goes on: the shadow takes over only from a backend that is deaf"
            }
            Withheld::GuestAbsent => "look at the guest: it has stopped, or hangs",
            Withheld::NotWorth { .. } => "nothing: it is watched on",
            Withheld::Refused(_) => "it is tried again at the next alarm",
        }
    }
}

impl fmt::Display for Withheld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Withheld::ObserveOnly => f.write_str("predictions are only reported here (--observe)"),
            Withheld::SharedResource(feature) => {
                write!(f, "{} is shared by primary and shadow: a swap cannot help", feature.name())
            }
            Withheld::Host { others } => write!(f, "{others} other devices of this host have alarms as well"),
            Withheld::Cooling { left } => {
                write!(f, "the last predicted failover is too recent: not before {left} have passed")
            }
            Withheld::Budget { per_hour } => write!(f, "there were {per_hour} predicted failovers within an hour"),
            Withheld::CommonCause { took: Some(took), usual } => {
                write!(f, "the shadow is slow as well: its reads take {took}, usually {usual}")
            }
            Withheld::CommonCause { took: None, usual } => {
                write!(f, "the shadow's reads are not completed either, usually they take {usual}")
            }
            Withheld::GivenAgain => f.write_str("an interrupt seems to be lost: the guest is given it once more"),
            Withheld::KickedAgain => f.write_str("a kick seems to be lost: the backend is given it once more"),
            Withheld::GuestAbsent => f.write_str("the guest takes no interrupts, given again or not"),
            Withheld::NotWorth { risk } => {
                write!(f, "a failure is not likely enough ({:.1} %) for what a swap costs", risk * 100.0)
            }
            Withheld::Refused(why) => f.write_str(why),
        }
    }
}

/// What is shown of the policy.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyStatus {
    /// What is done when a failure is predicted.
    pub on_prediction: OnPrediction,
    /// Predicted failovers that may be made within the hour.
    pub left_this_hour: u32,
    /// For how long none is made.
    pub cooling: Option<Nanos>,
    /// What the shadow's reads usually take.
    pub canary_usual: Option<Nanos>,
    /// Why the last alarm was not acted upon, if it was not.
    pub withheld: Option<Withheld>,
}

/// An alarm that is being looked into.
#[derive(Clone, Debug)]
pub(crate) struct Considered {
    pub(crate) foresight: Foresight,
    pub(crate) began: Nanos,
    /// What reads of the shadow have taken since.
    reads: [Nanos; READS],
    count: usize,
}

impl Considered {
    /// Whether a read of the shadow is wanted.
    pub(crate) fn wants_read(&self) -> bool {
        self.count < READS
    }

    /// The middle of the reads so far.
    fn median(&self) -> Option<Nanos> {
        let mut reads = self.reads;
        let there = &mut reads[..self.count];
        there.sort_unstable();
        there.get(there.len().checked_sub(1)? / 2).copied()
    }
}

/// What reads of the shadow take in health: a median that moves slowly (a stochastic approximation on a logarithmic scale).
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Usual {
    log: f32,
    count: u32,
}

impl Usual {
    /// So many reads are averaged first.
    const START: u32 = 5;
    /// Afterwards each moves it by so much at most: a fault that comes within two minutes is not taken for usual.
    const STEP: f32 = 0.005;

    fn learn(&mut self, took: Nanos) {
        let log = (took.0.max(1) as f32).ln();
        self.count = self.count.saturating_add(1);
        if self.count <= Self::START {
            self.log += (log - self.log) / self.count as f32;
        } else {
            self.log += (log - self.log).clamp(-Self::STEP, Self::STEP);
        }
    }

    fn value(&self) -> Option<Nanos> {
        (self.count > 0).then(|| Nanos(self.log.exp() as u64))
    }
}

/// The shadow was found slow as well.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Common {
    /// When that was found, and when a read last said so.
    found: Nanos,
    at: Nanos,
    took: Nanos,
    usual: Nanos,
}

impl Common {
    /// Whether it is too soon after that for an alarm to be evidence; not for ever: a store may become slow and stay so.
    fn holds(&self, limits: &Limits, now: Nanos) -> bool {
        let most = Nanos(limits.cool_down_min.0.saturating_mul(HELPED_AFTER));
        self.is_fresh(limits, now) && now.since(self.found) < most
    }

    /// Whether a read has said so lately.
    fn is_fresh(&self, limits: &Limits, now: Nanos) -> bool {
        now.since(self.at) < limits.cool_down_min
    }
}

/// Decides about predicted failovers of one pair.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Policy {
    #[serde(skip)]
    pub(crate) considered: Option<Considered>,
    /// When the predicted failovers of the last hour were made.
    made: Vec<Nanos>,
    /// The rest after the last of them.
    rest: Option<Nanos>,
    usual: Usual,
    /// The last alarm, whatever came of it.
    alarm_at: Option<Nanos>,
    /// When the shadow was last found slow as well, and how slow.
    common: Option<Common>,
    /// The last read that was made without an alarm and surely slow: when it ended, and what it took.
    slow_read: Option<(Nanos, Nanos)>,
    /// An alarm came so soon after the last failover that it cannot have helped.
    unhelped: bool,
    /// When the guest was given its interrupts once more, and what had been submitted by then.
    nudged: Option<(u64, Nanos)>,
    /// When a failover was last made for interrupts that were lost, and when one was last found lost soon after that.
    for_interrupts: (Option<Nanos>, Option<Nanos>),
    /// When the backend was last given the guest's kicks once more.
    kicked: Option<Nanos>,
    /// When one was last lost less than a minute after another, which giving it once more had helped.
    kicks_lost: Option<Nanos>,
    /// The reason that was said last, and when.
    #[serde(skip)]
    said: Option<(&'static str, Nanos)>,
    #[serde(skip)]
    last_withheld: Option<Withheld>,
}

impl Policy {
    /// Why an alarm is not even looked into. Learns from it whether the last failover helped.
    pub(crate) fn at_first(
        &mut self,
        foresight: &Foresight,
        on_prediction: OnPrediction,
        limits: &Limits,
        now: Nanos,
    ) -> Option<Withheld> {
        self.alarm_at = Some(now);
        let resource = match foresight.alarm {
            Alarm::Exhaustion(feature) => Some(feature),
            Alarm::Risk => foresight.cause,
            _ => None,
        };
        if let Some(feature @ Feature::StoreShare) = resource {
            return Some(Withheld::SharedResource(feature));
        }
        if let Some(last) = self.made.last() {
            let rest = self.rest.unwrap_or(limits.cool_down_min);
            self.unhelped |= now.since(*last) < Nanos(rest.0.saturating_mul(HELPED_AFTER));
        }
        // Windows of the time in which both were slow are no evidence against one of them; nor is silence, where a store that both have
        // stood as still as that. It may be well again just now, when the shadow is asked.
        let alarm = foresight.alarm;
        let slow = matches!(alarm, Alarm::Harm | Alarm::Drift | Alarm::Risk);
        let silent = matches!(alarm, Alarm::Law(Law::RequestIsCompleted | Law::AnythingIsCompleted));
        let stood_still = |it: &Common| it.took > slow_beyond(alarm, it.usual).max(HANGING) && it.is_fresh(limits, now);
        let explains = |it: &&Common| (slow && it.holds(limits, now)) || (silent && stood_still(it));
        if let Some(Common { took, usual, .. }) = self.common.as_ref().filter(explains) {
            return Some(Withheld::CommonCause { took: Some(*took), usual: *usual });
        }
        // An alarm is about the windows before it. What comes and goes may have gone by now: the control is what the shadow did then. It is
        // asked again at the next alarm.
        if let (Some((at, took)), Some(usual), true) = (self.slow_read, self.usual.value(), slow)
            && now.since(at) < SAME_TIME
            && !loose(Animal::CommonCauseIgnored)
        {
            return Some(Withheld::CommonCause { took: Some(took), usual });
        }
        if foresight.others >= OTHERS_MAX {
            return Some(Withheld::Host { others: foresight.others });
        }
        if on_prediction == OnPrediction::Observe {
            return Some(Withheld::ObserveOnly);
        }
        if let Some(left) = self.cooling(limits, now) {
            return Some(Withheld::Cooling { left });
        }
        if self.left_this_hour(limits, now) == 0 && !loose(Animal::PingPong) {
            return Some(Withheld::Budget { per_hour: limits.predicted_per_hour });
        }
        None
    }

    /// Looks into an alarm from now on.
    pub(crate) fn consider(&mut self, foresight: Foresight, now: Nanos) {
        self.considered = Some(Considered { foresight, began: now, reads: [Nanos(0); READS], count: 0 });
    }

    /// A read of the shadow that began at `began` has taken so long.
    pub(crate) fn read(&mut self, began: Nanos, took: Nanos, now: Nanos) {
        if let Some(considered) = self.considered.as_mut().filter(|it| it.wants_read() && began >= it.began) {
            considered.reads[considered.count] = took;
            considered.count += 1;
        } else if self.alarm_at.is_none_or(|at| now.since(at) >= UNWELL_FOR) {
            self.usual.learn(took);
        }
        let Some(usual) = self.usual.value() else { return };
        let beyond_chance = slow_beyond(Alarm::Errors, usual);
        if took > beyond_chance.max(SURELY_SLOW) {
            self.slow_read = Some((now, took));
        }
        let is_over = self.common.as_ref().is_none_or(|it| now.since(it.at) >= SAID_AGAIN);
        if is_over && took > beyond_chance.max(HANGING) {
            // Nobody has to ask whether a store stands still that does.
            self.common = Some(Common { found: now, at: now, took, usual });
        } else if let Some(common) = self.common.as_mut().filter(|_| took > slow_beyond(Alarm::Harm, usual)) {
            (common.at, common.took, common.usual) = (now, took, usual);
        }
    }

    /// What speaks against the failover that is considered, now that the shadow was asked. `waiting` is how long a read has been under way.
    pub(crate) fn against(&self, waiting: Option<Nanos>, swap: Option<Nanos>, limits: &Limits) -> Option<Withheld> {
        let considered = self.considered.as_ref()?;
        let Foresight { alarm, risk, harm, .. } = considered.foresight;
        if self.usual.value().is_none() && waiting.is_some() {
            return Some(Withheld::Refused("the shadow has not completed any read yet".to_owned()));
        }
        if let Some(usual) = self.usual.value().filter(|_| !loose(Animal::CommonCauseIgnored)) {
            let most = slow_beyond(alarm, usual);
            if waiting.is_some_and(|waiting| self.is_slow(waiting)) {
                return Some(Withheld::CommonCause { took: None, usual });
            }
            let took = considered.median();
            if took.is_some_and(|took| took > most) {
                return Some(Withheld::CommonCause { took, usual });
            }
        }
        // What a law or a resource says is as good as certain; what harm says has happened in part.
        let risk = if matches!(alarm, Alarm::Law(_) | Alarm::Exhaustion(_)) { 1.0 } else { risk.max(harm) };
        let (warm, crash) = (swap.unwrap_or(SWAP_COST), limits.hang);
        let gain = risk * crash.0 as f32;
        (gain <= (1.0 - risk) * warm.0 as f32).then_some(Withheld::NotWorth { risk })
    }

    /// The shadow was asked, and is slow as well. `waiting` is how long a read of it has been under way.
    pub(crate) fn found_common(&mut self, why: &Withheld, waiting: Option<Nanos>, now: Nanos) {
        if let Withheld::CommonCause { took, usual } = *why
            && let Some(took) = took.or(waiting)
        {
            self.common = Some(Common { found: now, at: now, took, usual });
        }
    }

    /// An interrupt seems to be lost: the guest is given it once more, and the next one is looked into only if it has gone on since.
    /// `submitted` is how much it has asked for so far. None: it has gone on, and has lost another one soon.
    /// After a swap that did not end it nobody else is asked for an hour: what is given again helps, and nothing else does.
    pub(crate) fn interrupt_lost(&mut self, submitted: u64, limits: &Limits, now: Nanos) -> Option<Withheld> {
        let soon = Nanos(limits.cool_down_min.0.saturating_mul(HELPED_AFTER));
        let (swapped, unhelped) = &mut self.for_interrupts;
        if swapped.is_some_and(|at| now.since(at) < soon) {
            *unhelped = Some(now);
        }
        let is_hopeless = unhelped.is_some_and(|at| now.since(at) < HOUR);
        match self.nudged.replace((submitted, now)) {
            Some((before, _)) if before == submitted => Some(Withheld::GuestAbsent),
            Some((_, at)) if now.since(at) < SAID_AGAIN && !is_hopeless => None,
            _ => Some(Withheld::GivenAgain),
        }
    }

    /// A kick seems to be lost: the backend is given it once more. `waiting_since` is since when a ring of it has been owed something and got
    /// nothing. None: that is since before the last time, so the backend does not hear what it is given, and is looked into.
    ///
    /// What is given again takes the same way into the backend as a kick of the guest. A backend that takes the one and not the other is not
    /// what loses them: no other one would get them either.
    pub(crate) fn kick_lost(&mut self, waiting_since: Option<Nanos>, now: Nanos) -> Option<Withheld> {
        let given = self.kicked.filter(|at| now.since(*at) < SAID_AGAIN);
        if let Some(at) = given {
            if now.since(at) < LOOKED_AGAIN {
                return Some(Withheld::KickedAgain);
            }
            if waiting_since.is_some_and(|since| since <= at) {
                return None;
            }
            self.kicks_lost = Some(now);
        }
        self.kicked = Some(now);
        Some(Withheld::KickedAgain)
    }

    /// Whether kicks are lost so often, and giving them again helps so well, that a ring which stands still is given one without an alarm.
    pub(crate) fn gives_kicks(&self, now: Nanos) -> bool {
        self.kicks_lost.is_some_and(|at| now.since(at) < SAID_AGAIN)
    }

    /// Whether a read that has been under way for so long says that the shadow is slow, without waiting for its end.
    pub(crate) fn is_slow(&self, waiting: Nanos) -> bool {
        let (Some(considered), Some(usual)) = (&self.considered, self.usual.value()) else { return false };
        waiting > slow_beyond(considered.foresight.alarm, usual).max(HANGING)
    }

    /// The failover that was considered begins.
    pub(crate) fn act(&mut self, limits: &Limits, now: Nanos) -> Option<Foresight> {
        let considered = self.considered.take()?;
        let unhelped = std::mem::take(&mut self.unhelped);
        self.rest = match self.rest {
            Some(rest) if unhelped => Some(Nanos(rest.0.saturating_mul(2)).min(limits.cool_down_max)),
            _ => Some(limits.cool_down_min),
        };
        self.made.retain(|at| now.since(*at) < HOUR);
        self.made.push(now);
        self.last_withheld = None;
        if considered.foresight.alarm == Alarm::Law(Law::InterruptIsTaken) {
            self.for_interrupts.0 = Some(now);
        }
        Some(considered.foresight)
    }

    /// Notes that the alarm is not acted upon. Says whether that is news.
    pub(crate) fn withhold(&mut self, why: &Withheld, now: Nanos) -> bool {
        self.considered = None;
        self.last_withheld = Some(why.clone());
        let news = self.said.is_none_or(|(name, at)| name != why.name() || now.since(at) >= SAID_AGAIN);
        if news {
            self.said = Some((why.name(), now));
        }
        news
    }

    fn cooling(&self, limits: &Limits, now: Nanos) -> Option<Nanos> {
        if loose(Animal::PingPong) {
            return None;
        }
        let rest = self.rest.unwrap_or(limits.cool_down_min);
        let over = *self.made.last()? + rest;
        (now < over).then(|| over.since(now))
    }

    fn left_this_hour(&self, limits: &Limits, now: Nanos) -> u32 {
        let made = self.made.iter().filter(|at| now.since(**at) < HOUR).count();
        limits.predicted_per_hour.saturating_sub(u32::try_from(made).unwrap_or(u32::MAX))
    }

    /// What is shown of it.
    pub(crate) fn status(&self, on_prediction: OnPrediction, limits: &Limits, now: Nanos) -> PolicyStatus {
        PolicyStatus {
            on_prediction,
            left_this_hour: self.left_this_hour(limits, now),
            cooling: self.cooling(limits, now),
            canary_usual: self.usual.value(),
            withheld: self.last_withheld.clone(),
        }
    }
}

/// Whether draining a primary with that alarm would be waiting for what it will not do.
pub(crate) fn can_drain(alarm: Alarm) -> bool {
    !matches!(alarm, Alarm::Law(Law::RequestIsCompleted | Law::AnythingIsCompleted))
}

/// What reads of the shadow may take without its being slow.
fn slow_beyond(alarm: Alarm, usual: Nanos) -> Nanos {
    let factor = match alarm {
        Alarm::Law(_) | Alarm::Errors | Alarm::Exhaustion(_) => COMMON_FACTOR_STOPPED,
        Alarm::Harm | Alarm::Drift | Alarm::Risk => COMMON_FACTOR,
    };
    Nanos((usual.0 as f32 * factor) as u64).max(usual + COMMON_LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = Nanos::from_millis(1_000);

    fn alarm(alarm: Alarm) -> Foresight {
        Foresight {
            backend: BackendId(1),
            alarm,
            risk: 0.4,
            harm: 0.3,
            cause: None,
            causes: "none".to_owned(),
            others: 0,
        }
    }

    fn after(seconds: u64) -> Nanos {
        Nanos(SECOND.0 * seconds)
    }

    /// A policy that knows what reads take: 400 µs.
    fn experienced() -> Policy {
        let mut policy = Policy::default();
        (0..20).for_each(|at| policy.read(after(at), Nanos::from_micros(400), after(at)));
        policy
    }

    fn judged(policy: &mut Policy, what: Alarm, reads: [u64; READS], now: Nanos) -> Option<Withheld> {
        let limits = Limits::default();
        let at_first = policy.at_first(&alarm(what), OnPrediction::Act, &limits, now);
        if at_first.is_some() {
            return at_first;
        }
        policy.consider(alarm(what), now);
        for read in reads {
            policy.read(now, Nanos::from_micros(read), now);
        }
        let against = policy.against(None, None, &limits);
        if against.is_none() {
            policy.act(&limits, now).expect("it was considered");
        }
        against
    }

    #[test]
    fn a_slow_primary_beside_a_quick_shadow_is_replaced_and_one_beside_a_slow_shadow_is_not() {
        let quick = judged(&mut experienced(), Alarm::Harm, [410, 900, 380], after(100));
        assert_eq!(quick, None);
        let slow = judged(&mut experienced(), Alarm::Harm, [4_000, 900, 3_000], after(100));
        assert!(matches!(slow, Some(Withheld::CommonCause { took: Some(Nanos(3_000_000)), .. })), "{slow:?}");
        let law = Alarm::Law(Law::AnythingIsCompleted);
        assert_eq!(judged(&mut experienced(), law, [2_000, 900, 3_000], after(100)), None, "it answers");
        assert!(judged(&mut experienced(), law, [20_000, 9_000, 30_000], after(100)).is_some());
    }

    #[test]
    fn a_read_that_does_not_come_back_is_a_common_cause() {
        let mut policy = experienced();
        policy.consider(alarm(Alarm::Risk), after(100));
        let against = policy.against(Some(Nanos::from_millis(300)), None, &Limits::default());
        assert!(matches!(against, Some(Withheld::CommonCause { took: None, .. })), "{against:?}");
    }

    #[test]
    fn after_a_common_cause_the_shadow_has_to_be_well_for_a_while() {
        let mut policy = experienced();
        let why = judged(&mut policy, Alarm::Harm, [4_000; READS], after(100)).expect("the shadow is slow");
        policy.found_common(&why, None, after(100));
        policy.read(after(104), Nanos::from_micros(5_000), after(104));
        for (second, common) in [(105, true), (113, true), (114, false)] {
            let now = judged(&mut policy.clone(), Alarm::Harm, [400; READS], after(second));
            assert_eq!(matches!(now, Some(Withheld::CommonCause { .. })), common, "{second}: {now:?}");
        }
    }

    #[test]
    fn what_both_share_the_host_and_the_operator_forbid_it() {
        let limits = Limits::default();
        let mut policy = experienced();
        let full = alarm(Alarm::Exhaustion(Feature::StoreShare));
        let first =
            |policy: &mut Policy, foresight: &Foresight, on| policy.at_first(foresight, on, &limits, after(100));
        let why = first(&mut policy, &full, OnPrediction::Act);
        assert!(matches!(why, Some(Withheld::SharedResource(_))));
        let nearly = Foresight { cause: Some(Feature::StoreShare), ..alarm(Alarm::Risk) };
        let why = first(&mut policy, &nearly, OnPrediction::Act);
        assert!(matches!(why, Some(Withheld::SharedResource(_))));
        let many = Foresight { others: 2, ..alarm(Alarm::Harm) };
        assert!(matches!(first(&mut policy, &many, OnPrediction::Act), Some(Withheld::Host { others: 2 })));
        let harm = alarm(Alarm::Harm);
        assert_eq!(first(&mut policy, &harm, OnPrediction::Observe), Some(Withheld::ObserveOnly));
        assert_eq!(first(&mut policy, &harm, OnPrediction::Act), None);
    }

    #[test]
    fn each_failover_that_did_not_help_doubles_the_rest_and_one_that_did_ends_that() {
        let mut policy = experienced();
        let mut now = 100;
        let mut rests = Vec::new();
        for _ in 0..4 {
            assert_eq!(judged(&mut policy, Alarm::Harm, [400; READS], after(now)), None);
            let began = now;
            loop {
                now += 1;
                match judged(&mut policy.clone(), Alarm::Harm, [400; READS], after(now)) {
                    Some(Withheld::Cooling { .. }) => {}
                    None => break,
                    other => panic!("{other:?}"),
                }
            }
            rests.push(now - began);
        }
        assert_eq!(rests, [10, 20, 40, 80]);
        now += 1_000;
        assert_eq!(judged(&mut policy, Alarm::Harm, [400; READS], after(now)), None);
        assert_eq!(policy.cooling(&Limits::default(), after(now)), Some(after(10)));
    }

    #[test]
    fn a_fault_that_no_swap_cures_is_not_forgiven_for_being_withheld() {
        let mut policy = experienced();
        let mut made = 0;
        for second in 100..20_000 {
            made += u32::from(judged(&mut policy, Alarm::Harm, [400; READS], after(second)).is_none());
        }
        assert!(made <= 13, "{made} in five and a half hours");
    }

    #[test]
    fn a_guest_that_takes_no_interrupts_is_told_from_one_that_loses_them() {
        let mut policy = Policy::default();
        let limits = Limits::default();
        assert_eq!(policy.interrupt_lost(7, &limits, after(1)), Some(Withheld::GivenAgain));
        assert_eq!(policy.interrupt_lost(7, &limits, after(2)), Some(Withheld::GuestAbsent));
        assert_eq!(policy.interrupt_lost(7, &limits, after(300)), Some(Withheld::GuestAbsent));
        assert_eq!(policy.interrupt_lost(9, &limits, after(302)), None, "it went on, and lost another one");
        assert_eq!(policy.interrupt_lost(10, &limits, after(900)), Some(Withheld::GivenAgain));
    }

    #[test]
    fn interrupts_that_are_lost_behind_a_swap_as_well_are_only_given_again() {
        // When one is lost, in seconds, and whether the backend is looked into for it; it is swapped then.
        let scripts: [&[(u64, bool)]; 2] = [
            &[
                (1, false),
                (2, true),
                (20, false),
                (40, false),
                (100, false),
                (3_600, false),
                (3_705, false),
                (3_720, true),
            ],
            // That one helped: it is another backend which loses them now.
            &[(1, false), (2, true), (200, false), (210, true)],
        ];
        let limits = Limits::default();
        for script in scripts {
            let mut policy = experienced();
            for (at, (second, looked_into)) in (0..).zip(script) {
                let why = policy.interrupt_lost(at, &limits, after(*second));
                assert_eq!(why, (!looked_into).then_some(Withheld::GivenAgain), "{second}: {script:?}");
                if *looked_into {
                    policy.consider(alarm(Alarm::Law(Law::InterruptIsTaken)), after(*second));
                    policy.act(&limits, after(*second)).expect("it was considered");
                }
            }
        }
    }

    #[test]
    fn kicks_are_given_again_as_long_as_the_backend_hears_those() {
        let ms = Nanos::from_millis;
        // Alarms: when, since when a ring waits, whether it is looked into, whether rings that stand still are given kicks afterwards.
        let scripts: [&[(u64, u64, bool, bool)]; 4] = [
            // Deaf: nothing was completed since the kick was given again, which is seen after a while.
            &[(1_000, 900, false, false), (1_100, 900, false, false), (1_160, 900, true, false)],
            // The guest's are lost: each time it helps.
            &[
                (1_000, 900, false, false),
                (1_400, 1_300, false, true),
                (1_900, 1_800, false, true),
                (9_000, 8_900, false, true),
            ],
            // It went deaf later on.
            &[
                (1_000, 900, false, false),
                (1_400, 1_300, false, true),
                (1_500, 1_300, false, true),
                (1_600, 1_300, true, true),
            ],
            // One in a while.
            &[(1_000, 900, false, false), (70_000, 69_900, false, false), (140_000, 139_900, false, false)],
        ];
        for script in scripts {
            let mut policy = Policy::default();
            for (at, since, looked_into, gives) in script {
                let why = policy.kick_lost(Some(ms(*since)), ms(*at));
                assert_eq!(why, (!looked_into).then_some(Withheld::KickedAgain), "{at}: {script:?}");
                assert_eq!(policy.gives_kicks(ms(*at)), *gives, "{at}: {script:?}");
            }
            assert!(!policy.gives_kicks(ms(200_000)), "it is over: {script:?}");
        }
    }

    #[test]
    fn a_store_that_comes_and_goes_is_a_common_cause_while_it_is_gone() {
        let silence = Alarm::Law(Law::AnythingIsCompleted);
        let ms = Nanos::from_millis;
        // The last read before the alarm: what it took, and when it ended before it; the alarm; whether that is a common cause although reads
        // are quick by now.
        let cases = [
            (400, 500, Alarm::Harm, true),
            (400, 500, silence, true),
            (400, 9_000, Alarm::Harm, true),
            (400, 9_000, silence, true),
            (400, 11_000, Alarm::Harm, false),
            (400, 11_000, silence, false),
            (40, 500, Alarm::Harm, true),
            (40, 1_900, Alarm::Risk, true),
            (40, 2_100, Alarm::Harm, false),
            // Slow is not silent, what has run out has, and what happens by chance is no evidence.
            (40, 500, silence, false),
            (40, 500, Alarm::Exhaustion(Feature::DescriptorShare), false),
            (10, 500, Alarm::Harm, false),
        ];
        for (took, before, what, common) in cases {
            let mut policy = experienced();
            let now = after(100);
            policy.read(Nanos(now.0 - ms(before + took).0), ms(took), Nanos(now.0 - ms(before).0));
            let why = judged(&mut policy, what, [400; READS], now);
            let found = matches!(why, Some(Withheld::CommonCause { .. }));
            assert_eq!(found, common, "{took} ms, {before} ms before {what:?}: {why:?}");
        }
    }

    #[test]
    fn a_read_that_hung_is_remembered_like_one_that_was_slow() {
        let mut policy = experienced();
        let silence = Alarm::Law(Law::AnythingIsCompleted);
        policy.consider(alarm(silence), after(100));
        let waiting = Some(Nanos::from_millis(300));
        let why = policy.against(waiting, None, &Limits::default()).expect("it hangs");
        policy.found_common(&why, waiting, after(100));
        policy.withhold(&why, after(100));
        for (second, common) in [(101, true), (109, true), (110, false)] {
            let now = judged(&mut policy.clone(), silence, [400; READS], after(second));
            assert_eq!(matches!(now, Some(Withheld::CommonCause { .. })), common, "{second}: {now:?}");
        }
    }

    #[test]
    fn a_store_that_is_slow_for_good_does_not_switch_foresight_off() {
        let mut policy = experienced();
        let why = judged(&mut policy, Alarm::Harm, [4_000; READS], after(100)).expect("the shadow is slow");
        policy.found_common(&why, None, after(100));
        (101..161).for_each(|second| policy.read(after(second), Nanos::from_millis(4), after(second)));
        let first = policy.at_first(&alarm(Alarm::Harm), OnPrediction::Act, &Limits::default(), after(161));
        assert_eq!(first, None, "the shadow is asked again");
        let law = alarm(Alarm::Law(Law::KickIsSeen));
        assert_eq!(policy.at_first(&law, OnPrediction::Act, &Limits::default(), after(101)), None);
    }

    #[test]
    fn silence_is_no_evidence_just_after_the_store_stood_still_for_both() {
        let mut policy = experienced();
        let why = judged(&mut policy, Alarm::Harm, [4_000; READS], after(100)).expect("the shadow is slow");
        policy.found_common(&why, None, after(100));
        let silence = alarm(Alarm::Law(Law::AnythingIsCompleted));
        let asked = |policy: &mut Policy, second| {
            policy.at_first(&silence, OnPrediction::Act, &Limits::default(), after(second))
        };
        assert_eq!(asked(&mut policy, 101), None, "slow is not silent");
        policy.read(after(102), Nanos::from_millis(1_600), after(102));
        assert!(matches!(asked(&mut policy, 103), Some(Withheld::CommonCause { .. })));
        assert_eq!(asked(&mut policy, 113), None, "it is long ago");
        policy.read(after(500), Nanos::from_millis(1_600), after(500));
        assert!(matches!(asked(&mut policy, 501), Some(Withheld::CommonCause { .. })), "however long it has been slow");
    }

    #[test]
    fn an_hour_has_a_budget() {
        let mut policy = experienced();
        let mut now = 100;
        for _ in 0..6 {
            assert_eq!(judged(&mut policy, Alarm::Harm, [400; READS], after(now)), None);
            now += 500;
        }
        let why = judged(&mut policy, Alarm::Harm, [400; READS], after(now));
        assert_eq!(why, Some(Withheld::Budget { per_hour: 6 }));
        assert_eq!(judged(&mut policy, Alarm::Harm, [400; READS], after(3_701)), None, "the first is an hour ago");
    }

    #[test]
    fn what_is_hardly_likely_is_not_worth_it() {
        let mut policy = experienced();
        let foresight = Foresight { risk: 0.001, harm: 0.0, ..alarm(Alarm::Drift) };
        policy.consider(foresight, after(100));
        assert!(matches!(policy.against(None, None, &Limits::default()), Some(Withheld::NotWorth { .. })));
    }

    #[test]
    fn the_same_reason_is_said_once_a_minute() {
        let mut policy = Policy::default();
        assert!(policy.withhold(&Withheld::ObserveOnly, after(0)));
        assert!(!policy.withhold(&Withheld::ObserveOnly, after(59)));
        assert!(policy.withhold(&Withheld::Budget { per_hour: 6 }, after(59)));
        assert!(policy.withhold(&Withheld::ObserveOnly, after(60)));
        assert!(policy.withhold(&Withheld::ObserveOnly, after(120)));
    }

    #[test]
    fn what_is_usual_is_not_learnt_from_a_shadow_that_is_unwell() {
        let mut policy = experienced();
        let usual = policy.usual.value();
        policy.at_first(&alarm(Alarm::Harm), OnPrediction::Observe, &Limits::default(), after(100));
        policy.read(after(101), Nanos::from_millis(900), after(102));
        assert_eq!(policy.usual.value(), usual);
        policy.read(after(201), Nanos::from_millis(900), after(202));
        assert!(policy.usual.value() > usual && policy.usual.value() < usual.map(|it| Nanos(it.0 * 2)));
    }
}
