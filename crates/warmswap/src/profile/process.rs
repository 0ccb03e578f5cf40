//! The process of a backend, as the kernel accounts for it.
//!
//! # Processor time
//!
//! `/proc/PID/stat` has that of all threads, those that have ended included, but in ticks of 10 ms, user and system time each cut to a
//! whole tick: of a tick of 100 ms that is a fifth. The `schedstat` of a thread has nanoseconds, but goes with the thread. So what living
//! threads have run is summed up, and the process' own ticks are a floor: where the sum falls behind them by more than two ticks, which
//! is what cutting explains, threads have ended that were not read to their end, and the difference is added. The sum is exact for
//! threads that stay, right within two ticks in all, not per second, for those that come and go, and never too high. What the kernel
//! tells of a running thread is as old as its last tick, 1 to 10 ms. System time exists in ticks only.
//!
//! # Whose it is
//!
//! Everything is opened below one directory, which was opened while the process was known to live and fails when it is gone, whoever has
//! its number then. A process on its way out has given up memory and descriptors before its end can be seen, so what was read counts only
//! if it had not begun to end and has not ended after that.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Dir, Mode, OFlags};
use warmswap_predict::{Counter, Feature, Measure};

use super::source::{Due, Effort, Held, Rate, SLOW_S, Source, Subject, Time};
use super::text::{self, Buffer, Reread};
#[cfg(test)]
use super::threads::THREADS_MAX;
use super::threads::Threads;

/// Most descriptors that are counted one by one, where the kernel does not tell their number.
const DESCRIPTORS_MAX: usize = 65_536;
/// Walking through the page tables may take this part of the time at most.
const WALK_SHARE: f64 = 1e-3;
/// Most resident memory that is walked through: beyond it takes so long that ticks would be lost.
const WALKED_MAX_BYTES: f64 = 4.0 * 1024.0 * 1024.0 * 1024.0;
/// Most resident memory of a process whose pages are marked as unused to see which are used again: this holds up its own page faults.
const AGED_MAX_BYTES: f64 = 256.0 * 1024.0 * 1024.0;

/// The process of one backend.
#[derive(Debug)]
pub(crate) struct Process {
    subject: Arc<Subject>,
    /// Its files. None: it had ended.
    files: Option<Files>,
    may_age: bool,
    time: Time,
    buffer: Buffer,
    held: Held,
    threads: Threads,
    slow: Due,
    walk: Due,
    /// Its pages were marked as unused at the last walk.
    aged: bool,
    limit: Option<u64>,
    spent: Spent,
    cpu_time: Rate,
    system: Rate,
    minor: Rate,
    major: Rate,
    read: Rate,
    written: Rate,
    last_cpu: Option<Duration>,
}

/// What is kept open of `/proc/PID`.
#[derive(Debug)]
struct Files {
    directory: OwnedFd,
    stat: Reread,
    status: Option<Reread>,
    io: Option<Reread>,
    descriptors: Option<OwnedFd>,
}

impl Files {
    fn open(subject: &Subject) -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(format!("/proc/{}", subject.pid), flags, Mode::empty()).ok()?;
        // It lives, so the number was its own just now.
        if subject.has_ended() {
            return None;
        }
        Some(Files {
            stat: Reread::open(&directory, "stat")?,
            status: Reread::open(&directory, "status"),
            io: Reread::open(&directory, "io"),
            descriptors: rustix::fs::openat(&directory, "fd", flags, Mode::empty()).ok(),
            directory,
        })
    }

    fn stat(&self, buffer: &mut Buffer) -> Option<Stat> {
        self.stat.read(buffer).and_then(Stat::parse).filter(|stat| !stat.is_ending())
    }

    /// Number of open descriptors. Kernels before 6.2 do not tell it: then they are counted if `count` says so.
    fn descriptors(&self, count: bool) -> Option<f64> {
        let directory = self.descriptors.as_ref()?;
        let told = rustix::fs::fstat(directory).ok()?.st_size;
        if told > 0 {
            return Some(told as f64);
        }
        if !count {
            return None;
        }
        self::count(directory).map(f64::from)
    }
}

/// Number of entries of a directory that are numbers.
fn count(directory: &OwnedFd) -> Option<u32> {
    let mut count = 0;
    for entry in Dir::read_from(directory).ok()?.take(DESCRIPTORS_MAX + 2) {
        count += u32::from(text::number(entry.ok()?.file_name().to_bytes()).is_some());
    }
    (count as usize <= DESCRIPTORS_MAX).then_some(count)
}

