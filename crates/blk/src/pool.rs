//! The workers as the control thread has them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};

use rustix::event::{PollFd, PollFlags, Timespec};
use warmswap_telemetry::QueueWriter;

use crate::clock::now_ns;
use crate::engine::Engine;
use crate::engine::sync::Sync;
use crate::engine::uring::Uring;
use crate::options::{EngineKind, Options};
use crate::queue::Served;
use crate::sandbox::{self, Profile};
use crate::worker::{Command, Port, Reply, Worker, eventfd};

/// A wait for a reply looks up this often, in nanoseconds.
const LOOK_EVERY_NS: u64 = 100_000_000;

/// Threads that serve queues. Queue `q` belongs to worker `q % workers`.
#[derive(Debug)]
pub(crate) struct Pool {
    ports: Vec<Arc<Port>>,
    replied: Arc<OwnedFd>,
    behind: Arc<OwnedFd>,
    /// A worker that ends says why.
    ended: mpsc::Receiver<String>,
    /// It is told once, and asked for more than once.
    why: std::cell::RefCell<Option<String>>,
    engine: EngineKind,
}

/// What ended a wait for a reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    Reply(Reply),
    /// Patience did.
    Interrupted,
}

/// How long a reply is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience<'a> {
    /// However long it takes: the worker replies at once.
    Forever,
    /// Until this is readable.
    Besides(BorrowedFd<'a>),
    /// Until then, in nanoseconds of the clock.
    Until(u64),
}

impl Pool {
    /// Starts the workers. Each makes its engine, and confines itself.
    ///
    /// # Errors
    /// No thread, no engine of the kind that was asked for, no sandbox.
    pub(crate) fn start(
        options: &Options,
        served: &Served,
        meters: Vec<QueueWriter>,
        confined: &Arc<sandbox::Report>,
    ) -> io::Result<Self> {
        let count = options.workers.clamp(1, options.queues);
        let (replied, behind) = (Arc::new(eventfd()?), Arc::new(eventfd()?));
        let (ended, endings) = mpsc::channel();
        let mut shares: Vec<Vec<QueueWriter>> = std::iter::repeat_with(Vec::new).take(usize::from(count)).collect();
        for meter in meters {
            let worker = meter.queue() % count;
            shares[usize::from(worker)].push(meter);
        }
        let mut pool = Pool {
            ports: Vec::new(),
            replied,
            behind,
            ended: endings,
            why: std::cell::RefCell::default(),
            engine: options.engine,
        };
        for (number, meters) in shares.into_iter().enumerate() {
            let port = Arc::new(Port::new(Arc::clone(&pool.replied), Arc::clone(&pool.behind))?);
            let setup = Setup {
                port: Arc::clone(&port),
                served: served.clone(),
                meters,
                engine: pool.engine,
                look_max: options.look_max,
                confined: Arc::clone(confined),
            };
            let (ready, is_ready) = mpsc::channel();
            let ended = ended.clone();
            std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                let why = work(setup, &ready).unwrap_or_else(|error| error);
                let _gone = ended.send(why.to_string());
            })?;
            pool.engine = is_ready.recv().map_err(|_| io::Error::other(pool.last_words()))?;
            pool.ports.push(port);
        }
        Ok(pool)
    }

    /// The engine that is used.
    pub(crate) fn engine(&self) -> EngineKind {
        self.engine
    }

    /// Readable when a worker wants the front-end's messages to be worked off.
    pub(crate) fn behind(&self) -> BorrowedFd<'_> {
        self.behind.as_fd()
    }

    /// They are about to be: what waits for them now is not what begins to wait meanwhile.
    ///
    /// # Errors
    /// As [`Pool::ask`].
    pub(crate) fn begin_round(&self) -> Result<(), String> {
        let _taken = rustix::io::read(&*self.behind, &mut [0; 8]);
        self.ask_all(|| Command::BeginRound)
    }

    /// They are.
    ///
    /// # Errors
    /// As [`Pool::ask`].
    pub(crate) fn caught_up(&self) -> Result<(), String> {
        self.ask_all(|| Command::CaughtUp)
    }

    fn last_words(&self) -> String {
        self.ended.recv().unwrap_or_else(|_| "a worker ended".to_owned())
    }

    fn port(&self, queue: u16) -> &Port {
        &self.ports[usize::from(queue) % self.ports.len()]
    }

    /// Has the worker of a queue carry something out.
    ///
    /// # Errors
    /// Its refusal, or that it has ended.
    pub(crate) fn ask(&self, queue: u16, command: Command) -> Result<Reply, String> {
        self.port(queue).send(command);
        self.wait(queue, Patience::Forever).map(|waited| match waited {
            Waited::Reply(reply) => reply,
            Waited::Interrupted => unreachable!("patience has no end"),
        })
    }

    /// Has every worker carry something out.
    ///
    /// # Errors
    /// As [`Pool::ask`].
    pub(crate) fn ask_all(&self, mut command: impl FnMut() -> Command) -> Result<(), String> {
        for queue in 0..self.ports.len() as u16 {
            self.ask(queue, command())?;
        }
        Ok(())
    }

    /// Asks for the stop of a queue; [`Pool::wait`] tells when it is at rest.
    pub(crate) fn stop(&self, queue: u16) {
        self.port(queue).send(Command::Stop(queue));
    }

    /// Waits for the next reply of the worker of a queue.
    ///
    /// # Errors
    /// As [`Pool::ask`].
    pub(crate) fn wait(&self, queue: u16, patience: Patience<'_>) -> Result<Waited, String> {
        loop {
            match self.port(queue).reply() {
                Some(Reply::Refused(reason)) => return Err(reason),
                Some(reply) => return Ok(Waited::Reply(reply)),
                None => {}
            }
            if let Some(why) = self.ending() {
                return Err(format!("a worker ended: {why}"));
            }
            if self.is_interrupted(patience)? {
                return Ok(Waited::Interrupted);
            }
        }
    }

    /// Waits until a worker replies, or patience ends. A worker that has ended does not reply: it is looked for now and then.
    fn is_interrupted(&self, patience: Patience<'_>) -> Result<bool, String> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.replied.as_fd(), PollFlags::IN)];
        let mut at_most = LOOK_EVERY_NS;
        match patience {
            Patience::Forever => {}
            Patience::Besides(fd) => fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN)),
            Patience::Until(until) => match until.saturating_sub(now_ns()) {
                0 => return Ok(true),
                left => at_most = at_most.min(left),
            },
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: at_most.cast_signed() };
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.to_string()),
        }
        if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
            return Ok(true);
        }
        let _taken = rustix::io::read(&*self.replied, &mut [0; 8]);
        Ok(false)
    }

    /// Why a worker has ended, if one has.
    pub(crate) fn ending(&self) -> Option<String> {
        let mut why = self.why.borrow_mut();
        if why.is_none() {
            *why = match self.ended.try_recv() {
                Ok(why) => Some(why),
                Err(mpsc::TryRecvError::Disconnected) => Some("nobody knows why".to_owned()),
                Err(mpsc::TryRecvError::Empty) => None,
            };
        }
        why.clone()
    }
}

