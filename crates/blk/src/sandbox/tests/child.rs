//! A process that restricts itself and then does something: this test binary, executed again, and forked once more,
//! because what the test harness runs a test on is not the only thread of its process.

use super::super::table::Profile;
use super::super::*;
use super::{DENIED, deeds};
use rustix::process::{Pid, Signal};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};

const ORDER: &str = "WARMSWAP_SANDBOX_TEST";
const ORDER_BEFORE_MAIN: &str = "WARMSWAP_SANDBOX_TEST_BEFORE_MAIN";
/// The child's exit code if the restriction was refused.
pub(super) const NOT_RESTRICTED: i32 = 80;
/// The child's exit code if the test is at fault.
pub(super) const TEST_FAILED: i32 = 81;
/// So that a child that hangs does not hang the tests.
const PATIENCE_S: u32 = 60;

/// In a stage: the child is a process that has never had another thread, as the backend is when it restricts itself.
/// std has not been started in it: a stack that overflows would not be noticed.
pub(super) const BEFORE_MAIN: &str = "before main";

/// How a child ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    stdout: String,
    pub(super) stderr: String,
}

impl Ended {
    /// What the deed said; the harness' own lines are left out.
    pub(super) fn said(&self) -> Vec<&str> {
        self.stdout.lines().filter_map(|line| line.strip_prefix("> ")).collect()
    }

    pub(super) fn killed_by(&self, signal: i32) -> bool {
        self.status.signal() == Some(signal)
    }
}

/// A child at the point where its deed has begun.
pub(super) struct Started {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    before: String,
    pid: i32,
}

/// Starts a child. It restricts itself as `stage` says and then does `deed`.
pub(super) fn start(stage: &str, deed: &str) -> Started {
    let (_, module) = module_path!().split_once("::").unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        // With one thread the harness would begin a line before the child does.
        .args([&format!("{module}::the_child"), "--exact", "--nocapture", "--test-threads=2"])
        .envs(match stage.contains(BEFORE_MAIN) {
            true => vec![(ORDER_BEFORE_MAIN, format!("{stage}/{deed}"))],
            // In a process that has had a thread it is too late for the number of arenas.
            false => vec![(ORDER, format!("{stage}/{deed}")), ("MALLOC_ARENA_MAX", "1".to_owned())],
        })
        .env_remove("RUST_BACKTRACE")
        .env_remove("RUST_LIB_BACKTRACE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut before = String::new();
    let mut pid = 0;
    while pid == 0 {
        let mut line = String::new();
        if stdout.read_line(&mut line).unwrap() == 0 {
            break;
        }
        match line.trim_end().strip_prefix("pid ") {
            Some(number) => pid = number.parse().unwrap(),
            None => before.push_str(&line),
        }
    }
    Started { child, stdout, before, pid }
}

/// Starts a child and waits for its end.
pub(super) fn run(stage: &str, deed: &str) -> Ended {
    start(stage, deed).end()
}

impl Started {
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// A file of its directory in `/proc`.
    pub(super) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.pid)).unwrap()
    }

    pub(super) fn status_of(&self, field: &str) -> String {
        let status = self.read("status");
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap().trim().to_owned()
    }

    pub(super) fn await_state(&self, state: char) {
        while !self.status_of("State").starts_with(state) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    pub(super) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_raw(self.pid).unwrap(), signal).unwrap();
    }

    pub(super) fn end(mut self) -> Ended {
        drop(self.child.stdin.take());
        let mut stdout = self.before;
        self.stdout.read_to_string(&mut stdout).unwrap();
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let status = self.child.wait().unwrap();
        // Of a child without a process in between.
        let _was_not_made = std::fs::remove_dir_all(deeds::directory(self.child.id()));
        Ended { status, stdout, stderr }
    }
}

