//! What the storage gives without virtio: the lab's own loop on the same image with the same requests, from and into the same
//! buffers. Its `unsafe` is for requests to the kernel that name this memory.
//!
//! * `io_uring`: one ring that holds as many requests as all queues of the cell together, on a registered file. It sleeps until
//!   something completes.
//! * `io_uring, spinning`: the same, looking at the completions all the time. A processor that never sleeps is not woken.
//! * `pread`: one call after the other, on one thread.
//!
//! Whichever does most in short runs is the limit of its cell. It is the limit of one thread: a backend that serves two queues
//! in two threads may do more.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use serde_json::{Value, json};

use super::cell::Cell;
use super::image::Image;
use super::pairs::Figures;
use crate::bench::load::Stream;
use crate::bench::spread::rounded;
use crate::bench::usage;
use crate::common::rng::Rng;
use crate::guest::{BLOCK, Kind, Request, Window, now_ns};

/// Calls between two looks at the clock.
const CALLS: u64 = 8;

/// The loop of a cell.
pub(super) struct Limit {
    file: File,
    requests: Requests,
    /// All ways there are here, at least `pread`.
    ways: Vec<Way>,
    /// Which of them is taken.
    chosen: usize,
}

/// A way to do requests.
enum Way {
    Ring(Box<Ring>),
    Calls,
}

/// The requests and their buffers.
struct Requests {
    stream: Stream,
    buffers: Vec<Window>,
    queues: usize,
    /// Requests so far: queues take turns.
    past: usize,
}

impl Requests {
    /// The next request: what, where on the disk in bytes, and its buffer.
    fn next(&mut self) -> (Request, u64, &Window) {
        self.past += 1;
        let (request, choice) = self.stream.next(self.past % self.queues);
        (request, request.block * BLOCK as u64, &self.buffers[choice % self.buffers.len()])
    }
}

impl Limit {
    /// A loop with these buffers.
    pub(super) fn new(image: &Image, cell: &Cell, buffers: Vec<Window>, seed: u64) -> anyhow::Result<Self> {
        let flags = if cell.medium.direct() { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&image.path);
        let file = file.with_context(|| format!("opening {}", image.path.display()))?;
        let stream = Stream::new(cell.asked.load(image.bytes), cell.queues, Rng::new(seed, 3));
        let depth = u32::from(cell.depth) * u32::from(cell.queues);
        let mut ways = vec![Way::Calls];
        for spinning in [false, true] {
            match Ring::new(&file, depth, spinning) {
                Ok(ring) => ways.push(Way::Ring(Box::new(ring))),
                Err(error) => eprintln!("  the limit is without io_uring: {error}"),
            }
        }
        let requests = Requests { stream, buffers, queues: cell.queues.into(), past: 0 };
        Ok(Limit { file, requests, ways, chosen: 0 })
    }

    /// Tries each way for `seconds`, as often as QSD's modes, and stays with the best. Returns what each did.
    pub(super) fn choose(&mut self, seconds: f64) -> anyhow::Result<Vec<Value>> {
        let mut iops = vec![0.0; self.ways.len()];
        for _ in 0..super::TRIALS {
            for (index, iops) in iops.iter_mut().enumerate() {
                self.chosen = index;
                self.run(super::warm_up(seconds))?;
                *iops += self.run(seconds)?.iops / super::TRIALS as f64;
            }
        }
        let best = (0..iops.len()).max_by(|&one, &other| iops[one].total_cmp(&iops[other]));
        self.chosen = best.expect("there is at least one way");
        let tried = self.ways.iter().zip(&iops);
        Ok(tried.map(|(way, iops)| json!({"what": way.name(), "iops": rounded(*iops, 0)})).collect())
    }

    /// How it does its requests.
    pub(super) fn name(&self) -> &'static str {
        self.ways[self.chosen].name()
    }

    /// One run. Nothing is in flight afterwards.
    pub(super) fn run(&mut self, seconds: f64) -> anyhow::Result<Figures> {
        let used = usage::process_ns(std::process::id())?;
        let began = now_ns();
        let until = began + (seconds * 1e9) as u64;
        let (count, ended) = match &mut self.ways[self.chosen] {
            Way::Ring(ring) => ring.run(&mut self.requests, until)?,
            Way::Calls => call_by_call(&self.file, &mut self.requests, until)?,
        };
        let used = usage::process_ns(std::process::id())? - used;
        Ok(Figures::of_count(count, (ended - began) as f64 / 1e9, used))
    }
}

impl Way {
    fn name(&self) -> &'static str {
        match self {
            Way::Ring(ring) if ring.spinning => "io_uring, spinning",
            Way::Ring(_) => "io_uring",
            Way::Calls => "pread",
        }
    }
}

