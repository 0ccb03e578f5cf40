//! What goes wrong, and when.

use warmswap_core::{BackendId, CommandId, Event as Happened, Foresight, Nanos};
use warmswap_predict::{Alarm, Feature, Law};
use warmswap_wire::{ConfigSpace, Request, VringFd};

use crate::backend::WRITEBACK;
use crate::options::Faults;
use crate::script::{Step, get_config};
use crate::world::{Event, World};

/// One kind.
type Inject<'t> = fn(&mut World<'t>);

impl<'t> World<'t> {
    pub(crate) fn count_fault(&mut self, name: &'static str) {
        self.note(|| format!("fault: {name}"));
        *self.stats.faults.entry(name).or_default() += 1;
    }

    /// The next fault, of a kind that is switched on.
    pub(crate) fn inject_fault(&mut self) {
        if !self.unsafe_phase {
            return;
        }
        let pause = self.random.around(self.options.fault_every);
        self.after(pause, Event::Fault);
        if !self.broker.pair.is_open() {
            // A pair of which no backend ever comes up ends with that.
            return;
        }
        let Faults {
            kill,
            kill_at_store,
            kill_at_message,
            kill_shadow,
            kill_both,
            drop_link,
            hang,
            stall,
            mute,
            slow,
            ..
        } = self.options.faults;
        let Faults { planned, predicted, late, .. } = self.options.faults;
        let options = &self.options;
        if self.options.faults.broker_dies && self.broker.left.is_none() && self.random.one_in(3) {
            self.broker.dies_in = Some(self.random.below(40) as u32);
        }
        let kinds: [(bool, Inject<'t>); 20] = [
            (kill, Self::fault_kill),
            (kill_at_store, Self::fault_kill_at_store),
            (kill_at_message, Self::fault_kill_at_message),
            (kill_shadow, Self::fault_kill_shadow),
            (kill_both, Self::fault_kill_both),
            (drop_link, Self::fault_drop_link),
            (hang, Self::fault_hang),
            (stall, Self::fault_stall),
            (mute, Self::fault_mute),
            (slow, Self::fault_slow),
            (planned, Self::fault_planned),
            (predicted, Self::fault_predicted),
            (late, Self::fault_late),
            (options.stops, Self::vmm_stops_and_starts),
            (options.hotplug, Self::vmm_plugs),
            (options.disconnects, Self::vmm_leaves),
            (options.resets, Self::vmm_resets),
            (options.call_swaps, Self::vmm_swaps_calls),
            (options.cache_modes, Self::vmm_changes_cache_mode),
            (options.bad_messages, Self::vmm_sends_nonsense),
        ];
        let on: Vec<Inject<'t>> = kinds.iter().filter(|(on, _)| *on).map(|(_, inject)| *inject).collect();
        if !on.is_empty() {
            let inject = self.random.pick(&on);
            inject(self);
        }
    }

    // --- backends ----------------------------------------------------------------------------------------------------------

    fn primary(&self) -> Option<u64> {
        self.broker.pair.primary().map(|id| id.0).filter(|id| self.backends[*id as usize - 1].alive)
    }

    /// The youngest backend that is not the primary.
    fn shadow(&self) -> Option<u64> {
        let primary = self.broker.pair.primary().map(|id| id.0);
        let other = |id: &u64| Some(*id) != primary && self.backends[*id as usize - 1].alive;
        (1..=self.backends.len() as u64).rev().find(other)
    }

    fn any_backend(&mut self) -> Option<u64> {
        if self.random.percent(70) { self.primary() } else { self.shadow() }
    }

    fn fault_kill(&mut self) {
        if let Some(id) = self.primary() {
            self.count_fault("kill");
            self.kill(id, "killed");
        }
    }

    fn fault_kill_at_store(&mut self) {
        if let Some(id) = self.any_backend() {
            self.count_fault("kill at a store");
            let thread = self.backend(id).thread;
            let stores = self.random.below(60) as u32;
            self.mem.threads.borrow_mut()[thread].dies_in = Some(stores);
        }
    }

    fn fault_kill_at_message(&mut self) {
        if let Some(id) = self.shadow() {
            self.count_fault("kill at a message");
            let messages = self.random.below(40) as u32;
            self.backend(id).dies_in_messages = Some(messages);
            if self.random.one_in(2) {
                // And something for it to do.
                self.fault_kill();
            }
        }
    }

    fn fault_kill_shadow(&mut self) {
        if let Some(id) = self.shadow() {
            self.count_fault("kill the shadow");
            self.kill(id, "killed");
        }
    }

    fn fault_kill_both(&mut self) {
        self.count_fault("kill both");
        for id in [self.primary(), self.shadow()].into_iter().flatten() {
            self.kill(id, "killed");
        }
    }

    /// The control path ends, the data path does not.
    fn fault_drop_link(&mut self) {
        if let Some(id) = self.any_backend() {
            self.count_fault("drop the link");
            let lost = if self.options.faults.cut { self.random.below(20) as usize } else { 0 };
            let backend = self.backend(id);
            backend.muted = true;
            backend.to_broker.close(lost);
            self.wake_broker(self.now + Nanos(5_000));
        }
    }

    fn fault_hang(&mut self) {
        if let Some(id) = self.any_backend() {
            self.count_fault("hang");
            self.set_runs(id, |backend| backend.hung = true);
            self.recovers_perhaps(id, 3);
        }
    }

    fn fault_stall(&mut self) {
        if let Some(id) = self.primary() {
            self.count_fault("stall");
            self.set_runs(id, |backend| backend.stalled = true);
            self.recovers_perhaps(id, 2);
        }
    }

    fn fault_mute(&mut self) {
        if let Some(id) = self.any_backend() {
            self.count_fault("mute");
            self.backend(id).muted = true;
            self.recovers_perhaps(id, 2);
        }
    }

    fn fault_slow(&mut self) {
        if let Some(id) = self.any_backend() {
            self.count_fault("slow");
            let span = Nanos::from_micros(self.random.between(1_000, 30_000));
            self.backend(id).slow_until = self.now + span;
        }
    }

    /// In one of so many cases not before the end.
    fn recovers_perhaps(&mut self, id: u64, cases: u64) {
        if !self.random.one_in(cases) {
            let span = Nanos::from_micros(self.random.between(500, 40_000));
            self.after(span, Event::Recovered(id));
        }
    }

    fn set_runs(&mut self, id: u64, change: impl FnOnce(&mut crate::backend::Backend)) {
        let backend = self.backend(id);
        change(backend);
        let (thread, runs) = (backend.thread, backend.works());
        self.mem.threads.borrow_mut()[thread].runs = runs;
    }

    /// What went wrong for a while is over.
    pub(crate) fn recover(&mut self, id: u64) {
        let closed = self.backend(id).to_broker.closed;
        if !self.backend(id).alive {
            return;
        }
        self.set_runs(id, |backend| {
            backend.hung = false;
            backend.stalled = false;
            backend.muted = closed;
        });
        self.wake_worker(id);
        self.wake_control(id, self.now);
    }

    // --- the broker --------------------------------------------------------------------------------------------------------

    fn fault_planned(&mut self) {
        self.count_fault("planned failover");
        self.broker.commands += 1;
        let (command, now) = (CommandId(self.broker.commands), self.random.one_in(3));
        self.tell_broker(Happened::FailoverRequested { command, now, reason: "a seed".to_owned() });
    }

    fn fault_predicted(&mut self) {
        let Some(id) = self.broker.pair.primary() else { return };
        self.count_fault("alarm");
        let alarm = self.random.pick(&[
            Alarm::Harm,
            Alarm::Drift,
            Alarm::Errors,
            Alarm::Risk,
            Alarm::Exhaustion(Feature::DescriptorShare),
            Alarm::Exhaustion(Feature::StoreShare),
            Alarm::Law(Law::RequestIsCompleted),
            Alarm::Law(Law::InterruptIsTaken),
            Alarm::Law(Law::AnythingIsCompleted),
        ]);
        // Now and then one of a backend that has gone.
        let backend = if self.random.one_in(10) { BackendId(self.random.between(1, id.0)) } else { id };
        let (risk, harm) = (self.random.below(100) as f32 / 100.0, self.random.below(100) as f32 / 100.0);
        let others = u32::from(self.random.one_in(10)) * 3;
        let causes = "a seed".to_owned();
        self.tell_broker(Happened::FailurePredicted(Foresight {
            backend,
            alarm,
            risk,
            harm,
            cause: None,
            causes,
            others,
        }));
    }

    fn fault_late(&mut self) {
        self.count_fault("late broker");
        let span = Nanos::from_micros(self.random.between(300, 90_000));
        self.broker.late_until = self.now + span;
        self.vmm.excused_until = self.broker.late_until;
        self.wake_broker(self.broker.late_until);
    }

    // --- the VMM -----------------------------------------------------------------------------------------------------------

    fn vmm_begins(&mut self, steps: Vec<Step>) {
        if self.vmm.is_idle() && self.guest.runs {
            self.vmm.script.extend(steps);
            self.wake_vmm(self.now + Nanos(1_000));
        }
    }

    fn vmm_stops_and_starts(&mut self) {
        let mut steps = Vec::new();
        if self.random.percent(80) {
            steps.push(Step::Pause);
        }
        steps.extend(self.stop_rings());
        let pause = Nanos::from_micros(self.random.between(1, 3_000));
        steps.push(Step::Wait(pause));
        steps.extend(self.start_rings());
        steps.push(Step::Run);
        self.vmm_begins(steps);
    }

    fn vmm_plugs(&mut self) {
        let steps = match self.guest.hot {
            None => vec![Step::Plug, Step::Plugged],
            Some(_) => vec![Step::Unused, Step::Unplug],
        };
        self.vmm_begins(steps);
    }

    fn vmm_leaves(&mut self) {
        if self.vmm.is_idle() || self.random.one_in(4) {
            self.count_fault("disconnect");
            let cut = self.options.faults.cut && self.random.one_in(2);
            if cut && self.vmm.is_idle() {
                // In the middle of a message.
                self.vmm_cut_message();
            }
            let lost = if cut { self.random.between(1, 20) as usize } else { 0 };
            self.vmm_disconnects(lost);
            self.vmm_comes_again();
        }
    }

    fn vmm_cut_message(&mut self) {
        let call = VringFd { index: 0, fd: Some(self.some_descriptor()) };
        self.vmm_does(Step::Say(Request::SetVringErr(call)));
    }

    fn vmm_resets(&mut self) {
        if self.vmm.is_idle() && self.guest.runs {
            self.count_fault("reset");
            let steps = self.reset_script();
            self.vmm_begins(steps);
        }
    }

    pub(crate) fn reset_script(&self) -> Vec<Step> {
        let mut steps = vec![Step::Pause];
        steps.extend(self.stop_rings());
        steps.push(Step::Reset);
        steps.extend(self.start_rings());
        steps.push(Step::Run);
        steps
    }

    fn vmm_swaps_calls(&mut self) {
        let ring = self.random.below(u64::from(self.options.rings)) as u16;
        self.vmm_begins(vec![Step::Call(ring)]);
    }

    /// The guest writes to the configuration space, and reads now and then what stands there.
    fn vmm_changes_cache_mode(&mut self) {
        if !self.vmm.is_idle() || !self.guest.runs {
            return;
        }
        self.count_fault("cache mode");
        let byte = self.random.below(2) as u8;
        let write = ConfigSpace { offset: WRITEBACK as u32, flags: 0, bytes: vec![byte] };
        let mut steps = vec![Step::Say(Request::SetConfig(write))];
        if self.random.one_in(2) {
            steps.push(Step::Say(get_config()));
        }
        self.vmm_begins(steps);
    }

    fn vmm_sends_nonsense(&mut self) {
        let step = if self.random.one_in(2) {
            Step::Unknown
        } else {
            let err = VringFd { index: 0, fd: Some(self.some_descriptor()) };
            Step::Bare(Request::SetVringErr(err))
        };
        self.vmm_begins(vec![step]);
    }

    /// Somebody looks after a device that serves no more: the guest is reset.
    pub(crate) fn operator_looks(&mut self) {
        if !self.unsafe_phase && self.now > self.options.safety + Nanos::from_millis(2) {
            self.guest.issues = false;
        }
        if self.broker.needs_reset && self.vmm.is_idle() {
            let steps = self.reset_script();
            self.vmm.script.extend(steps);
            self.wake_vmm(self.now + Nanos(1_000));
        }
        if !self.unsafe_phase || self.broker.needs_reset {
            self.after(Nanos::from_millis(1), Event::Operator);
        }
    }
}
