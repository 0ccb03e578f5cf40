//! What a child does when it is restricted.

use super::super::table::Profile;
use super::super::*;
use super::DENIED;
use super::child::{Stage, say};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// What is open before the restrictions.
pub(super) struct Things {
    image: File,
    program: File,
    listener: UnixListener,
    client: UnixStream,
    tcp: TcpListener,
    directory: PathBuf,
}

/// The directory of the files of the child with this id.
pub(super) fn directory(pid: u32) -> PathBuf {
    std::env::temp_dir().join(format!("warmswap-sandbox-test-{pid}"))
}

impl Things {
    pub(super) fn new() -> Things {
        let directory = directory(std::process::id());
        std::fs::create_dir_all(&directory).unwrap();
        let image =
            File::options().read(true).write(true).create(true).truncate(true).open(directory.join("image")).unwrap();
        image.set_len(1 << 20).unwrap();
        let listener = UnixListener::bind(directory.join("socket")).unwrap();
        let client = UnixStream::connect(directory.join("socket")).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        Things { image, program: File::open("/bin/true").unwrap(), listener, client, tcp, directory }
    }
}

pub(super) type Deed = fn(&Things, &Stage);

/// A deed by its name, and whether it does the restricting itself.
pub(super) fn find(name: &str) -> (Deed, bool) {
    let (_, deed, restricts) =
        DEEDS.iter().find(|(known, ..)| *known == name).unwrap_or_else(|| panic!("no deed {name:?}"));
    (*deed, *restricts)
}

const DEEDS: &[(&str, Deed, bool)] = &[
    ("nothing", |_, _| say("ok"), false),
    (
        "be killed",
        |_, _| rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap(),
        false,
    ),
    ("open", |_, _| told(rustix::fs::open("/etc/passwd", OFlags::RDONLY, Mode::empty())), false),
    (
        "make a file",
        |things, _| told(rustix::fs::open(things.directory.join("new"), OFlags::CREATE, Mode::RUSR)),
        false,
    ),
    ("execute", |_, _| execute(None), false),
    ("execute what is open", |things, _| execute(Some(&things.program)), false),
    (
        "socket",
        |_, _| told(rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None)),
        false,
    ),
    ("connect to a TCP port", |things, _| told_io(TcpStream::connect(things.tcp.local_addr().unwrap())), false),
    ("signal the parent", |_, _| told(rustix::process::test_kill_process(rustix::process::getppid().unwrap())), false),
    ("map code", |_, _| told(map(libc::PROT_READ | libc::PROT_EXEC)), false),
    ("turn memory into code", |_, _| turn_into_code(), false),
    ("start a thread", |_, _| told_io(std::thread::Builder::new().spawn(|| {}).map(|it| it.join().unwrap())), false),
    ("start a process", |_, _| start_a_process(), false),
    ("use what is open", |things, _| use_what_is_open(things), false),
    ("use the image", |things, _| use_the_image(things), false),
    ("lock the image", |things, _| told(lock(&things.image)), false),
    ("try every number", |_, stage| try_every_number(stage), false),
    ("try the arguments", |_, _| try_the_arguments(), false),
    ("call by the x32 numbers", |_, _| told(call(0x4000_0000 | libc::SYS_getpid, [0; 6])), false),
    ("panic", |_, _| panic_on_purpose(), false),
    ("overflow the stack", |_, _| say(deeper(1)), false),
    ("free twice", |_, _| free_twice(), false),
    ("wait for the end", |_, _| told_io(std::io::stdin().read_to_end(&mut Vec::new())), false),
    ("wait a moment", |_, _| wait_a_moment(), false),
    (
        "tell whether it is dumpable",
        |_, _| say(call(libc::SYS_prctl, [libc::PR_GET_DUMPABLE as usize, 0, 0, 0, 0, 0]).unwrap()),
        false,
    ),
    ("allocate in a thread", |_, stage| allocate_in_a_thread(stage), true),
    ("serve", serve, true),
];

fn told<T>(result: Result<T, Errno>) {
    told_io(result.map_err(std::io::Error::from));
}

fn told_io<T>(result: std::io::Result<T>) {
    match result {
        Ok(_) => say("ok"),
        Err(error) => say(format_args!("errno {}", error.raw_os_error().unwrap())),
    }
}

