//! `lab demo`: a disk under load whose backend fails in one way after the other, twice at the same time: guarded by a broker that acts on what it
//! foresees, and by one that acts only once something has failed. For each: when the fault began, when the broker knew and why, when the guest
//! suffered, and for how long. The last fault lies below both backends, and must not be acted upon.

use std::time::Duration;

use anyhow::{Context, ensure};

use super::cases::{Case, Mode, Variant};
use super::events::{Told, What};
use super::play::{Outcome, play};
use crate::campaign::form::Form;
use crate::campaign::kind::{Backend, Kind};
use crate::campaign::plan::{Plan, Spec};
use crate::campaign::pool::unmount_abandoned;
use crate::common::interrupt;
use crate::common::workspace::Workspace;

/// Before a fault, from its onset to its collapse, in seconds; what runs out takes longer.
const HEALTHY_S: f64 = 10.0;
const FAULT_S: f64 = 8.0;
/// Time between words that it goes on.
const DOT_EVERY: Duration = Duration::from_secs(1);

/// Options.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What is drawn at random
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// A fault of the demonstration.
struct Scene {
    title: &'static str,
    kind: &'static str,
    form: Form,
    backend: Backend,
    workload: &'static str,
    variant: Variant,
}

const SCENES: [Scene; 6] = [
    Scene {
        title: "A store path that limps: reads and writes through the primary's own mount take longer and longer",
        kind: "store-slow",
        form: Form::Ramp,
        backend: Backend::Qsd,
        workload: "mixed-qd8",
        variant: Variant::OwnPath,
    },
    Scene {
        title: "A stall that grows: the backend stands still again and again, longer each time",
        kind: "stall",
        form: Form::Ramp,
        backend: Backend::Blk,
        workload: "mixed-qd8",
        variant: Variant::Backend,
    },
    Scene {
        title: "A silent hang: the backend answers its control channel and completes nothing any more",
        kind: "spin",
        form: Form::Sudden,
        backend: Backend::BlkDirect,
        workload: "mixed-qd8",
        variant: Variant::Backend,
    },
    Scene {
        title: "A kill: nobody can know it before",
        kind: "kill",
        form: Form::Sudden,
        backend: Backend::Qsd,
        workload: "read-qd32",
        variant: Variant::Backend,
    },
    Scene {
        title: "A leak: the backend loses memory with every request, until its limit kills it",
        kind: "leak",
        form: Form::Ramp,
        backend: Backend::Blk,
        workload: "mixed-qd8",
        variant: Variant::Backend,
    },
    Scene {
        title: "A store that limps below both: primary and shadow see it through the same mount, and a swap would help nobody",
        kind: "store-slow",
        form: Form::Ramp,
        backend: Backend::Qsd,
        workload: "mixed-qd8",
        variant: Variant::Common,
    },
];

/// Runs the demonstration.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    interrupt::note_signals();
    unmount_abandoned();
    let workspace = Workspace::new(&std::env::temp_dir(), "campaign")?;
    let plan = Plan::parse(&format!(
        "healthy_s = {HEALTHY_S:.1}\nfault_s = {FAULT_S:.1}\nharmless_s = 20.0\ntimeout_ms = 1000\ntick_ms = 20\nwindow_ms = 200\n\
         shuffle = 0\nruns = []\n"
    ))?;
    println!(
        "A guest under load on a disk with a warm shadow. Six faults, each twice at the same time: warmswap as it is, and with --observe, \
         where it acts\nonly once the backend has failed. Time is compressed: a window of 200 ms stands for a second."
    );
    let mut sums = [0.0; 2];
    let mut wrong = Vec::new();
    for (number, scene) in SCENES.iter().enumerate() {
        println!("\n{}. {}", number + 1, scene.title);
        let case = scene.case(number, args.seed)?;
        let [predictive, reactive] = both(&case, &plan, &workspace)?;
        tell(scene, &predictive, &reactive);
        if scene.variant != Variant::Common {
            sums = [sums[0] + predictive.stall_s(), sums[1] + reactive.stall_s()];
        }
        wrong.extend(scene.wrong(&predictive));
    }
    println!("\nThe guest stood still for {:.2} s in all; where warmswap only reacts, for {:.2} s.", sums[0], sums[1]);
    println!("Nothing was lost, nothing came twice, every block held what was written.");
    ensure!(wrong.is_empty(), "not as it should be: {}", wrong.join("; "));
    Ok(())
}

