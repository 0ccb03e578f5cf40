//! The fio load: rounds of random writes, each verified by crc32c headers and write sequence.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::Context as _;
use serde_json::Value;

use super::{Shared, disk};
use crate::vm::layout::{BLOCK, FIO, MIB, Region};
use crate::vm::orders::Line;
use crate::vm::rng::Rng;

/// One run of fio.
#[derive(Debug, Clone, Copy)]
struct Round {
    pattern: &'static str,
    depth: u64,
    jobs: u64,
    block_bytes: u64,
    /// Bytes each job writes.
    job_bytes: u64,
    /// Verify this many writes behind, instead of all at the end; 0 is all at the end.
    backlog: u64,
    seed: u64,
    region: Region,
    /// The processors, and thus the queues, the jobs are spread over.
    processors: &'static str,
}

/// The processors of the guest.
const BOTH: &str = "0-1";

/// Rounds over every depth, queue count and pattern, in seeded order, until told to stop.
pub(crate) fn rounds(shared: &Shared) -> anyhow::Result<()> {
    let mut rng = Rng::new(shared.orders.seed, 3);
    let mut number = 0;
    play(shared, "fill", number, &fill(FIO, rng.next()))?;
    loop {
        let mut menu = menu();
        rng.shuffle(&mut menu);
        for mut round in menu {
            if shared.stopping() {
                shared.meter.fio_ends();
                return Ok(());
            }
            number += 1;
            round.seed = rng.next();
            play(shared, "rounds", number, &round)?;
        }
    }
}

/// Two lanes of depth-16 rounds, each on its half, so that one is busy while the other starts.
pub(crate) fn steady(shared: &Shared) -> anyhow::Result<()> {
    let half = FIO.bytes / 2;
    let lanes = [("left", FIO.offset, "0"), ("right", FIO.offset + half, "1")];
    thread::scope(|scope| {
        let running: Vec<_> = lanes
            .into_iter()
            .zip(4..)
            .map(|((name, offset, processors), stream)| {
                scope.spawn(move || lane(shared, name, Region { offset, bytes: half }, processors, stream))
            })
            .collect();
        running.into_iter().try_for_each(|lane| lane.join().map_err(|_| anyhow::anyhow!("a lane panicked"))?)
    })
}

/// One lane of [`steady`].
fn lane(shared: &Shared, name: &str, region: Region, processors: &'static str, stream: u64) -> anyhow::Result<()> {
    let mut rng = Rng::new(shared.orders.seed, stream);
    play(shared, name, 0, &fill(region, rng.next()))?;
    for number in 1.. {
        if shared.stopping() {
            break;
        }
        let round = Round {
            pattern: "randrw",
            depth: 16,
            jobs: 1,
            block_bytes: BLOCK,
            job_bytes: region.bytes / 4,
            backlog: 512,
            seed: rng.next(),
            region,
            processors,
        };
        play(shared, name, number, &round)?;
    }
    shared.meter.fio_ends();
    Ok(())
}

/// Writes the whole region once, so that at the end the host finds a header on every block of it.
fn fill(region: Region, seed: u64) -> Round {
    let (jobs, block_bytes) = (2, 16 * BLOCK);
    Round {
        pattern: "write",
        depth: 4,
        jobs,
        block_bytes,
        job_bytes: region.bytes / jobs,
        backlog: 0,
        seed,
        region,
        processors: BOTH,
    }
}

/// Every kind of round once; the slower the depth, the less it writes.
fn menu() -> Vec<Round> {
    let mut menu = Vec::new();
    for (depth, job_bytes) in [(1, MIB), (4, 2 * MIB), (16, 4 * MIB), (32, 4 * MIB)] {
        for jobs in [1, 2] {
            for (pattern, block_bytes, backlog) in
                [("randwrite", BLOCK, 0), ("randwrite", BLOCK, 128), ("randrw", BLOCK, 0), ("randwrite", 4 * BLOCK, 0)]
            {
                menu.push(Round {
                    pattern,
                    depth,
                    jobs,
                    block_bytes,
                    job_bytes,
                    backlog,
                    seed: 0,
                    region: FIO,
                    processors: BOTH,
                });
            }
        }
    }
    menu
}

