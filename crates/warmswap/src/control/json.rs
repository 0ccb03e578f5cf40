//! The outward form of status and reports. The core knows no JSON; its values are converted here by hand.

use serde_json::{Value, json};
use warmswap_core::{BackendStatus, Phase, Report};

use crate::driver::DeviceStatus;

/// A status answer.
pub(crate) fn status(devices: &[(String, DeviceStatus)], socket: &str, device_type: &str) -> Value {
    let list: Vec<Value> = devices.iter().map(|(name, status)| device(name, status, socket, device_type)).collect();
    json!({ "devices": list })
}

fn device(name: &str, status: &DeviceStatus, socket: &str, device_type: &str) -> Value {
    let pair = &status.pair;
    let rings: Vec<Value> = pair
        .rings
        .iter()
        .map(|ring| {
            json!({
                "index": ring.index,
                "size": ring.size,
                "running": ring.served,
                "avail_idx": ring.avail_idx,
                "used_idx": ring.used_idx,
                "inflight": ring.inflight,
                "observer": ring.observer,
                "requests": ring.requests,
            })
        })
        .collect();
    let counters = &pair.counters;
    json!({
        "name": name,
        "type": device_type,
        "socket": socket,
        "state": pair.state.name(),
        "vmm": if pair.vmm_connected { "connected" } else { "absent" },
        "phase": pair.phase.name(),
        "recovery_level": pair.recovery,
        "fence_level": status.fence,
        "primary": backend(pair.primary.as_ref(), status.primary_pid, None),
        "shadow": backend(pair.shadow.as_ref(), status.shadow_pid, Some(&pair.shadow_note)),
        "shadow_note": pair.shadow_note,
        "refusal": pair.refusal,
        "halted": pair.halted,
        "rings": rings,
        "failovers": {
            "settled": counters.settled,
            "planned": counters.planned,
            "crash": counters.crash,
            "hang": counters.hang,
            "refused": counters.refused,
            "halted": counters.halted,
        },
        "counters": {
            "shadows_lost": counters.shadows_lost,
            "canaries_failed": counters.canaries_failed,
            "isolated": counters.isolated,
            "drains_unverified": counters.drains_unverified,
            "drains_overdue": counters.drains_overdue,
            "answered_from_record": counters.answered_from_record,
            "refused_messages": counters.refused_messages,
            "protocol_errors": counters.protocol_errors,
            "vmm_requests": counters.vmm_requests,
            "vmm_connections": counters.vmm_connections,
            "observations": counters.observations,
            "observer_gaps": counters.observer_gaps,
        },
        "last_failover": pair.last.as_ref().map(report),
        "broker": { "pid": std::process::id(), "rss_bytes": rss_bytes(), "descriptors": status.descriptors },
    })
}

fn backend(backend: Option<&BackendStatus>, pid: Option<u32>, reason: Option<&str>) -> Value {
    backend.map_or(Value::Null, |backend| {
        let mut value = json!({ "pid": pid, "generation": backend.id.0, "state": backend.state.name() });
        if let Some(took) = backend.canary {
            value["canary_us"] = json!((took.as_micros() * 10.0).round() / 10.0);
        }
        if let Some(reason) = reason {
            value["reason"] = json!(reason);
        }
        value
    })
}

/// A failover's report.
pub(crate) fn report(report: &Report) -> Value {
    let micros = |nanos: warmswap_core::Nanos| (nanos.as_micros() * 10.0).round() / 10.0;
    let phases: serde_json::Map<String, Value> = Phase::TIMED
        .iter()
        .zip(report.phases)
        .map(|(phase, spent)| (phase.name().to_owned(), json!(micros(spent))))
        .collect();
    json!({
        "id": report.id,
        "result": report.outcome.name(),
        "kind": report.kind.name(),
        "cause": report.cause,
        "message": report.message,
        "inflight": report.inflight,
        "survivors": report.survivors,
        "recovery": report.recovery.name(),
        "fence": report.fence.name(),
        "evidence": report.evidence,
        "attempts": report.attempts,
        "isolated": report.isolated,
        "phases_us": phases,
        "blackout_us": micros(report.blackout),
    })
}

fn rss_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}
