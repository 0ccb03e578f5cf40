//! Faults on purpose, for the laboratory: a backend that fails the way real ones do, at a time and to a degree that are known.
//!
//! Compiled only with the feature `lab`; what is shipped has none of it. A plan is text: faults separated by `;`, each a kind and its
//! values, as in `latency:shape=ramp,us=5000,from_ms=2000,over_ms=10000;errors:every=100`. Times count from the first start of a ring.
//!
//! | fault | values | what happens |
//! |---|---|---|
//! | `latency` | `us`, `shape=step\|ramp\|onoff`, `over_ms` (ramp), `period_ms` (onoff), `first`, `last` (sectors), `of=read\|write` | requests take longer |
//! | `stop` | `every_ms`, `for_ms` | nothing completes for a while, again and again |
//! | `errors` | `every` | every so many-th request ends with an error |
//! | `lose-completion` | `every` | its completion is never published |
//! | `lose-interrupt` | `every` | the call that is due is not sent |
//! | `leak` | `bytes` | so much memory is lost with every request |
//! | `descriptors` | `every` | with every so many-th request a descriptor is lost; where there is none left the process aborts |
//! | `threads` | `every` | the same with threads |
//! | `convoy` | `hold_us`, `every_us` | the worker queues for a lock that another thread holds that long, that often |
//! | `spin` | | the worker computes for ever; the control thread answers |
//! | `kill` | `store` | the process is killed before that store, counted from one, into memory shared with others |
//!
//! Every fault takes `from_ms` and `for_ms_in_all`: when it begins, how long it lasts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use warmswap_telemetry::Kind;

use crate::clock::now_ns;

static PLAN: OnceLock<Vec<Fault>> = OnceLock::new();
/// When the first ring was started.
static BEGAN_NS: AtomicU64 = AtomicU64::new(0);
/// Stores that are left until the process is killed, and one; zero: it is not.
static STORES: AtomicU64 = AtomicU64::new(0);
static CONVOY: Mutex<()> = Mutex::new(());

#[derive(Debug)]
struct Fault {
    what: What,
    from_ns: u64,
    until_ns: u64,
    /// Requests it has looked at.
    count: AtomicU64,
}

#[derive(Debug)]
enum What {
    Latency { ns: u64, shape: Shape, first: u64, last: u64, of: Option<Kind> },
    Stop { every_ns: u64, for_ns: u64 },
    Errors { every: u64 },
    LoseCompletion { every: u64 },
    LoseInterrupt { every: u64 },
    Leak { bytes: usize },
    Descriptors { every: u64 },
    Threads { every: u64 },
    Convoy { hold: Duration, every: Duration },
    Spin,
    Kill,
}

#[derive(Debug)]
enum Shape {
    Step,
    Ramp { over_ns: u64 },
    OnOff { period_ns: u64 },
}

/// Takes a plan. Once for each process, before its threads start.
///
/// # Errors
/// What of it is not understood.
pub fn plan(text: &str) -> Result<(), String> {
    let faults: Vec<Fault> = text.split(';').filter(|it| !it.is_empty()).map(parse).collect::<Result<_, _>>()?;
    PLAN.set(faults).map_err(|_| "there is a plan already".to_owned())
}

