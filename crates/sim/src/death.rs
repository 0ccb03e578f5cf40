//! The broker's own death, and the one that goes on.
//!
//! The program writes down where a pair stands and what it wants before it does that; takes what has come away from its sockets, sends and
//! counts in one system call; and does the rest, which can be done twice, last. So a broker that dies in a step has either not begun it
//! (then what has come is still there), or written it down and said nothing yet, or said all of it. The last two happen here; the first
//! is a broker that is late.

use warmswap_core::{Action, Actions, Event as Happened, Nanos, Pair};

use crate::world::World;

/// What a dead broker has left.
#[derive(Debug)]
pub(crate) struct Left {
    /// The pair, as it was written down.
    pair: String,
    /// What was written down and is to be done, or done again.
    wanted: Vec<Action>,
    /// When whoever was fenced had been killed, if the record says so.
    killed_at: Option<Nanos>,
}

impl World<'_> {
    /// Counts a step of the broker; true where it dies in this one.
    pub(crate) fn broker_dies_now(&mut self) -> bool {
        match &mut self.broker.dies_in {
            Some(0) => {
                self.broker.dies_in = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    /// The broker dies with these actions written down.
    pub(crate) fn broker_dies(&mut self, actions: Vec<Action>) {
        self.count_fault("broker dies");
        let pair = serde_json::to_string(&self.broker.pair).expect("a pair can be written down");
        let killed_at = self.broker.killed_at.filter(|_| self.broker.fences > 0);
        let mut left = Left { pair, wanted: Vec::new(), killed_at };
        let said = self.random.one_in(2);
        for action in actions {
            // What can be done twice may be done before and after.
            let again = matches!(action, Action::Signal(_)).then(|| match &action {
                Action::Signal(fd) => Action::Signal(*fd),
                _ => unreachable!("just seen"),
            });
            // A start that was written down and not made ends with the broker: the backend is one that could not be started.
            if said || matches!(action, Action::Start { .. }) {
                self.carry_out(action);
                left.wanted.extend(again);
            } else {
                left.wanted.push(action);
            }
        }
        self.broker.watched.fill(None);
        self.broker.left = Some(left);
        let span = Nanos::from_micros(self.random.between(500, 90_000));
        self.broker.late_until = self.now + span;
        self.vmm.excused_until = self.broker.late_until;
        self.wake_broker(self.broker.late_until);
    }

    /// The next broker goes on.
    pub(crate) fn broker_takes_over(&mut self) {
        let Some(left) = self.broker.left.take() else { return };
        self.note(|| "broker: another one takes over".to_owned());
        let pair: Pair = match serde_json::from_str(&left.pair) {
            Ok(pair) => pair,
            Err(error) => return self.fail("take-over", format!("the record cannot be read: {error}")),
        };
        self.mem.forget_maps();
        let mut actions = Actions::default();
        match pair.take_over(self.options.config(), left.killed_at, self.now, &mut self.mem, &mut actions) {
            Ok(pair) => self.broker.pair = pair,
            Err(why) => return self.fail("take-over", why),
        }
        self.keep_what_can_be_seen_again();
        for action in left.wanted {
            self.carry_out(action);
        }
        for action in actions.drain() {
            self.carry_out(action);
        }
        // Whoever had asked for something has lost the connection.
        self.broker.answered = self.broker.commands;
    }

    /// Of what the dead broker had been told, ends of links and processes are seen again, and fences are raised again.
    fn keep_what_can_be_seen_again(&mut self) {
        for event in std::mem::take(&mut self.broker.events) {
            match event {
                Happened::LinkUp { backend, backend_req, private } => {
                    let own = [private.kick, private.call, private.probe];
                    own.into_iter().chain(backend_req).for_each(|fd| self.mem.close(fd));
                    self.kill(backend.0, "with the broker that had just connected to it");
                }
                Happened::FailoverRequested { .. } | Happened::Kicked { .. } | Happened::FailurePredicted(_) => {}
                other => self.broker.events.push_back(other),
            }
        }
    }
}