/// Runs one round and reports it.
fn play(shared: &Shared, lane: &str, number: u64, round: &Round) -> anyhow::Result<()> {
    let output = format!("/tmp/fio-{lane}.json");
    shared.meter.fio_begins();
    let begin = Instant::now();
    let ran = command(round, &output).output().context("starting fio")?;
    let found = Found::read(&std::fs::read_to_string(&output).unwrap_or_default());
    let complaints = String::from_utf8_lossy(&ran.stderr);
    let complaints: Vec<&str> = complaints.lines().filter(|line| is_complaint(line)).collect();
    for complaint in complaints.iter().take(5) {
        shared.port.say(&Line::new("note").with("fio", complaint));
    }
    let line = Line::new("fio")
        .with("lane", lane)
        .with("round", number)
        .with("pattern", round.pattern)
        .with("depth", round.depth)
        .with("jobs", round.jobs)
        .with("block", round.block_bytes)
        .with("exit", ran.status.code().unwrap_or(-1).unsigned_abs())
        .with("errors", found.errors)
        .with("verify", complaints.iter().filter(|line| line.contains("verify")).count())
        .with("ios", found.requests)
        .with("short", expected_requests(round).saturating_sub(found.writes))
        .with("max_us", found.longest_us)
        .with("ms", begin.elapsed().as_millis());
    shared.port.say(&line);
    Ok(())
}

/// The command line of a round.
fn command(round: &Round, output: &str) -> Command {
    let mut command = Command::new("/usr/bin/fio");
    command.stdin(Stdio::null());
    let job_stride = round.region.bytes / round.jobs;
    let options = [
        ("name", "lab".to_owned()),
        ("filename", disk::DEVICE.to_owned()),
        ("ioengine", "libaio".to_owned()),
        ("direct", "1".to_owned()),
        ("rw", round.pattern.to_owned()),
        ("bs", round.block_bytes.to_string()),
        ("iodepth", round.depth.to_string()),
        ("numjobs", round.jobs.to_string()),
        ("offset", round.region.offset.to_string()),
        ("offset_increment", job_stride.to_string()),
        ("size", round.job_bytes.to_string()),
        ("randseed", (round.seed >> 1).to_string()),
        // One processor, thus one queue, for each job.
        ("cpus_allowed", round.processors.to_owned()),
        ("cpus_allowed_policy", "split".to_owned()),
        ("verify", "crc32c".to_owned()),
        ("verify_interval", BLOCK.to_string()),
        ("continue_on_error", "verify".to_owned()),
        ("verify_state_save", "0".to_owned()),
        ("output-format", "json".to_owned()),
        ("output", output.to_owned()),
    ];
    command.args(options.iter().map(|(key, value)| format!("--{key}={value}")));
    if round.backlog > 0 {
        command.arg(format!("--verify_backlog={}", round.backlog));
    }
    command
}

/// Writes a round must have done: fewer means that fio ended early, whatever its exit code.
fn expected_requests(round: &Round) -> u64 {
    match round.pattern {
        // The share of reads is random.
        "randrw" => 1,
        _ => round.jobs * round.job_bytes / round.block_bytes,
    }
}

/// Lines of fio's standard error that speak of trouble, not of style.
fn is_complaint(line: &str) -> bool {
    let line = line.trim();
    !line.is_empty() && !line.contains("multiple writers may overwrite")
}

/// What fio's report says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    errors: u64,
    requests: u64,
    writes: u64,
    longest_us: u64,
}

impl Found {
    /// Reads the report; one that cannot be read is an error by itself.
    fn read(text: &str) -> Self {
        let json = text.find('{').and_then(|at| serde_json::from_str::<Value>(&text[at..]).ok());
        let Some(jobs) = json.as_ref().and_then(|json| json["jobs"].as_array()) else {
            return Self { errors: 1, ..Self::default() };
        };
        let mut found = Self::default();
        for job in jobs {
            let number = |value: &Value| value.as_u64().unwrap_or(0);
            found.errors += number(&job["total_err"]).max(u64::from(number(&job["error"]) != 0));
            found.writes += number(&job["write"]["total_ios"]);
            for side in ["read", "write"] {
                found.requests += number(&job[side]["total_ios"]);
                found.longest_us = found.longest_us.max(number(&job[side]["lat_ns"]["max"]) / 1000);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_added_up_over_jobs() {
        let report = r#"fio: a note first
            {"jobs":[{"error":0,"total_err":0,"read":{"total_ios":5,"lat_ns":{"max":9000}},"write":{"total_ios":7,"lat_ns":{"max":4000}}},
                     {"error":84,"total_err":3,"read":{"total_ios":1,"lat_ns":{"max":1000}},"write":{"total_ios":2,"lat_ns":{"max":88000}}}]}"#;
        assert_eq!(Found::read(report), Found { errors: 3, requests: 15, writes: 9, longest_us: 88 });
        assert_eq!(Found::read("").errors, 1);
    }
}
