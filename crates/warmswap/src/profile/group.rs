//! The control groups of a backend: how near their limits they are, how long they were throttled, and what they wait for.
//!
//! A limit or a quota of a group above holds as well, so every group up to the root of the hierarchy is asked: the nearest bound counts,
//! and the longest throttling. Controllers may lie in hierarchies of version 1 each or in that of version 2; each is looked for in both.
//! Pressure exists in version 2 only.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::CWD;
use warmswap_predict::{Feature, Measure};

use super::source::{Due, Effort, Held, Rate, SLOW_S, Source, Subject, Time};
use super::text::{self, Buffer, Reread};

/// Most groups above a group that are asked.
const LEVELS_MAX: usize = 16;
/// From here on a limit of version 1 is none: the kernel shows the greatest it can hold.
const UNLIMITED: u64 = 1 << 62;

/// The control groups of one backend.
#[derive(Debug)]
pub(crate) struct Group {
    subject: Arc<Subject>,
    /// Where everything is: `/`, but for tests.
    root: PathBuf,
    /// Which groups it is in. None: it had ended.
    membership: Option<Reread>,
    /// The same as it was read last.
    known: Vec<u8>,
    found: Found,
    time: Time,
    slow: Due,
    buffer: Buffer,
    held: Held,
}

/// What is kept open of its groups.
#[derive(Debug, Default)]
struct Found {
    memory: Vec<PathBuf>,
    tasks: Vec<PathBuf>,
    memory_bounds: Vec<Bound>,
    task_bounds: Vec<Bound>,
    throttled: Vec<Throttled>,
    pressures: Vec<(Feature, Reread, Rate)>,
}

/// A group with a limit.
#[derive(Debug)]
struct Bound {
    usage: Reread,
    limit: u64,
}

/// A group that can have a quota.
#[derive(Debug)]
struct Throttled {
    stat: Reread,
    rate: Rate,
}

impl Group {
    /// Begins to look at the groups of a process.
    pub(crate) fn new(subject: Arc<Subject>) -> Self {
        Group::below(Path::new("/"), subject)
    }

    fn below(root: &Path, subject: Arc<Subject>) -> Self {
        let membership = Reread::open(CWD, root.join(format!("proc/{}/cgroup", subject.pid)));
        Group {
            // It lives, so the number was its own just now.
            membership: membership.filter(|_| !subject.has_ended()),
            subject,
            root: root.to_path_buf(),
            known: Vec::new(),
            found: Found::default(),
            time: Time::default(),
            slow: Due::default(),
            buffer: Buffer::default(),
            held: Held::default(),
        }
    }

    fn look(&mut self, effort: Effort) -> Option<()> {
        if effort == Effort::Deep || self.known.is_empty() {
            let membership = self.membership.as_ref()?.read(&mut self.buffer)?;
            if membership != self.known {
                self.known = membership.to_vec();
                self.found = Found::find(&self.root, &self.known, self.subject.group.as_deref(), &mut self.buffer);
            }
            self.found.find_bounds(&mut self.buffer);
        }
        let Group { found, time, buffer, held, .. } = self;
        let time = *time;
        held.note(Feature::MemoryShare, nearest(&found.memory_bounds, buffer));
        held.note(Feature::ThreadShare, nearest(&found.task_bounds, buffer));
        let throttled = found.throttled.iter_mut().filter_map(|group| group.since(time, buffer));
        held.add(Feature::Throttled, throttled.reduce(|one, two| if two.0 > one.0 { two } else { one }));
        for (feature, file, rate) in &mut found.pressures {
            let seen = file.read(buffer).and_then(text::pressure).and_then(|micros| rate.since(micros, time));
            held.add_scaled(*feature, seen.map(|(micros, seconds)| (micros.min(seconds * 1e6), seconds)), 1e6);
        }
        Some(())
    }
}

impl Source for Group {
    fn measure(&mut self, span_s: f64, effort: Effort, into: &mut Measure) {
        self.time.pass(span_s);
        if effort == Effort::Light
            || self.membership.is_none()
            || !(self.slow.is_due(self.time) || effort == Effort::Deep)
        {
            return;
        }
        self.slow.in_s(self.time, SLOW_S);
        let looked = self.look(effort);
        if self.subject.has_ended() {
            self.membership = None;
        }
        if looked.is_some() && self.membership.is_some() {
            self.held.release(into);
        } else {
            self.held.forget();
        }
    }
}