impl Scene {
    fn case(&self, number: usize, seed: u64) -> anyhow::Result<Case> {
        let kind = Kind::from_name(self.kind).with_context(|| format!("there is no kind {}", self.kind))?;
        let Scene { form, backend, workload, variant, .. } = *self;
        let name = format!("demo-{number}");
        Ok(Case { spec: Spec { name, kind, form, backend, workload, seed, ticks: false }, variant })
    }

    /// What a run must not have.
    fn wrong(&self, run: &Outcome) -> Option<String> {
        let endured = &run.endured;
        let what = if endured.lost + endured.duplicated + endured.corrupted > 0 {
            format!("{} lost, {} twice, {} corrupted", endured.lost, endured.duplicated, endured.corrupted)
        } else if self.variant == Variant::Common && run.foresights().count() > 0 {
            "a failover that could not help was made".to_owned()
        } else {
            return None;
        };
        Some(format!("{}: {what}", self.kind))
    }
}

/// Both ways at the same time.
fn both(case: &Case, plan: &Plan, workspace: &Workspace) -> anyhow::Result<[Outcome; 2]> {
    let one = |mode: Mode| -> anyhow::Result<Outcome> {
        let directory = workspace.directory(&format!("{}-{}", case.spec.name, mode.name()))?;
        let outcome = play(case, mode, plan, &directory);
        // What was mounted there was unmounted; what is left is in nobody's way.
        let _ = std::fs::remove_dir_all(&directory);
        outcome
    };
    std::thread::scope(|scope| {
        let runs = [Mode::Predictive, Mode::Reactive].map(|mode| scope.spawn(move || one(mode)));
        let mut seconds = 0;
        while !runs.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            std::thread::sleep(DOT_EVERY);
            seconds += 1;
            if seconds % 5 == 0 {
                eprint!("   … {seconds} s\r");
            }
        }
        let [predictive, reactive] = runs.map(|run| run.join().expect("it does not panic"));
        Ok([predictive?, reactive?])
    })
}

/// What happened, in the order in which it did.
fn tell(scene: &Scene, predictive: &Outcome, reactive: &Outcome) {
    let onset = predictive.onset_ns.unwrap_or(predictive.began_ns);
    let since = |at: u64| format!("{:>6.2} s", (at as f64 - onset as f64) / 1e9);
    println!("   {:>6.2} s  the fault begins", 0.0);
    let of_interest = |told: &&Told| told.at_ns >= onset && !matches!(told.what, What::Lost);
    let mut said = Vec::new();
    for told in predictive.told.iter().filter(of_interest) {
        let text = match &told.what {
            What::Predicted if said.contains(&"predicted") => continue,
            What::Predicted => {
                said.push("predicted");
                format!("warmswap knows: {}", told.why)
            }
            What::Withheld if said.contains(&"withheld") => continue,
            What::Withheld => {
                said.push("withheld");
                format!("nothing is done: {}", told.why)
            }
            What::Settled(kind) => format!("the shadow serves ({kind})"),
            What::Halted => format!("halted: {}", told.why),
            What::Lost => continue,
        };
        println!("   {}  {text}", since(told.at_ns));
    }
    let suffered = reactive.first_felt_ns().map(|at| at.saturating_sub(reactive.onset_ns.unwrap_or(0)) as f64 / 1e9);
    match (scene.variant, suffered) {
        (Variant::Common, _) => {}
        (_, Some(at)) => println!("   {at:>6.2} s  without foresight the guest stands still for the first time"),
        (_, None) => {
            println!("             without foresight the guest never stood still for a tenth of a second");
        }
    }
    println!(
        "             the guest stood still for {:.2} s; without foresight for {:.2} s",
        predictive.stall_s(),
        reactive.stall_s()
    );
}
