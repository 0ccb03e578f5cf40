//! What catches the animals that the simulator cannot meet, or does not catch: tests and instruments, by name.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use warmswap_zoo::{Animal, VARIABLE};

use crate::common::process::die_with_parent;

/// A checker that is run as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Checker {
    /// A test of a crate: package, binary, full name.
    Test(&'static str, &'static str, &'static str),
    /// An instrument of this laboratory.
    Lab(&'static [&'static str]),
}

impl fmt::Display for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Checker::Test(package, _, name) => write!(f, "{package} {name}"),
            Checker::Lab(words) => write!(f, "lab {}", words.join(" ")),
        }
    }
}

/// A short run of the crash enumerator: every store of small rings.
const CRASH: Checker =
    Checker::Lab(&["crash", "--queue-size", "4", "--event-idx", "off", "--engine", "sync", "--slow-reads", "off"]);

const fn core(name: &'static str) -> Checker {
    Checker::Test("warmswap-core", "warmswap_core", name)
}

const fn wire(name: &'static str) -> Checker {
    Checker::Test("warmswap-wire", "warmswap_wire", name)
}

/// Every death between two stores of an in-flight region, on short histories.
const EVERY_DEATH: Checker =
    wire("inflight::track::tests::a_death_after_any_store_of_any_short_history_loses_and_repeats_nothing");

/// What is written when rings are handed over, and once they are known to be enabled.
const EVERY_SIGNAL: Checker =
    core("pair::tests::failovers::every_ring_is_kicked_and_called_and_kicked_again_once_it_is_known_to_be_enabled");

/// The checker that is to catch an animal if the simulator does not.
pub(super) fn named(animal: Animal) -> Option<Checker> {
    CHECKERS.iter().find(|(known, _)| *known == animal).map(|(_, checker)| *checker)
}

/// Whether an animal lives where the simulator never comes.
pub(super) fn is_beyond_the_simulator(animal: Animal) -> bool {
    ["warmswap/", "blk/", "socket/", "predict/"].iter().any(|part| animal.home().starts_with(part))
}

