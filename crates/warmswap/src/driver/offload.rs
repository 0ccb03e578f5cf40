//! Where shadows run, and whether there is room for them.
//!
//! A shadow is started on the offload set, with a low weight; when it becomes the primary it gets the processors and the weight of primaries.
//! Before one is started what it will take is compared with what is free there, less what others were promised a moment ago: too little is a
//! refusal with numbers, and the device goes on without a shadow. Reading `/proc` and moving processes between control groups waits for locks of
//! others, so it is done by the threads that start processes and this one, never by the control thread.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use rustix::thread::CpuSet;

use crate::profile::group::own_group;

/// Moves that may wait.
const MOVES_MAX: usize = 256;
/// Threads that begin while others are moved are found by looking again, so often.
const PASSES: usize = 3;
/// Weight of shadows where the usual one is 100 (version 2) or 1024 (version 1).
const SHADOW_WEIGHT: u32 = 10;
const SHADOW_SHARES: u32 = 102;
const USUAL_WEIGHT: u32 = 100;
/// Name of the group of version 1 that shadows are in.
const SHADOWS: &str = "warmswap-shadows";
/// What a backend takes at least, in bytes, and how much more than the primary a shadow is reckoned with.
const MEMORY_LEAST: u64 = 32 << 20;
const MEMORY_MARGIN: (u64, u64) = (5, 4);
/// Memory that stays free, in bytes.
const MEMORY_KEPT: u64 = 128 << 20;
/// Descriptors that a shadow needs in the broker.
const DESCRIPTORS: u64 = 64;
/// Part of one processor of the offload set that has to be idle.
const IDLE_LEAST: f64 = 0.05;
/// What was promised shows in the system's own figures after so long.
const PROMISED_FOR: Duration = Duration::from_secs(5);
/// The shortest time over which idleness is judged.
const IDLE_OVER: Duration = Duration::from_millis(50);

/// A backend that has been given a role.
#[derive(Debug)]
pub(crate) struct Move {
    pub(crate) pid: u32,
    /// Its own group of version 2.
    pub(crate) group: Option<PathBuf>,
    pub(crate) primary: bool,
}

/// Hands moves to the thread.
#[derive(Clone, Debug)]
pub(crate) struct Offload {
    moves: Sender<Move>,
    cpus: Vec<usize>,
}

impl Offload {
    /// Starts the thread. Shadows keep to `cpus`; primaries to what the calling thread may use.
    pub(crate) fn start(cpus: Vec<usize>) -> std::io::Result<Self> {
        let (sender, moves) = crossbeam_channel::bounded(MOVES_MAX);
        let places = Places::new(&cpus);
        std::thread::Builder::new().name("offload".to_owned()).spawn(move || places.run(&moves))?;
        Ok(Offload { moves: sender, cpus })
    }

    /// Processors of shadows; none: any.
    pub(crate) fn cpus(&self) -> &[usize] {
        &self.cpus
    }

    /// Hands one over. One that finds no room leaves a backend where it is.
    pub(crate) fn put(&self, backend: Move) {
        if !self.cpus.is_empty() {
            let _left_out = self.moves.try_send(backend);
        }
    }
}

/// Where backends go.
struct Places {
    shadows: CpuSet,
    primaries: CpuSet,
    /// Groups of version 1 for shadows and for primaries, where there are some.
    groups: Option<(PathBuf, PathBuf)>,
}

impl Places {
    fn new(cpus: &[usize]) -> Self {
        let mut shadows = CpuSet::new();
        cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU).for_each(|cpu| shadows.set(*cpu));
        let primaries = rustix::thread::sched_getaffinity(None).unwrap_or(shadows);
        let groups = if cpus.is_empty() { None } else { own_group("cpu").and_then(|own| shadow_group(&own)) };
        Places { shadows, primaries, groups }
    }

    fn run(&self, moves: &Receiver<Move>) {
        for Move { pid, group, primary } in moves {
            keep(pid, if primary { &self.primaries } else { &self.shadows });
            if let Some(weight) = group.map(|group| group.join("cpu.weight")).filter(|weight| weight.exists()) {
                let value = if primary { USUAL_WEIGHT } else { SHADOW_WEIGHT };
                // Where it may not be changed, its processors are all there is.
                let _refused = std::fs::write(weight, value.to_string());
            } else if let Some((shadows, primaries)) = &self.groups {
                let to = if primary { primaries } else { shadows };
                let _gone = std::fs::write(to.join("cgroup.procs"), pid.to_string());
            }
        }
    }
}

