use std::time::Instant;
fn main() {
    let args: Vec<u64> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let trace = std::env::args().any(|a| a == "trace");
    if trace {
        let options = warmswap_sim::Options::from_seed(args[0]);
        println!("{options}");
        let outcome =
            warmswap_sim::replay(args[0], &options, &mut |at, text| println!("{at:>12} {text}", at = at.to_string()));
        println!("{:?}", outcome.failure);
        return;
    }
    let began = Instant::now();
    let mut stats = warmswap_sim::Stats::default();
    let mut failures = std::collections::BTreeMap::<String, (u64, u64, String)>::new();
    for seed in args[0]..args[1] {
        let options = warmswap_sim::Options::from_seed(seed);
        let outcome = warmswap_sim::run(seed, &options);
        stats.add(&outcome.stats);
        if let Some(f) = outcome.failure {
            if std::env::args().any(|a| a == "all") {
                println!(
                    "{} {} {} {:?} ring {} burst {} depth {} torn {} cls {:?} {:?}",
                    seed,
                    f.check,
                    f.detail,
                    f.at,
                    options.ring_size,
                    options.burst,
                    options.depth,
                    options.torn_looks,
                    options.primary,
                    options.shadow
                );
            }
            let e = failures.entry(f.check.to_owned()).or_insert((0, seed, format!("{} {}", f.at, f.detail)));
            e.0 += 1;
        }
    }
    let took = began.elapsed().as_secs_f64();
    println!("{stats:#?}");
    for (check, (n, seed, detail)) in &failures {
        println!("{n:6} {check}: seed {seed}: {detail}");
    }
    println!(
        "{:.0} seeds/s, {:.2} ms/seed, {:.0} ns/step",
        (args[1] - args[0]) as f64 / took,
        took * 1e3 / (args[1] - args[0]) as f64,
        took * 1e9 / stats.steps as f64
    );
}
