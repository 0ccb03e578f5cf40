//! What was found, as a table and as JSON.

use std::time::Duration;

use serde_json::{Value, json};

use super::checks::{Check, DISABLE, PRIVATE_KICK, STOP};
use super::outcome::Verdict;
use super::stage::Subject;
use crate::common::commit::commit;

/// Longest detail that a line of the table has; JSON has all of it.
const DETAIL_MAX: usize = 200;

/// The result of one check.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) check: &'static Check,
    pub(super) verdict: Verdict,
    pub(super) detail: String,
    pub(super) took: Duration,
}

impl Finding {
    /// Its line of the table.
    pub(super) fn line(&self) -> String {
        let verdict = match self.verdict {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::NotApplicable => "n/a",
            Verdict::Crash => "CRASH",
            Verdict::Timeout => "TIMEOUT",
        };
        let mut line = format!("{:<20} {verdict:<8} {}", self.check.id, self.check.name);
        if !self.detail.is_empty() {
            let short: String = self.detail.chars().take(DETAIL_MAX).collect();
            let dots = if short.len() < self.detail.len() { "…" } else { "" };
            line.push_str(&format!("\n{:30}{short}{dots}", ""));
        }
        if !self.verdict.is_good() {
            line.push_str(&format!("\n{:30}[{}]", "", self.check.clause));
        }
        line
    }

    fn json(&self) -> Value {
        json!({
            "id": self.check.id,
            "name": self.check.name,
            "clause": self.check.clause,
            "result": self.verdict.word(),
            "detail": self.detail,
            "seconds": (self.took.as_secs_f64() * 1e3).round() / 1e3,
        })
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) findings: Vec<Finding>,
    /// Not interrupted.
    pub(super) complete: bool,
}

impl Report {
    fn count(&self, verdict: Verdict) -> usize {
        self.findings.iter().filter(|finding| finding.verdict == verdict).count()
    }

    /// Whether nothing is wrong with the back-end, and it can be drained.
    pub(super) fn is_good(&self) -> bool {
        let can_be_drained = !self.knows_drains() || self.drain().is_some();
        can_be_drained && self.findings.iter().all(|finding| finding.verdict.is_good())
    }

    fn passes(&self, id: &str) -> Option<bool> {
        let finding = self.findings.iter().find(|finding| finding.check.id == id)?;
        (finding.verdict != Verdict::NotApplicable).then_some(finding.verdict == Verdict::Pass)
    }

    /// Whether it was found out how the back-end is drained, or that it is not.
    fn knows_drains(&self) -> bool {
        let made = |id: &str| self.findings.iter().any(|finding| finding.check.id == id);
        self.passes(STOP).is_some() && [STOP, DISABLE, PRIVATE_KICK].into_iter().all(made)
    }

    /// The gentlest way of draining that holds, by the words of `warmswap guard --drain`.
    fn drain(&self) -> Option<&'static str> {
        let methods = [(STOP, "stop"), (DISABLE, "disable"), (PRIVATE_KICK, "private-kick")];
        methods.into_iter().find(|(id, _)| self.passes(id) == Some(true)).map(|(_, method)| method)
    }

    /// The closing lines.
    pub(super) fn summary(&self) -> String {
        let counts: Vec<String> = Verdict::ALL
            .into_iter()
            .map(|verdict| (verdict, self.count(verdict)))
            .filter(|(verdict, count)| *count > 0 || *verdict == Verdict::Pass || *verdict == Verdict::Fail)
            .map(|(verdict, count)| format!("{count} {}", verdict.word()))
            .collect();
        let mut text = format!("{} checks: {}", self.findings.len(), counts.join(", "));
        if self.knows_drains() {
            let drain = self.drain().unwrap_or("none of the three: it is fenced");
            text.push_str(&format!("\ndrained by: {drain}"));
        }
        if !self.complete {
            text.push_str("\ninterrupted: not all checks were made");
        }
        text
    }

    /// For programs.
    pub(super) fn json(&self, subject: &Subject) -> Value {
        let counts: serde_json::Map<String, Value> =
            Verdict::ALL.into_iter().map(|verdict| (verdict.word().to_owned(), json!(self.count(verdict)))).collect();
        json!({
            "backend": subject.line.join(" "),
            "type": subject.kind.name(),
            "commit": commit(),
            "complete": self.complete,
            "checks": self.findings.iter().map(Finding::json).collect::<Vec<_>>(),
            "counts": counts,
            "drain": {
                "stop": self.passes(STOP),
                "disable": self.passes(DISABLE),
                "private-kick": self.passes(PRIVATE_KICK),
                "first": self.drain(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conform::checks::all;

    fn report(results: &[(&str, Verdict)]) -> Report {
        let finding = |(id, verdict): &(&str, Verdict)| Finding {
            check: all().into_iter().find(|check| check.id == *id).expect("there is such a check"),
            verdict: *verdict,
            detail: String::new(),
            took: Duration::ZERO,
        };
        Report { findings: results.iter().map(finding).collect(), complete: true }
    }

    #[test]
    fn a_back_end_that_no_method_drains_is_not_good_though_each_may_be_left_out() {
        let one = report(&[(STOP, Verdict::Fail), (PRIVATE_KICK, Verdict::Pass), (DISABLE, Verdict::Fail)]);
        assert_eq!((one.drain(), one.is_good()), (Some("private-kick"), false));
        let gentle = report(&[(STOP, Verdict::Pass), (PRIVATE_KICK, Verdict::NotApplicable), (DISABLE, Verdict::Pass)]);
        assert_eq!((gentle.drain(), gentle.is_good()), (Some("stop"), true));
        let none = report(&[(STOP, Verdict::Fail), (PRIVATE_KICK, Verdict::NotApplicable), (DISABLE, Verdict::Crash)]);
        assert_eq!((none.drain(), none.is_good()), (None, false));
        let unmeasured = report(&[(STOP, Verdict::NotApplicable)]);
        assert!(unmeasured.is_good(), "nothing is known of it");
    }
}