fn parse(text: &str) -> Result<Fault, String> {
    let (name, values) = text.split_once(':').unwrap_or((text, ""));
    let mut values: Vec<(&str, &str)> =
        values.split(',').filter(|it| !it.is_empty()).map(|it| it.split_once('=').unwrap_or((it, ""))).collect();
    let mut word = |name: &str| {
        let at = values.iter().position(|(it, _)| *it == name)?;
        Some(values.swap_remove(at).1)
    };
    let mut number = |name: &str, default: u64| match word(name) {
        Some(text) => text.parse().map_err(|_| format!("fault {name}={text}: expected a number")),
        None => Ok(default),
    };
    let ms = 1_000_000;
    let from_ns = number("from_ms", 0)? * ms;
    let until_ns = number("for_ms_in_all", 0)? * ms;
    let what = match name {
        "latency" => {
            let ns = number("us", 1000)? * 1000;
            let (first, last) = (number("first", 0)?, number("last", u64::MAX)?);
            let (over_ns, period_ns) = (number("over_ms", 10_000)? * ms, number("period_ms", 1000)? * ms);
            let shape = match word("shape") {
                None | Some("step") => Shape::Step,
                Some("ramp") => Shape::Ramp { over_ns },
                Some("onoff") => Shape::OnOff { period_ns },
                Some(other) => return Err(format!("fault latency: shape={other}, expected step, ramp or onoff")),
            };
            let of = match word("of") {
                None => None,
                Some("read") => Some(Kind::Read),
                Some("write") => Some(Kind::Write),
                Some(other) => return Err(format!("fault latency: of={other}, expected read or write")),
            };
            What::Latency { ns, shape, first, last, of }
        }
        "stop" => What::Stop { every_ns: number("every_ms", 1000)? * ms, for_ns: number("for_ms", 100)? * ms },
        "errors" => What::Errors { every: number("every", 100)?.max(1) },
        "lose-completion" => What::LoseCompletion { every: number("every", 1000)?.max(1) },
        "lose-interrupt" => What::LoseInterrupt { every: number("every", 1000)?.max(1) },
        "leak" => What::Leak { bytes: number("bytes", 4096)? as usize },
        "descriptors" => What::Descriptors { every: number("every", 100)?.max(1) },
        "threads" => What::Threads { every: number("every", 100)?.max(1) },
        "convoy" => What::Convoy {
            hold: Duration::from_micros(number("hold_us", 1000)?),
            every: Duration::from_micros(number("every_us", 2000)?),
        },
        "spin" => What::Spin,
        "kill" => {
            STORES.store(number("store", 1)?, Ordering::Relaxed);
            What::Kill
        }
        other => return Err(format!("there is no fault called {other}")),
    };
    if let Some((name, _)) = values.first() {
        return Err(format!("fault {text}: {name} is not understood"));
    }
    let until_ns = if until_ns == 0 { u64::MAX } else { from_ns.saturating_add(until_ns) };
    Ok(Fault { what, from_ns, until_ns, count: AtomicU64::new(0) })
}

/// Where it is not its time, a convoy looks again so much later.
const CONVOY_AGAIN: Duration = Duration::from_millis(5);

fn convoy(fault: &Fault, hold: Duration, every: Duration) {
    loop {
        if fault.is_active() {
            std::thread::sleep(every);
            let _held = CONVOY.lock();
            std::thread::sleep(hold);
        } else {
            std::thread::sleep(CONVOY_AGAIN);
        }
    }
}

/// Loses a descriptor. A program that cannot go on without one aborts.
fn lose_descriptor() {
    match rustix::io::dup(std::io::stderr()) {
        Ok(lost) => std::mem::forget(lost),
        Err(_) => std::process::abort(),
    }
}

/// Loses a thread.
fn lose_thread() {
    let forever = || {
        loop {
            std::thread::park();
        }
    };
    if std::thread::Builder::new().stack_size(64 << 10).spawn(forever).is_err() {
        std::process::abort();
    }
}

/// Starts what threads a plan needs.
pub(crate) fn start() {
    for fault in PLAN.get().into_iter().flatten() {
        if let What::Convoy { hold, every } = fault.what {
            std::thread::spawn(move || convoy(fault, hold, every));
        }
    }
}

/// A ring was started.
pub(crate) fn begun() {
    let _kept = BEGAN_NS.compare_exchange(0, now_ns(), Ordering::Relaxed, Ordering::Relaxed);
}

/// Since the first ring was started; none before.
fn elapsed_ns() -> Option<u64> {
    match BEGAN_NS.load(Ordering::Relaxed) {
        0 => None,
        began => Some(now_ns().saturating_sub(began)),
    }
}

fn active() -> impl Iterator<Item = &'static Fault> {
    let elapsed = elapsed_ns();
    let plan = PLAN.get().map_or(&[][..], Vec::as_slice);
    plan.iter().filter(move |fault| fault.is_active_at(elapsed))
}

impl Fault {
    fn is_active(&self) -> bool {
        self.is_active_at(elapsed_ns())
    }

    fn is_active_at(&self, elapsed: Option<u64>) -> bool {
        elapsed.is_some_and(|it| it >= self.from_ns && it < self.until_ns)
    }

    fn is_turn(&self, every: u64) -> bool {
        self.count.fetch_add(1, Ordering::Relaxed) % every == every - 1
    }
}