/// A system call as it is.
fn call(number: libc::c_long, arg: [usize; 6]) -> Result<libc::c_long, Errno> {
    // SAFETY: each caller's arguments lead to nothing but an answer or memory that nobody else knows.
    let answer = unsafe { libc::syscall(number, arg[0], arg[1], arg[2], arg[3], arg[4], arg[5]) };
    if answer >= 0 { Ok(answer) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()) }
}

fn execute(open: Option<&File>) {
    let name = c"/bin/true";
    let arguments = [name.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null()];
    // SAFETY: the strings end with a zero and the lists with a null; both outlive the call.
    let _does_not_return = unsafe {
        match open {
            None => libc::execve(name.as_ptr(), arguments.as_ptr(), environment.as_ptr()),
            Some(file) => libc::fexecve(file.as_raw_fd(), arguments.as_ptr(), environment.as_ptr()),
        }
    };
    told_io::<()>(Err(std::io::Error::last_os_error()));
}

fn map(protection: libc::c_int) -> Result<usize, Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let address = call(libc::SYS_mmap, [0, 4096, protection as usize, flags as usize, usize::MAX, 0])?;
    Ok(usize::try_from(address).unwrap())
}

fn turn_into_code() {
    let page = map(libc::PROT_READ | libc::PROT_WRITE).unwrap();
    told(call(libc::SYS_mprotect, [page, 4096, (libc::PROT_READ | libc::PROT_EXEC) as usize, 0, 0, 0]));
}

fn start_a_process() {
    // SAFETY: the child ends at once.
    let pid = unsafe {
        match libc::fork() {
            0 => libc::_exit(0),
            pid => pid,
        }
    };
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    told(rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()));
}

fn lock(image: &File) -> Result<(), Errno> {
    // SAFETY: all zeroes is a value of it.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    let fd = image.as_raw_fd().unsigned_abs() as usize;
    call(libc::SYS_fcntl, [fd, libc::F_OFD_SETLK as usize, (&raw const lock) as usize, 0, 0, 0]).map(drop)
}

fn use_what_is_open(things: &Things) {
    let mut read = [0; 7];
    things.image.write_all_at(b"written", 4096).unwrap();
    things.image.read_exact_at(&mut read, 4096).unwrap();
    assert_eq!(&read, b"written");
    rustix::fs::fallocate(&things.image, FallocateFlags::empty(), 1 << 20, 1 << 20).unwrap();
    assert_eq!(things.image.metadata().unwrap().len(), 2 << 20);
    things.image.sync_all().unwrap();
    lock(&things.image).unwrap();
    say("written, read, allocated, flushed, locked");
}

/// As a worker does without a ring.
fn execute_requests(image: &File, at: u64) {
    let mut read = [1; 8];
    image.write_all_at(b"request.", at + 8192).unwrap();
    image.read_exact_at(&mut read, at + 8192).unwrap();
    assert_eq!(&read, b"request.");
    rustix::io::pwritev(image, &[IoSlice::new(b"vec"), IoSlice::new(b"tor")], at + 16384).unwrap();
    rustix::io::preadv(image, &mut [IoSliceMut::new(&mut read)], at + 16384).unwrap();
    assert_eq!(&read, b"vector\0\0");
    rustix::io::pwritev2(image, &[IoSlice::new(b"two")], at + 16384, rustix::io::ReadWriteFlags::empty()).unwrap();
    rustix::io::preadv2(image, &mut [IoSliceMut::new(&mut read)], at + 16384, rustix::io::ReadWriteFlags::empty())
        .unwrap();
    rustix::fs::fallocate(image, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, 4096).unwrap();
    // It is no block device; the filter is not what says so.
    let range = [0u64, 512];
    let fd = image.as_raw_fd().unsigned_abs() as usize;
    for request in [0x1277, 0x127f] {
        assert_eq!(call(libc::SYS_ioctl, [fd, request, (&raw const range) as usize, 0, 0, 0]), Err(Errno::NOTTY));
    }
    image.sync_all().unwrap();
    image.sync_data().unwrap();
}

fn use_the_image(things: &Things) {
    execute_requests(&things.image, 0);
    say("ok");
}

