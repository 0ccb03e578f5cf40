//! Failpoints, for instruments: a backend is killed before the broker takes a certain step of a failover.
//!
//! A step is an action of the core: a message to a backend, a signal, a change of roles. Killing before each of them in turn is every death
//! that a failover can meet between two things that it does.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::process::Signal;
use serde::Deserialize;
use warmswap_core::{Action, Entry, Phase};
use warmswap_wire::{HEADER_SIZE, Header, RequestCode};

/// Whom it kills, by the roles at the time at which it was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Whom {
    /// The old primary.
    Primary,
    /// The one that is to take over.
    Shadow,
    /// Both.
    Both,
    /// The broker itself, between two things that it does.
    Broker,
}

/// One that is set.
#[derive(Debug)]
pub(crate) struct Failpoint {
    /// Actions of the failover until it is reached.
    left: u32,
    /// Actions have been counted.
    began: bool,
    step: u32,
    /// None of them: the broker itself.
    victims: Vec<Arc<OwnedFd>>,
    broker: bool,
}

impl Failpoint {
    /// Before the action of this number, counted from 1, of the next failover these processes are killed.
    pub(crate) fn new(step: u32, victims: Vec<Arc<OwnedFd>>) -> Self {
        Failpoint { left: step, began: false, step, victims, broker: false }
    }

    /// At the point of this number, counted from 1, of the next failover this process is killed.
    pub(crate) fn of_broker(step: u32) -> Self {
        Failpoint { left: step, began: false, step, victims: Vec::new(), broker: true }
    }

    /// Whether it is the broker that it kills.
    pub(crate) fn is_of_broker(&self) -> bool {
        self.broker
    }

    /// Kills this process as a fault of it would: at once, with nothing put in order.
    pub(crate) fn strike_broker(&self, before: &str) {
        eprintln!("warmswap: failpoint {} of the broker reached, before {before}", self.step);
        let _killed = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
        std::process::abort();
    }

    /// Counts an action that is about to be carried out; true where the point is reached.
    pub(crate) fn reaches(&mut self, failing_over: bool) -> bool {
        self.began |= failing_over;
        if !self.began {
            return false;
        }
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }

    /// Whether the failover that it waited for is over.
    pub(crate) fn is_passed(&self, failing_over: bool) -> bool {
        self.began && !failing_over
    }

    /// Kills, and says before what.
    pub(crate) fn strike(&self, phase: Phase, before: &Action) -> Entry {
        for victim in &self.victims {
            // It may have ended by itself.
            let _gone = rustix::process::pidfd_send_signal(victim, Signal::KILL);
        }
        let entry = Entry::info("FailpointReached").with("step", self.step);
        entry.with("phase", phase.name()).with("before", name(before))
    }
}

/// An action in a word.
fn name(action: &Action) -> String {
    match action {
        Action::SendLink { bytes, .. } => {
            let header = bytes.first_chunk::<HEADER_SIZE>().and_then(|head| Header::decode(head).ok());
            let code = header.and_then(|header| RequestCode::from_id(header.request));
            code.map_or("a message", RequestCode::name).to_owned()
        }
        other => {
            let text = format!("{other:?}");
            text.split(|letter: char| !letter.is_alphanumeric()).next().unwrap_or_default().to_owned()
        }
    }
}
