//! Two programs for the tests: a keeper that counts what it allocates, and a command that does what it is told over a socket.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::process::exit;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix};
use warmswap_keeper::{Keeper, Kept, Options, Store};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is the system's allocator; only counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is handed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args[1].as_str() {
        "keeper" => keeper(&args),
        "command" => Command::new(&args[2]).obey(),
        "sender" => send(&args[2], b"FDSTORE=1", 1).expect("it can be sent"),
        other => panic!("{other} is neither keeper nor command"),
    }
}

/// `keeper MAX RUN_DIR COMMAND…`: says at its end how often it has allocated since it was prepared.
fn keeper(args: &[String]) {
    let options = Options {
        descriptors_max: args[2].parse().ok(),
        run_dir: PathBuf::from(&args[3]),
        command: args[4..].iter().map(Into::into).collect(),
    };
    let keeper = Keeper::prepare(&options).unwrap_or_else(|error| {
        eprintln!("{error}");
        exit(1)
    });
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let status = keeper.run();
    let after = ALLOCATIONS.load(Ordering::Relaxed);
    eprintln!("allocated {} times", after - before);
    exit(status.into())
}

/// `command SOCKET`: connects there, and answers each line with one.
struct Command {
    orders: BufReader<UnixStream>,
    answers: UnixStream,
    notify: String,
    store: Store,
    inherited: BTreeMap<String, OwnedFd>,
    /// What was open at the very start.
    numbers: usize,
}

impl Command {
    fn new(socket: &str) -> Self {
        let numbers = std::fs::read_dir("/proc/self/fd").expect("it can be read").count() - 1;
        let notify = std::env::var("NOTIFY_SOCKET").expect("a keeper");
        let mut store = Store::from_env().expect("a sound environment").expect("a keeper");
        assert!(std::env::vars().all(|(name, _)| !name.starts_with("LISTEN_") && name != "NOTIFY_SOCKET"));
        let inherited = store.take_inherited().into_iter().collect();
        let answers = UnixStream::connect(socket).expect("the test listens");
        let orders = BufReader::new(answers.try_clone().expect("a descriptor"));
        Command { orders, answers, notify, store, inherited, numbers }
    }

    fn obey(mut self) {
        loop {
            let mut line = String::new();
            if self.orders.read_line(&mut line).expect("the test's socket") == 0 {
                // The test is over.
                exit(0);
            }
            let line = line.trim_end();
            let (order, rest) = line.split_once(' ').unwrap_or((line, ""));
            let answer = self.answer(order, rest).unwrap_or_else(|error| format!("error {error}"));
            writeln!(self.answers, "{answer}").expect("the test's socket");
        }
    }

    fn answer(&mut self, order: &str, rest: &str) -> std::io::Result<String> {
        Ok(match order {
            "pid" => std::process::id().to_string(),
            "exit" => exit(rest.parse().expect("a status")),
            "count" => self.inherited.len().to_string(),
            "numbers" => self.numbers.to_string(),
            "max" => format!("{:?}", self.store.max()),
            "limit" => format!("{:?}", rustix::process::getrlimit(rustix::process::Resource::Nofile).current),
            "barrier" => self.store.barrier().map(|()| "done".to_owned())?,
            "ready" => self.store.ready().map(|()| "done".to_owned())?,
            "eventfd" => self.put_new(&eventfd(rest.parse().expect("a count")))?,
            "memfd" => {
                let file = rustix::fs::memfd_create("kept", MemfdFlags::CLOEXEC)?;
                rustix::io::write(&file, rest.as_bytes())?;
                self.put_new(&file)?
            }
            "connect" => self.put_new(&UnixStream::connect(rest)?.into())?,
            // As many eventfds as it says, each with its own place in the order as its count.
            "many" => {
                for count in 1..=rest.parse::<u64>().expect("a number") {
                    self.put_new(&eventfd(count))?;
                }
                "done".to_owned()
            }
            // How many of what is inherited are eventfds whose count is what its name says.
            "many?" => {
                let right = self.inherited.iter().filter(|(name, fd)| {
                    let number = Kept::from_name(name).expect("a name of ours").number();
                    counter(fd.as_fd()).is_ok_and(|count| count == u64::from(number) + 1)
                });
                right.count().to_string()
            }
            "eventfd?" => counter(self.inherited[rest].as_fd())?.to_string(),
            "memfd?" => {
                let mut bytes = [0; 100];
                let count = rustix::io::pread(&self.inherited[rest], &mut bytes, 0)?;
                String::from_utf8_lossy(&bytes[..count]).into_owned()
            }
            "say" => {
                let (name, text) = rest.split_once(' ').expect("name and text");
                rustix::io::write(&self.inherited[name], text.as_bytes())?;
                "done".to_owned()
            }
            "adopt" => self.store.adopt(rest, self.inherited[rest].as_fd())?.to_string(),
            "let-go" => {
                self.store.let_go(Kept::from_name(rest).expect("a name of ours")).map(|()| "done".to_owned())?
            }
            "discard" => self.store.discard(rest).map(|()| "done".to_owned())?,
            "names" => self.inherited.keys().map(String::as_str).collect::<Vec<_>>().join(" "),
            // A datagram as it is given, with so many descriptors of /dev/null.
            "raw" => {
                let (count, text) = rest.split_once(' ').expect("count and text");
                send(&self.notify, &unescape(text), count.parse().expect("a number"))?;
                "done".to_owned()
            }
            // A process whose parent is gone at once: it is the keeper's to reap.
            "orphan" => {
                let mut shell = std::process::Command::new("sh");
                let mut shell = shell.args(["-c", "sleep 1000 >/dev/null & echo $!"]);
                shell = shell.stdout(std::process::Stdio::piped());
                let output = shell.spawn()?.wait_with_output()?;
                String::from_utf8_lossy(&output.stdout).trim().to_owned()
            }
            // Sends as the keeper's own descendant, which is not the command.
            "child-raw" => {
                let program = std::env::current_exe()?;
                let status = std::process::Command::new(program).arg("sender").arg(&self.notify).status()?;
                assert!(status.success());
                "done".to_owned()
            }
            "path" => self.notify.clone(),
            other => panic!("{other} is no order"),
        })
    }

    fn put_new(&mut self, fd: &OwnedFd) -> std::io::Result<String> {
        let kept = self.store.put(fd.as_fd())?;
        Ok(kept.to_string())
    }
}

fn eventfd(count: u64) -> OwnedFd {
    let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    rustix::io::write(&fd, &count.to_ne_bytes()).expect("it has room");
    fd
}

/// Looks at the count and leaves it as it is.
fn counter(fd: BorrowedFd<'_>) -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes)?;
    rustix::io::write(fd, &bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn unescape(text: &str) -> Vec<u8> {
    text.replace("\\n", "\n").replace("\\0", "\0").into_bytes()
}

fn send(path: &str, bytes: &[u8], fds: usize) -> std::io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    let null = std::fs::File::open("/dev/null")?;
    let fds = vec![null.as_fd(); fds];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let address = SocketAddrUnix::new(path)?;
    let sent = rustix::net::sendmsg_addr(&socket, &address, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty());
    let _count = sent?;
    Ok(())
}
