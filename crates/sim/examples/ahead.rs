use warmswap_core::Nanos;
fn main() {
    let args: Vec<u64> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let mut checks = std::collections::BTreeMap::<String, (u64, u64, String)>::new();
    let (mut n, mut inexact) = (0, 0);
    for seed in args[0]..args[1] {
        let mut o = warmswap_sim::Options::from_seed(seed);
        o.ring_size = args[2] as u16;
        o.depth = (args[2] as u16).min(args[3] as u16);
        o.burst = args[4] as u16;
        o.indirect = true;
        o.preempted = true;
        o.service = Nanos::from_micros(8);
        o.pause = Nanos::from_micros(30);
        o.faults = Default::default();
        o.faults.kill = true;
        o.faults.kill_at_store = true;
        o.stops = false;
        o.disconnects = false;
        o.resets = false;
        o.hotplug = false;
        o.fault_every = Nanos::from_millis(1);
        o.safety = Nanos::from_millis(30);
        o.keeping = warmswap_sim::Keeping::Correct;
        o.survivors = warmswap_core::Survivors::Place;
        o.rings = 1;
        o.torn_looks = seed % 2 == 0;
        let out = warmswap_sim::run(seed, &o);
        n += out.stats.failovers;
        inexact += out.stats.halts.values().sum::<u64>();
        if let Some(f) = out.failure {
            let e = checks
                .entry(
                    f.check.to_owned() + &f.detail.chars().filter(|c| !c.is_ascii_digit()).take(90).collect::<String>(),
                )
                .or_insert((0, seed, f.detail));
            e.0 += 1;
        }
    }
    println!("failovers {n} halts {inexact}");
    for (c, (k, s, d)) in checks {
        println!("{k:6} {c}: seed {s}: {d}");
    }
}
