//! `lab devices`: one daemon that guards very many devices.
//!
//! Real backends (the built-in one, two a device) and no guests: what is measured is what a device costs the process that guards it, how
//! long it takes to begin with all of them, to fail over all of them at the same moment, and, under a keeper, to take over all of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::commit::commit;
use crate::common::interrupt;
use crate::common::process::{Target, signal_with_parent};
use crate::common::workspace::Workspace;

/// Size of each image.
const IMAGE_BYTES: u64 = 1 << 20;
/// How long everything may take to get where it should be.
const PATIENCE: Duration = Duration::from_secs(180);
/// How often the devices that are not there yet are asked.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// Kernel ticks per second, as `/proc/PID/stat` counts.
const TICKS: f64 = 100.0;

/// Options of `lab devices`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Devices
    #[arg(long, default_value_t = 1000)]
    count: usize,
    /// Start the daemon under a keeper, and kill it once
    #[arg(long)]
    kept: bool,
    /// Measure devices as the daemon does by default
    #[arg(long)]
    profile: bool,
    /// Seconds over which the processor time of a daemon at rest is taken
    #[arg(long, default_value_t = 10)]
    rest: u64,
    /// Directory for images and sockets; a tmpfs by default
    #[arg(long, default_value = "/dev/shm")]
    image_dir: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// A daemon and its devices.
struct Daemon {
    child: Child,
    control: PathBuf,
    names: Vec<String>,
}

impl Daemon {
    fn start(args: &Args, directory: &Path) -> anyhow::Result<Self> {
        let control = directory.join("c");
        std::fs::create_dir_all(&control)?;
        let names: Vec<String> = (0..args.count).map(|number| format!("d{number}")).collect();
        let config = directory.join("devices.toml");
        std::fs::write(&config, configuration(args, directory, &control, &names)?)?;
        let program = std::env::current_exe()?;
        let mut command = Command::new(&program);
        if args.kept {
            command.args(["warmswap", "keeper", "--run-dir"]).arg(&control).arg("--").arg(&program);
        }
        command.args(["warmswap", "daemon", "--config"]).arg(&config);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(directory.join("log"))?);
        let child = signal_with_parent(&mut command, Signal::TERM).spawn().context("starting the daemon")?;
        Ok(Daemon { child, control, names })
    }

    /// Asks one device's control socket one thing.
    fn ask(&self, name: &str, question: &Value) -> anyhow::Result<Value> {
        ask(&self.control.join(format!("{name}.ctl")), question)
    }

    fn status(&self, name: &str) -> anyhow::Result<Value> {
        let answer = self.ask(name, &json!({"verb": "status"}))?;
        answer["devices"].get(0).cloned().context("the daemon does not know the device yet")
    }

    /// Waits until every device is as it should be, and says how long that took since `began`, and their statuses.
    fn wait(
        &mut self,
        what: &str,
        began: Instant,
        is: impl Fn(&str, &Value) -> bool,
    ) -> anyhow::Result<(f64, Vec<Value>)> {
        let mut waiting: Vec<usize> = (0..self.names.len()).collect();
        let mut statuses = vec![Value::Null; self.names.len()];
        let mut said = Instant::now();
        while !waiting.is_empty() {
            waiting.retain(|at| match self.status(&self.names[*at]) {
                Ok(status) if is(&self.names[*at], &status) => {
                    statuses[*at] = status;
                    false
                }
                _ => true,
            });
            ensure!(self.child.try_wait()?.is_none(), "the daemon ended while it was waited for {what}");
            ensure!(!interrupt::is_asked(), "interrupted");
            let left = waiting.len();
            ensure!(began.elapsed() < PATIENCE, "{left} devices are not {what} within {PATIENCE:?}");
            if said.elapsed() > Duration::from_secs(2) {
                said = Instant::now();
                eprintln!("{what}: {left} of {} devices to go", self.names.len());
            }
            std::thread::sleep(ASK_EVERY);
        }
        Ok((began.elapsed().as_secs_f64() * 1e3, statuses))
    }

    fn broker(&self) -> anyhow::Result<u32> {
        let pid = self.status(&self.names[0])?["broker"]["pid"].as_u64().context("a broker without a process")?;
        Ok(u32::try_from(pid)?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(target) = Target::open(self.child.id()) {
            let _ended = target.signal(Signal::TERM);
        }
        let _status = self.child.wait();
    }
}

fn configuration(args: &Args, directory: &Path, control: &Path, names: &[String]) -> anyhow::Result<String> {
    let mut text = format!("control = {control:?}\nquiet = true\nno-profile = {}\n", !args.profile);
    for name in names {
        let image = directory.join(format!("{name}.raw"));
        File::create(&image)?.set_len(IMAGE_BYTES)?;
        let socket = directory.join(format!("{name}.s"));
        writeln!(text, "[device.{name}]\nsocket = {socket:?}\ndisk = {image:?}")?;
    }
    Ok(text)
}

fn ask(socket: &Path, question: &Value) -> anyhow::Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "{question}")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// What a process has.
fn holdings(pid: u32) -> anyhow::Result<Value> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
    };
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let target = std::fs::read_link(entry.path()).map(|it| it.display().to_string()).unwrap_or_default();
        let kind = target.split([':', ' ']).next().unwrap_or("").rsplit('/').next().unwrap_or("").to_owned();
        let kind = if target.starts_with('/') && !target.starts_with("/memfd") { "file".to_owned() } else { kind };
        *kinds.entry(kind).or_default() += 1;
    }
    let rss = number("VmRSS:").context("no VmRSS")? as f64 / 1024.0;
    Ok(
        json!({ "rss_mib": rss, "threads": number("Threads:"), "descriptors": kinds.values().sum::<u64>(), "descriptors_by_kind": kinds }),
    )
}

