//! The outward form of status and reports. The core knows no JSON; its values are converted here by hand.

use serde_json::{Value, json};
use warmswap_core::{BackendStatus, Phase, PolicyStatus, Report};

use crate::config::DeviceConfig;
use crate::driver::DeviceStatus;
use crate::journal::timestamp;

/// A status answer.
pub(crate) fn status(devices: &[(String, DeviceStatus)], config: &DeviceConfig) -> Value {
    let list: Vec<Value> = devices.iter().map(|(name, status)| device(name, status, config)).collect();
    json!({ "devices": list })
}

fn device(name: &str, status: &DeviceStatus, config: &DeviceConfig) -> Value {
    let pair = &status.pair;
    let no_shadow = config.no_shadow();
    let shadow_note = no_shadow.unwrap_or(&pair.shadow_note);
    let refusal = match (no_shadow, &pair.refusal) {
        (Some(why), Some(_)) => Some(format!("there is no shadow: {why}")),
        (_, refusal) => refusal.clone(),
    };
    let last = pair.last.as_ref().map(|last| {
        let mut last = report(last);
        if let Some(ended) = status.last_failover_at {
            last["ended"] = json!(timestamp(ended));
            last["seconds_ago"] = json!(ended.elapsed().map_or(0, |ago| ago.as_secs()));
        }
        last
    });
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
        "type": config.pair.device.name(),
        "socket": config.socket.display().to_string(),
        "state": pair.state.name(),
        "vmm": if pair.vmm_connected { "connected" } else { "absent" },
        "phase": pair.phase.name(),
        "recovery_level": pair.recovery,
        "fence_level": status.fence,
        "primary": backend(pair.primary.as_ref(), status.primary_pid, None),
        "shadow": backend(pair.shadow.as_ref(), status.shadow_pid, Some(shadow_note)),
        "shadow_wanted": no_shadow.is_none(),
        "shadow_note": shadow_note,
        "refusal": refusal,
        "misconfigured": status.misconfigured,
        "after_crash_of": config.predecessor,
        "halted": pair.halted,
        "rings": rings,
        "failovers": {
            "settled": counters.settled,
            "planned": counters.planned,
            "predicted": counters.predicted,
            "crash": counters.crash,
            "hang": counters.hang,
            "refused": counters.refused,
            "halted": counters.halted,
        },
        "policy": policy(&pair.policy),
        "counters": {
            "alarms": counters.alarms,
            "withheld": counters.withheld,
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
        "last_failover": last,
        "broker": { "pid": std::process::id(), "version": env!("CARGO_PKG_VERSION"), "rss_bytes": rss_bytes(), "descriptors": status.descriptors,
            "configuration": status.configuration.map(|(number, _)| number),
            "configuration_undone": status.configuration.is_some_and(|(_, undone)| undone), "late": status.late, "late_worst_us": (status.late_worst.as_micros() * 10.0).round() / 10.0 },
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

/// What is done about predictions.
fn policy(policy: &PolicyStatus) -> Value {
    json!({
        "on_prediction": policy.on_prediction.name(),
        "left_this_hour": policy.left_this_hour,
        "cooling_s": policy.cooling.map(|left| left.0 / 1_000_000_000),
        "canary_usual_us": policy.canary_usual.map(|usual| (usual.as_micros() * 10.0).round() / 10.0),
        "withheld": policy.withheld.as_ref().map(|why| json!({ "why": why.name(), "reason": why.to_string() })),
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
