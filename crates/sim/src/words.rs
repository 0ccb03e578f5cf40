//! What is said of a run, for a trace.

use warmswap_core::{Entry, Event as Happened, Value};
use warmswap_wire::Request;

pub(crate) fn in_words(event: &Happened) -> String {
    match event {
        Happened::VmmConnected => "the VMM connects".to_owned(),
        Happened::VmmRequest { request, .. } => format!("VMM: {}", request_in_words(request)),
        Happened::VmmRefused { request, reason, .. } => format!("VMM: request {request}: {reason}"),
        Happened::VmmGone { reason } => format!("the VMM is gone: {reason}"),
        Happened::LinkUp { backend, .. } => format!("{backend} is connected"),
        Happened::LinkMessage { backend, header, .. } => {
            let name =
                warmswap_wire::RequestCode::from_id(header.request).map_or("?", warmswap_wire::RequestCode::name);
            format!("{backend} answers {name}")
        }
        Happened::BackendRequest { backend, .. } => format!("{backend} asks"),
        Happened::LinkDown { backend, reason } | Happened::Exited { backend, reason } => format!("{backend}: {reason}"),
        Happened::Fenced { backend, evidence, .. } => format!("{backend} is fenced: {evidence}"),
        Happened::FenceWaiting { backend, reason } => format!("{backend} is not fenced yet: {reason}"),
        Happened::Kicked { ring } => format!("ring {ring} is kicked"),
        Happened::FailoverRequested { now, .. } => {
            format!("the operator wants a failover{}", if *now { " now" } else { "" })
        }
        Happened::FailurePredicted(foresight) => format!("alarm: {}", foresight.alarm.name()),
        Happened::Tick => "tick".to_owned(),
    }
}

pub(crate) fn request_in_words(request: &Request) -> String {
    let name = request.code().name();
    match request {
        Request::SetVringNum(it)
        | Request::SetVringBase(it)
        | Request::SetVringEnable(it)
        | Request::GetVringBase(it) => {
            format!("{name} {}={}", it.index, it.value)
        }
        Request::SetVringKick(it) | Request::SetVringCall(it) | Request::SetVringErr(it) => {
            format!("{name} {}", it.index)
        }
        Request::SetVringAddr(it) => format!("{name} {} at {:#x}", it.index, it.descriptor),
        Request::AddMemReg { region, .. } | Request::RemMemReg(region) => format!("{name} at {:#x}", region.guest_addr),
        _ => name.to_owned(),
    }
}

pub(crate) fn entry_in_words(entry: &Entry) -> String {
    let mut words = entry.event.to_owned();
    for (name, value) in &entry.properties {
        let value = match value {
            Value::Number(value) => value.to_string(),
            Value::Micros(value) => format!("{value:.0}"),
            Value::Text(value) => format!("{value:?}"),
            Value::Flag(value) => value.to_string(),
        };
        words.push_str(&format!(" {name}={value}"));
    }
    words
}

/// A reason without its numbers.
pub(crate) fn generic(reason: &str) -> String {
    let mut words = String::with_capacity(reason.len());
    let mut digits = false;
    for letter in reason.chars() {
        if letter.is_ascii_digit() {
            if !digits {
                words.push('N');
            }
            digits = true;
        } else {
            digits = false;
            words.push(letter);
        }
    }
    words
}