/// Percent of one processor that a process takes over some seconds.
fn processor(pid: u32, seconds: u64) -> anyhow::Result<f64> {
    let ticks = || -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split_whitespace().collect();
        Ok(fields[11].parse::<f64>()? + fields[12].parse::<f64>()?)
    };
    let (before, began) = (ticks()?, Instant::now());
    std::thread::sleep(Duration::from_secs(seconds));
    Ok((ticks()? - before) / TICKS / began.elapsed().as_secs_f64() * 100.0)
}

/// Asks for a failover of every device at the same moment.
fn failovers_at_once(daemon: &Daemon) -> anyhow::Result<Value> {
    let barrier = Arc::new(Barrier::new(daemon.names.len() + 1));
    let ask_one = |name: &String| {
        let (barrier, socket) = (Arc::clone(&barrier), daemon.control.join(format!("{name}.ctl")));
        let question = json!({"verb": "failover", "device": name, "now": false, "reason": "lab devices"});
        let run = move || {
            barrier.wait();
            let began = Instant::now();
            ask(&socket, &question).map(|answer| (began.elapsed(), answer))
        };
        std::thread::Builder::new().stack_size(128 << 10).spawn(run)
    };
    let threads = daemon.names.iter().map(ask_one).collect::<Result<Vec<_>, _>>()?;
    barrier.wait();
    let began = Instant::now();
    let mut results: BTreeMap<String, u64> = BTreeMap::new();
    let mut blackouts = Vec::new();
    let mut answers = Vec::new();
    for thread in threads {
        let (took, answer) = thread.join().map_err(|_| anyhow::anyhow!("an asker panicked"))??;
        let result = answer["result"].as_str().or(answer["error"]["message"].as_str()).unwrap_or("?").to_owned();
        *results.entry(result).or_default() += 1;
        blackouts.extend(answer["blackout_us"].as_f64());
        answers.push(took.as_secs_f64() * 1e3);
    }
    let all = began.elapsed().as_secs_f64() * 1e3;
    Ok(
        json!({ "results": results, "settled_ms": all, "answer_ms": spread(&mut answers), "blackout_us": spread(&mut blackouts) }),
    )
}

/// Kills every primary at the same moment, and waits until every device is protected again.
fn crashes_at_once(daemon: &mut Daemon, statuses: &[Value]) -> anyhow::Result<Value> {
    let settled = |status: &Value| status["failovers"]["settled"].as_u64().unwrap_or(0);
    let before: BTreeMap<&str, u64> =
        daemon.names.iter().map(String::as_str).zip(statuses.iter().map(settled)).collect();
    let before: BTreeMap<String, u64> = before.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
    let primaries = statuses.iter().filter_map(|status| u32::try_from(status["primary"]["pid"].as_u64()?).ok());
    let primaries = primaries.map(Target::open).collect::<Result<Vec<_>, _>>()?;
    let began = Instant::now();
    primaries.iter().try_for_each(|primary| primary.signal(Signal::KILL))?;
    let is = |name: &str, status: &Value| {
        status["state"] == "protected" && status["failovers"]["settled"].as_u64() > before.get(name).copied()
    };
    let (took, statuses) = daemon.wait("protected after a crash of all", began, is)?;
    let halted: u64 = statuses.iter().filter_map(|status| status["failovers"]["halted"].as_u64()).sum();
    Ok(json!({ "killed": primaries.len(), "protected_ms": took, "halted": halted }))
}

fn spread(values: &mut [f64]) -> Value {
    values.sort_by(f64::total_cmp);
    let at =
        |part: f64| values.get(((values.len() as f64 * part) as usize).min(values.len().saturating_sub(1))).copied();
    json!({ "first": at(0.0), "p50": at(0.5), "p99": at(0.99), "max": at(1.0) })
}

/// Runs the instrument.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    interrupt::note_signals();
    let workspace = Workspace::new(&args.image_dir, "devices")?;
    let began = Instant::now();
    let mut daemon = Daemon::start(args, workspace.path())?;
    let log = || std::fs::read_to_string(workspace.path().join("log")).unwrap_or_default();
    let report = measure(args, &mut daemon, began).with_context(log)?;
    if args.json {
        println!("{report}");
    } else {
        println!("{report:#}");
    }
    Ok(())
}

fn measure(args: &Args, daemon: &mut Daemon, began: Instant) -> anyhow::Result<Value> {
    let protected = |_: &str, status: &Value| status["state"] == "protected";
    let (ready, statuses) = daemon.wait("protected", began, protected)?;
    let pid = daemon.broker()?;
    let backend = statuses[0]["primary"]["pid"].as_u64().context("a primary without a process")?;
    let mut report = json!({
        "command": std::env::args().skip(1).collect::<Vec<_>>().join(" "), "commit": commit(),
        "devices": args.count, "ready_ms": ready, "cpu_percent_at_rest": processor(pid, args.rest)?,
        "broker": holdings(pid)?, "backend": holdings(u32::try_from(backend)?)?,
    });
    if args.kept {
        report["keeper"] = holdings(daemon.child.id())?;
        let killed = Instant::now();
        Target::open(pid)?.signal(Signal::KILL)?;
        let again = |_: &str, status: &Value| {
            status["state"] == "protected" && status["broker"]["pid"].as_u64() != Some(u64::from(pid))
        };
        report["take_over_ms"] = json!(daemon.wait("taken over", killed, again)?.0);
    }
    report["failovers_at_once"] = failovers_at_once(daemon)?;
    let (_, statuses) = daemon.wait("protected after a failover of all", Instant::now(), protected)?;
    report["crashes_at_once"] = crashes_at_once(daemon, &statuses)?;
    Ok(report)
}