/// At least one for each that the simulator may miss.
const CHECKERS: &[(Animal, Checker)] = &[
    (
        Animal::ClaimByIndexAlone,
        core(
            "pair::tests::failovers::a_base_that_is_the_used_index_by_chance_is_not_believed_while_something_older_is_owed",
        ),
    ),
    (Animal::LateStopBelieved, core("pair::tests::stops::a_stop_that_is_answered_too_late_proves_nothing")),
    (
        Animal::FullTurnForgotten,
        core("pair::tests::stops::a_ring_whose_index_stands_at_zero_after_a_full_turn_goes_on"),
    ),
    (
        Animal::WrittenAheadIgnored,
        core("observer::tests::what_is_written_ahead_of_the_index_leaves_no_wrong_exact_set"),
    ),
    (Animal::KickLost, EVERY_SIGNAL),
    (Animal::KickBeforeEnableLost, EVERY_SIGNAL),
    (Animal::CallLost, EVERY_SIGNAL),
    (
        Animal::FirstCallLost,
        core("pair::tests::start::a_call_that_comes_after_the_kick_is_written_once_the_backend_has_it"),
    ),
    (
        Animal::EventIdxLeft,
        core("pair::tests::failovers::a_position_the_dead_backend_left_behind_is_moved_to_what_is_submitted_next"),
    ),
    (
        Animal::WarmingMissesChanges,
        core("pair::tests::start::a_ready_shadow_takes_the_place_of_a_primary_that_has_not_served_yet"),
    ),
    (
        Animal::OldMemoryUsed,
        core("pair::tests::vmm::other_memory_at_the_same_place_waits_for_whoever_may_still_have_the_old_one"),
    ),
    (
        Animal::NobodySuspected,
        core(
            "pair::tests::isolation::whoever_dies_after_the_one_an_operator_had_killed_speaks_against_what_was_in_flight",
        ),
    ),
    (
        Animal::RoleKept,
        core("pair::tests::canaries::one_that_became_primary_during_its_read_and_is_lost_leaves_the_role_to_another"),
    ),
    (
        Animal::RegionSwappedInCanary,
        core("pair::tests::regions::a_ring_that_starts_during_a_canary_read_does_not_take_its_region_away"),
    ),
    (Animal::RegionNotRenewed, core("pair::tests::regions::a_ring_of_another_driver_has_a_fresh_region")),
    (Animal::StopTakenForDrain, core("pair::tests::failovers::a_stop_that_is_not_verified_is_a_crash")),
    (
        Animal::StopAnsweredWhileServed,
        core("pair::tests::stops::a_stop_is_never_answered_while_a_living_backend_may_still_serve_the_ring"),
    ),
    (
        Animal::RestartedWhileDrained,
        core("pair::tests::failovers::a_kick_that_the_vmm_changes_during_a_drain_does_not_start_the_ring_again"),
    ),
    (Animal::FenceByTimeout, core("pair::tests::failovers::a_fence_without_proof_waits_and_nothing_is_handed_over")),
    (
        Animal::OneOfGroupKilled,
        Checker::Test("warmswap", "external", "a_backend_behind_a_wrapper_is_killed_and_proved_as_a_whole"),
    ),
    (Animal::ExitTakenForQuiet, Checker::Lab(&["fence"])),
    (Animal::PlacedWithoutWrap, core("pair::tests::failovers::survivors_are_placed_across_the_wrap_of_the_indices")),
    (Animal::SilenceIgnored, core("observer::tests::a_full_turn_of_the_indices_during_silence_is_never_called_exact")),
    (Animal::NoNotifyLeft, core("pair::tests::failovers::flags_the_dead_backend_left_behind_are_cleared")),
    (Animal::CallForgotten, core("pair::tests::stops::a_ring_can_be_stopped_and_started_while_another_runs_on")),
    (
        Animal::MemoryAckedEarly,
        core(
            "pair::tests::vmm::a_change_of_memory_without_acknowledgement_holds_back_the_next_request_until_both_have_it",
        ),
    ),
    (
        Animal::FeaturesDiffer,
        core("pair::tests::start::a_late_shadow_with_fewer_features_is_refused_with_the_difference"),
    ),
    (Animal::CapacityDiffers, core("pair::tests::start::a_shadow_of_another_capacity_is_refused_with_the_difference")),
    (
        Animal::WriteCacheForgotten,
        core("pair::tests::start::a_late_shadow_is_warmed_from_the_record_without_being_given_a_ring"),
    ),
    (
        Animal::ConfigChangeSwallowed,
        core("pair::tests::vmm::a_resize_seen_by_the_primary_is_told_to_the_vmm_and_followed_by_the_shadow"),
    ),
    (Animal::LogOnOneLeg, core("pair::tests::vmm::the_dirty_log_reaches_both_and_is_answered_with_its_description")),
    (
        Animal::LogAckedEarly,
        core("pair::tests::vmm::a_dirty_log_is_not_acknowledged_before_the_primary_marks_its_writes"),
    ),
    (
        Animal::HangKilledBlind,
        core("pair::tests::failovers::a_hang_while_it_is_not_known_what_is_owed_is_left_alone_for_a_while"),
    ),
    (
        Animal::BusyTakenForHung,
        core(
            "pair::tests::failovers::a_primary_that_completes_but_does_not_answer_is_alive_until_it_completes_nothing",
        ),
    ),
    (
        Animal::TrialOutlivesStop,
        core("pair::tests::isolation::a_ring_the_vmm_resets_during_the_trial_is_not_touched_afterwards"),
    ),
    (Animal::PingPong, core("pair::tests::foresee::the_next_one_has_to_wait")),
    (
        Animal::CommonCauseIgnored,
        core("foresight::tests::a_slow_primary_beside_a_quick_shadow_is_replaced_and_one_beside_a_slow_shadow_is_not"),
    ),
    (
        Animal::NanInModel,
        Checker::Test(
            "warmswap-predict",
            "warmswap_predict",
            "regress::tests::the_covariance_stays_positive_and_bounded",
        ),
    ),
    (Animal::MarksNeverCleared, EVERY_DEATH),
    (Animal::ClearedBeforePublished, EVERY_DEATH),
    (Animal::RegionAtZero, EVERY_DEATH),
    (Animal::BatchHalfRepaired, EVERY_DEATH),
    (Animal::ResubmittedByHead, EVERY_DEATH),
    (Animal::ResubmittedTwice, EVERY_DEATH),
    (Animal::BaseOverRegion, EVERY_DEATH),
    (Animal::MarkedBeforeCounted, EVERY_DEATH),
    (
        Animal::StopUndrained,
        Checker::Test("warmswap", "blk", "a_stop_is_answered_when_everything_that_was_taken_is_completed"),
    ),
    (Animal::OwedCallForgotten, CRASH),
    (Animal::PublishedBeforeWritten, CRASH),
    (Animal::PackedOffered, wire("features::tests::what_no_broker_could_hand_over_is_masked_for_every_device")),
    (Animal::EventWithoutWrap, wire("ring::tests::event_crossing_wraps")),
    (
        Animal::PartialHeader,
        Checker::Test(
            "warmswap-socket",
            "warmswap_socket",
            "tests::a_message_that_comes_byte_by_byte_is_received_once_it_is_whole",
        ),
    ),
    (
        Animal::LengthUnchecked,
        Checker::Test("warmswap-wire", "round_trip", "a_missing_or_surplus_byte_or_descriptor_is_an_error"),
    ),
];