/// A group for shadows below our own, with a low weight, and our own.
fn shadow_group(own: &Path) -> Option<(PathBuf, PathBuf)> {
    let shadows = own.join(SHADOWS);
    std::fs::create_dir(&shadows).or_else(|error| if shadows.is_dir() { Ok(()) } else { Err(error) }).ok()?;
    std::fs::write(shadows.join("cpu.shares"), SHADOW_SHARES.to_string()).ok()?;
    Some((shadows, own.to_path_buf()))
}

/// Has every thread of a process keep to these processors.
fn keep(pid: u32, cpus: &CpuSet) {
    let mut seen = Vec::new();
    for _ in 0..PASSES {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return };
        let found: Vec<i32> = threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        let fresh: Vec<i32> = found.into_iter().filter(|thread| !seen.contains(thread)).collect();
        if fresh.is_empty() {
            return;
        }
        for thread in &fresh {
            // One that has ended needs no processor.
            let _ended =
                rustix::process::Pid::from_raw(*thread).map(|it| rustix::thread::sched_setaffinity(Some(it), cpus));
        }
        seen.extend(fresh);
    }
}

/// Says whether there is room for one more shadow.
#[derive(Debug, Default)]
pub(crate) struct Admission {
    /// When, and how much memory, was promised.
    promised: Vec<(Instant, u64)>,
    /// The last figures of processors: when, and the time each had been idle, in ticks of the kernel.
    idle: Option<(Instant, Vec<(usize, u64)>)>,
}

impl Admission {
    /// Reserves room for a shadow of a primary whose own memory is `primary_bytes`, on `cpus`; or why there is none.
    pub(crate) fn admit(&mut self, primary_bytes: u64, cpus: &[usize]) -> Result<(), String> {
        let (part, whole) = MEMORY_MARGIN;
        let need = (primary_bytes.saturating_mul(part) / whole).max(MEMORY_LEAST);
        self.promised.retain(|(at, _)| at.elapsed() < PROMISED_FOR);
        let promised: u64 = self.promised.iter().map(|(_, bytes)| bytes).sum();
        if let Some(free) = free_memory() {
            let left = free.saturating_sub(promised);
            if left < need + MEMORY_KEPT {
                return Err(format!(
                    "no room for a shadow: it needs {} MiB of memory beside {} MiB that stay free, there are {} MiB",
                    need >> 20,
                    MEMORY_KEPT >> 20,
                    left >> 20
                ));
            }
        }
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let used = std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
        if let Some(most) = descriptors.filter(|most| used + DESCRIPTORS > *most) {
            return Err(format!(
                "no room for a shadow: it needs {DESCRIPTORS} descriptors here, {used} of {most} are in use"
            ));
        }
        if let Some(idle) = self.idle_share(cpus)
            && idle < IDLE_LEAST
        {
            return Err(format!(
                "no room for a shadow: processors {cpus:?} are idle for {:.1} % of one, {:.0} % are needed",
                idle * 100.0,
                IDLE_LEAST * 100.0
            ));
        }
        self.promised.push((Instant::now(), need));
        Ok(())
    }

