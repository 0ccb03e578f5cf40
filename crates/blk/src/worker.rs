//! A worker: a thread with an engine, and the queues that it serves.
//!
//! ```text
//! ┌▶ commands ─▶ take, submit ─▶ answers ─▶ publish ─┐ something was done: again
//! │                                                  │ nothing: look on for a while, then ask for kicks and sleep
//! └──────────────────────────────────────────────────┘
//! ```
//! Kicks are asked for only before a sleep: while a worker looks at its rings anyway a driver need not leave the guest to tell of a
//! request. How long it looks on before it sleeps follows what the last sleeps were like: where work comes again within the time
//! that falling asleep and being woken costs, looking on is cheaper, and faster; a queue that rests costs nothing.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::EventfdFlags;
use warmswap_telemetry::QueueWriter;

use crate::clock::now_ns;
use crate::engine::{Answer, Engine, Watch};
use crate::log::DirtyLog;
use crate::memory::MemoryMap;
use crate::queue::{Queue, Served, Start};
use crate::request::Limits;
use crate::ring::Place;

/// First length of a look without a sleep, once one was worth it.
const LOOK_MIN_NS: u64 = 4_000;
/// A queue without a kick descriptor is looked at this often.
const UNKICKED: Duration = Duration::from_micros(100);

/// What the control thread asks of a worker. Each command has one [`Reply`], in order, except that a stop has its reply when the queue
/// has come to rest.
#[derive(Debug)]
pub(crate) enum Command {
    Start(Box<Start>),
    /// Take nothing more; say when nothing is in flight.
    Stop(u16),
    Kick(u16, Option<OwnedFd>),
    Call(u16, Option<OwnedFd>),
    Err(u16, Option<OwnedFd>),
    Enable(u16, bool),
    /// The guest's memory has changed, and where the ring lies in it.
    Move(u16, Arc<MemoryMap>, Place),
    Log(Option<Arc<DirtyLog>>),
    Limits(Limits),
    /// The front-end's messages are about to be read.
    BeginRound,
    /// Every message of the front-end that had come by then is worked off.
    CaughtUp,
}

/// What a worker answers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Done,
    /// A queue was started, and so many requests of the last back-end with it.
    Started(usize),
    /// A queue was stopped; where the next one goes on.
    Stopped(u16),
    Refused(String),
}

/// Between the control thread and a worker.
#[derive(Debug)]
pub(crate) struct Port {
    commands: Mutex<VecDeque<Command>>,
    has_commands: AtomicBool,
    wake: OwnedFd,
    replies: Mutex<VecDeque<Reply>>,
    /// Readable when there are replies; one for all workers.
    replied: Arc<OwnedFd>,
    /// Readable when a worker wants the front-end's messages to be worked off; one for all.
    behind: Arc<OwnedFd>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An eventfd that nobody waits in.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

impl Port {
    pub(crate) fn new(replied: Arc<OwnedFd>, behind: Arc<OwnedFd>) -> io::Result<Self> {
        Ok(Port {
            commands: Mutex::default(),
            has_commands: AtomicBool::new(false),
            wake: eventfd()?,
            replies: Mutex::default(),
            replied,
            behind,
        })
    }