impl Throttled {
    fn open(group: &Path, buffer: &mut Buffer) -> Option<Self> {
        let stat = Reread::open(CWD, group.join("cpu.stat"))?;
        // Without a controller the file is there and tells nothing of quotas.
        throttled_ns(stat.read(buffer)?)?;
        Some(Throttled { stat, rate: Rate::default() })
    }

    /// Seconds in which it was throttled, and the time they are of. The kernel adds the processors up: one group cannot be throttled for
    /// longer than all the time.
    fn since(&mut self, time: Time, buffer: &mut Buffer) -> Option<(f64, f64)> {
        let ns = self.stat.read(buffer).and_then(throttled_ns)?;
        self.rate.since(ns, time).map(|(ns, seconds)| ((ns / 1e9).min(seconds), seconds))
    }
}

fn throttled_ns(stat: &[u8]) -> Option<u64> {
    let [ns, micros] = text::values(stat, [b"throttled_time".as_slice(), b"throttled_usec"]);
    ns.or_else(|| micros?.checked_mul(1_000))
}

/// The greatest part of a limit that is used.
fn nearest(bounds: &[Bound], buffer: &mut Buffer) -> Option<f64> {
    let shares = bounds.iter().filter_map(|bound| Some(bound.usage.number(buffer)? as f64 / bound.limit as f64));
    shares.reduce(f64::max)
}

impl Found {
    fn find(root: &Path, membership: &[u8], own: Option<&Path>, buffer: &mut Buffer) -> Self {
        // Longer than what is reread, and read seldom.
        let mounts = std::fs::read(root.join("proc/self/mountinfo")).unwrap_or_default();
        let mounts: Vec<Mount<'_>> = mounts.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect();
        let levels = |controller: &[u8]| levels(root, &mounts, membership, controller);
        let own = own.and_then(|own| {
            let mount = mounts.iter().find(|mount| mount.controllers.is_none() && own.starts_with(&mount.point))?;
            Some(up(own, &mount.point))
        });
        let unified = own.unwrap_or_else(|| levels(b""));
        let of = |controller: &[u8]| Some(levels(controller)).filter(|it| !it.is_empty()).unwrap_or(unified.clone());
        let mut found = Found { memory: of(b"memory"), tasks: of(b"pids"), ..Found::default() };
        found.throttled.extend(of(b"cpu").iter().filter_map(|group| Throttled::open(group, buffer)));
        // The root of the hierarchy has pressures as well, which are those of the host. What only other groups have tells them apart.
        if let Some(group) = unified.first().filter(|group| group.join("cgroup.type").exists()) {
            let pressures = [
                (Feature::GroupCpuPressure, "cpu.pressure"),
                (Feature::GroupMemoryPressure, "memory.pressure"),
                (Feature::GroupIoPressure, "io.pressure"),
            ];
            for (feature, name) in pressures {
                let file = Reread::open(CWD, group.join(name));
                found.pressures.extend(file.map(|file| (feature, file, Rate::default())));
            }
        }
        found
    }

    /// Looks which groups have limits now.
    fn find_bounds(&mut self, buffer: &mut Buffer) {
        let mut bounds = |groups: &[PathBuf], names: [(&str, &str); 2]| {
            let bounds = groups.iter().filter_map(|group| {
                let mut bounds = names.iter().filter_map(|(usage, limit)| {
                    let limit = Reread::open(CWD, group.join(limit))?.number(buffer)?;
                    let usage = Reread::open(CWD, group.join(usage))?;
                    (1..UNLIMITED).contains(&limit).then_some(Bound { usage, limit })
                });
                bounds.next()
            });
            bounds.collect()
        };
        self.memory_bounds = bounds(
            &self.memory,
            [("memory.current", "memory.max"), ("memory.usage_in_bytes", "memory.limit_in_bytes")],
        );
        self.task_bounds = bounds(&self.tasks, [("pids.current", "pids.max"); 2]);
    }
}

