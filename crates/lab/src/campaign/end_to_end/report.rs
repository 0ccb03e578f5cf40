//! What came of all runs, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::cases::{Case, Mode};
use super::play::Outcome;

/// A case with what came of it in the modes it was tried in.
#[derive(Debug)]
pub(super) struct Tried<'a> {
    pub(super) case: &'a Case,
    /// In the order of [`Mode::ALL`].
    pub(super) outcomes: [Option<Outcome>; 3],
}

/// All that was tried.
#[derive(Debug)]
pub(super) struct Report<'a> {
    pub(super) modes: &'a [Mode],
    pub(super) tried: Vec<Tried<'a>>,
    /// Runs that could not be made.
    pub(super) errors: usize,
}

impl Tried<'_> {
    fn of(&self, mode: Mode) -> Option<&Outcome> {
        self.outcomes[mode as usize].as_ref()
    }

    fn runs(&self) -> impl Iterator<Item = (Mode, &Outcome)> {
        Mode::ALL.into_iter().filter_map(|mode| Some((mode, self.of(mode)?)))
    }

    /// Time from the predicted failover to the failure that it was for, in seconds. That failure is what a guest felt whose broker does not
    /// act on predictions, if there was one; and where the guest of this run felt one first, it is that one.
    fn lead_s(&self) -> Option<f64> {
        let run = self.of(Mode::Predictive)?;
        let (foreseen, own) = (run.foreseen()?, run.failed()?);
        let planned = run.collapse_ns - run.onset_ns?;
        let other = self.of(Mode::Reactive).and_then(Outcome::failed).unwrap_or(planned);
        let failure = if own < foreseen { own } else { other };
        Some((failure as f64 - foreseen as f64) / 1e9)
    }

    /// A fault that was tried in all of these modes: only then may they be compared.
    fn is_comparable(&self, modes: &[Mode]) -> bool {
        self.case.spec.kind.is_fault() && modes.iter().all(|mode| self.of(*mode).is_some())
    }

    fn json(&self) -> Value {
        let spec = &self.case.spec;
        let stalls = by_mode(|mode| self.of(mode).map(|run| rounded(run.stall_s())).into());
        let failovers = by_mode(|mode| self.of(mode).map_or(Value::Null, |run| json!(counts(run.failovers()))));
        json!({
            "kind": spec.kind.name, "form": spec.form.name(), "backend": spec.backend.name(), "workload": spec.workload,
            "variant": self.case.variant.name(), "seed": spec.seed, "stall_seconds": stalls, "failovers": failovers,
            "lead_s": self.lead_s().map(rounded),
        })
    }
}

/// An object with a value for each mode.
fn by_mode(value: impl Fn(Mode) -> Value) -> Value {
    Value::Object(Mode::ALL.into_iter().map(|mode| (mode.name().to_owned(), value(mode))).collect::<Map<_, _>>())
}

/// To milliseconds.
fn rounded(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

fn counts<'a>(names: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, usize> {
    let mut counts = BTreeMap::new();
    names.for_each(|name| *counts.entry(name).or_default() += 1);
    counts
}

/// All that is known of a run, for a file of details.
pub(super) fn details(case: &Case, mode: Mode, run: &Outcome) -> Value {
    let spec = &case.spec;
    let since = |ns: u64| rounded((ns as f64 - run.began_ns as f64) / 1e9);
    let told: Vec<Value> = run
        .told
        .iter()
        .map(|told| json!({"at_s": since(told.at_ns), "what": format!("{:?}", told.what), "why": told.why}))
        .collect();
    let stalls: Vec<[f64; 2]> =
        run.endured.stalls.iter().map(|stall| [since(stall.from_ns), since(stall.until_ns)]).collect();
    let endured = &run.endured;
    json!({
        "kind": spec.kind.name, "form": spec.form.name(), "backend": spec.backend.name(), "workload": spec.workload,
        "variant": case.variant.name(), "seed": spec.seed, "mode": mode.name(), "onset_s": run.onset_ns.map(since),
        "collapse_s": since(run.collapse_ns), "stall_s": rounded(run.stall_s()), "stall_before_s": rounded(run.stall_before_s()),
        "completed": endured.completed, "lost": endured.lost, "duplicated": endured.duplicated, "io_errors": endured.io_errors,
        "corrupted": endured.corrupted, "reconnects": endured.reconnects, "first": endured.first, "told": told, "stalls": stalls,
    })
}

