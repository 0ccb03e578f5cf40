fn main() {
    let args: Vec<u64> = std::env::args().skip(1).map(|it| it.parse().unwrap()).collect();
    let mut failed = std::collections::BTreeMap::<String, Vec<u64>>::new();
    let (mut deaths, mut failovers) = (0, 0);
    let mut halts = std::collections::BTreeMap::<String, u64>::new();
    for seed in args[0]..args[1] {
        let options = warmswap_sim::Options::from_seed(seed);
        if args.len() > 2 && !options.faults.broker_dies { continue; }
        if args[1] - args[0] == 1 { 
            let run = warmswap_sim::replay(seed, &options, &mut |at, text| println!("{at} {text}"));
            println!("{options}\n{:?}", run.failure); return; }
        let run = std::panic::catch_unwind(|| warmswap_sim::run(seed, &options));
        let Ok(run) = run else { println!("{seed}: panic"); continue };
        deaths += run.stats.faults.get("broker dies").copied().unwrap_or(0);
        failovers += run.stats.failovers;
        for (k, n) in &run.stats.halts { *halts.entry(k.clone()).or_default() += n; }
        if let Some(failure) = &run.failure {
            let list = failed.entry(failure.check.to_string()).or_default();
            list.push(seed);
            if list.len() < 4 { println!("{seed}: {}: {}", failure.check, failure.detail); }
        }
    }
    println!("deaths {deaths} failovers {failovers} failed {failed:?} halts {halts:?}");
}
