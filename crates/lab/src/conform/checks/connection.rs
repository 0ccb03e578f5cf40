//! Connections that come and go, and the end of the process.

use std::time::Duration;

use warmswap_wire::Request;

use super::{Check, For, TAKEOVER};
use crate::conform::link::{Heard, Link};
use crate::conform::outcome::{Checked, Miss, failed};
use crate::conform::stage::{Choice, QUIET, Stage};

/// See the module.
pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "reconnect",
        name: "when a connection is lost, the next one is served from where the ring is, or the process ends",
        clause: "Communication: an optional reconnection mechanism can be implemented",
        devices: For::Requests,
        run: reconnect,
    },
    Check {
        id: "second-connection",
        name: "a second connection does not disturb the first",
        clause: TAKEOVER,
        devices: For::Requests,
        run: second_connection,
    },
    Check {
        id: "sigterm",
        name: "it ends on SIGTERM within five seconds",
        clause: "Backend program conventions: the back-end program must end (as quickly and cleanly as possible) when SIGTERM is received",
        devices: For::Any,
        run: sigterm,
    },
];

/// How long a process may take to end.
const END: Duration = Duration::from_secs(5);

fn reconnect(stage: &mut Stage<'_>) -> Checked {
    let patience = stage.subject.patience;
    let mut bench = stage.ready()?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    bench.hang_up()?;
    if let Some(status) = bench.process.borrow_mut().ends_within(QUIET)? {
        return Ok(format!("the process ends ({status})"));
    }
    if let Err(miss) =
        bench.reconnect(Duration::from_secs(1), patience).and_then(|()| bench.negotiate(Choice::default()))
    {
        if bench.process.borrow_mut().ends_within(QUIET)?.is_some() {
            return Ok("the process ends".to_owned());
        }
        return Err(miss);
    }
    bench.share_memory()?;
    bench.start(&ring, ring.used_idx())?;
    bench.serve(&mut ring, &jobs, 4..8)?;
    Ok("the next one is served".to_owned())
}

fn second_connection(stage: &mut Stage<'_>) -> Checked {
    let mut bench = stage.ready()?;
    let (mut ring, jobs) = (bench.ring(0)?, bench.jobs()?);
    bench.start(&ring, 0)?;
    bench.serve(&mut ring, &jobs, 0..4)?;
    let second = match Link::connect(&bench.socket, Duration::ZERO, QUIET) {
        Err(Miss::Timeout(_)) => None,
        link => Some(link?),
    };
    let mut what = "it is not accepted";
    if let Some(link) = &second {
        what = match link.send(&Request::GetFeatures, &[], false).and_then(|()| link.hear()) {
            Ok(Heard::Message { .. }) => "it is answered",
            Ok(Heard::Closed) | Err(Miss::Closed(_)) => "it is closed",
            Ok(Heard::Silence) => "it waits",
            Err(other) => return Err(other),
        };
    }
    bench.serve(&mut ring, &jobs, 4..8)?;
    drop(second);
    bench.serve(&mut ring, &jobs, 8..12)?;
    bench.settle()?;
    Ok(what.to_owned())
}

fn sigterm(stage: &mut Stage<'_>) -> Checked {
    let bench = stage.ready()?;
    let mut process = bench.process.borrow_mut();
    let began = std::time::Instant::now();
    process.ask_to_end()?;
    match process.ends_within(END)? {
        Some(status) => Ok(format!("after {:.0} ms ({status})", began.elapsed().as_secs_f64() * 1e3)),
        None => failed("it goes on"),
    }
}
