//! From the table to the kernel.

use super::table::{Must, Profile, Rule, Test, rules};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;

/// For each system call when it is allowed: if one of the rules holds, or always if there is none.
pub(super) type Chains = BTreeMap<libc::c_long, Vec<SeccompRule>>;

/// What a profile allows.
pub(super) fn chains(profile: Profile) -> Result<Chains, BackendError> {
    merge(rules(profile))
}

fn merge<'a>(rules: impl Iterator<Item = &'a Rule>) -> Result<Chains, BackendError> {
    let mut always = Vec::new();
    let mut chains = Chains::new();
    for rule in rules {
        let conditions = conditions(rule.only)?;
        for call in rule.calls {
            if rule.only.is_empty() {
                always.push(call.number);
            }
            chains.entry(call.number).or_default().extend(conditions.iter().cloned());
        }
    }
    // "Always" from one rule outweighs the conditions of another.
    for number in always {
        chains.insert(number, Vec::new());
    }
    Ok(chains)
}

/// All tests must hold; a rule of the filter can ask for one value of an argument only.
fn conditions(tests: &[Test]) -> Result<Vec<SeccompRule>, BackendError> {
    if tests.is_empty() {
        return Ok(Vec::new());
    }
    let mut alternatives = vec![Vec::new()];
    for test in tests {
        let mut longer = Vec::new();
        for (operator, value) in comparisons(test.must) {
            // The kernel takes these arguments as 32 bits, or looks at bits of the lower half: the upper one says
            // nothing.
            let condition = SeccompCondition::new(test.arg, SeccompCmpArgLen::Dword, operator, u64::from(value))?;
            for shorter in &alternatives {
                let mut alternative: Vec<SeccompCondition> = shorter.clone();
                alternative.push(condition.clone());
                longer.push(alternative);
            }
        }
        alternatives = longer;
    }
    alternatives.into_iter().map(SeccompRule::new).collect()
}

fn comparisons(must: Must) -> Vec<(SeccompCmpOp, u32)> {
    match must {
        Must::BeOneOf(values) => values.iter().map(|value| (SeccompCmpOp::Eq, value.bits)).collect(),
        Must::Have(value) => vec![(SeccompCmpOp::MaskedEq(u64::from(value.bits)), value.bits)],
        Must::Lack(value) => vec![(SeccompCmpOp::MaskedEq(u64::from(value.bits)), 0)],
        Must::BeThisProcess => {
            let own = rustix::process::getpid().as_raw_nonzero().get();
            vec![(SeccompCmpOp::Eq, own.cast_unsigned())]
        }
    }
}

/// Puts a filter in force for the calling thread.
pub(super) fn install(chains: Chains, violation: SeccompAction) -> Result<(), seccompiler::Error> {
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(chains, violation, SeccompAction::Allow, architecture)?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)
}

#[cfg(test)]
mod tests {
    use super::super::table::{Call, Value};
    use super::*;

    const CALL: Call = Call { name: "SYS_fcntl", number: libc::SYS_fcntl };
    const ONE: Value = Value { name: "ONE", bits: 1 };
    const TWO: Value = Value { name: "TWO", bits: 2 };
    const EITHER: Rule =
        Rule { calls: &[CALL], only: &[Test { arg: 1, must: Must::BeOneOf(&[ONE, TWO]) }], why: "of two" };
    const BOTH: Rule = Rule {
        calls: &[CALL],
        only: &[Test { arg: 1, must: Must::BeOneOf(&[ONE, TWO]) }, Test { arg: 2, must: Must::Lack(TWO) }],
        why: "of two, and a bit",
    };
    const ALWAYS: Rule = Rule { calls: &[CALL], only: &[], why: "always" };

    fn alternatives(rules: &[&Rule]) -> usize {
        merge(rules.iter().copied()).unwrap()[&libc::SYS_fcntl].len()
    }

    #[test]
    fn a_rule_without_tests_outweighs_those_with_tests_in_either_order() {
        assert_eq!(alternatives(&[&EITHER]), 2);
        assert_eq!(alternatives(&[&EITHER, &ALWAYS]), 0, "none means always");
        assert_eq!(alternatives(&[&ALWAYS, &EITHER]), 0, "none means always");
    }

    #[test]
    fn rules_for_the_same_call_add_up_and_tests_multiply() {
        assert_eq!(alternatives(&[&BOTH]), 2);
        assert_eq!(alternatives(&[&EITHER, &BOTH]), 4);
        let chains = merge([&BOTH].into_iter()).unwrap();
        let condition =
            |arg, operator, value| SeccompCondition::new(arg, SeccompCmpArgLen::Dword, operator, value).unwrap();
        let lacking = condition(2, SeccompCmpOp::MaskedEq(2), 0);
        let expected =
            [1, 2].map(|value| SeccompRule::new(vec![condition(1, SeccompCmpOp::Eq, value), lacking.clone()]).unwrap());
        assert_eq!(chains[&libc::SYS_fcntl], expected);
    }
}