    /// How many processors of the set were idle since the last time, if that is long enough ago.
    fn idle_share(&mut self, cpus: &[usize]) -> Option<f64> {
        if cpus.is_empty() {
            return None;
        }
        let now = Instant::now();
        let stat = std::fs::read_to_string("/proc/stat").ok()?;
        let ticks = idle_ticks(&stat);
        let before = match &self.idle {
            Some((at, _)) if now.duration_since(*at) < IDLE_OVER => return None,
            _ => self.idle.replace((now, ticks.clone())),
        };
        let (at, before) = before?;
        let per_second = rustix::param::clock_ticks_per_second() as f64;
        let since = |cpu: &usize| {
            let of = |list: &[(usize, u64)]| list.iter().find(|(known, _)| known == cpu).map(|(_, ticks)| *ticks);
            Some(of(&ticks)?.saturating_sub(of(&before)?) as f64)
        };
        let idle = cpus.iter().filter_map(since).fold(0.0, |sum, ticks| sum + ticks);
        Some(idle / per_second / now.duration_since(at).as_secs_f64())
    }
}

/// Time that each processor has been idle, in ticks.
fn idle_ticks(stat: &str) -> Vec<(usize, u64)> {
    let line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let cpu = words.next()?.strip_prefix("cpu")?.parse().ok()?;
        // user, nice, system, idle
        Some((cpu, words.nth(3)?.parse().ok()?))
    };
    stat.lines().filter_map(line).collect()
}

/// Memory that a new process could have, in bytes: what the host has left, or what our control group may still take.
fn free_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let host = info.lines().find_map(|line| {
        let kib: u64 = line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    })?;
    let group = own_group("memory").or_else(|| own_group("")).and_then(|group| group_room(&group));
    Some(group.map_or(host, |room| room.min(host)))
}

/// What a control group may still take. Its page cache can go.
fn group_room(group: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    let both = |limit, usage| Some((number(limit)?, number(usage)?));
    let (limit, usage) =
        both("memory.max", "memory.current").or_else(|| both("memory.limit_in_bytes", "memory.usage_in_bytes"))?;
    let stat = std::fs::read_to_string(group.join("memory.stat")).ok()?;
    let cache = stat
        .lines()
        .find_map(|line| line.strip_prefix("file ").or_else(|| line.strip_prefix("cache "))?.parse::<u64>().ok());
    Some(limit.saturating_sub(usage.saturating_sub(cache.unwrap_or(0))))
}

/// Memory of its own of a process, in bytes.
pub(crate) fn own_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let anonymous = status.lines().find_map(|line| {
        let kib: u64 = line.strip_prefix("RssAnon:")?.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    });
    anonymous.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_promised_once() {
        let mut admission = Admission::default();
        let free = free_memory().expect("this machine says so");
        assert_eq!(admission.admit(1 << 20, &[]), Ok(()));
        let half = free / 2 * 4 / 5;
        let first = admission.admit(half, &[]);
        assert_eq!(first, Ok(()), "half of what is free");
        let second = admission.admit(half, &[]).expect_err("the first half is promised");
        assert!(second.contains("MiB of memory"), "{second}");
        let all = Admission::default().admit(u64::MAX / 8, &[]).expect_err("nobody has that much");
        assert!(all.starts_with("no room for a shadow"), "{all}");
    }

    #[test]
    fn processors_that_are_never_idle_have_no_room() {
        let stat = "cpu  1 2 3 4 5\ncpu0 1 2 3 400 5 6\ncpu1 1 2 3 40 5 6\nintr 7\n";
        assert_eq!(idle_ticks(stat), [(0, 400), (1, 40)]);
        let mut admission = Admission::default();
        // A processor that does not exist was idle for no time at all.
        assert_eq!(admission.admit(1, &[4095]), Ok(()), "nothing is known yet");
        std::thread::sleep(IDLE_OVER + IDLE_OVER / 5);
        let why = admission.admit(1, &[4095]).expect_err("it is never idle");
        assert!(why.contains("[4095] are idle for 0.0 %"), "{why}");
    }

    #[test]
    fn a_process_is_moved_with_all_its_threads() {
        let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return };
        let Some(cpu) = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)) else { return };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("it is everywhere");
        let mut one = CpuSet::new();
        one.set(cpu);
        keep(child.id(), &one);
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed());
        let now = rustix::thread::sched_getaffinity(pid).expect("it lives");
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
        assert_eq!(now.count(), 1);
        assert!(now.is_set(cpu));
    }
}