struct Setup {
    port: Arc<Port>,
    served: Served,
    meters: Vec<QueueWriter>,
    engine: EngineKind,
    look_max: std::time::Duration,
    confined: Arc<sandbox::Report>,
}

/// The life of a worker's thread, and what ends it.
fn work(setup: Setup, ready: &mpsc::Sender<EngineKind>) -> io::Result<io::Error> {
    let (engine, image) = (setup.engine, Arc::clone(&setup.served.image));
    let why_not = match engine {
        EngineKind::Sync => None,
        EngineKind::Auto if image.is_in_memory() => None,
        EngineKind::Auto | EngineKind::Uring => match Uring::new(Arc::clone(&image)) {
            Ok(ring) => return serve(ring, EngineKind::Uring, setup, ready),
            Err(error) if engine == EngineKind::Uring => return Err(error),
            Err(error) => Some(error),
        },
    };
    if let Some(error) = why_not {
        crate::tell(&format!("there is no io_uring ({error}): requests are served one after the other"));
    }
    serve(Sync::new(image)?, EngineKind::Sync, setup, ready)
}

/// The rest of that life. `ready` is told which engine it is.
fn serve<E: Engine>(
    engine: E,
    kind: EngineKind,
    setup: Setup,
    ready: &mpsc::Sender<EngineKind>,
) -> io::Result<io::Error> {
    sandbox::restrict_thread(Profile::Worker, &setup.confined).map_err(io::Error::other)?;
    let _gone = ready.send(kind);
    Ok(Worker::new(engine, setup.port, setup.served, setup.meters, setup.look_max).run())
}