impl Report<'_> {
    fn guarded(&self) -> impl Iterator<Item = &Outcome> {
        let runs = self.tried.iter().flat_map(Tried::runs);
        runs.filter(|(mode, _)| *mode != Mode::Reconnect).map(|(_, run)| run)
    }

    fn predictive(&self) -> impl Iterator<Item = &Outcome> {
        self.tried.iter().filter_map(|tried| tried.of(Mode::Predictive))
    }

    fn needless(&self) -> usize {
        self.predictive().map(Outcome::needless).sum()
    }

    fn useless(&self) -> usize {
        self.predictive().map(Outcome::useless).sum()
    }

    pub(super) fn lost(&self) -> u64 {
        self.guarded().map(|run| run.endured.lost).sum()
    }

    pub(super) fn corrupted(&self) -> u64 {
        self.guarded().map(|run| run.endured.corrupted).sum()
    }

    fn runs(&self) -> usize {
        self.tried.iter().map(|tried| tried.runs().count()).sum()
    }

    /// Stall of a mode over all faults that were tried in every mode, in seconds.
    fn stall_s(&self, mode: Mode) -> Option<f64> {
        let compared = self.tried.iter().filter(|tried| tried.is_comparable(self.modes));
        // The sum of no numbers is negative.
        let sum = || compared.filter_map(|tried| tried.of(mode)).map(Outcome::stall_s).sum::<f64>().max(0.0);
        self.modes.contains(&mode).then(sum)
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        json!({
            "stall_seconds": by_mode(|mode| self.stall_s(mode).map(rounded).into()),
            "per_kind": self.tried.iter().map(Tried::json).collect::<Vec<_>>(),
            "needless_failovers": self.needless(), "useless_failovers": self.useless(),
            "lost": self.lost(), "corrupted": self.corrupted(), "runs": self.runs(), "errors": self.errors,
        })
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut rows: BTreeMap<(&str, &str), Vec<&Tried<'_>>> = BTreeMap::new();
        for tried in &self.tried {
            rows.entry((tried.case.spec.kind.name, tried.case.variant.name())).or_default().push(tried);
        }
        let mut text = format!(
            "{:<17}{:<10}{:>5}{:>12}{:>11}{:>11}{:>9}  {:<28}{}\n",
            "kind",
            "variant",
            "cases",
            "predictive",
            "reactive",
            "reconnect",
            "lead s",
            "failovers, predictive",
            "reactive"
        );
        for ((kind, variant), tried) in &rows {
            text += &row(kind, variant, tried);
        }
        let [predictive, reactive, reconnect] = Mode::ALL.map(|mode| seconds(self.stall_s(mode)));
        let total = format!("{:<32}{predictive:>12}{reactive:>11}{reconnect:>11}", "stall seconds, faults");
        // A string takes what it is given.
        let _written = writeln!(text, "{total}");
        let _written = writeln!(
            text,
            "{} runs, {} that could not be made; guarded: {} requests lost, {} blocks corrupted; predicted failovers: {} needless, {} \
             useless",
            self.runs(),
            self.errors,
            self.lost(),
            self.corrupted(),
            self.needless(),
            self.useless()
        );
        text
    }
}

fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
}

/// A row of the table: all cases of a kind and variant.
fn row(kind: &str, variant: &str, tried: &[&Tried<'_>]) -> String {
    let stall = |mode: Mode| {
        let of: Vec<f64> = tried.iter().filter_map(|it| it.of(mode)).map(Outcome::stall_s).collect();
        seconds((!of.is_empty()).then(|| of.iter().sum()))
    };
    let failovers = |mode: Mode| {
        let all = counts(tried.iter().filter_map(|it| it.of(mode)).flat_map(Outcome::failovers));
        let words: Vec<String> = all.iter().map(|(name, count)| format!("{count} {name}")).collect();
        if words.is_empty() { "-".to_owned() } else { words.join(", ") }
    };
    let leads: Vec<f64> = tried.iter().filter_map(|it| it.lead_s()).collect();
    let lead = seconds((!leads.is_empty()).then(|| leads.iter().sum::<f64>() / leads.len() as f64));
    let [predictive, reactive, reconnect] = Mode::ALL.map(stall);
    format!(
        "{kind:<17}{variant:<10}{:>5}{predictive:>12}{reactive:>11}{reconnect:>11}{lead:>9}  {:<28}{}\n",
        tried.len(),
        failovers(Mode::Predictive),
        failovers(Mode::Reactive)
    )
}

#[cfg(test)]
mod tests {
    use super::super::cases::cases;
    use super::super::events::{Told, What};
    use super::super::guest::Endured;
    use super::super::stall::Stall;
    use super::*;

    const S: u64 = 1_000_000_000;

    fn run(stall: Option<(u64, u64)>, kind: Option<(&str, u64)>) -> Outcome {
        let stalls = stall.into_iter().map(|(from, until)| Stall { from_ns: from * S, until_ns: until * S }).collect();
        let settled = |(kind, at): (&str, u64)| {
            let what = What::Settled(kind.to_owned());
            Told { at_ns: at * S, what, why: String::new() }
        };
        let told = kind.into_iter().map(settled).collect();
        let endured = Endured { stalls, lost: 1, ..Endured::default() };
        Outcome { endured, told, began_ns: 0, onset_ns: Some(10 * S), collapse_ns: 20 * S }
    }

    #[test]
    fn modes_are_compared_over_the_same_cases_and_the_keys_are_those_that_were_promised() {
        let cases = cases(&["latency".to_owned(), "kill".to_owned()], &[], &[1]).expect("listed");
        let whole = [
            Some(run(None, Some(("predicted", 13)))),
            Some(run(Some((16, 22)), Some(("hang", 22)))),
            Some(run(Some((16, 26)), None)),
        ];
        let part = [None, Some(run(Some((11, 12)), None)), None];
        let tried =
            cases.iter().zip([whole, part]).map(|(case, outcomes)| Tried { case, outcomes }).collect::<Vec<_>>();
        let report = Report { modes: &Mode::ALL, tried, errors: 2 };
        let json = report.json();
        assert_eq!(json["stall_seconds"], json!({"predictive": 0.0, "reactive": 6.0, "reconnect": 10.0}));
        // Of the guarded ones.
        assert_eq!(
            (json["lost"].as_u64(), json["runs"].as_u64(), json["errors"].as_u64()),
            (Some(3), Some(4), Some(2))
        );
        assert_eq!(json["per_kind"][0]["lead_s"], json!(3.0));
        assert_eq!(json["per_kind"][0]["failovers"]["reactive"], json!({"hang": 1}));
        assert_eq!(json["per_kind"][1]["stall_seconds"]["predictive"], Value::Null);
        let keys: Vec<&String> = json.as_object().expect("an object").keys().collect();
        assert_eq!(keys.len(), 8);
        assert!(report.text().contains("1 predicted"), "{}", report.text());
    }
}
