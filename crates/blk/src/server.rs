//! The process: what it sets up, in which order, and the control thread's loop.
//!
//! ```text
//! image opened, locked, the dead waited for ─▶ socket ─▶ telemetry page ─▶ restricted ─▶ workers ─▶ filtered ─▶ one front-end after
//! another
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::SocketFlags;
use warmswap_socket::{Connection, listen};
use warmswap_telemetry::{Identity, Page};

use crate::clock::now_ns;
use crate::device::{self, Shape};
use crate::image::{Image, ImageError};
use crate::options::{Endpoint, Options};
use crate::pool::Pool;
use crate::queue::Served;
use crate::request::Limits;
use crate::sandbox::{self, Profile, State};
use crate::session::{End, Session, Shared};

/// The size of the image is looked at this often.
const SIZE_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };
/// On SIGTERM requests in flight are waited for so long.
const END_MAX_NS: u64 = 1_000_000_000;
/// Virtio device id of a block device.
const DEVICE_BLOCK: u32 = 2;

/// Why a backend did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The image cannot be used.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// The socket cannot be made.
    #[error("{0}")]
    Listen(io::Error),
    /// A socket that was given cannot be used.
    #[error("{path}: {error}")]
    Socket {
        /// Which.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The telemetry page cannot be made.
    #[error("the telemetry page: {0}")]
    Telemetry(String),
    /// The process could not confine itself as it was told to.
    #[error("{0}")]
    Sandbox(#[from] sandbox::SandboxError),
    /// A worker could not start, or ended by itself.
    #[error("a worker ended: {0}; what it had taken and not completed is left to whoever serves the rings next")]
    Worker(String),
    /// The system refused something else.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What it said.
        error: io::Error,
    },
}

/// Runs a backend until SIGTERM or SIGINT, or, on an inherited connection, until the front-end has gone.
///
/// # Errors
/// See [`RunError`].
pub fn run(options: &Options) -> Result<(), RunError> {
    let system = |what| move |error| RunError::System { what, error };
    let end = take_signals().map_err(system("taking signals"))?;
    let image = Image::open(&options.image, options.read_only, options.direct)?;
    image.must_be(options.identity)?;
    image.warn();
    let tell = |pid| {
        let what = "which is gone, is still in flight on the image: waiting for its end";
        crate::tell(&format!("I/O of process {pid}, {what}"));
    };
    image.wait_for_the_dead(tell).map_err(system("asking who has the image open"))?;
    let shape = Shape {
        sectors: image.sectors().map_err(system("asking for the image's size"))?,
        block_size: image.block_size(),
        queues: options.queues,
        read_only: image.is_read_only(),
    };
    let source = Source::open(&options.endpoint)?;
    let instance = image.instance().0.cast_unsigned();
    let identity = Identity { instance, device_type: DEVICE_BLOCK, started_ns: now_ns() };
    let (page, meters) =
        Page::create(options.queues, identity).map_err(|error| RunError::Telemetry(error.to_string()))?;
    let image = Arc::new(image);
    let limits = Limits {
        sectors: shape.sectors,
        read_only: shape.read_only,
        write_through: true,
        block_sectors: u64::from(shape.block_size) / crate::image::SECTOR,
    };
    let served = Served { image: Arc::clone(&image), limits, id: device::id(&options.serial) };
    let confined = Arc::new(sandbox::restrict_process(&options.sandbox)?);
    #[cfg(feature = "lab")]
    crate::faults::start();
    let pool = Pool::start(options, &served, meters, &confined).map_err(|error| RunError::Worker(error.to_string()))?;
    let how = if image.is_direct() { "past the page cache" } else { "through the page cache" };
    let size = shape.sectors * crate::image::SECTOR;
    crate::tell(&format!(
        "{} ({size} bytes, {how}), {} queues, engine {}",
        options.image.display(),
        options.queues,
        pool.engine().name()
    ));
    if confined.layers().iter().any(|layer| matches!(layer.state, State::Off | State::NotAvailable)) {
        crate::tell(&format!("not wholly confined: {confined}"));
    }
    sandbox::restrict_thread(Profile::Control, &confined)?;
    let server = Server { options, image, pool, end, source, _page: page };
    server.run(shape)
}

/// Where front-ends come from.
#[derive(Debug)]
enum Source {
    Listener(OwnedFd),
    Connection(Option<OwnedFd>),
}

impl Source {
    fn open(endpoint: &Endpoint) -> Result<Self, RunError> {
        match endpoint {
            Endpoint::Path(path) => {
                // One is served, one may wait.
                listen(path, 1).map(Source::Listener).map_err(RunError::Listen)
            }
            Endpoint::Inherited(fd) => {
                let fail = |error| RunError::Socket { path: format!("descriptor {fd}"), error };
                let ours = copy_of(*fd).map_err(fail)?;
                let listens = rustix::net::sockopt::socket_acceptconn(&ours).map_err(|error| fail(error.into()))?;
                Ok(if listens { Source::Listener(ours) } else { Source::Connection(Some(ours)) })
            }
        }
    }
}