    /// Sends a command.
    pub(crate) fn send(&self, command: Command) {
        locked(&self.commands).push_back(command);
        self.has_commands.store(true, Ordering::Release);
        // It never fills up: every read takes all of it.
        let _told = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// The next reply, if it has come.
    pub(crate) fn reply(&self) -> Option<Reply> {
        locked(&self.replies).pop_front()
    }

    fn answer(&self, reply: Reply) {
        locked(&self.replies).push_back(reply);
        let _told = rustix::io::write(&*self.replied, &1_u64.to_ne_bytes());
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Worker<E> {
    engine: E,
    port: Arc<Port>,
    served: Served,
    queues: Vec<Queue>,
    /// Meters of the queues that are not served now.
    meters: Vec<QueueWriter>,
    commands_watched: bool,
    /// The control thread was asked to work off the front-end's messages.
    behind: bool,
    /// How long it looks on before it sleeps: with nothing in flight, and with something. A driver's answer to a completion is another
    /// thing to wait for than a disk's to a request.
    look_ns: [u64; 2],
    look_max_ns: u64,
}

impl<E: Engine> Worker<E> {
    pub(crate) fn new(
        engine: E,
        port: Arc<Port>,
        served: Served,
        meters: Vec<QueueWriter>,
        look_max: Duration,
    ) -> Self {
        Worker {
            engine,
            port,
            served,
            queues: Vec::new(),
            meters,
            commands_watched: false,
            behind: false,
            look_ns: [0; 2],
            look_max_ns: u64::try_from(look_max.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Serves until the process ends, or the engine's own means fail: that is returned. No request is lost then, what is in flight is
    /// for the next back-end.
    pub(crate) fn run(mut self) -> io::Error {
        loop {
            if let Err(error) = self.serve() {
                // The kernel may go on with what it has taken, into memory that these keep where it is. The process ends.
                std::mem::forget(self.queues);
                return error;
            }
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        if !self.turn()? && !self.look_on()? {
            self.sleep()?;
        }
        Ok(())
    }

    /// Everything that can be done now, once. False if there was nothing.
    fn turn(&mut self) -> io::Result<bool> {
        let mut worked = false;
        if self.port.has_commands.load(Ordering::Acquire) {
            self.obey();
            worked = true;
        }
        #[cfg(feature = "lab")]
        crate::faults::turn();
        for queue in &mut self.queues {
            worked |= queue.take(&mut self.engine) > 0;
        }
        if !self.behind && self.queues.iter().any(Queue::has_parked) {
            self.behind = true;
            let _told = rustix::io::write(&*self.port.behind, &1_u64.to_ne_bytes());
        }
        self.engine.submit()?;
        while let Some(answer) = self.engine.answer() {
            self.hear(answer);
            worked = true;
        }
        #[cfg(feature = "lab")]
        self.queues.iter_mut().for_each(Queue::release);
        for queue in &mut self.queues {
            queue.publish();
        }
        if self.queues.iter().any(|queue| queue.stopping && queue.is_at_rest()) {
            self.finish_stops();
        }
        Ok(worked)
    }

    #[inline]
    fn hear(&mut self, answer: Answer) {
        match answer {
            Answer::Done(tag, result) => {
                let queue = self.queues.iter_mut().find(|queue| queue.index == tag.queue);
                queue.expect("a queue with requests in flight is not stopped").answer(tag.head, result);
            }
            Answer::Ready(Watch::Kick(index)) => {
                if let Some(queue) = self.queues.iter_mut().find(|queue| queue.index == index) {
                    queue.kicked();
                }
            }
            Answer::Ready(Watch::Commands) => {
                self.commands_watched = false;
                let _taken = rustix::io::read(&self.port.wake, &mut [0; 8]);
            }
        }
    }

    /// Looks at rings and answers for a while, if that has been worth it. True if there is work.
    fn look_on(&mut self) -> io::Result<bool> {
        let look_ns = self.look_ns[self.state()];
        if look_ns == 0 {
            return Ok(false);
        }
        let began = now_ns();
        loop {
            let mut found = self.port.has_commands.load(Ordering::Relaxed) || self.engine.has_answer();
            for queue in &mut self.queues {
                if queue.has_work() {
                    queue.polled();
                    found = true;
                }
            }
            if found {
                return Ok(true);
            }
            if now_ns().saturating_sub(began) >= look_ns {
                return Ok(false);
            }
            for _ in 0..8 {
                std::hint::spin_loop();
            }
        }
    }

    fn sleep(&mut self) -> io::Result<()> {
        let mut at_most = None;
        for queue in &mut self.queues {
            if queue.kick.is_none() && queue.enabled {
                at_most = Some(UNKICKED);
            }
            if let (false, Some(kick)) = (queue.watched, &queue.kick) {
                match self.engine.watch(kick.as_fd(), Watch::Kick(queue.index)) {
                    Ok(()) => queue.watched = true,
                    // What a front-end gives as a kick is no means of ours: the ring is looked at now and then, as one without.
                    Err(_) => at_most = Some(UNKICKED),
                }
            }
        }
        if !self.commands_watched {
            self.engine.watch(self.port.wake.as_fd(), Watch::Commands)?;
            self.commands_watched = true;
        }
        // After the watches: a kick that comes now is seen.
        let mut found = false;
        for queue in &mut self.queues {
            found |= queue.arm();
        }
        if found || self.port.has_commands.load(Ordering::Acquire) {
            return Ok(());
        }
        #[cfg(feature = "lab")]
        if let Some(due) = self.queues.iter().filter_map(Queue::next_due).min() {
            at_most = Some(Duration::from_nanos(due.saturating_sub(now_ns()).max(1000)));
        }
        let (state, began) = (self.state(), now_ns());
        self.engine.sleep(at_most)?;
        self.adapt(state, now_ns().saturating_sub(began));
        for queue in &mut self.queues {
            if queue.watched && queue.has_work() {
                queue.woke();
            }
        }
        Ok(())
    }

    /// Looks on longer next time if this sleep was one that looking on would have spared, not at all if it was long.
    fn adapt(&mut self, state: usize, slept_ns: u64) {
        let look_ns = &mut self.look_ns[state];
        if slept_ns > self.look_max_ns {
            *look_ns = 0;
        } else if slept_ns > *look_ns {
            *look_ns = (*look_ns * 2).max(LOOK_MIN_NS).min(self.look_max_ns);
        }
    }

    /// Which of the waits this is.
    #[inline]
    fn state(&self) -> usize {
        usize::from(self.queues.iter().any(|queue| !queue.is_at_rest()))
    }

    fn obey(&mut self) {
        loop {
            let command = {
                let mut commands = locked(&self.port.commands);
                let command = commands.pop_front();
                if command.is_none() {
                    self.port.has_commands.store(false, Ordering::Release);
                }
                command
            };
            let Some(command) = command else { return };
            if let Some(reply) = self.carry_out(command) {
                self.port.answer(reply);
            }
        }
    }

    fn carry_out(&mut self, command: Command) -> Option<Reply> {
        match command {
            Command::Start(start) => return Some(self.start(*start)),
            Command::Stop(index) => {
                let queue = self.queues.iter_mut().find(|queue| queue.index == index);
                let Some(queue) = queue else { return Some(Reply::Refused("it is not started".into())) };
                // What the last back-end owed is owed by this one, and what the front-end said before it asked for the stop is worked off.
                queue.begin_owed(&mut self.engine);
                queue.stopping = true;
                queue.begin_round();
                queue.retry(&mut self.engine);
                // Its reply comes when it is at rest.
                return None;
            }
            Command::Kick(index, kick) => self.set_kick(index, kick),
            Command::Call(index, call) => {
                if let Some(queue) = self.queue(index) {
                    queue.set_call(call);
                }
            }
            Command::Err(index, err) => {
                if let Some(queue) = self.queue(index) {
                    queue.set_err(err);
                }
            }
            Command::Enable(index, enabled) => {
                if let Some(queue) = self.queue(index) {
                    queue.enabled = enabled;
                }
            }
            Command::Move(index, memory, place) => {
                if let Some(queue) = self.queue(index) {
                    queue.move_to(memory, place);
                }
            }
            Command::Log(log) => self.queues.iter_mut().for_each(|queue| queue.set_log(log.clone())),
            Command::BeginRound => {
                self.behind = false;
                self.queues.iter_mut().for_each(Queue::begin_round);
            }
            Command::CaughtUp => {
                self.queues.iter_mut().for_each(|queue| queue.retry(&mut self.engine));
            }
            Command::Limits(limits) => {
                self.served.limits = limits;
                self.queues.iter_mut().for_each(|queue| queue.set_limits(limits));
            }
        }
        Some(Reply::Done)
    }

    fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.iter_mut().find(|queue| queue.index == index)
    }

    fn start(&mut self, start: Start) -> Reply {
        let Some(at) = self.meters.iter().position(|meter| meter.queue() == start.index) else {
            return Reply::Refused(format!("ring {} is served already, or is none of this device", start.index));
        };
        let meter = self.meters.swap_remove(at);
        match Queue::new(start, self.served.clone(), meter) {
            Ok(queue) => {
                let recovered = queue.recovered();
                self.queues.push(queue);
                // Served in the order of their numbers.
                self.queues.sort_by_key(|queue| queue.index);
                Reply::Started(recovered)
            }
            Err((reason, meter)) => {
                self.meters.push(meter);
                Reply::Refused(reason)
            }
        }
    }

    fn set_kick(&mut self, index: u16, kick: Option<OwnedFd>) {
        self.unwatch(index);
        if let Some(queue) = self.queue(index) {
            queue.kick = kick;
        }
    }

    fn unwatch(&mut self, index: u16) {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.index == index) else { return };
        if let (true, Some(kick)) = (queue.watched, &queue.kick) {
            queue.watched = false;
            // An engine that cannot forget it tells of a kick too many.
            let _told = self.engine.unwatch(kick.as_fd(), Watch::Kick(index));
        }
    }

    #[cold]
    fn finish_stops(&mut self) {
        while let Some(at) = self.queues.iter().position(|queue| queue.stopping && queue.is_at_rest()) {
            self.unwatch(self.queues[at].index);
            let (base, meter) = self.queues.remove(at).end();
            self.meters.push(meter);
            self.port.answer(Reply::Stopped(base));
        }
    }
}
