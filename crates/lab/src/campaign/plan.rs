//! A campaign's plan: a TOML file, and the runs that it stands for.
//!
//! ```toml
//! healthy_s = 10.0        # before a fault begins
//! fault_s = 10.0          # from there to collapse; what runs out has 120 windows, poison grows by a hundredth a window to four times
//! harmless_s = 25.0       # a run without a fault
//! timeout_ms = 1000       # a guest that gets no answer for so long has lost its disk
//! tick_ms = 20
//! window_ms = 200         # one window stands for a second
//! shuffle = 1             # seed of the order
//!
//! [[runs]]
//! kinds = ["latency"]     # see `lab campaign --kinds`
//! forms = ["ramp"]        # all that the kind has, if it is not said
//! backends = ["blk"]      # the same
//! workloads = ["read-qd1"] # the same
//! seeds = [1, 2]
//! count = 3               # runs for each kind, form and seed; backends and workloads take turns
//! ticks = true            # keep their ticks as well as their windows
//! ```

use std::path::Path;

use anyhow::{Context, bail, ensure};

use super::form::Form;
use super::kind::{Backend, Kind};
use super::workload::WORKLOADS;
use crate::common::rng::Rng;

/// A plan has fewer runs.
const RUNS_MAX: usize = 100_000;

/// A plan.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {
    /// Time before a fault begins, in seconds.
    pub(super) healthy_s: f64,
    /// Time from there to collapse, in seconds.
    pub(super) fault_s: f64,
    /// Length of a run without a fault, in seconds.
    pub(super) harmless_s: f64,
    /// A request without an answer for so long is a failure, in milliseconds.
    pub(super) timeout_ms: u64,
    /// Time between two measurements, in milliseconds.
    pub(super) tick_ms: u64,
    /// Length of a window, in milliseconds.
    pub(super) window_ms: u64,
    /// Seed of the order in which the runs come.
    shuffle: u64,
    runs: Vec<Entry>,
}

#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    kinds: Vec<String>,
    forms: Option<Vec<String>>,
    backends: Option<Vec<String>>,
    workloads: Option<Vec<String>>,
    seeds: Vec<u64>,
    #[serde(default = "one")]
    count: u64,
    #[serde(default)]
    ticks: bool,
}

fn one() -> u64 {
    1
}

/// A run that is to be made.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    /// Its number in the campaign.
    pub(super) name: String,
    pub(super) kind: &'static Kind,
    pub(super) form: Form,
    pub(super) backend: Backend,
    pub(super) workload: &'static str,
    /// Everything that chance decides comes from it.
    pub(super) seed: u64,
    /// Its ticks are kept.
    pub(super) ticks: bool,
}

impl Spec {
    /// The same under another name.
    pub(super) fn named(&self, name: &str) -> Spec {
        Spec { name: name.to_owned(), ..self.clone() }
    }

    /// Chance for one purpose of this run: it repeats with the seed, and runs of other kinds, forms, backends or workloads have another.
    pub(super) fn chance(&self, purpose: u64) -> Rng {
        let names = [self.kind.name, self.form.name(), self.backend.name(), self.workload].join("/");
        // FNV-1a.
        let mixed = names
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        Rng::new(self.seed ^ mixed, purpose)
    }
}

impl Plan {
    /// Reads one.
    pub(super) fn parse(text: &str) -> anyhow::Result<Plan> {
        let plan: Plan = toml::from_str(text)?;
        let lengths = [("healthy_s", plan.healthy_s), ("fault_s", plan.fault_s), ("harmless_s", plan.harmless_s)];
        for (name, seconds) in lengths {
            ensure!((2.0..=3_600.0).contains(&seconds), "{name} = {seconds}, expected 2 to 3600");
        }
        ensure!((100..=60_000).contains(&plan.timeout_ms), "timeout_ms = {}, expected 100 to 60000", plan.timeout_ms);
        ensure!((10..=1_000).contains(&plan.tick_ms), "tick_ms = {}, expected 10 to 1000", plan.tick_ms);
        let whole = plan.window_ms >= plan.tick_ms && plan.window_ms.is_multiple_of(plan.tick_ms);
        ensure!(whole, "window_ms = {}, expected a multiple of tick_ms", plan.window_ms);
        Ok(plan)
    }

    /// Reads one from a file.
    pub(super) fn read(path: &Path) -> anyhow::Result<(Plan, String)> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let plan = Plan::parse(&text).with_context(|| path.display().to_string())?;
        Ok((plan, text))
    }

    /// Its runs, in their order.
    pub(super) fn specs(&self) -> anyhow::Result<Vec<Spec>> {
        let mut specs = Vec::new();
        for (at, entry) in self.runs.iter().enumerate() {
            entry.expand(&mut specs).with_context(|| format!("entry {} of runs", at + 1))?;
            ensure!(specs.len() < RUNS_MAX, "more than {RUNS_MAX} runs");
        }
        // Fisher and Yates: whatever part of a campaign there is, it is a fair sample of the whole.
        let mut rng = Rng::new(self.shuffle, 7);
        for at in (1..specs.len()).rev() {
            specs.swap(at, rng.below(at as u64 + 1) as usize);
        }
        specs.iter_mut().enumerate().for_each(|(at, spec)| spec.name = format!("{at:05}"));
        Ok(specs)
    }
}