/// A copy of an inherited descriptor, which nobody inherits from us.
fn copy_of(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call looks at a number, and fails on one that is not open.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    // SAFETY: just made, and ours alone.
    if copy < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(copy) }) }
}

/// SIGTERM and SIGINT as a descriptor, and nothing of a broken pipe. Before any thread is made.
fn take_signals() -> io::Result<OwnedFd> {
    // SAFETY: an empty set is made before it is used; the calls take pointers to it that live long enough.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

struct Server<'a> {
    options: &'a Options,
    image: Arc<Image>,
    pool: Pool,
    end: OwnedFd,
    source: Source,
    /// Whoever looks for it finds it as long as the process has it open.
    _page: Page,
}

/// What woke the control thread.
#[derive(Default)]
struct Woken {
    end: bool,
    front_end: bool,
    behind: bool,
    channel: bool,
}

impl Server<'_> {
    fn run(mut self, mut shape: Shape) -> Result<(), RunError> {
        loop {
            let Some(connection) = self.accept(&mut shape)? else { return Ok(()) };
            let shared =
                Shared { pool: &self.pool, shape, write_cache: self.options.write_cache, end: self.end.as_fd() };
            let session = Session::new(connection, &shared);
            let (asked, size) = self.serve(session)?;
            shape.sectors = size;
            if asked || matches!(self.source, Source::Connection(_)) {
                return Ok(());
            }
        }
    }

    /// The next front-end; none if the process is asked to end.
    fn accept(&mut self, shape: &mut Shape) -> Result<Option<Connection>, RunError> {
        let system =
            |error: rustix::io::Errno| RunError::System { what: "waiting for a front-end", error: error.into() };
        let socket = match &mut self.source {
            Source::Connection(socket) => socket.take(),
            Source::Listener(listener) => loop {
                let mut fds = [PollFd::new(&self.end, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
                match rustix::event::poll(&mut fds, Some(&SIZE_EVERY)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(system(error)),
                }
                if !fds[0].revents().is_empty() {
                    return Ok(None);
                }
                if let Some(sectors) = grown(&self.image, shape.sectors) {
                    shape.sectors = sectors;
                }
                if fds[1].revents().is_empty() {
                    continue;
                }
                match rustix::net::accept_with(&*listener, SocketFlags::CLOEXEC) {
                    Ok(socket) => break Some(socket),
                    // It is gone already.
                    Err(rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                    Err(error) => return Err(system(error)),
                }
            },
        };
        let Some(socket) = socket else { return Ok(None) };
        let fail = |error: warmswap_socket::ConnectionError| RunError::Socket {
            path: "the front-end's connection".into(),
            error: io::Error::other(error),
        };
        Connection::new(socket).map(Some).map_err(fail)
    }

    /// Serves a front-end until it is gone or the process is asked to end. Returns which, and the size of the image by then.
    fn serve(&self, mut session: Session<'_>) -> Result<(bool, u64), RunError> {
        let mut sectors = session.sectors();
        let end = loop {
            let woken = self.wait(&session)?;
            if woken.end {
                break End::Asked;
            }
            if woken.channel {
                session.serve_channel();
            }
            if woken.behind {
                self.pool.begin_round().map_err(RunError::Worker)?;
            }
            if (woken.front_end || woken.behind)
                && let Err(end) = session.serve()
            {
                break end;
            }
            if woken.behind {
                self.pool.caught_up().map_err(RunError::Worker)?;
            }
            if let Some(why) = self.pool.ending() {
                return Err(RunError::Worker(why));
            }
            if let Some(now) = grown(&self.image, sectors) {
                let (before, bytes) = (sectors * crate::image::SECTOR, now * crate::image::SECTOR);
                if now < sectors {
                    crate::tell(&format!(
                        "the image SHRANK from {before} to {bytes} bytes: what lay behind is lost to the guest"
                    ));
                } else {
                    crate::tell(&format!("the image has grown from {before} to {bytes} bytes"));
                }
                sectors = now;
                if let Err(error) = session.resize(now) {
                    crate::tell(&error);
                }
            }
        };
        let asked = match end {
            // Whoever serves the rings next finds less to do; nothing depends on it.
            End::Asked => {
                session.end_until(now_ns() + END_MAX_NS);
                true
            }
            End::Lost(reason) => {
                crate::tell(&format!("the front-end has left: {reason}"));
                session.end()
            }
        };
        Ok((asked, sectors))
    }

    fn wait(&self, session: &Session<'_>) -> Result<Woken, RunError> {
        let mut fds = vec![
            PollFd::new(&self.end, PollFlags::IN),
            PollFd::from_borrowed_fd(session.fd(), session.wants()),
            PollFd::from_borrowed_fd(self.pool.behind(), PollFlags::IN),
        ];
        fds.extend(session.channel().map(|fd: BorrowedFd<'_>| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, Some(&SIZE_EVERY)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(RunError::System { what: "waiting for the front-end", error: error.into() }),
        }
        let is = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Woken { end: is(0), front_end: is(1), behind: is(2), channel: is(3) })
    }
}

/// The size of the image, if it is another than it was.
fn grown(image: &Image, sectors: u64) -> Option<u64> {
    image.sectors().ok().filter(|now| *now != sectors)
}