/// A place where a hierarchy can be seen.
#[derive(Debug)]
struct Mount<'a> {
    /// The group that is seen there.
    root: &'a Path,
    point: PathBuf,
    /// None: version 2.
    controllers: Option<&'a [u8]>,
}

impl<'a> Mount<'a> {
    /// A line of `mountinfo`, if it is of control groups.
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = text::words(line);
        let root = Path::new(OsStr::from_bytes(fields.nth(3)?));
        let point = PathBuf::from(OsStr::from_bytes(fields.next()?));
        let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
        let controllers = match rest.next()? {
            b"cgroup2" => None,
            b"cgroup" => Some(rest.nth(1)?),
            _ => return None,
        };
        Some(Mount { root, point, controllers })
    }

    fn has(&self, controller: &[u8]) -> bool {
        match self.controllers {
            None => controller.is_empty(),
            Some(controllers) => is_among(controllers, controller),
        }
    }
}

fn is_among(list: &[u8], word: &[u8]) -> bool {
    !word.is_empty() && list.split(|byte| *byte == b',').any(|it| it == word)
}

/// Our own group in the hierarchy of a controller of version 1, or of version 2 for no name.
pub(crate) fn own_group(controller: &str) -> Option<PathBuf> {
    let mounts = std::fs::read("/proc/self/mountinfo").ok()?;
    let mounts: Vec<Mount<'_>> = mounts.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect();
    let membership = std::fs::read("/proc/self/cgroup").ok()?;
    levels(Path::new("/"), &mounts, &membership, controller.as_bytes()).into_iter().next()
}

/// The group of a process in the hierarchy of a controller of version 1, or of version 2 for no name, and those above it.
fn levels(root: &Path, mounts: &[Mount<'_>], membership: &[u8], controller: &[u8]) -> Vec<PathBuf> {
    for line in membership.split(|byte| *byte == b'\n') {
        let mut parts = line.splitn(3, |byte| *byte == b':');
        let (Some(number), Some(controllers), Some(group)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let is_it = if controller.is_empty() {
            number == b"0" && controllers.is_empty()
        } else {
            is_among(controllers, controller)
        };
        if !is_it {
            continue;
        }
        let group = Path::new(OsStr::from_bytes(group));
        for mount in mounts.iter().filter(|mount| mount.has(controller)) {
            // A group outside of what can be seen there begins with `..`, or with something else.
            let Ok(below) = group.strip_prefix(mount.root) else { continue };
            let top = root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point));
            let path = top.join(below);
            if !below.components().any(|it| it == std::path::Component::ParentDir) && path.is_dir() {
                return up(&path, &top);
            }
        }
    }
    Vec::new()
}