/// What is taken from `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    flags: u64,
    minor: u64,
    major: u64,
    user: u64,
    system: u64,
    threads: u64,
    memory: u64,
}

impl Stat {
    fn parse(text: &[u8]) -> Option<Self> {
        // The name, in brackets, may hold anything; the state follows it.
        let name_end = text.windows(2).rposition(|two| two == b") ")?;
        let mut fields = text::words(text.get(name_end + 2..)?);
        // Counted from 1 as in proc(5), from the third on.
        let mut next = 3;
        let mut field = |number: usize| {
            let value = fields.nth(number.checked_sub(next)?).and_then(text::number);
            next = number + 1;
            value
        };
        Some(Stat {
            flags: field(9)?,
            minor: field(10)?,
            major: field(12)?,
            user: field(14)?,
            system: field(15)?,
            threads: field(20)?,
            memory: field(23)?,
        })
    }

    /// It is on its way out: what it tells is what it has not given up yet.
    fn is_ending(&self) -> bool {
        const PF_EXITING: u64 = 0x4;
        self.flags & PF_EXITING != 0 || self.threads == 0 || self.memory == 0
    }
}

/// Processor time since the first reading, made from two accounts: see the module.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    ticks: Counter,
    ticks_sum: u64,
    sum_ns: u64,
}

impl Spent {
    /// What its sum is now. `ran_ns` is what living threads have run since the last call, `ticks` what the process has in all.
    fn advance(&mut self, ran_ns: u64, ticks: u64, tick_ns: u64) -> u64 {
        /// Each of the two parts of the ticks is cut to a whole one.
        const CUT: u64 = 2;
        self.ticks_sum = self.ticks_sum.saturating_add(self.ticks.since(ticks).unwrap_or(0));
        let floor_ns = self.ticks_sum.saturating_sub(CUT).saturating_mul(tick_ns);
        self.sum_ns = self.sum_ns.saturating_add(ran_ns).max(floor_ns);
        self.sum_ns
    }
}

impl Process {
    /// Begins to look at a process. `may_age`: its pages may be marked as unused to see which of them it uses, where it is small.
    pub(crate) fn new(subject: Arc<Subject>, may_age: bool) -> Self {
        Process {
            files: Files::open(&subject),
            subject,
            may_age,
            time: Time::default(),
            buffer: Buffer::default(),
            held: Held::default(),
            threads: Threads::default(),
            slow: Due::default(),
            walk: Due::default(),
            aged: false,
            limit: None,
            spent: Spent::default(),
            cpu_time: Rate::default(),
            system: Rate::default(),
            minor: Rate::default(),
            major: Rate::default(),
            read: Rate::default(),
            written: Rate::default(),
            last_cpu: None,
        }
    }

    /// Processor time that the last call added, if it added any: of the time since the call before it that did.
    pub(crate) fn last_cpu(&self) -> Option<Duration> {
        self.last_cpu
    }

    /// Reads what is to be read. None: the process is on its way out.
    fn look(&mut self, effort: Effort) -> Option<()> {
        let Process { files, time, buffer, held, threads, .. } = self;
        let (files, time) = (files.as_ref()?, *time);
        let stat = files.stat(buffer)?;
        threads.list(&files.directory, stat.threads);
        let times = threads.times(time, buffer);

        let tick_ns = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
        let ran_ns = times.map_or(0, |times| times.ran_ns);
        let spent = self.spent.advance(ran_ns, stat.user.saturating_add(stat.system), tick_ns);
        let cpu = self.cpu_time.since(spent, time);
        held.add_scaled(Feature::Cpu, cpu, 1e9);
        self.last_cpu = cpu.map(|(ns, _)| Duration::from_nanos(ns as u64));
        held.add_scaled(Feature::CpuSystem, self.system.since(stat.system, time), 1e9 / tick_ns as f64);
        if let Some(times) = times {
            held.add_scaled(Feature::RunDelay, Some((times.waited_ns as f64, times.seconds)), 1e9);
            // What is told of a running thread lags behind, and may catch up.
            held.note(Feature::BusiestThread, Some((times.busiest_ns as f64 / 1e9 / times.seconds).min(1.0)));
        }
        held.add(Feature::MinorFaults, self.minor.since(stat.minor, time));
        held.add(Feature::MajorFaults, self.major.since(stat.major, time));
        held.note(Feature::Threads, Some(stat.threads as f64));

        if effort == Effort::Deep || self.slow.is_due(time) {
            self.slow.in_s(time, SLOW_S);
            self.look_slowly(effort);
            // It may have begun to end meanwhile.
            self.files.as_ref()?.stat(&mut self.buffer)?;
        }
        Some(())
    }

