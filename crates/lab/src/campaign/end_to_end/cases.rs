//! What is tried: a case for each kind and seed, and for what lies in the store both ways it can lie.

use anyhow::{Context, ensure};

use crate::campaign::form::Form;
use crate::campaign::kind::{KINDS, Kind, Means, Outside};
use crate::campaign::plan::Spec;
use crate::campaign::workload::WORKLOADS;

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// There is none.
    Harmless,
    /// The backend's: another one does not have it.
    Backend,
    /// The way to the storage that the first backend takes. The shadow takes another one.
    OwnPath,
    /// Everybody's: no other backend helps.
    Common,
}

impl Variant {
    /// The word in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Variant::Harmless => "harmless",
            Variant::Backend => "backend",
            Variant::OwnPath => "own-path",
            Variant::Common => "common",
        }
    }

    /// The variants of a kind.
    fn of(kind: &Kind) -> &'static [Variant] {
        match kind.means {
            Means::Sham(_) | Means::Harmless(_) => &[Variant::Harmless],
            Means::Outside(Outside::Store(_)) => &[Variant::OwnPath, Variant::Common],
            // The file system is one, and the guest's own driver is no backend.
            Means::Outside(Outside::Fill) | Means::LostKicks | Means::LostCalls => &[Variant::Common],
            Means::Outside(_) | Means::Hook(_) => &[Variant::Backend],
        }
    }
}

/// How the device is looked after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Mode {
    /// A guarded pair, as a user has it: a predicted failure is acted on.
    Predictive,
    /// The same pair, which acts once something has failed, and not before.
    Reactive,
    /// No broker: a backend that ends is started again, and the guest connects again.
    Reconnect,
}

impl Mode {
    /// Every mode.
    pub(super) const ALL: [Mode; 3] = [Mode::Predictive, Mode::Reactive, Mode::Reconnect];

    /// The word on the command line and in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Mode::Predictive => "predictive",
            Mode::Reactive => "reactive",
            Mode::Reconnect => "reconnect",
        }
    }
}

/// A case: the same in every mode.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) spec: Spec,
    pub(super) variant: Variant,
}

impl Case {
    /// Whether it is tried in a mode: what harms nobody only says whether foresight is needless.
    pub(super) fn fits(&self, mode: Mode) -> bool {
        self.spec.kind.is_fault() || mode == Mode::Predictive
    }
}

/// The cases of these kinds, or all, with these seeds. Forms take turns with the seed unless they are named: then there is one case for each
/// that the kind has. So do backends and workloads.
pub(super) fn cases(kinds: &[String], forms: &[String], seeds: &[u64]) -> anyhow::Result<Vec<Case>> {
    let named = |name: &String| Kind::from_name(name).with_context(|| format!("there is no kind {name}"));
    let kinds: Vec<&'static Kind> =
        if kinds.is_empty() { KINDS.iter().collect() } else { kinds.iter().map(named).collect::<Result<_, _>>()? };
    let form = |name: &String| Form::from_name(name).with_context(|| format!("there is no form {name}"));
    let forms: Vec<Form> = forms.iter().map(form).collect::<Result<_, _>>()?;
    let mut cases = Vec::new();
    for seed in seeds {
        for kind in &kinds {
            let named: Vec<Form> = kind.forms.iter().copied().filter(|form| forms.contains(form)).collect();
            let turn = *seed as usize + kind.name.bytes().map(usize::from).sum::<usize>();
            let own = [kind.forms[*seed as usize % kind.forms.len()]];
            for form in if forms.is_empty() { &own[..] } else { &named } {
                for variant in Variant::of(kind) {
                    let name = format!("{:04}", cases.len());
                    cases.push(Case { spec: spec(name, kind, *form, turn, *seed), variant: *variant });
                }
            }
        }
    }
    ensure!(!cases.is_empty(), "there is nothing to be tried: none of these kinds has one of these forms");
    Ok(cases)
}

fn spec(name: String, kind: &'static Kind, form: Form, turn: usize, seed: u64) -> Spec {
    let workloads = if kind.workloads.is_empty() { &WORKLOADS[..] } else { kind.workloads };
    let backend = kind.backends[turn / kind.forms.len() % kind.backends.len()];
    let workload = workloads[(turn + turn / workloads.len()) % workloads.len()];
    Spec { name, kind, form, backend, workload, seed, ticks: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_cases_and_they_are_the_same_every_time() {
        let all = cases(&[], &[], &[1, 2]).expect("all");
        assert_eq!(format!("{all:?}"), format!("{:?}", cases(&[], &[], &[1, 2]).expect("all")));
        for kind in KINDS {
            let of: Vec<&Case> = all.iter().filter(|case| case.spec.kind.name == kind.name).collect();
            assert_eq!(of.len(), 2 * Variant::of(kind).len(), "{}", kind.name);
            assert!(of.iter().all(|case| kind.forms.contains(&case.spec.form)), "{}", kind.name);
            assert!(of.iter().all(|case| (case.variant != Variant::Harmless) == kind.is_fault()), "{}", kind.name);
        }
        let two = cases(&["store-slow".to_owned()], &["ramp".to_owned(), "step".to_owned()], &[1]).expect("listed");
        let variants: Vec<&str> = two.iter().map(|case| case.variant.name()).collect();
        assert_eq!(variants, ["own-path", "common", "own-path", "common"]);
        cases(&["stroe-slow".to_owned()], &[], &[1]).expect_err("there is no such kind");
    }
}