/// A group and those above it.
fn up(group: &Path, top: &Path) -> Vec<PathBuf> {
    group.ancestors().take_while(|it| it.starts_with(top)).take(LEVELS_MAX).map(Path::to_path_buf).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::process::tests::{Sleeper, subject_of};
    use proptest::prelude::*;
    use std::fs;

    /// A directory that looks like the root of a system with control groups.
    struct System {
        root: PathBuf,
        child: Sleeper,
    }

    impl System {
        fn new(name: &str, mounts: &str, membership: &str) -> Self {
            let root = std::env::temp_dir().join(format!("warmswap-{name}-{}", std::process::id()));
            let child = Sleeper::start();
            let system = System { root, child };
            system.put("proc/self/mountinfo", mounts);
            system.join(membership);
            system
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.root.join(path);
            fs::create_dir_all(path.parent().expect("it has one")).expect("a temporary directory");
            fs::write(path, text).expect("a temporary file");
        }

        fn join(&self, membership: &str) {
            self.put(&format!("proc/{}/cgroup", self.child.pid()), membership);
        }

        fn group(&self) -> Group {
            Group::below(&self.root, subject_of(self.child.pid()))
        }
    }

    impl Drop for System {
        fn drop(&mut self) {
            let _gone = fs::remove_dir_all(&self.root);
        }
    }

    fn measured(group: &mut Group, span_s: f64, effort: Effort) -> Measure {
        let mut measure = Measure::default();
        group.measure(span_s, effort, &mut measure);
        measure
    }

    const MOUNTS: &str = "\
        22 27 0:21 / /proc rw,relatime - proc proc rw\n\
        31 23 0:28 / /cg/cpu rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n\
        35 31 0:32 /outer /cg/memory rw - cgroup cgroup rw,memory\n\
        39 31 0:36 / /cg/pids rw - cgroup cgroup rw,pids\n\
        41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn version_1_is_read_from_each_hierarchy_up_to_its_root() {
        let system = System::new("group-1", MOUNTS, "4:memory:/outer/a/b\n3:cpu,cpuacct:/a\n2:pids:/a/b\n0::/\n");
        system.put("cg/memory/a/b/memory.usage_in_bytes", "1000\n");
        system.put("cg/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n");
        system.put("cg/memory/a/memory.usage_in_bytes", "3000\n");
        system.put("cg/memory/a/memory.limit_in_bytes", "4000\n");
        system.put("cg/memory/memory.usage_in_bytes", "4000\n");
        system.put("cg/memory/memory.limit_in_bytes", "8000\n");
        system.put("cg/cpu/a/cpu.stat", "nr_periods 1\nnr_throttled 1\nthrottled_time 500000000\n");
        system.put("cg/pids/a/b/pids.current", "5\n");
        system.put("cg/pids/a/b/pids.max", "max\n");
        system.put("cg/pids/a/pids.current", "6\n");
        system.put("cg/pids/a/pids.max", "12\n");
        system.put("cg/unified/cpu.pressure", "some avg10=0 avg60=0 avg300=0 total=1\n");
        let mut group = system.group();
        let first = measured(&mut group, 1.0, Effort::Full);
        assert_eq!(first.value(Feature::MemoryShare), Some(0.75), "that of the nearest bound");
        assert_eq!(first.value(Feature::ThreadShare), Some(0.5));
        assert_eq!(first.value(Feature::Throttled), None, "the first reading");
        system.put("cg/cpu/a/cpu.stat", "nr_periods 9\nnr_throttled 9\nthrottled_time 1500000000\n");
        for _ in 0..3 {
            assert_eq!(measured(&mut group, 1.0, Effort::Light), Measure::default());
        }
        let second = measured(&mut group, 1.0, Effort::Full);
        assert_eq!(second.value(Feature::Throttled), Some(0.25), "one of four seconds");
        assert_eq!(second.value(Feature::GroupCpuPressure), None, "that of the root is the host's");
        assert_eq!(measured(&mut group, 0.1, Effort::Full), Measure::default(), "once a second is enough");
    }

    #[test]
    fn version_2_has_everything_in_one_hierarchy_and_pressure_as_well() {
        let mounts = "41 31 0:38 / /cg rw - cgroup2 cgroup2 rw\n";
        let system = System::new("group-2", mounts, "0::/s/g\n");
        system.put("cg/s/g/memory.current", "1000\n");
        system.put("cg/s/g/memory.max", "4000\n");
        system.put("cg/s/memory.current", "1000\n");
        system.put("cg/s/memory.max", "max\n");
        system.put("cg/s/g/cpu.stat", "usage_usec 5\nuser_usec 5\nsystem_usec 0\n");
        system.put("cg/s/cpu.stat", "usage_usec 5\nnr_periods 1\nnr_throttled 1\nthrottled_usec 7000000\n");
        system.put("cg/s/g/cgroup.type", "domain\n");
        let pressure = |total| format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\nfull total=0\n");
        system.put("cg/s/g/cpu.pressure", &pressure(100_000));
        system.put("cg/s/g/io.pressure", &pressure(0));
        let mut group = system.group();
        let _first = measured(&mut group, 1.0, Effort::Full);
        system.put("cg/s/cpu.stat", "usage_usec 5\nnr_periods 1\nnr_throttled 1\nthrottled_usec 27000000\n");
        system.put("cg/s/g/cpu.pressure", &pressure(600_000));
        let second = measured(&mut group, 1.0, Effort::Full);
        let values = [
            Feature::MemoryShare,
            Feature::Throttled,
            Feature::GroupCpuPressure,
            Feature::GroupMemoryPressure,
            Feature::GroupIoPressure,
            Feature::ThreadShare,
        ];
        let values = values.map(|feature| second.value(feature));
        assert_eq!(values, [Some(0.25), Some(1.0), Some(0.5), None, Some(0.0), None], "throttled on many processors");
        // A limit that is set later, and another group.
        system.put("cg/s/memory.max", "2000\n");
        assert_eq!(measured(&mut group, 1.0, Effort::Deep).value(Feature::MemoryShare), Some(0.5));
        system.put("cg/t/memory.current", "9\n");
        system.put("cg/t/memory.max", "10\n");
        system.join("0::/t\n");
        let moved = measured(&mut group, 1.0, Effort::Deep);
        assert_eq!((moved.value(Feature::MemoryShare), moved.value(Feature::Throttled)), (Some(0.9), None));
    }

    #[test]
    fn a_process_that_has_ended_has_no_groups() {
        let mut system = System::new("group-3", MOUNTS, "2:pids:/a\n");
        system.put("cg/pids/a/pids.current", "5\n");
        system.put("cg/pids/a/pids.max", "10\n");
        let mut group = system.group();
        assert_eq!(measured(&mut group, 1.0, Effort::Deep).value(Feature::ThreadShare), Some(0.5));
        system.child.kill();
        for effort in [Effort::Full, Effort::Deep] {
            assert_eq!(measured(&mut group, 1.0, effort), Measure::default());
        }
    }

    #[test]
    fn groups_that_cannot_be_seen_or_make_no_sense_are_missing() {
        for membership in ["", "0::/../../x\n", "4:memory:/inner\n", "x\n::\n4:memory\n", "4:memory:/outer/gone\n"] {
            let system = System::new("group-4", MOUNTS, membership);
            assert_eq!(measured(&mut system.group(), 1.0, Effort::Deep), Measure::default(), "{membership}");
        }
    }

    #[test]
    fn our_own_groups_are_found() {
        let subject = subject_of(std::process::id());
        let mut group = Group::new(subject);
        let measure = measured(&mut group, 1.0, Effort::Deep);
        let shares = [Feature::MemoryShare, Feature::ThreadShare].map(|feature| measure.value(feature));
        assert!(shares.into_iter().flatten().all(|share| (0.0..10.0).contains(&share)), "{shares:?}");
    }

    #[test]
    fn the_pressure_of_a_group_of_its_own_is_told_where_the_kernel_does() {
        let (janitor, thread) = crate::cgroup::Janitor::start().expect("a thread");
        let name = format!("profile-{}", std::process::id());
        // Not everybody may make groups, and not every kernel tells their pressure.
        if let Ok(cgroup) = crate::cgroup::Cgroup::create(&name, &janitor)
            && cgroup.path().join("cpu.pressure").exists()
        {
            let mut child = Sleeper::busy();
            fs::write(cgroup.path().join("cgroup.procs"), child.pid().to_string()).expect("it is ours");
            let mut subject = Arc::into_inner(subject_of(child.pid())).expect("nobody else has it");
            subject.group = Some(cgroup.path().to_path_buf());
            let mut group = Group::new(Arc::new(subject));
            let _first = measured(&mut group, 1.0, Effort::Full);
            std::thread::sleep(std::time::Duration::from_millis(50));
            let measure = measured(&mut group, 1.0, Effort::Full);
            let features = [Feature::GroupCpuPressure, Feature::GroupMemoryPressure, Feature::GroupIoPressure];
            for share in features.map(|feature| measure.value(feature)) {
                assert!(share.is_some_and(|share| (0.0..=1.0).contains(&share)), "{share:?}");
            }
            child.kill();
        }
        drop(janitor);
        thread.join().expect("it ends with its last user");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            mounts in proptest::collection::vec("[0-9 /a:-]{0,20}( - )?(cgroup2?)?[ a-z,]{0,20}", 0..5),
            membership in "[0-9:a-z,/.\n]{0,60}",
            stat in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let mounts: Vec<_> = mounts.iter().filter_map(|line| Mount::parse(line.as_bytes())).collect();
            for controller in ["", "memory", "a"] {
                let _any = levels(Path::new("/nowhere"), &mounts, membership.as_bytes(), controller.as_bytes());
            }
            let _any = Mount::parse(&stat);
            let _any = throttled_ns(&stat);
        }
    }
}
