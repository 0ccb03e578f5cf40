//! Processes of backends: started, killed, retired, proved harmless.
//!
//! A proof comes when a process has been reaped and what it had at the disk is over, as that of the program does.

use warmswap_core::{BackendId, Event as Happened, FenceLevel, Nanos, PrivateEvents};

use crate::backend::Backend;
use crate::memory::{Object, Owner, Thread};
use crate::options::Sabotage;
use crate::world::{Event, World};

impl World<'_> {
    pub(crate) fn spawn(&mut self, id: u64) {
        assert_eq!(id, self.backends.len() as u64 + 1, "generations count up");
        let thread = {
            let mut threads = self.mem.threads.borrow_mut();
            threads.push(Thread::new(Owner::Backend(id)));
            threads.len() - 1
        };
        let class = self.options.class_of(id);
        self.backends.push(Backend::new(id, class, self.options.keeping, thread));
        self.stats.backends += 1;
        let takes = self.random.around(self.options.start_takes);
        // The first two have to come, or there is no device at all: a pair that never had a backend has ended.
        let takes = if id <= 2 { takes.min(Nanos(self.options.limits.start_max.0 / 2)) } else { takes };
        self.after(takes, Event::Started(id));
    }

    pub(crate) fn backend_started(&mut self, id: u64) {
        if self.backend(id).retired {
            return;
        }
        // As above.
        let fails = self.unsafe_phase && id > 2 && self.options.faults.start_fails && self.random.one_in(3);
        if self.ending || fails {
            self.count_fault("start fails");
            self.backend(id).retired = true;
            return self.tell_broker(Happened::Exited {
                backend: BackendId(id),
                reason: "it could not be started".to_owned(),
            });
        }
        let backend = self.backend(id);
        (backend.alive, backend.connected) = (true, true);
        let kick = self.mem.make_event();
        let call = self.mem.make_event();
        let probe = self.mem.make_event();
        let channel = self.mem.make(Object::Channel);
        let [kick, call, probe] = [kick, call, probe].map(|obj| self.mem.insert(obj));
        let backend_req = Some(self.mem.insert(channel));
        let private = PrivateEvents { kick, call, probe };
        self.note(|| format!("#{id} starts"));
        self.tell_broker(Happened::LinkUp { backend: BackendId(id), backend_req, private });
    }

    pub(crate) fn send_link(&mut self, id: u64, bytes: &[u8], fds: &[warmswap_wire::FdSlot]) {
        let objects = self.objects(fds);
        self.check_message(id, bytes, &objects);
        let at = self.latency();
        let backend = self.backend(id);
        if !backend.connected || backend.retired {
            return;
        }
        backend.from_broker.send(bytes, objects, at);
        self.wake_control(id, at);
    }

    /// A process dies: its threads stop at once, its link a moment later.
    pub(crate) fn kill(&mut self, id: u64, why: &str) {
        let backend = self.backend(id);
        if !backend.alive {
            return;
        }
        backend.alive = false;
        let thread = backend.thread;
        if !(self.options.sabotage == Sabotage::LivesOn && self.backends[id as usize - 1].fencing) {
            let mut threads = self.mem.threads.borrow_mut();
            threads[thread].runs = false;
            threads[thread].queue.clear();
        }
        self.note(|| format!("#{id} dies {why}"));
        self.orphan_operations(id);
        let cut = self.options.faults.cut && self.random.one_in(2);
        let lost = if cut { self.random.between(1, 30) as usize } else { 0 };
        self.backend(id).to_broker.close(lost);
        let hangs_up = Nanos(self.random.between(10_000, 800_000));
        let exits = Nanos(self.random.between(10_000, 1_500_000));
        self.after(hangs_up, Event::HungUp(id));
        self.after(exits, Event::Exited(id));
        if self.backend(id).fencing {
            let takes = self.random.around(self.options.fence_takes);
            self.after(takes, Event::Reaped(id));
        }
    }

    pub(crate) fn backend_exited(&mut self, id: u64) {
        let backend = self.backend(id);
        if !backend.retired && !backend.fencing && !backend.exit_told {
            backend.exit_told = true;
            self.tell_broker(Happened::Exited { backend: BackendId(id), reason: "killed by signal 9".to_owned() });
        }
    }

    pub(crate) fn raise_fence(&mut self, id: u64) {
        self.note(|| format!("broker: fences #{id}"));
        self.broker.fences += 1;
        self.broker.killed_at = Some(self.now);
        let backend = self.backend(id);
        backend.retired = true;
        backend.fencing = true;
        if !backend.connected {
            return self.prove(id, "it was never connected to");
        }
        let takes = self.random.around(self.options.fence_takes);
        if self.backends[id as usize - 1].alive {
            // The signal takes a moment to arrive: it goes on until then.
            let signal = Nanos(self.random.between(1_000, 50_000));
            self.after(signal, Event::Killed(id));
        } else {
            self.after(takes, Event::Reaped(id));
        }
        self.after(Nanos::from_millis(10), Event::FenceOverdue(id));
    }

    pub(crate) fn reaped(&mut self, id: u64) {
        self.backend(id).reaped = true;
        self.look_at_fence(id);
    }

    /// The proof: the process is gone, and what it had at the disk is over.
    pub(crate) fn look_at_fence(&mut self, id: u64) {
        let early = self.options.sabotage == Sabotage::FencesEarly;
        let backend = self.backend(id);
        if backend.fencing && backend.reaped && !backend.fenced && (backend.at_disk == 0 || early) {
            self.prove(id, "reaped, its storage is closed");
        }
    }

    pub(crate) fn prove(&mut self, id: u64, evidence: &str) {
        let backend = self.backend(id);
        backend.fenced = true;
        let thread = backend.thread;
        self.mem.threads.borrow_mut()[thread].fenced = true;
        if self.options.sabotage == Sabotage::LivesOn {
            // Its worker was never stopped.
            let mut stores = 0;
            while stores < 3 && self.mem.store_next(thread) {
                stores += 1;
            }
        }
        let (backend, evidence) = (BackendId(id), evidence.to_owned());
        self.broker.fences -= 1;
        self.tell_broker(Happened::Fenced { backend, level: FenceLevel::Reaped, evidence });
    }

    pub(crate) fn fence_overdue(&mut self, id: u64) {
        if !self.backend(id).fenced {
            let reason = "I/O is under way".to_owned();
            self.tell_broker(Happened::FenceWaiting { backend: BackendId(id), reason });
        }
    }

    pub(crate) fn retire(&mut self, id: u64) {
        let backend = self.backend(id);
        backend.retired = true;
        if self.backends[id as usize - 1].alive {
            let signal = Nanos(self.random.between(1_000, 50_000));
            self.after(signal, Event::Killed(id));
        }
    }
}
