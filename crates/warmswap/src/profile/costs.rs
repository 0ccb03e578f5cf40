//! What a call of each source costs: printed, and asserted nowhere.
//!
//! `cargo test --release -p warmswap --lib costs -- --ignored --nocapture`

use std::sync::Arc;
use std::time::{Duration, Instant};

use warmswap_predict::Measure;

use super::group::Group;
use super::host::{Pressure, Store};
use super::page::Page;
use super::process::Process;
use super::process::tests::{Told, subject_of};
use super::source::{Effort, Image, Source};

const CALLS: usize = 200;

fn print(source: &str, effort: Effort, state: &str, mut call: impl FnMut()) {
    let mut took: Vec<f64> = (0..CALLS)
        .map(|_| {
            let began = Instant::now();
            call();
            let micros = began.elapsed().as_secs_f64() * 1e6;
            // As cold as between two ticks, if not as long.
            std::thread::sleep(Duration::from_millis(1));
            micros
        })
        .collect();
    took.sort_by(f64::total_cmp);
    let mean = took.iter().sum::<f64>() / CALLS as f64;
    println!(
        "{source:10} {state:5} {effort:?}: median {:.2} us, mean {mean:.2} us, p90 {:.2} us",
        took[CALLS / 2],
        took[CALLS * 9 / 10]
    );
}

#[test]
#[ignore = "measures and prints"]
fn what_a_call_costs() {
    let mut child = Told::start();
    child.tell("idle", 3);
    child.tell("touch", 64 << 20);
    child.tell("page", 1);
    for state in ["idle", "busy"] {
        if state == "busy" {
            child.tell("spin", 1);
        }
        let mut subject = Arc::into_inner(subject_of(child.pid())).expect("nobody else has it");
        subject.images.push(Image::at(&std::env::current_exe().expect("it runs this")).expect("it is there"));
        let subject = Arc::new(subject);
        let mut sources: Vec<(&str, Box<dyn Source>)> = vec![
            ("process", Box::new(Process::new(Arc::clone(&subject), false))),
            ("aging", Box::new(Process::new(Arc::clone(&subject), true))),
            ("group", Box::new(Group::new(Arc::clone(&subject)))),
            ("store", Box::new(Store::new(Arc::clone(&subject)))),
            ("page", Box::new(Page::new(Arc::clone(&subject)))),
        ];
        let mut measure = Measure::default();
        for (name, source) in &mut sources {
            source.measure(0.1, Effort::Deep, &mut measure);
            print(name, Effort::Light, state, || source.measure(0.1, Effort::Light, &mut measure));
            // Most of what is read once a second is not read at each tick.
            print(name, Effort::Full, state, || source.measure(0.1, Effort::Full, &mut measure));
            print(&format!("{name} 1 s"), Effort::Full, state, || source.measure(1.0, Effort::Full, &mut measure));
            print(name, Effort::Deep, state, || source.measure(1_000.0, Effort::Deep, &mut measure));
        }
        let mut host = Pressure::default();
        for effort in [Effort::Light, Effort::Full] {
            print("pressure", effort, state, || {
                host.read(0.1, effort);
                host.add(&mut measure);
            });
        }
    }
}
