//! `lab conform`: whether a vhost-user back-end does what the specification asks for, as far as a failover depends on it.
//!
//! Every check starts fresh back-ends from the command line that it is given, connects to them as a front-end of its own, and uses
//! real guest memory, eventfds and split rings. What must be is said by the table in [`checks`]. Block devices that serve the suite's
//! image (`{image}`) are checked most closely: what they read is known, and the image lies in a store that can be made slow.
//!
//! What it does not check: packed rings, migration of device state, postcopy, IOMMUs, in-band notifications; and speed.

mod checks;
mod job;
mod link;
mod outcome;
mod process;
mod raw;
mod report;
mod ring;
mod stage;
mod table;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use self::checks::Check;
use self::job::Kind;
use self::outcome::{Checked, Miss, Verdict};
use self::report::{Finding, Report};
use self::stage::{Stage, Subject, make_image};
use crate::campaign::fuse::Store;
use crate::common::interrupt;
use crate::common::workspace::Workspace;

/// Size of the image, and blocks of it that hold the pattern.
const IMAGE_BYTES: u64 = 64 << 20;
const IMAGE_BLOCKS: u16 = 64;

/// Options of `lab conform`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Type of the device
    #[arg(long = "type", default_value = "blk", value_enum)]
    kind: Kind,
    /// Make only these checks
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    only: Vec<String>,
    /// Leave these checks out
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    skip: Vec<String>,
    /// Print the checks, and end
    #[arg(long)]
    list: bool,
    /// Print a table in Markdown of what these runs said in JSON, and end
    #[arg(long, value_name = "FILE", num_args = 1..)]
    table: Vec<PathBuf>,
    /// Print JSON; progress goes to standard error
    #[arg(long)]
    json: bool,
    /// Exit with 1 if anything is wrong with the back-end
    #[arg(long)]
    strict: bool,
    /// Longest time for an answer, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    patience_ms: u64,
    /// The back-end's command line: {socket} is where it shall listen, or {fd} a listening socket that it inherits; {image} a raw image,
    /// {dir} a directory to share
    #[arg(last = true, value_name = "BACKEND ARG", required_unless_present_any = ["list", "table"])]
    command: Vec<String>,
}

/// Makes the checks.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if !args.table.is_empty() {
        print!("{}", table::of(&args.table)?);
        return Ok(());
    }
    let checks = chosen(args)?;
    if args.list {
        checks.iter().for_each(|check| println!("{:<20} {}\n{:20} [{}]", check.id, check.name, "", check.clause));
        return Ok(());
    }
    let reachable = args.command.iter().any(|word| word.contains("{socket}") || word.contains("{fd}"));
    ensure!(reachable, "the command line needs {{socket}} where the back-end shall listen, or {{fd}}");
    interrupt::note_signals();
    let workspace = Workspace::new(&std::env::temp_dir(), "conform")?;
    let backing = workspace.path().join("image");
    make_image(&backing, IMAGE_BLOCKS)?;
    std::fs::File::options().write(true).open(&backing)?.set_len(IMAGE_BYTES)?;
    let store = slow_store(&workspace, &backing);
    let subject = Subject {
        line: args.command.clone(),
        kind: args.kind,
        image: store.as_ref().map_or_else(|| backing.clone(), Store::image),
        store: store.as_ref().map(Store::faults),
        patience: Duration::from_millis(args.patience_ms),
    };
    let mut report = Report { findings: Vec::new(), complete: true };
    for (number, check) in checks.into_iter().enumerate() {
        if interrupt::is_asked() {
            report.complete = false;
            break;
        }
        let dir = workspace.directory(&format!("{number}"))?;
        let finding = make(check, &subject, &dir).with_context(|| format!("the check {} cannot be made", check.id))?;
        say(args, &finding.line());
        report.findings.push(finding);
    }
    say(args, &format!("\n{}", report.summary()));
    if args.json {
        println!("{:#}", report.json(&subject));
    }
    ensure!(report.complete, "the run was interrupted");
    ensure!(!args.strict || report.is_good(), "not every check has passed");
    Ok(())
}

/// For people: on standard output, or beside it where that is for programs.
fn say(args: &Args, text: &str) {
    if args.json {
        eprintln!("{text}");
    } else {
        println!("{text}");
    }
}

fn chosen(args: &Args) -> anyhow::Result<Vec<&'static Check>> {
    let all = checks::all();
    for id in args.only.iter().chain(&args.skip) {
        ensure!(all.iter().any(|check| check.id == id), "there is no check {id}: see --list");
    }
    let wanted = |check: &&Check| {
        let is = |id: &String| id == check.id;
        (args.only.is_empty() || args.only.iter().any(is)) && !args.skip.iter().any(is)
    };
    Ok(all.into_iter().filter(wanted).collect())
}

/// The image in a store that can be made slow; none where that cannot be mounted.
fn slow_store(workspace: &Workspace, backing: &Path) -> Option<Store> {
    let mount = workspace.directory("mount").ok()?;
    Store::mount(backing, &mount).ok()
}

/// Makes one check.
fn make(check: &'static Check, subject: &Subject, dir: &Path) -> anyhow::Result<Finding> {
    let began = Instant::now();
    let finding = |verdict, detail| Finding { check, verdict, detail, took: began.elapsed() };
    let slow = subject.store.is_some();
    if let Some(why) = check.devices.refuses(subject.kind, subject.is_ours(), slow) {
        return Ok(finding(Verdict::NotApplicable, why.to_owned()));
    }
    let mut stage = Stage::new(subject, dir.to_path_buf());
    let checked = (check.run)(&mut stage);
    let judged = judge(&stage, checked);
    stage.clear()?;
    let (verdict, detail) = judged?;
    Ok(finding(verdict, detail))
}

/// The verdict: a back-end that died in disorder is one, whatever the check saw.
fn judge(stage: &Stage<'_>, checked: Checked) -> anyhow::Result<(Verdict, String)> {
    let closed = matches!(&checked, Err(Miss::Closed(_)));
    let died = stage.died(closed)?;
    let (verdict, detail) = match checked {
        Err(Miss::Broken(error)) if died.is_none() => return Err(error),
        Ok(detail) => (Verdict::Pass, detail),
        Err(Miss::Fail(why)) => (Verdict::Fail, why),
        Err(Miss::NotApplicable(why)) => (Verdict::NotApplicable, why),
        Err(Miss::Closed(when)) => (Verdict::Fail, format!("the connection is closed {when}{}", stage.end_in_words()?)),
        Err(Miss::Timeout(what)) => (Verdict::Timeout, what),
        Err(Miss::Broken(error)) => (Verdict::Crash, format!("{error:#}")),
    };
    Ok(match died {
        Some(how) if detail.is_empty() => (Verdict::Crash, how),
        Some(how) => (Verdict::Crash, format!("{how} ({detail})")),
        None => (verdict, detail),
    })
}