/// Stops at the first that is neither denied nor in the table; those in the table are not tried.
fn try_every_number(stage: &Stage) {
    const NUMBERS_MAX: libc::c_long = 1024;
    // uretprobe and uprobe: newer kernels pass them by every filter, and kill a caller that is no probe.
    const PROBES: [libc::c_long; 2] = if cfg!(target_arch = "x86_64") { [335, 336] } else { [NUMBERS_MAX; 2] };
    let chains = filter::chains(stage.profile().unwrap_or(Profile::Worker)).unwrap();
    for number in (0..NUMBERS_MAX).filter(|number| !chains.contains_key(number) && !PROBES.contains(number)) {
        let answer = call(number, [usize::MAX; 6]);
        if answer != Err(Errno::from_raw_os_error(DENIED)) {
            return say(format_args!("{number} answered {answer:?}"));
        }
    }
    say("denied all but those of the table");
}

/// Stands for the child's own id.
const OWN: usize = usize::MAX - 1;
const NONE: usize = usize::MAX;
const UPPER: usize = 1 << 32;

/// Calls that the arguments decide about: whether a worker's and a control thread's pass. In a free process they change
/// nothing.
pub(super) const ARGUMENTS: &[(&str, libc::c_long, [usize; 4], [bool; 2])] = &[
    ("mmap readable", libc::SYS_mmap, [0, 0, libc::PROT_READ as usize, 0], [true, true]),
    ("mmap executable", libc::SYS_mmap, [0, 0, (libc::PROT_READ | libc::PROT_EXEC) as usize, 0], [false, false]),
    ("mmap executable, more bits", libc::SYS_mmap, [0, 0, libc::PROT_EXEC as usize | UPPER, 0], [false, false]),
    ("mprotect readable", libc::SYS_mprotect, [0, 0, libc::PROT_READ as usize, 0], [true, true]),
    ("mprotect executable", libc::SYS_mprotect, [0, 0, libc::PROT_EXEC as usize, 0], [false, false]),
    ("fcntl F_GETFD", libc::SYS_fcntl, [NONE, libc::F_GETFD as usize, 0, 0], [true, true]),
    ("fcntl F_GETFL", libc::SYS_fcntl, [NONE, libc::F_GETFL as usize, 0, 0], [false, true]),
    ("fcntl F_OFD_SETLK", libc::SYS_fcntl, [NONE, libc::F_OFD_SETLK as usize, 0, 0], [false, true]),
    ("fcntl F_DUPFD_CLOEXEC", libc::SYS_fcntl, [NONE, libc::F_DUPFD_CLOEXEC as usize, 0, 0], [false, true]),
    ("fcntl F_ADD_SEALS", libc::SYS_fcntl, [NONE, libc::F_ADD_SEALS as usize, 0, 0], [false, true]),
    ("fcntl F_DUPFD", libc::SYS_fcntl, [NONE, libc::F_DUPFD as usize, 0, 0], [false, false]),
    ("fcntl F_SETOWN", libc::SYS_fcntl, [NONE, libc::F_SETOWN as usize, 0, 0], [false, false]),
    ("ioctl BLKDISCARD", libc::SYS_ioctl, [NONE, 0x1277, 0, 0], [true, false]),
    ("ioctl BLKDISCARD, more bits", libc::SYS_ioctl, [NONE, 0x1277 | UPPER, 0, 0], [true, false]),
    ("ioctl BLKZEROOUT", libc::SYS_ioctl, [NONE, 0x127f, 0, 0], [true, false]),
    ("ioctl BLKGETSIZE64", libc::SYS_ioctl, [NONE, 0x8008_1272, 0, 0], [false, true]),
    ("ioctl FIONBIO", libc::SYS_ioctl, [NONE, libc::FIONBIO as usize, 0, 0], [false, true]),
    ("ioctl BLKSECDISCARD", libc::SYS_ioctl, [NONE, 0x127d, 0, 0], [false, false]),
    ("ioctl TIOCSTI", libc::SYS_ioctl, [NONE, libc::TIOCSTI as usize, 0, 0], [false, false]),
    (
        "getsockopt SO_PEERCRED",
        libc::SYS_getsockopt,
        [NONE, libc::SOL_SOCKET as usize, libc::SO_PEERCRED as usize, 0],
        [false, true],
    ),
    (
        "getsockopt SO_SNDBUF",
        libc::SYS_getsockopt,
        [NONE, libc::SOL_SOCKET as usize, libc::SO_SNDBUF as usize, 0],
        [false, false],
    ),
    (
        "getsockopt of TCP",
        libc::SYS_getsockopt,
        [NONE, libc::SOL_TCP as usize, libc::SO_PEERCRED as usize, 0],
        [false, false],
    ),
    ("newfstatat of a descriptor", libc::SYS_newfstatat, [NONE, 0, 0, libc::AT_EMPTY_PATH as usize], [false, true]),
    ("newfstatat of a path", libc::SYS_newfstatat, [NONE, 0, 0, libc::AT_SYMLINK_NOFOLLOW as usize], [false, false]),
    ("statx of a descriptor", libc::SYS_statx, [NONE, 0, libc::AT_EMPTY_PATH as usize, 0], [false, true]),
    ("statx of a path", libc::SYS_statx, [NONE, 0, libc::AT_SYMLINK_NOFOLLOW as usize, 0], [false, false]),
    ("tgkill of its own process", libc::SYS_tgkill, [OWN, OWN, 0, 0], [true, true]),
    ("tgkill of another process", libc::SYS_tgkill, [1, 1, 0, 0], [false, false]),
    ("io_uring_enter", libc::SYS_io_uring_enter, [NONE, 0, 0, 0], [true, false]),
    ("epoll_ctl", libc::SYS_epoll_ctl, [NONE, 0, 0, 0], [true, true]),
    ("prctl PR_SET_NAME", libc::SYS_prctl, [libc::PR_SET_NAME as usize, 0, 0, 0], [true, true]),
    ("prctl PR_SET_DUMPABLE", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as usize, 1, 0, 0], [false, false]),
];