/// Not a test but what [`start`] executes.
#[test]
fn the_child() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let (stage, deed) = order.split_once('/').unwrap();
    // SAFETY: the other thread of this process waits for this one, and so holds no lock that the child could miss.
    match unsafe { libc::fork() } {
        0 => be_the_child(stage, deed),
        pid => end_like(Pid::from_raw(pid).expect("fork has failed")),
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static INITIALIZER: extern "C" fn() = before_main;

extern "C" fn before_main() {
    if let Ok(order) = std::env::var(ORDER_BEFORE_MAIN) {
        let (stage, deed) = order.split_once('/').expect("an order");
        be_the_child(stage, deed);
    }
}

fn end_like(pid: Pid) -> ! {
    let (_, status) = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap().unwrap();
    let _was_not_made = std::fs::remove_dir_all(deeds::directory(pid.as_raw_nonzero().get().unsigned_abs()));
    if let Some(signal) = status.terminating_signal() {
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(rustix::process::Resource::Core, none).unwrap();
        // SAFETY: the default action is no code of ours; the process ends here.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    // SAFETY: ends the process, without what the harness has left to do.
    unsafe { libc::_exit(status.exit_status().unwrap_or(TEST_FAILED)) }
}

fn be_the_child(stage: &str, deed: &str) -> ! {
    let done = std::panic::catch_unwind(|| {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
        // SAFETY: the default action of the alarm is to end the process.
        unsafe { libc::alarm(PATIENCE_S) };
        let (deed, restricts_itself) = deeds::find(deed);
        let things = deeds::Things::new();
        let stage = Stage { words: stage.to_owned() };
        if !restricts_itself && let Err(error) = stage.enter() {
            eprintln!("{error}");
            std::process::exit(NOT_RESTRICTED)
        }
        deed(&things, &stage);
    });
    std::process::exit(if done.is_ok() { 0 } else { TEST_FAILED })
}

/// What the deed says.
pub(super) fn say(what: impl Display) {
    println!("> {what}");
}

/// How the child is restricted, from words that a test is readable with.
pub(super) struct Stage {
    words: String,
}

impl Stage {
    fn says(&self, word: &str) -> bool {
        self.words.contains(word)
    }

    /// Without this call the filter is put in force.
    fn missing(&self) -> Option<&str> {
        self.words
            .rsplit_once(" without ")
            .map(|(_, name)| name)
            .filter(|name| *name != "Landlock" && !name.contains(' '))
    }

    /// The main thread's, if it is to be filtered.
    pub(super) fn profile(&self) -> Option<Profile> {
        match self.words.split([' ', ',']).next() {
            Some("worker") => Some(Profile::Worker),
            Some("control") => Some(Profile::Control),
            _ => None,
        }
    }

    fn policy(&self) -> Policy {
        let mut policy = Policy { require: self.says("required"), ..Policy::default() };
        if self.says(" off") {
            let off = Switch::Off;
            policy = Policy { privileges: off, core_files: off, landlock: off, seccomp: Seccomp::Off, ..policy };
        }
        if self.says(" logs") {
            policy.seccomp = Seccomp::Log;
        }
        policy
    }

    /// Restricts the process and the calling thread; then the deed may begin.
    fn enter(&self) -> Result<(), SandboxError> {
        if self.says("with RUST_BACKTRACE") {
            // SAFETY: there is no other thread.
            unsafe { std::env::set_var("RUST_BACKTRACE", "1") };
        }
        if self.says("as nobody") {
            become_nobody();
        }
        if self.says("without Landlock") {
            lose_landlock();
        }
        let _beside = self.says("beside a thread").then(|| std::thread::spawn(std::thread::park));
        if !self.words.starts_with("free") {
            let report = self.restrict_process()?;
            eprintln!("{report}");
            if let Some(profile) = self.profile() {
                self.restrict_thread(profile, &report)?;
            }
        }
        self.begin();
        Ok(())
    }

    /// From here on the parent may look.
    pub(super) fn begin(&self) {
        println!("pid {}", std::process::id());
    }

    pub(super) fn restrict_process(&self) -> Result<Report, SandboxError> {
        if self.says("unprepared") {
            // As the protection would be without its preparations.
            let (layer, violation) = layers::seccomp(Seccomp::On);
            let layers = std::array::from_fn(|_| layer.clone());
            return Ok(Report { layers, violation });
        }
        restrict_process(&self.policy())
    }

    pub(super) fn restrict_thread(&self, profile: Profile, report: &Report) -> Result<(), SandboxError> {
        if !self.says(" answers") && self.missing().is_none() {
            return restrict_thread(profile, report);
        }
        let mut chains = filter::chains(profile).unwrap();
        if let Some(missing) = self.missing() {
            let calls = rules(Profile::Worker).chain(rules(Profile::Control)).flat_map(|rule| rule.calls);
            let number = calls.filter(|call| call.name() == missing).map(|call| call.number).next();
            let _not_in_each_profile = chains.remove(&number.expect("a call of the table"));
        }
        let action = match self.says(" answers") {
            true => SeccompAction::Errno(DENIED.unsigned_abs()),
            false => SeccompAction::KillProcess,
        };
        filter::install(chains, action).map_err(|source| SandboxError::Filter { profile, source })
    }
}

fn become_nobody() {
    const NOBODY: libc::uid_t = 65534;
    // SAFETY: there is no other thread, so these concern the whole process.
    let changed = unsafe {
        libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(NOBODY, NOBODY, NOBODY) == 0
            && libc::setresuid(NOBODY, NOBODY, NOBODY) == 0
    };
    assert!(changed);
}

/// From here on the kernel answers like one that has no Landlock.
fn lose_landlock() {
    let chains = [(libc::SYS_landlock_create_ruleset, vec![])].into_iter().collect();
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let filter = seccompiler::SeccompFilter::new(
        chains,
        SeccompAction::Allow,
        missing,
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}
