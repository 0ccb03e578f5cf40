//! Goes through the zoo.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use warmswap_zoo::Animal;

use super::Args;
use super::checkers::{Bench, Checker, is_beyond_the_simulator, named};
use super::hunt::{Hunt, first_seed, hunt};
use super::report::{Report, Row};
use crate::common::interrupt;

/// Seeds from each start that must be clean while everybody is in his cage.
const CLEAN_MAX: u64 = 500;

/// Runs the instrument.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    interrupt::note_signals();
    let animals = animals(&args.animals)?;
    if args.list {
        for animal in animals {
            println!("{:<28} {:<26} {} ({})", animal.id(), animal.home(), animal.what(), animal.source());
        }
        return Ok(());
    }
    let began = Instant::now();
    let clean_seeds = clean(args)?;
    let hunts = hunt_all(args, &animals)?;
    let rows = judge(&animals, &hunts)?;
    ensure!(!interrupt::is_asked(), "interrupted");
    let report = Report::new(rows, clean_seeds, args.starts, args.seeds_max, began.elapsed());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else if args.markdown {
        report.print_markdown();
    } else {
        report.print();
    }
    ensure!(report.is_ok(), "an animal is at large");
    Ok(())
}

fn animals(wanted: &[String]) -> anyhow::Result<Vec<Animal>> {
    if wanted.is_empty() {
        return Ok(Animal::ALL.to_vec());
    }
    let find = |id: &String| {
        let known = Animal::ALL.iter().copied().find(|animal| animal.id() == id);
        known.with_context(|| format!("there is no animal {id:?}; `lab zoo --list` has them all"))
    };
    wanted.iter().map(find).collect()
}

/// Runs the seeds with nothing loose: a checker that always fails catches everything.
fn clean(args: &Args) -> anyhow::Result<u64> {
    let most = args.seeds_max.min(CLEAN_MAX);
    let starts: Vec<u64> = (0..args.starts).collect();
    for (start, hunt) in in_parallel(&starts, |start| hunt(None, *start, most))? {
        if let Some(catch) = hunt.catch {
            let seed = first_seed(start) + hunt.seeds - 1;
            anyhow::bail!("seed {seed} fails with nothing loose: {}: {}", catch.check, catch.detail);
        }
    }
    Ok(most * args.starts)
}

/// Hunts from the first start; those that were caught there from the others as well.
fn hunt_all(args: &Args, animals: &[Animal]) -> anyhow::Result<BTreeMap<Animal, Vec<Hunt>>> {
    let within: Vec<Animal> = animals.iter().copied().filter(|animal| !is_beyond_the_simulator(*animal)).collect();
    let first = in_parallel(&within, |animal| {
        let hunt = hunt(Some(*animal), 0, args.seeds_max)?;
        let said = match &hunt.catch {
            Some(catch) => format!("caught after {} seeds: {}", hunt.seeds, catch.check),
            None => format!("not caught within {} seeds", hunt.seeds),
        };
        eprintln!("{:<28} {said}", animal.id());
        Ok(hunt)
    })?;
    let tasks: Vec<(Animal, u64)> = first
        .iter()
        .filter(|(_, hunt)| hunt.catch.is_some())
        .flat_map(|(animal, _)| (1..args.starts).map(|start| (*animal, start)))
        .collect();
    let mut hunts: BTreeMap<Animal, Vec<Hunt>> = first.into_iter().map(|(animal, hunt)| (animal, vec![hunt])).collect();
    for ((animal, _), hunt) in in_parallel(&tasks, |(animal, start)| hunt(Some(*animal), *start, args.seeds_max))? {
        hunts.entry(animal).or_default().push(hunt);
    }
    Ok(hunts)
}

/// A row for each animal; those that the simulator has not caught are given to their checkers.
fn judge(animals: &[Animal], hunts: &BTreeMap<Animal, Vec<Hunt>>) -> anyhow::Result<Vec<Row>> {
    let hunted = |animal: Animal| hunts.get(&animal).map_or(&[][..], Vec::as_slice);
    let is_caught = |animal: Animal| Row::hunted(animal, hunted(animal)).is_caught();
    let mut checkers: Vec<Checker> =
        animals.iter().filter(|animal| !is_caught(**animal)).filter_map(|animal| named(*animal)).collect();
    checkers.sort_unstable();
    checkers.dedup();
    let bench = Bench::build(&checkers)?;
    let mut controls = BTreeMap::new();
    for checker in checkers {
        eprintln!("{checker}, with nothing loose");
        controls.insert(checker, bench.passes(checker, None)?);
    }
    let mut rows = Vec::new();
    for animal in animals.iter().copied() {
        rows.push(if is_caught(animal) {
            Row::hunted(animal, hunted(animal))
        } else {
            let Some(checker) = named(animal) else {
                let nobody = Err("the simulator has not caught it, and no checker is named for it".to_owned());
                rows.push(Row::checked(animal, "-".to_owned(), nobody, hunted(animal)));
                continue;
            };
            eprintln!("{checker}, with {} loose", animal.id());
            let caught = match (&controls[&checker], bench.passes(checker, Some(animal))?) {
                (Err(words), _) => Err(format!("{checker} fails with nothing loose: {words}")),
                (Ok(()), Ok(())) => Err(format!("{checker} passes with it loose")),
                (Ok(()), Err(words)) => Ok(words),
            };
            Row::checked(animal, checker.to_string(), caught, hunted(animal))
        });
    }
    Ok(rows)
}

/// Does something with each, as many at a time as there are processors. What comes of it is in their order.
fn in_parallel<T: Clone + Sync, R: Send>(
    tasks: &[T],
    work: impl Fn(&T) -> anyhow::Result<R> + Sync,
) -> anyhow::Result<Vec<(T, R)>> {
    let left: Mutex<VecDeque<usize>> = Mutex::new((0..tasks.len()).collect());
    let done: Mutex<BTreeMap<usize, R>> = Mutex::new(BTreeMap::new());
    let go_on = || -> anyhow::Result<()> {
        loop {
            let at = left.lock().expect("nobody panics with it").pop_front();
            let Some(at) = at.filter(|_| !interrupt::is_asked()) else { return Ok(()) };
            let result = work(&tasks[at])?;
            done.lock().expect("nobody panics with it").insert(at, result);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(go_on)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("panics end the process"))
    })?;
    ensure!(!interrupt::is_asked(), "interrupted");
    let done = done.into_inner().expect("nobody panics with it");
    Ok(done.into_iter().map(|(at, result)| (tasks[at].clone(), result)).collect())
}