    fn look_slowly(&mut self, effort: Effort) {
        let Process { files: Some(files), time, buffer, held, threads, .. } = self else { return };
        let time = *time;
        let mut resident = None;
        if let Some(text) = files.status.as_ref().and_then(|status| status.read(buffer)) {
            let bytes = text::values(text, [b"VmRSS:".as_slice(), b"RssAnon:"]).map(kilobytes);
            resident = bytes[0];
            held.note(Feature::Rss, resident);
            held.note(Feature::RssAnon, bytes[1]);
        }
        if let Some(switches) = threads.switches(time, &files.directory, buffer) {
            held.add(Feature::SwitchesVoluntary, Some((switches.voluntary as f64, switches.seconds)));
            held.add(Feature::SwitchesInvoluntary, Some((switches.involuntary as f64, switches.seconds)));
        }
        if let Some(text) = files.io.as_ref().and_then(|io| io.read(buffer)) {
            let [read, written] = text::values(text, [b"read_bytes:".as_slice(), b"write_bytes:"]);
            held.add(Feature::ReadBytes, read.and_then(|bytes| self.read.since(bytes, time)));
            held.add(Feature::WriteBytes, written.and_then(|bytes| self.written.since(bytes, time)));
        }
        let deep = effort == Effort::Deep;
        if deep || self.limit.is_none() {
            let limits = Reread::open(&files.directory, "limits");
            self.limit = limits.as_ref().and_then(|limits| limits.read(buffer)).and_then(descriptor_limit);
        }
        if let Some(descriptors) = files.descriptors(deep) {
            held.note(Feature::Descriptors, Some(descriptors));
            held.note(Feature::DescriptorShare, self.limit.map(|limit| descriptors / limit as f64));
        }
        if let Some(resident) = resident.filter(|bytes| deep && *bytes <= WALKED_MAX_BYTES && self.walk.is_due(time)) {
            self.walk(resident);
        }
    }

    /// Has the kernel walk through the page tables.
    fn walk(&mut self, resident_bytes: f64) {
        let Process { files: Some(files), buffer, held, .. } = self else { return };
        let began = Instant::now();
        // It belongs to the memory that the process had when it was opened, and an exec gives it another.
        let rollup = Reread::open(&files.directory, "smaps_rollup");
        let Some(text) = rollup.as_ref().and_then(|rollup| rollup.read(buffer)) else { return };
        let names = [b"Pss:".as_slice(), b"Referenced:", b"Swap:"];
        let [pss, referenced, swap] = text::values(text, names).map(kilobytes);
        held.note(Feature::Pss, pss);
        held.note(Feature::Swap, swap);
        if std::mem::take(&mut self.aged) {
            held.note(Feature::Referenced, referenced);
        }
        if self.may_age && resident_bytes <= AGED_MAX_BYTES {
            self.aged = age(&files.directory).is_ok();
        }
        self.walk.in_s(self.time, began.elapsed().as_secs_f64() / WALK_SHARE);
    }
}

impl Source for Process {
    fn measure(&mut self, span_s: f64, effort: Effort, into: &mut Measure) {
        self.time.pass(span_s);
        self.last_cpu = None;
        if effort == Effort::Light || self.files.is_none() {
            return;
        }
        let looked = self.look(effort);
        if self.subject.has_ended() {
            self.files = None;
        }
        if looked.is_some() && self.files.is_some() {
            self.held.release(into);
        } else {
            self.held.forget();
            self.last_cpu = None;
        }
    }
}

/// Marks every page of a process as unused.
fn age(directory: &OwnedFd) -> rustix::io::Result<usize> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, "clear_refs", flags, Mode::empty())?;
    rustix::io::write(file, b"1")
}

fn kilobytes(value: Option<u64>) -> Option<f64> {
    value.map(|kilobytes| kilobytes as f64 * 1024.0)
}

