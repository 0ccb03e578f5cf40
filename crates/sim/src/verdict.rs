//! What is made of what the broker says and does: the checks, and the counts.
//!
//! Checked here: no ring is given to a backend while another one may still write; what lies in a ring that is handed over is exactly
//! what is owed, in the order of its submission, to a backend that knows what the guest has written to the configuration space; a ring that is said to be stopped is at rest; a failover that halts has a reason
//! the simulation knows of, too; in the end no descriptor is open, and what was flushed is on the medium.

use warmswap_core::{Entry, Kind, Nanos, PRIVATE_ADDR, PairState, Report, Value};
use warmswap_wire::{FdSlot, HEADER_SIZE, Header, Request, VringFd};

use crate::backend::{Backend, written_writeback};
use crate::memory::Obj;
use crate::options::{Keeping, Sabotage};
use crate::words::{entry_in_words, generic, request_in_words};
use crate::world::{Event, World};

/// So long after the last fault everybody works again.
const CALM: Nanos = Nanos::from_millis(20);

impl World<'_> {
    /// Whoever is given a ring of the guest's must be alone with it, and find what is owed.
    pub(crate) fn check_message(&mut self, id: u64, bytes: &[u8], objects: &[Obj]) {
        let Some((head, payload)) = bytes.split_first_chunk::<HEADER_SIZE>() else { return };
        let Ok(header) = Header::decode(head) else {
            return self.fail("messages", "the broker sends no header".to_owned());
        };
        let slots: Vec<_> = objects.iter().map(|obj| FdSlot(*obj)).collect();
        let request = match Request::decode(&header, payload, &slots) {
            Ok(request) => request,
            Err(error) => {
                return self.fail("messages", format!("what the broker says to #{id} cannot be decoded: {error}"));
            }
        };
        self.note(|| format!("broker: #{id} <- {}", request_in_words(&request)));
        if let Request::SetConfig(write) = &request {
            let told = &mut self.backends[id as usize - 1].told_writeback;
            *told = written_writeback(write).or(*told);
        }
        if let Request::SetVringAddr(addr) = &request
            && addr.descriptor < PRIVATE_ADDR
        {
            self.check_alone(id, addr.index);
        }
        if let Request::SetVringKick(VringFd { index, fd: Some(fd) }) = &request {
            let guests = self.guest.rings.get(*index as usize).is_some_and(|ring| ring.kick == fd.0);
            if guests && !self.backends[id as usize - 1].rings[*index as usize].started {
                self.check_handed(id, *index as u16);
            }
        }
    }

    pub(crate) fn check_alone(&mut self, id: u64, index: u32) {
        let others = self.backends.iter().filter(|other| other.id != id && other.may_write());
        let others: Vec<String> = others.map(|other| format!("#{}", other.id)).collect();
        if !others.is_empty() {
            let detail = format!("#{id} is given ring {index} while {} may still write", others.join(", "));
            self.fail("one writer", detail);
        }
    }

    /// A ring whose stop is answered is at rest: its indices stand still, and its slots hold what is owed.
    pub(crate) fn check_stopped(&mut self, index: u16, base: u16, proved: bool) {
        let used = self.guest.used_idx(index, &self.mem);
        if base != used {
            return self.fail("stopped ring", format!("ring {index} is stopped at base {base}, used.idx is {used}"));
        }
        let writes = |backend: &&Backend| backend.may_write() && backend.rings[usize::from(index)].is_busy();
        if let Some(backend) = self.backends.iter().find(writes).filter(|_| proved) {
            let detail = format!("ring {index} is said to be stopped while #{} may still write to it", backend.id);
            self.fail("stopped ring", detail);
        }
    }

    pub(crate) fn check_handed(&mut self, id: u64, index: u16) {
        let (owed, slots) = (self.guest.owed(index, &self.mem), self.guest.slots(index, &self.mem));
        self.note(|| format!("ring {index} goes to #{id} with {owed:?}"));
        if owed != slots {
            let detail = format!("ring {index} goes to #{id} with heads {slots:?}; owed are {owed:?}");
            self.fail("ring handed over", detail);
        }
        let (wanted, told) = (self.broker.writeback, self.backends[id as usize - 1].told_writeback);
        if wanted.is_some() && wanted != told {
            let detail =
                format!("ring {index} goes to #{id}, which was told {told:?} of its cache; the guest wrote {wanted:?}");
            self.fail("configuration handed over", detail);
        }
    }

    pub(crate) fn journal(&mut self, entry: &Entry) {
        self.note(|| format!("journal: {}", entry_in_words(entry)));
        let text = |name: &str| {
            entry.properties.iter().find_map(|(known, value)| match value {
                Value::Text(text) if *known == name => Some(text.as_str()),
                _ => None,
            })
        };
        let number = |name: &str| {
            entry.properties.iter().find_map(|(known, value)| match value {
                Value::Number(number) if *known == name => Some(*number),
                _ => None,
            })
        };
        match entry.event {
            "FailoverStarted" => {
                self.broker.running = number("id");
                self.judge_failover(text("kind").unwrap_or_default(), text("cause").unwrap_or_default());
            }
            "FailoverSettled" => {
                self.broker.running = None;
                let kind = text("kind").unwrap_or_default();
                *self.stats.kinds.entry(kind.to_owned()).or_default() += 1;
                let inflight = number("inflight").unwrap_or(0);
                self.stats.failovers += 1;
                self.stats.failovers_inflight += u64::from(inflight > 0);
                let bucket = (u64::BITS - inflight.leading_zeros()) as usize;
                self.stats.inflight[bucket.min(9)] += 1;
                self.stats.survivors += number("survivors").unwrap_or(0);
            }
            "FailoverRefused" => {
                if number("id").is_some() {
                    self.broker.running = None;
                }
                let reason = text("reason").or(text("message")).unwrap_or_default();
                *self.stats.refused.entry(generic(reason)).or_default() += 1;
            }
            "FailoverHalted" => {
                self.broker.running = None;
                self.broker.needs_reset = true;
                let reason = text("message").unwrap_or_default();
                *self.stats.halts.entry(generic(reason)).or_default() += 1;
                self.judge_halt(reason);
            }
            "FailoverWithheld" => {
                *self.stats.withheld.entry(text("why").unwrap_or_default().to_owned()).or_default() += 1;
            }
            "AnsweredFromRecord" if text("request") == Some("GET_VRING_BASE") => {
                self.stats.stops_unproved += 1;
                self.broker.unproved = number("ring");
            }
            "MessageRefused" if text("request").is_some_and(|name| name.starts_with("SET_VRING")) => {
                self.broker.needs_reset = true;
            }
            "RingStarted" => self.forget_pace(number("ring").unwrap_or(0) as u16),
            "RequestIsolated" => {
                let (ring, head) = (number("ring").unwrap_or(0) as u16, number("head").unwrap_or(0) as u16);
                self.guest.isolated.push((ring, head));
            }
            "RingStopped" => {
                self.stats.stops += 1;
                let proved = self.broker.unproved.take() != number("ring");
                self.check_stopped(number("ring").unwrap_or(0) as u16, number("base").unwrap_or(0) as u16, proved);
            }
            _ => {}
        }
        if self.broker.needs_reset {
            let takes = Nanos(self.random.between(100_000, 2_000_000));
            self.after(takes, Event::Operator);
        }
    }

    pub(crate) fn refused(&mut self, report: &Report) {
        if report.kind != Kind::Planned && report.kind != Kind::Crash {
            self.fail("report", format!("a {} failover was refused to an asker", report.kind.name()));
        }
    }

    /// Where nothing goes wrong any more nobody stalls. A failover that is made for it all the same has helped over something that was
    /// lost: a kick, a descriptor, a mode of notification.
    fn judge_failover(&mut self, kind: &str, cause: &str) {
        let works = self.options.sabotage == Sabotage::None;
        let stalls = works && kind == "hang" && cause.contains("has completed nothing");
        // A broker that was kept from its processor meets what happened before only now.
        let calm = self.options.safety.max(self.broker.late_until) + CALM;
        if stalls && self.now > calm {
            self.fail("needless failover", format!("every backend works, and one is failed over: {cause}"));
        }
    }

    /// A halt needs a reason that the simulation knows of.
    pub(crate) fn judge_halt(&mut self, reason: &str) {
        let options = &self.options;
        let absent = |fault| self.stats.faults.contains_key(fault);
        let late = absent("late broker") || absent("broker dies");
        // What a request was in flight at so many deaths of speaks against it, whatever they died of.
        let deaths = u64::from(options.limits.isolate_after) <= self.stats.backends;
        let excused = if reason.contains("in-flight region marks head") {
            // The region lies, and was asked.
            matches!(options.keeping, Keeping::NeverCleared)
        } else if reason.contains("switched off") {
            options.survivors == warmswap_core::Survivors::Refuse
        } else if reason.contains("not known exactly") {
            late || self.pace_was_fast()
        } else if reason.contains("cannot be isolated") {
            deaths
        } else {
            false
        };
        if !excused {
            let detail = format!("a failover halted although what is owed could be known: {reason}");
            self.fail("needless halt", detail);
        }
    }

    pub(crate) fn broker_is_whole(&self) -> bool {
        let status = self.broker.pair.status(self.now);
        status.state == PairState::Protected && self.broker.fences == 0
    }

    pub(crate) fn broker_in_words(&self) -> String {
        let status = self.broker.pair.status(self.now);
        let backend = |it: &Option<warmswap_core::BackendStatus>| {
            it.as_ref().map_or("none".to_owned(), |it| format!("{} {}", it.id, it.state.name()))
        };
        let mut words = format!(
            "the device is {}, phase {}, primary {}, shadow {} ({})",
            status.state.name(),
            status.phase.name(),
            backend(&status.primary),
            backend(&status.shadow),
            status.shadow_note
        );
        if let Some(halted) = status.halted {
            words.push_str(&format!(", halted: {halted}"));
        }
        for ring in status.rings {
            words.push_str(&format!(", ring {} {} in flight {}", ring.index, ring.observer, ring.inflight));
        }
        if self.broker.commands != self.broker.answered {
            words.push_str(", a command has no answer");
        }
        words
    }

    /// Everybody leaves: nothing may be left open, and what was flushed must be on the medium.
    pub(crate) fn end(&mut self) {
        self.broker.pair.end();
        self.vmm_disconnects(0);
        self.until(self.now + Nanos::from_millis(300), |_| false);
        self.ending = true;
        for id in 1..=self.backends.len() as u64 {
            self.kill(id, "in the end");
        }
        self.until(self.now + Nanos::from_millis(100), |_| false);
        if self.mem.open > 0 {
            let detail = format!("left open: {:?}", self.mem.open_slots());
            return self.fail("descriptors", detail);
        }
        if self.failure.is_some() {
            return;
        }
        self.disk.fail_power(&mut self.random);
        for lba in 0..self.options.blocks {
            if let Err(wrong) = self.guest.ledger.check_durable(lba, &self.disk.read(lba)) {
                return self.fail("flush", wrong);
            }
        }
    }
}