fn try_the_arguments() {
    for (name, number, args, _) in ARGUMENTS {
        let [a, b, c, d] = args.map(|arg| if arg == OWN { std::process::id() as usize } else { arg });
        let denied = call(*number, [a, b, c, d, NONE, 0]) == Err(Errno::from_raw_os_error(DENIED));
        say(format_args!("{name}: {}", if denied { "denied" } else { "passed" }));
    }
}

/// In a release a panic is an abort, after its message.
fn panic_as_released() {
    let message = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        message(panic);
        std::process::abort();
    }));
}

fn panic_on_purpose() {
    panic_as_released();
    panic!("on purpose");
}

fn deeper(depth: usize) -> usize {
    let here = std::hint::black_box([depth; 512]);
    if here[0] == 0 { 0 } else { deeper(depth + 1) + std::hint::black_box(here)[1] }
}

fn free_twice() {
    // SAFETY: it is not sound, and glibc ends the process for it: that is the test.
    unsafe {
        let block = std::hint::black_box(libc::malloc(64));
        libc::free(std::hint::black_box(block));
        libc::free(std::hint::black_box(block));
    }
}

fn wait_a_moment() {
    std::thread::sleep(Duration::from_millis(300));
    say("waited");
}

/// Makes the allocator take and give back.
fn allocate() {
    const BLOCKS: usize = 400;
    let blocks: Vec<_> = (0..BLOCKS).map(|size| vec![1u8; 60_000 + size]).collect();
    assert_eq!(blocks.iter().map(|block| usize::from(block[9])).sum::<usize>(), BLOCKS);
    drop(blocks);
    // More than the allocator ever takes from an arena.
    let mut large = vec![0u8; 40 << 20];
    large.resize(41 << 20, 2);
    assert_eq!(std::hint::black_box(large).last(), Some(&2));
}

fn allocate_in_a_thread(stage: &Stage) {
    stage.begin();
    let report = stage.profile().map(|profile| (profile, stage.restrict_process().unwrap()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if let Some((profile, report)) = &report {
                stage.restrict_thread(*profile, report).unwrap();
            }
            allocate();
            say("ok");
        });
    });
}

