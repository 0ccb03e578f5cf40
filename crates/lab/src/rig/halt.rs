//! Failovers the broker halts: it knows that it does not know, guesses nothing, and waits until the VMM resets the rings.
//!
//! That is a refusal with a reason, not a wrong result, but the guest's disk is gone until somebody acts. So every one is said
//! and counted, the guest is reset as an operator would do it, and whatever was wrong in memory or on the image before is judged
//! all the same. A request that was in flight at the reset is like one in flight at a power loss: done or not.

use std::fmt;

use anyhow::{Context, ensure};

use super::failover;
use super::load::Pace;
use super::tally::Tally;
use super::vmm;
use super::world::World;

/// Halts after each other, without a failover that settles, after which the device does not come back.
const ATTEMPTS_MAX: u64 = 20;

/// How the broker ends a refusal that only a reset helps out of.
const RESET_THE_GUEST: &str = "reset the guest";

/// The broker has halted the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Halted {
    /// The broker's reason.
    pub(crate) reason: String,
}

impl fmt::Display for Halted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the broker has halted the device: {}", self.reason)
    }
}

impl std::error::Error for Halted {}

/// Halts as the broker announces them: by events, and by the count in its status. Either may come first.
#[derive(Debug, Default)]
pub(crate) struct Halts {
    in_events: u64,
    in_status: u64,
    /// Rings that the broker would not start again after their backend was lost: the same for the guest, without a failover.
    not_started: u64,
    handled: u64,
    reason: Option<String>,
}

impl Halts {
    /// An event came, as a line of JSON.
    pub(crate) fn event(&mut self, line: &str) {
        if !line.contains("\"FailoverHalted\"") && !line.contains(RESET_THE_GUEST) {
            return;
        }
        let event: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let text = |property: &str| event["properties"][property].as_str().map(str::to_owned);
        if event["event"] == "FailoverHalted" {
            self.in_events += 1;
            self.reason = text("message");
        } else if event["event"] == "MessageRefused" && text("reason").is_some_and(|it| it.ends_with(RESET_THE_GUEST)) {
            self.not_started += 1;
            self.reason = text("reason");
        }
    }

    /// A status came that counts `halted` failovers; `message` is what it says of the last one, if that one was halted.
    pub(crate) fn status(&mut self, halted: u64, message: Option<&str>) {
        self.in_status = halted;
        if self.in_status > self.in_events && message.is_some() {
            self.reason = message.map(str::to_owned);
        }
    }

    /// Takes a halt that was not taken before.
    pub(crate) fn take(&mut self) -> Option<Halted> {
        if self.in_events.max(self.in_status) > self.handled {
            self.handled += 1;
        } else if self.not_started > 0 {
            // One reset is for all of them.
            self.not_started = 0;
        } else {
            return None;
        }
        Some(Halted { reason: self.reason.clone().unwrap_or_default() })
    }
}

/// Goes on where `step` ended because the broker halted the device: the guest is reset, until the device is protected and
/// serves again. Other failures stay failures.
pub(crate) fn recover(mut step: anyhow::Result<()>, world: &mut World, tally: &mut Tally) -> anyhow::Result<()> {
    for _ in 0..ATTEMPTS_MAX {
        let Err(error) = step else { return Ok(()) };
        let halted = halt_behind(error, world)?;
        ensure!(!halted.reason.is_empty(), "the broker has halted the device without a reason");
        eprintln!("  HALTED after {} failovers: {}; the guest is reset", tally.failovers, halted.reason);
        if world.kills_broker {
            // There it should be rare, and has a story.
            eprintln!("{}", world.broker.last_events());
        }
        tally.halt(&halted.reason);
        step = reset(world).context("resetting the guest of a halted device");
    }
    step.context("the device does not come back")
}

/// The halt that made a step fail. What the VMM asks of a ring that was halted meanwhile fails before the rig has heard why.
fn halt_behind(error: anyhow::Error, world: &mut World) -> anyhow::Result<Halted> {
    if let Some(halted) = error.downcast_ref::<Halted>() {
        return Ok(halted.clone());
    }
    // Of a broker that has ended, the failure says more than that no word came.
    match world.load.verdict.is_clean().then(|| world.pending_halt()) {
        Some(Ok(Some(halted))) => Ok(halted),
        _ => Err(error),
    }
}

/// What an operator does: the guest is reset. Its rings are stopped, what was completed counts, the rest is forgotten, and new
/// rings start at index 0.
fn reset(world: &mut World) -> anyhow::Result<()> {
    world.resynchronise = true;
    world.pace = Pace::Trickle;
    if !world.guest.is_connected() {
        return world.boot_again();
    }
    if world.guest.is_hung_up()? {
        // The VMM asked for what a halted ring cannot give, without wanting to hear so: the broker has hung up. It is restarted.
        world.load.reap_all(&mut world.guest);
        world.guest.disconnect();
        world.load.abandon(&world.guest, false);
        world.boot_again()?;
    } else {
        vmm::stop(world)?;
        world.load.reap_all(&mut world.guest);
        world.load.abandon(&world.guest, true);
        vmm::look(world)?;
        world.guest.start_at(0)?;
        vmm::unmask(world)?;
    }
    failover::serves_again(world)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: &str =
        r#"{"event":"FailoverHalted","level":"error","properties":{"id":3,"message":"ring 0: unknown"}}"#;

    #[test]
    fn a_halt_is_taken_once_whether_events_or_status_say_it_first() {
        let mut halts = Halts::default();
        assert_eq!(halts.take(), None);
        halts.event(EVENT);
        assert_eq!(halts.take().map(|halted| halted.reason).as_deref(), Some("ring 0: unknown"));
        halts.status(1, Some("ring 0: unknown"));
        assert_eq!(halts.take(), None);
        halts.status(2, Some("ring 1: unknown"));
        assert_eq!(halts.take().map(|halted| halted.reason).as_deref(), Some("ring 1: unknown"));
        halts.event(EVENT);
        assert_eq!(halts.take(), None);
    }

    #[test]
    fn rings_that_are_not_started_again_are_one_halt() {
        let mut halts = Halts::default();
        let reason = "what ring 1 owes is not known since its backend was lost; reset the guest";
        for _ in 0..2 {
            halts.event(&format!(r#"{{"event":"MessageRefused","properties":{{"reason":"{reason}"}}}}"#));
        }
        assert_eq!(halts.take(), Some(Halted { reason: reason.into() }));
        assert_eq!(halts.take(), None);
    }

    #[test]
    fn other_events_are_no_halts() {
        let mut halts = Halts::default();
        halts.event(r#"{"event":"FailoverSettled","properties":{"message":"\"FailoverHalted\""}}"#);
        halts
            .event(r#"{"event":"MessageRefused","properties":{"reason":"the VMM uses ring 7, the backends serve 4"}}"#);
        halts.event("not JSON, but \"FailoverHalted\"");
        assert_eq!(halts.take(), None);
    }

    #[test]
    fn a_halt_is_found_behind_every_context() {
        let error = anyhow::Error::from(Halted { reason: "x".into() }).context("one").context("two");
        assert!(error.downcast_ref::<Halted>().is_some());
    }
}