/// Test binaries with the animals in them, built once.
#[derive(Debug)]
pub(super) struct Bench {
    /// Executable and directory by package and binary.
    binaries: BTreeMap<(String, String), (PathBuf, PathBuf)>,
}

impl Bench {
    /// Builds what these checkers need.
    pub(super) fn build(checkers: &[Checker]) -> anyhow::Result<Self> {
        let mut packages: Vec<&str> = checkers.iter().filter_map(|checker| checker.package()).collect();
        packages.sort_unstable();
        packages.dedup();
        let mut bench = Bench { binaries: BTreeMap::new() };
        if packages.is_empty() {
            return Ok(bench);
        }
        let mut cargo = Command::new("cargo");
        cargo.args(["test", "--no-run", "--quiet", "--message-format", "json", "--lib", "--tests"]);
        packages.iter().for_each(|package| _ = cargo.args(["--package", package]));
        packages.iter().for_each(|package| _ = cargo.args(["--features", &format!("{package}/zoo")]));
        cargo.arg("--manifest-path").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"));
        let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("running cargo")?;
        anyhow::ensure!(output.status.success(), "the checkers cannot be built");
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let message: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
            let (Some(executable), Some(manifest)) = (text(&message["executable"]), text(&message["manifest_path"]))
            else {
                continue;
            };
            let directory = PathBuf::from(&manifest).parent().map(PathBuf::from).unwrap_or_default();
            let package = message["package_id"].as_str().unwrap_or_default();
            let package = package.rsplit(['/', '#', '@']).find(|part| part.starts_with("warmswap"));
            let package = package.map_or_else(|| package_of(&directory), str::to_owned);
            let binary = text(&message["target"]["name"]).unwrap_or_default();
            bench.binaries.insert((package, binary), (executable.into(), directory));
        }
        Ok(bench)
    }

    /// Runs a checker. Whether it passed, and what it said if not.
    pub(super) fn passes(&self, checker: Checker, loose: Option<Animal>) -> anyhow::Result<Result<(), String>> {
        let mut command = match checker {
            Checker::Test(package, binary, name) => {
                let key = (package.to_owned(), binary.to_owned());
                let Some((executable, directory)) = self.binaries.get(&key) else {
                    bail!("{package} has no test binary {binary}")
                };
                let mut command = Command::new(executable);
                command.args(["--exact", name]).current_dir(directory);
                command
            }
            Checker::Lab(words) => {
                let mut command = Command::new("/proc/self/exe");
                command.args(words);
                command
            }
        };
        command.env(VARIABLE, loose.map_or("", Animal::id)).env("RUST_BACKTRACE", "0").stdin(Stdio::null());
        let output = die_with_parent(&mut command).output().with_context(|| format!("running {checker}"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        // A name that no test has would pass whatever is loose.
        if matches!(checker, Checker::Test(..)) && said.contains("running 0 tests") {
            bail!("there is no test {checker}");
        }
        let words = format!("{said}{}", String::from_utf8_lossy(&output.stderr));
        Ok(if output.status.success() { Ok(()) } else { Err(reason(&words)) })
    }
}

impl Checker {
    fn package(&self) -> Option<&'static str> {
        match self {
            Checker::Test(package, ..) => Some(package),
            Checker::Lab(_) => None,
        }
    }
}

/// The package that lives in a directory: the program's is named as its directory, the others have its name before theirs.
fn package_of(directory: &std::path::Path) -> String {
    match directory.file_name().and_then(|name| name.to_str()).unwrap_or_default() {
        "warmswap" => "warmswap".to_owned(),
        name => format!("warmswap-{name}"),
    }
}

/// The line that says most of why something failed.
fn reason(words: &str) -> String {
    let lines: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let panicked = lines.iter().position(|line| line.contains("panicked at")).and_then(|at| lines.get(at + 1));
    panicked.or(lines.last()).map_or_else(|| "it failed without a word".to_owned(), |line| (*line).to_owned())
}