impl Entry {
    fn expand(&self, specs: &mut Vec<Spec>) -> anyhow::Result<()> {
        for name in &self.kinds {
            let kind = Kind::from_name(name).with_context(|| format!("there is no kind {name}"))?;
            let forms = self.forms_of(kind)?;
            let backends = chosen("backend", self.backends.as_deref(), kind.backends, |it| it.name())?;
            let fitting = if kind.workloads.is_empty() { &WORKLOADS[..] } else { kind.workloads };
            let workloads = chosen("workload", self.workloads.as_deref(), fitting, |it| it)?;
            // Kinds begin with another backend and workload each.
            let mut turn = name.bytes().map(u64::from).sum::<u64>();
            for seed in &self.seeds {
                for form in &forms {
                    for number in 0..self.count {
                        let backend = backends[turn as usize % backends.len()];
                        let workload = workloads[(turn + turn / workloads.len() as u64) as usize % workloads.len()];
                        // Runs that differ in nothing else differ in their seed.
                        let seed = seed + number * 1_000;
                        specs.push(Spec {
                            name: String::new(),
                            kind,
                            form: *form,
                            backend,
                            workload,
                            seed,
                            ticks: self.ticks,
                        });
                        turn += 1;
                    }
                }
            }
        }
        Ok(())
    }

    fn forms_of(&self, kind: &Kind) -> anyhow::Result<Vec<Form>> {
        let Some(names) = &self.forms else { return Ok(kind.forms.to_vec()) };
        let form = |name: &String| Form::from_name(name).with_context(|| format!("there is no form {name}"));
        let named = names.iter().map(form).collect::<anyhow::Result<Vec<_>>>()?;
        let forms: Vec<Form> = named.into_iter().filter(|form| kind.forms.contains(form)).collect();
        ensure!(!forms.is_empty(), "{} has none of these forms", kind.name);
        Ok(forms)
    }
}

/// Those of `all` that are named, or all.
fn chosen<T: Copy>(
    what: &str,
    named: Option<&[String]>,
    all: &[T],
    name: impl Fn(T) -> &'static str,
) -> anyhow::Result<Vec<T>> {
    let Some(named) = named else { return Ok(all.to_vec()) };
    let chosen: Vec<T> = all.iter().copied().filter(|it| named.iter().any(|wanted| wanted == name(*it))).collect();
    if chosen.is_empty() {
        let all: Vec<&str> = all.iter().map(|it| name(*it)).collect();
        bail!("{what} {}: expected one of {}", named.join(", "), all.join(", "));
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "healthy_s = 10.0\nfault_s = 10.0\nharmless_s = 20.0\ntimeout_ms = 1000\ntick_ms = 20\nwindow_ms = 200\nshuffle = 3\n";

    fn specs(runs: &str) -> anyhow::Result<Vec<Spec>> {
        Plan::parse(&format!("{HEAD}{runs}"))?.specs()
    }

    #[test]
    fn a_plan_stands_for_the_same_runs_every_time() {
        let text = "[[runs]]\nkinds = [\"latency\", \"steady\"]\nseeds = [1, 2]\ncount = 2\n";
        let specs_of = |text| specs(text).expect("it is right");
        let (one, other) = (specs_of(text), specs_of(text));
        assert_eq!(format!("{one:?}"), format!("{other:?}"));
        // Four forms of one and one of the other, two seeds, two of each.
        assert_eq!(one.len(), (4 + 1) * 2 * 2);
        assert_eq!((one[0].name.as_str(), one[19].name.as_str()), ("00000", "00019"));
        let mut seeds: Vec<u64> = one.iter().filter(|it| it.kind.name == "steady").map(|it| it.seed).collect();
        seeds.sort_unstable();
        assert_eq!(seeds, [1, 2, 1001, 1002]);
        assert!(one.iter().any(|it| it.workload != one[0].workload && it.backend != one[0].backend));
    }

    #[test]
    fn what_is_wrong_with_a_plan_is_said() {
        let says = |runs: &str| format!("{:#}", specs(runs).expect_err("it is wrong"));
        assert!(
            says("[[runs]]\nkinds = [\"latecy\"]\nseeds = [1]").contains("entry 1 of runs: there is no kind latecy")
        );
        assert!(
            says("[[runs]]\nkinds = [\"latency\"]\nseeds = [1]\nbackends = [\"qsd\"]").contains("expected one of blk")
        );
        assert!(says("[[runs]]\nkinds = [\"latency\"]\nseed = [1]").contains("seed"));
        let wrong = Plan::parse(&HEAD.replace("window_ms = 200", "window_ms = 30")).expect_err("no multiple");
        assert!(format!("{wrong:#}").contains("runs") || format!("{wrong:#}").contains("window_ms"));
    }

    #[test]
    fn the_plans_of_the_repository_are_right() {
        for text in [
            include_str!("../../plans/default.toml"),
            include_str!("../../plans/hour.toml"),
            include_str!("../../plans/smoke.toml"),
        ] {
            let specs = Plan::parse(text).and_then(|plan| plan.specs()).expect("it is right");
            assert!(specs.iter().any(|it| it.kind.is_fault()) && specs.iter().any(|it| !it.kind.is_fault()));
        }
    }
}