/// One call after the other until `until`. Returns how many, and when the last ended.
fn call_by_call(file: &File, requests: &mut Requests, until: u64) -> anyhow::Result<(u64, u64)> {
    let mut count = 0;
    loop {
        for _ in 0..CALLS {
            let (request, at, buffer) = requests.next();
            let (fd, memory, length) = (file.as_raw_fd(), buffer.user() as *mut libc::c_void, buffer.length);
            let at = at.cast_signed();
            // SAFETY: the buffer is mapped as long as `requests` lives, and nothing but atomics refers to it.
            let done = unsafe {
                match request.kind {
                    Kind::Read => libc::pread(fd, memory, length, at),
                    _ => libc::pwrite(fd, memory, length, at),
                }
            };
            if done < 0 {
                return Err(io::Error::last_os_error()).with_context(|| format!("{request:?}"));
            }
            ensure!(done.unsigned_abs() == length, "{request:?} moved {done} bytes");
        }
        count += CALLS;
        let now = now_ns();
        if now >= until {
            return Ok((count, now));
        }
    }
}

/// An io_uring, and how many requests it is to hold.
struct Ring {
    ring: IoUring,
    spinning: bool,
    depth: u32,
    in_flight: u32,
    /// Of the buffers in flight: kept where the ring fails with some of them.
    memory: Option<Window>,
}

impl Ring {
    fn new(file: &File, depth: u32, spinning: bool) -> io::Result<Self> {
        let ring = if spinning {
            // Completions must come without a call.
            IoUring::new(depth)?
        } else {
            // Older kernels know neither of these.
            let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(depth);
            ring.or_else(|_| IoUring::new(depth))?
        };
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Ring { ring, spinning, depth, in_flight: 0, memory: None })
    }

    /// Hands over what is new, and waits until something has completed.
    fn submit_and_wait(&mut self) -> io::Result<()> {
        if !self.spinning {
            self.ring.submit_and_wait(1)?;
            return Ok(());
        }
        if !self.ring.submission().is_empty() {
            self.ring.submit()?;
        }
        while self.ring.completion().is_empty() {
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Keeps `depth` requests in flight until `until`, then waits for them. Returns how many completed in that time, and when
    /// the last of those did.
    fn run(&mut self, requests: &mut Requests, until: u64) -> anyhow::Result<(u64, u64)> {
        let bytes = requests.buffers[0].length;
        self.memory = requests.buffers.first().cloned();
        let (mut count, mut ended) = (0, None);
        loop {
            while ended.is_none() && self.in_flight < self.depth {
                let (request, at, buffer) = requests.next();
                // SAFETY: the buffer stays mapped until the request has completed: `run` waits for it, and where that fails
                // `drop` keeps the memory. Only atomics refer to it.
                unsafe { self.ring.submission().push(&entry(request, at, buffer)) }.context("the ring is full")?;
                self.in_flight += 1;
            }
            if self.in_flight == 0 {
                return Ok((count, ended.unwrap_or(until)));
            }
            match self.submit_and_wait() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).context("io_uring_enter"),
            }
            let taken = take(self.ring.completion(), bytes, &mut self.in_flight)?;
            if ended.is_none() {
                count += taken;
                let now = now_ns();
                ended = (now >= until).then_some(now);
            }
        }
    }
}

fn entry(request: Request, at: u64, buffer: &Window) -> squeue::Entry {
    let (file, memory, length) = (types::Fixed(0), buffer.user() as *mut u8, buffer.length as u32);
    match request.kind {
        Kind::Read => opcode::Read::new(file, memory, length).offset(at).build(),
        _ => opcode::Write::new(file, memory, length).offset(at).build(),
    }
}

/// Takes what has completed.
fn take(completions: cqueue::CompletionQueue<'_>, bytes: usize, in_flight: &mut u32) -> anyhow::Result<u64> {
    let mut count = 0;
    for completion in completions {
        *in_flight -= 1;
        match usize::try_from(completion.result()) {
            Ok(moved) if moved == bytes => count += 1,
            Ok(moved) => bail!("a request of {bytes} bytes moved {moved}"),
            Err(_) => return Err(io::Error::from_raw_os_error(-completion.result())).context("a request of io_uring"),
        }
    }
    Ok(count)
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write there: all windows share one mapping, and it is never unmapped.
        if let (1.., Some(memory)) = (self.in_flight, self.memory.take()) {
            std::mem::forget(Arc::clone(&memory.mapping));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::blk::cell::{Asked, Medium};
    use crate::bench::blk::memory::Memory;

    #[test]
    fn every_way_does_what_is_asked_and_its_processor_time_is_seen() {
        let parent = std::path::Path::new("/dev/shm");
        let image = Image::new(Medium::Tmpfs, parent, 16, &mut Rng::new(1, 1)).expect("image");
        for asked in [Asked::SmallReads, Asked::LargeWrites] {
            let cell = Cell { medium: Medium::Tmpfs, asked, depth: 4, queues: 2 };
            let load = cell.asked.load(image.bytes);
            let memory = Memory::new(load.bytes(), &mut Rng::new(1, 2)).expect("memory");
            let mut limit = Limit::new(&image, &cell, memory.buffers(), 1).expect("limit");
            for way in 0..limit.ways.len() {
                limit.chosen = way;
                let figures = limit.run(0.05).expect("run");
                assert!(figures.iops > 0.0 && figures.cpu_s > 0.0, "{}: {figures:?}", limit.name());
            }
        }
    }
}