/// How many descriptors a process may have open, if there is a bound.
fn descriptor_limit(limits: &[u8]) -> Option<u64> {
    let line = limits.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Max open files "))?;
    text::words(line).next().and_then(text::number).filter(|limit| *limit > 0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

    use proptest::prelude::*;
    use rustix::process::{Pid, PidfdFlags, Signal};

    pub(crate) fn pid_of(pid: u32) -> Pid {
        i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process has a number")
    }

    /// A living process of ours as a subject.
    pub(crate) fn subject_of(pid: u32) -> Arc<Subject> {
        let pidfd = rustix::process::pidfd_open(pid_of(pid), PidfdFlags::empty()).expect("it lives");
        Arc::new(Subject { pid, pidfd: Arc::new(pidfd), group: None, images: Vec::new() })
    }

    /// A process that does what it is told, and nothing else. It ends with this value.
    pub(crate) struct Sleeper(Child);

    impl Sleeper {
        pub(crate) fn start() -> Self {
            let child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn();
            Sleeper(child.expect("everybody has one"))
        }

        pub(crate) fn busy() -> Self {
            let mut shell = Command::new("sh");
            // It ends by itself even if nobody ends it.
            let child = shell.args(["-c", "ulimit -t 20; while :; do :; done"]).stdin(Stdio::null()).spawn();
            Sleeper(child.expect("a shell"))
        }

        pub(crate) fn pid(&self) -> u32 {
            self.0.id()
        }

        pub(crate) fn kill(&mut self) {
            let _gone = self.0.kill();
            let _collected = self.0.wait();
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.kill();
        }
    }

    /// A process of this very program, in which [`told`] does what it reads.
    pub(crate) struct Told {
        child: Sleeper,
        orders: ChildStdin,
        answers: BufReader<ChildStdout>,
    }

    const TOLD: &str = "profile::process::tests::told";

    impl Told {
        pub(crate) fn start() -> Self {
            let mut command = Command::new(std::env::current_exe().expect("it runs this"));
            command.args([TOLD, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
            let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
            let mut child = child.expect("it runs this");
            let orders = child.stdin.take().expect("a pipe");
            let answers = BufReader::new(child.stdout.take().expect("a pipe"));
            let mut told = Told { child: Sleeper(child), orders, answers };
            told.tell("nothing", 0);
            told
        }

        pub(crate) fn pid(&self) -> u32 {
            self.child.pid()
        }

        pub(crate) fn kill(&mut self) {
            self.child.kill();
        }

        /// Has it do something, and waits until it has done it.
        pub(crate) fn tell(&mut self, what: &str, much: usize) {
            writeln!(self.orders, "{what} {much}").expect("it reads");
            let mut line = String::new();
            while !line.contains("done") {
                line.clear();
                assert!(self.answers.read_line(&mut line).expect("it answers") > 0, "it has ended");
            }
        }
    }

    #[test]
    #[ignore = "the other process of tests in this module"]
    fn told() {
        let mut memory = Vec::new();
        let mut files = Vec::new();
        let mut page = None;
        let mut line = String::new();
        while std::io::stdin().read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            let (what, much) = line.trim().split_once(' ').expect("an order");
            let much: usize = much.parse().expect("a number");
            match what {
                "touch" => memory.push(vec![1_u8; much]),
                "open" => files.extend((0..much).map(|_| std::fs::File::open("/dev/null").expect("a descriptor"))),
                "rest" => (0..much).for_each(|_| std::thread::sleep(Duration::from_millis(1))),
                "idle" => (0..much).for_each(|_| {
                    let _detached = std::thread::spawn(|| std::thread::sleep(Duration::from_secs(60)));
                }),
                "spin" => (0..much).for_each(|_| drop(std::thread::spawn(|| (0..1_000).for_each(|_| burn())))),
                // Threads that come and go, each of which runs for 5 ms.
                "burn" => (0..much).for_each(|_| std::thread::spawn(burn).join().expect("it runs")),
                "page" => {
                    let identity =
                        warmswap_telemetry::Identity { device_type: 2, instance: 0, started_ns: much as u64 };
                    page = Some(warmswap_telemetry::Page::create(1, identity).expect("a page"));
                }
                "serve" => {
                    let (_page, writers) = page.as_mut().expect("it was told to make one");
                    let kind = warmswap_telemetry::Kind::Read;
                    (0..much).for_each(|_| writers[0].update(1).completed(kind, 512, 1_000));
                }
                "write" => {
                    let path = std::env::temp_dir().join(format!("warmswap-told-{}", std::process::id()));
                    let mut file = std::fs::File::create(&path).expect("a temporary file");
                    file.write_all(&vec![7; much]).and_then(|()| file.sync_all()).expect("room for it");
                    std::fs::remove_file(&path).expect("just made");
                }
                _ => {}
            }
            println!("done");
            line.clear();
        }
    }

    fn burn() {
        let ran = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).tv_nsec;
        let began = ran();
        while (ran() - began) < 5_000_000 {
            std::hint::spin_loop();
        }
    }

    fn measured(process: &mut Process, span_s: f64, effort: Effort) -> Measure {
        let mut measure = Measure::default();
        process.measure(span_s, effort, &mut measure);
        measure
    }

    fn ticks(pid: u32) -> f64 {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).expect("it lives");
        let stat = Stat::parse(&stat).expect("the kernel wrote it");
        (stat.user + stat.system) as f64 / rustix::param::clock_ticks_per_second() as f64
    }

    /// Stops a process, so that what it has used can be read twice.
    fn stop(pid: u32) {
        rustix::process::kill_process(pid_of(pid), Signal::STOP).expect("it is ours");
        let stopped = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
            stat.rsplit_once(") ").expect("a name").1.starts_with('T')
        };
        while !stopped() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn goes_on(pid: u32) {
        rustix::process::kill_process(pid_of(pid), Signal::CONT).expect("it is ours");
    }

    #[test]
    fn processor_time_is_what_the_process_used_whatever_the_calls() {
        let child = Sleeper::busy();
        let mut process = Process::new(subject_of(child.pid()), false);
        stop(child.pid());
        let before = ticks(child.pid());
        let first = measured(&mut process, 0.1, Effort::Full);
        assert_eq!(first.value(Feature::Cpu), None, "nothing was read before");
        goes_on(child.pid());
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(100));
            assert_eq!(measured(&mut process, 0.25, Effort::Light), Measure::default());
        }
        stop(child.pid());
        // The calls say that four seconds have passed.
        let measure = measured(&mut process, 3.0, Effort::Full);
        let used = ticks(child.pid()) - before;
        let cpu = measure.value(Feature::Cpu).expect("it was read twice");
        assert!(used > 0.02 && (cpu * 4.0 - used).abs() <= 0.025, "{cpu} cores in 4 s, {used} s of processor time");
        let busiest = measure.value(Feature::BusiestThread).expect("it was read twice");
        assert!((busiest - cpu).abs() < 0.006, "{busiest} of {cpu}: it has one thread");
        assert!(measure.value(Feature::CpuSystem).is_some_and(|system| system * 4.0 <= used + 0.01));
        assert!(measure.value(Feature::RunDelay).is_some_and(|share| (0.0..1.0).contains(&share)));
        let last = process.last_cpu().expect("the call added some").as_secs_f64();
        assert!((last - cpu * 4.0).abs() < 1e-6);
    }

    #[test]
    fn processor_time_of_threads_that_come_and_go_is_not_lost() {
        let mut child = Told::start();
        let mut process = Process::new(subject_of(child.pid()), false);
        let _first = measured(&mut process, 1.0, Effort::Full);
        let before = ticks(child.pid());
        child.tell("burn", 60);
        let measure = measured(&mut process, 1.0, Effort::Full);
        let (cpu, used) = (measure.value(Feature::Cpu).expect("read twice"), ticks(child.pid()) - before);
        assert!(used >= 0.28, "60 threads of 5 ms each: {used}");
        assert!(
            (used - 0.045..=used + 0.025).contains(&cpu),
            "{cpu} of {used}: two ticks may be left for later, two for cutting"
        );
    }

    #[test]
    fn what_a_process_has_is_what_it_was_told_to_take() {
        const MEGABYTE: f64 = 1024.0 * 1024.0;
        // Long enough for another walk through its memory.
        const SPAN_S: f64 = 1_000.0;
        let mut child = Told::start();
        let mut process = Process::new(subject_of(child.pid()), true);
        let before = measured(&mut process, 1.0, Effort::Deep);
        let value = |measure: &Measure, feature: Feature| {
            measure.value(feature).unwrap_or_else(|| panic!("{}", feature.name()))
        };
        assert_eq!(before.value(Feature::Referenced), None, "nobody knows since when");
        child.tell("touch", 48 << 20);
        child.tell("open", 50);
        child.tell("idle", 5);
        child.tell("rest", 30);
        let after = measured(&mut process, SPAN_S, Effort::Deep);
        let grown = |feature| value(&after, feature) - value(&before, feature);
        assert!((47.0..60.0).contains(&(grown(Feature::RssAnon) / MEGABYTE)), "{}", grown(Feature::RssAnon));
        assert!((47.0..60.0).contains(&(grown(Feature::Rss) / MEGABYTE)), "{}", grown(Feature::Rss));
        assert!((46.0..60.0).contains(&(grown(Feature::Pss) / MEGABYTE)), "{}", grown(Feature::Pss));
        assert!(
            (46.0..64.0).contains(&(value(&after, Feature::Referenced) / MEGABYTE)),
            "all that it has touched since"
        );
        assert!(after.value(Feature::Swap).is_some());
        assert_eq!((grown(Feature::Threads), grown(Feature::Descriptors)), (5.0, 50.0));
        let listed = std::fs::read_dir(format!("/proc/{}/fd", child.pid())).expect("it lives").count();
        assert_eq!(value(&after, Feature::Descriptors), listed as f64);
        let limit = value(&after, Feature::Descriptors) / value(&after, Feature::DescriptorShare);
        assert!((50.0..1e10).contains(&limit) && (limit - limit.round()).abs() < 1e-3, "{limit}");
        assert!(value(&after, Feature::MinorFaults) * SPAN_S >= 24.0, "as many as there are huge pages");
        assert!(value(&after, Feature::SwitchesVoluntary) * SPAN_S >= 29.5, "it has slept so often");
        assert!(after.value(Feature::SwitchesInvoluntary).is_some());
        let again = measured(&mut process, SPAN_S, Effort::Deep);
        assert!(
            value(&again, Feature::Referenced) < 16.0 * MEGABYTE,
            "it rests, {}",
            value(&again, Feature::Referenced)
        );
    }

    #[test]
    fn bytes_that_reach_storage_are_counted() {
        let mut child = Told::start();
        let mut process = Process::new(subject_of(child.pid()), false);
        let first = measured(&mut process, 1.0, Effort::Full);
        assert_eq!(first.value(Feature::WriteBytes), None);
        child.tell("write", 1 << 20);
        let written = measured(&mut process, 2.0, Effort::Full).value(Feature::WriteBytes).expect("read twice");
        // On a file system in memory nothing reaches storage.
        assert!(written == 0.0 || ((1 << 19) as f64..(3 << 18) as f64).contains(&written), "{written}");
    }

    #[test]
    fn a_process_that_was_killed_is_missing_and_never_garbage() {
        for collected in [true, false] {
            let mut child = Told::start();
            child.tell("touch", 1 << 20);
            let mut process = Process::new(subject_of(child.pid()), true);
            let first = measured(&mut process, 1.0, Effort::Deep);
            let resident = first.value(Feature::Rss).expect("it lives");
            rustix::process::kill_process(pid_of(child.pid()), Signal::KILL).expect("it is ours");
            // What is seen while it ends is true of a living process, or missing.
            let mut values = 0;
            while process.files.is_some() {
                let measure = measured(&mut process, 1.0, Effort::Deep);
                for (feature, least) in
                    [(Feature::Rss, resident / 2.0), (Feature::Descriptors, 2.0), (Feature::Threads, 1.0)]
                {
                    if let Some(value) = measure.value(feature) {
                        values += 1;
                        assert!(value >= least, "{} is {value}", feature.name());
                    }
                }
            }
            if collected {
                child.child.kill();
            }
            assert_eq!(measured(&mut process, 1.0, Effort::Deep), Measure::default(), "after {values} last values");
            if collected {
                // Its number is nobody's, or another's.
                let subject = Arc::clone(&process.subject);
                assert_eq!(measured(&mut Process::new(subject, true), 1.0, Effort::Deep), Measure::default());
            }
        }
    }

    #[test]
    fn another_process_that_has_the_number_is_not_measured() {
        let mut child = Sleeper::start();
        let pidfd = rustix::process::pidfd_open(pid_of(child.pid()), PidfdFlags::empty()).expect("it lives");
        child.kill();
        let subject =
            Arc::new(Subject { pid: std::process::id(), pidfd: Arc::new(pidfd), group: None, images: Vec::new() });
        let mut sources: [Box<dyn Source>; 3] = [
            Box::new(Process::new(Arc::clone(&subject), true)),
            Box::new(crate::profile::group::Group::new(Arc::clone(&subject))),
            Box::new(crate::profile::page::Page::new(subject)),
        ];
        let mut measure = Measure::default();
        for source in &mut sources {
            source.measure(1.0, Effort::Full, &mut measure);
            source.measure(1.0, Effort::Deep, &mut measure);
        }
        assert_eq!(measure, Measure::default());
    }

    #[test]
    fn descriptors_are_counted_where_their_number_is_not_told() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let child = Sleeper::start();
        let directory = rustix::fs::open(format!("/proc/{}/fd", child.pid()), flags, Mode::empty()).expect("it lives");
        stop(child.pid());
        let listed = std::fs::read_dir(format!("/proc/{}/fd", child.pid())).expect("it lives").count();
        assert_eq!(count(&directory).map(|count| count as usize), Some(listed));
    }

    #[test]
    fn of_a_process_with_too_many_threads_the_sums_of_the_kernel_are_left() {
        let mut child = Told::start();
        let mut process = Process::new(subject_of(child.pid()), false);
        let _first = measured(&mut process, 1.0, Effort::Full);
        child.tell("idle", THREADS_MAX);
        let many = measured(&mut process, 1.0, Effort::Full);
        assert!(many.value(Feature::Threads).is_some_and(|threads| threads > THREADS_MAX as f64));
        assert!(many.value(Feature::Cpu).is_some_and(|cpu| (0.0..2.0).contains(&cpu)));
        let missing = [Feature::RunDelay, Feature::BusiestThread, Feature::SwitchesVoluntary];
        assert_eq!(missing.map(|feature| many.value(feature)), [None; 3]);
    }

    #[test]
    fn of_a_stat_the_fields_behind_any_name_are_taken() {
        let fields: Vec<String> = (4..=52).map(|number| number.to_string()).collect();
        for name in ["cat", "a) S 1 (b", ") ", "a b c", ""] {
            let stat = Stat::parse(format!("1 ({name}) S {}\n", fields.join(" ")).as_bytes());
            let expected = Stat { flags: 9, minor: 10, major: 12, user: 14, system: 15, threads: 20, memory: 23 };
            assert_eq!(stat, Some(expected), "{name}");
        }
        assert_eq!(Stat::parse(b"1 (cat) S 1 2 3\n"), None, "cut off");
        let mut own = Vec::new();
        std::fs::File::open("/proc/self/stat").expect("/proc").read_to_end(&mut own).expect("/proc");
        assert!(Stat::parse(&own).is_some_and(|stat| !stat.is_ending()));
    }

    #[test]
    fn the_sum_of_threads_never_falls_behind_the_ticks_and_never_runs_ahead_of_them() {
        let mut spent = Spent::default();
        let sums = [(0, 100), (5, 100), (5, 102), (0, 112), (0, 112), (1_000, 113)];
        let sums = sums.map(|(ran, ticks)| spent.advance(ran, ticks, 10));
        assert_eq!(sums, [0, 5, 10, 100, 100, 1_100]);
        assert_eq!(Spent::default().advance(0, u64::MAX, u64::MAX), 0);
    }

    #[test]
    fn a_limit_without_bound_is_none() {
        let limits =
            |value| format!("Max processes  7 7 processes\nMax open files            {value}   4096   files\n");
        assert_eq!(descriptor_limit(limits("1024").as_bytes()), Some(1024));
        assert_eq!(descriptor_limit(limits("unlimited").as_bytes()), None);
        assert_eq!(descriptor_limit(limits("0").as_bytes()), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(text in proptest::collection::vec(any::<u8>(), 0..300), ticks in any::<[u64; 3]>()) {
            let _any = Stat::parse(&text);
            let _any = Stat::parse(&[b"1 (a) ".as_slice(), &text].concat());
            let _any = descriptor_limit(&text);
            let _any = descriptor_limit(&[b"Max open files ".as_slice(), &text].concat());
            let mut spent = Spent::default();
            for ticks in ticks {
                let _any = spent.advance(ticks, ticks, ticks);
            }
        }
    }
}