/// A store into memory shared with others is about to be made.
#[inline]
pub(crate) fn store() {
    if STORES.load(Ordering::Relaxed) > 0 && STORES.fetch_sub(1, Ordering::Relaxed) == 1 {
        // Not an orderly end of any kind, and by a call that the sandbox allows.
        let ids = [rustix::process::getpid(), rustix::thread::gettid()].map(rustix::process::Pid::as_raw_nonzero);
        // SAFETY: the call takes three numbers.
        unsafe { libc::syscall(libc::SYS_tgkill, ids[0].get(), ids[1].get(), libc::SIGKILL) };
    }
}

/// Once for each turn of a worker.
pub(crate) fn turn() {
    for fault in active() {
        match fault.what {
            What::Spin => loop {
                std::hint::spin_loop();
            },
            What::Convoy { .. } => drop(CONVOY.lock()),
            _ => {}
        }
    }
}

/// A request was done: how much longer its completion is kept back, in nanoseconds.
pub(crate) fn delay_ns(kind: Kind, sector: u64) -> u64 {
    let Some(elapsed) = elapsed_ns() else { return 0 };
    let one = |fault: &Fault| match &fault.what {
        What::Latency { ns, shape, first, last, of } => {
            if sector < *first || sector > *last || of.is_some_and(|of| of != kind) {
                return 0;
            }
            let since = elapsed.saturating_sub(fault.from_ns);
            match shape {
                Shape::Step => *ns,
                Shape::Ramp { over_ns } => {
                    (u128::from(*ns) * u128::from(since.min(*over_ns)) / u128::from((*over_ns).max(1))) as u64
                }
                Shape::OnOff { period_ns } => {
                    if (since / (*period_ns).max(1)).is_multiple_of(2) {
                        *ns
                    } else {
                        0
                    }
                }
            }
        }
        What::Stop { every_ns, for_ns } => {
            let at = elapsed.saturating_sub(fault.from_ns) % (*every_ns).max(1);
            for_ns.saturating_sub(at)
        }
        What::Leak { bytes } => {
            // Touched, or it would cost nothing.
            std::mem::forget(vec![1_u8; *bytes]);
            0
        }
        What::Descriptors { every } => {
            if fault.is_turn(*every) {
                lose_descriptor();
            }
            0
        }
        What::Threads { every } => {
            if fault.is_turn(*every) {
                lose_thread();
            }
            0
        }
        _ => 0,
    };
    active().map(one).max().unwrap_or(0)
}

/// Whether this request shall end with an error.
pub(crate) fn fails() -> bool {
    active().any(|fault| matches!(fault.what, What::Errors { every } if fault.is_turn(every)))
}

/// Whether this completion shall be lost.
pub(crate) fn loses_completion() -> bool {
    active().any(|fault| matches!(fault.what, What::LoseCompletion { every } if fault.is_turn(every)))
}

/// Whether this call shall be lost.
pub(crate) fn loses_call() -> bool {
    active().any(|fault| matches!(fault.what, What::LoseInterrupt { every } if fault.is_turn(every)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_is_not_understood_is_refused_in_words() {
        for (text, why) in [
            ("laten", "no fault called laten"),
            ("latency:us=x", "expected a number"),
            ("latency:shape=circle", "shape=circle"),
            ("errors:evry=3", "evry is not understood"),
        ] {
            let refused = parse(text).expect_err(text);
            assert!(refused.contains(why), "{refused}");
        }
        let fault = parse("latency:shape=ramp,us=5,over_ms=10,from_ms=1,for_ms_in_all=2").expect("it is right");
        assert_eq!((fault.from_ns, fault.until_ns), (1_000_000, 3_000_000));
        let times = [999_999, 1_000_000, 2_999_999, 3_000_000].map(|elapsed| fault.is_active_at(Some(elapsed)));
        assert_eq!((times, fault.is_active_at(None)), ([false, true, true, false], false));
        for (text, expected) in [("descriptors:every=7", 7), ("threads:every=0", 1)] {
            let fault = parse(text).expect(text);
            let (What::Descriptors { every } | What::Threads { every }) = fault.what else { panic!("{text}") };
            assert_eq!(every, expected, "{text}");
        }
    }
}