/// A process as the backend is one: the main thread speaks, two workers execute, and all are filtered when they have
/// started.
fn serve(things: &Things, stage: &Stage) {
    panic_as_released();
    stage.begin();
    let report = stage.restrict_process().unwrap();
    let (results, finished) = channel();
    let paused = (Mutex::new(0), Condvar::new());
    std::thread::scope(|scope| {
        let (spare, told_spare) = channel::<()>();
        let (answer, answered) = channel();
        scope.spawn(move || {
            told_spare.recv().unwrap();
            answer
                .send(rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None))
                .unwrap();
        });
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (requests, waiting) = channel();
                let (results, report, paused) = (results.clone(), &report, &paused);
                let thread = scope.spawn(move || {
                    stage.restrict_thread(Profile::Worker, report).unwrap();
                    work(&things.image, &waiting, &results, paused);
                });
                (requests, thread)
            })
            .collect();
        stage.restrict_thread(Profile::Control, &report).unwrap();

        spare.send(()).unwrap();
        answered.recv().unwrap().unwrap();
        say("spare: a socket, not being filtered yet");
        for request in 0..20 {
            workers[request as usize % 2].0.send(request).unwrap();
        }
        let sum: u32 = (0..20).map(|_| finished.recv().unwrap()).sum();
        assert_eq!((sum, *paused.0.lock().unwrap()), (190, 20));
        say("workers: wrote, read, discarded, flushed, slept, grew, counted");
        speak(things);
        say("control: accepted, received a descriptor, answered, measured, made memory");
        for (requests, thread) in workers {
            drop(requests);
            // Unlike the end of the scope this waits for the end of the thread itself.
            thread.join().unwrap();
        }
    });
    say("joined");
}

fn work(image: &File, requests: &Receiver<u32>, results: &Sender<u32>, paused: &(Mutex<u32>, Condvar)) {
    while let Ok(request) = requests.recv() {
        let began = Instant::now();
        execute_requests(image, u64::from(request) << 15);
        std::thread::sleep(Duration::from_millis(1));
        {
            let mut count = paused.0.lock().unwrap();
            *count += 1;
            drop(paused.1.wait_timeout(count, Duration::from_millis(1)).unwrap());
        }
        allocate();
        let counted: HashMap<u32, u32> = (0..100).map(|it| (it, request)).collect();
        assert!(began.elapsed() >= Duration::from_millis(1));
        results.send(counted[&7]).unwrap();
    }
}

/// As the control thread does with its front-end, which is itself here.
fn speak(things: &Things) {
    use rustix::net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    };
    let (front_end, _) = things.listener.accept().unwrap();
    front_end.set_nonblocking(true).unwrap();
    assert_eq!(rustix::net::sockopt::socket_peercred(&front_end).unwrap().pid, rustix::process::getpid());

    let sent = [things.image.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&sent)));
    rustix::net::sendmsg(&things.client, &[IoSlice::new(b"take it")], &mut ancillary, SendFlags::NOSIGNAL).unwrap();

    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let flags = rustix::event::epoll::EventFlags::IN;
    rustix::event::epoll::add(&epoll, &front_end, rustix::event::epoll::EventData::new_u64(1), flags).unwrap();
    let mut events = [rustix::event::epoll::Event { flags, data: rustix::event::epoll::EventData::new_u64(0) }; 4];
    assert_eq!(rustix::event::epoll::wait(&epoll, &mut events[..], None).unwrap(), 1);

    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 16];
    rustix::net::recvmsg(&front_end, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .unwrap();
    let received: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(received.len(), 1);
    let received = File::from(received.into_iter().next().unwrap());
    assert!(received.metadata().unwrap().len() >= 1 << 20);
    assert!(rustix::fs::fstat(&received).unwrap().st_size >= 1 << 20);
    lock(&received).unwrap();
    drop(received.try_clone().unwrap());

    (&front_end).write_all(b"done").unwrap();
    let mut answer = [0; 4];
    (&things.client).read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"done");
    front_end.shutdown(std::net::Shutdown::Both).unwrap();

    let memory = rustix::fs::memfd_create("telemetry", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memory, 8192).unwrap();
    rustix::fs::fcntl_add_seals(&memory, rustix::fs::SealFlags::SHRINK).unwrap();
    let flags = rustix::mm::MapFlags::SHARED;
    // SAFETY: a mapping of its own, which nobody looks at.
    unsafe {
        let mapped =
            rustix::mm::mmap(std::ptr::null_mut(), 8192, rustix::mm::ProtFlags::READ, flags, &memory, 0).unwrap();
        rustix::mm::munmap(mapped, 8192).unwrap();
    }
    let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&wake, &1u64.to_ne_bytes()).unwrap();
    let mut fds = [rustix::event::PollFd::new(&wake, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, None).unwrap(), 1);
    rustix::io::read(&wake, &mut [0; 8]).unwrap();
}
