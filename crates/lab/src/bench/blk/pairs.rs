//! What the runs of a cell come to. Arithmetic only.

use serde::Serialize;
use serde_json::{Value, json};

use super::cell::Cell;
use crate::bench::spread::{Samples, rounded};
use crate::bench::throughput::Run;

/// Who runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Turn {
    /// Our backend.
    Blk,
    /// QSD in the mode that does most.
    Qsd,
    /// QSD in the mode that does most per processor time, where that is another.
    Frugal,
    /// Another backend, whatever it is.
    Peer,
    /// The lab's own loop.
    Limit,
}

impl Turn {
    /// All there are.
    pub(super) const ALL: [Turn; 5] = [Turn::Blk, Turn::Qsd, Turn::Frugal, Turn::Peer, Turn::Limit];

    /// Index of its backend. The limit has none.
    pub(super) fn side(self) -> Option<usize> {
        (self != Turn::Limit).then_some(self as usize)
    }
}

/// What came out of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Figures {
    /// Requests.
    pub(super) requests: u64,
    /// Requests per second.
    pub(super) iops: f64,
    /// Processor time of the backend in seconds.
    pub(super) cpu_s: f64,
    /// Requests per second of it.
    pub(super) iops_per_cpu: f64,
    /// Median of the latency. The limit measures none.
    pub(super) p50_us: f64,
    /// 99th percentile.
    pub(super) p99_us: f64,
    /// 99.9th percentile.
    pub(super) p999_us: f64,
}

impl Figures {
    /// Of a run of a guest, during which its backend used `cpu_ns`.
    pub(super) fn of_run(run: &Run, cpu_ns: u64) -> Self {
        let (requests, iops, cpu_s) = (run.completed, run.iops, cpu_ns as f64 / 1e9);
        let iops_per_cpu = requests as f64 / cpu_s;
        Figures { requests, iops, cpu_s, iops_per_cpu, p50_us: run.p50_us, p99_us: run.p99_us, p999_us: run.p999_us }
    }

    /// Of so many requests in so many seconds.
    pub(super) fn of_count(requests: u64, seconds: f64, cpu_ns: u64) -> Self {
        let run = Run { completed: requests, iops: requests as f64 / seconds, ..Run::default() };
        Figures::of_run(&run, cpu_ns)
    }
}

/// One run of each.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Pair {
    /// In the order they ran.
    turns: Vec<(Turn, Figures)>,
    /// Cores that the backends used whose turn it was not, at most.
    idle_cores: f64,
}

impl Pair {
    /// Adds a run, during which all other backends used `idle_cores`.
    pub(super) fn add(&mut self, turn: Turn, figures: Figures, idle_cores: f64) {
        self.turns.push((turn, figures));
        self.idle_cores = self.idle_cores.max(idle_cores);
    }

    fn of(&self, turn: Turn) -> Option<&Figures> {
        self.turns.iter().find(|(other, _)| *other == turn).map(|(_, figures)| figures)
    }
}

/// A cell that was measured.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    /// What each was, in the order of `Turn`.
    pub(super) names: [Option<String>; 5],
    /// QSD's modes and what they did when they were tried.
    pub(super) tried: Vec<Value>,
    /// The same of the limit's ways.
    pub(super) limit_tried: Vec<Value>,
    /// The engine blk says it has.
    pub(super) blk_engine: Option<String>,
    /// The pairs.
    pub(super) pairs: Vec<Pair>,
}

impl Measured {
    /// The cell of the report: each ratio beside its range over the pairs, then what each side did.
    pub(super) fn row(&self, cell: &Cell) -> Value {
        let iops = |figures: &Figures| figures.iops;
        let per_cpu = |figures: &Figures| figures.iops_per_cpu;
        let frugal = if self.names[Turn::Frugal as usize].is_some() { Turn::Frugal } else { Turn::Qsd };
        let mut row = json!({
            "name": cell.to_string(),
            "direct": cell.medium.direct(),
            "pairs": self.pairs.len(),
            "iops": rounded(self.samples(Turn::Blk, iops).median(), 0),
            "tried": self.tried,
            "limit_tried": self.limit_tried,
            "blk_engine": self.blk_engine,
            "idle_cores_max": rounded(self.pairs.iter().map(|pair| pair.idle_cores).fold(0.0, f64::max), 4),
            "raw": self.pairs,
        });
        let mut ratio = |name: &str, other: Turn, of: fn(&Figures) -> f64| {
            let ratios = self.ratios(other, of);
            row[name] = rounded(ratios.median(), 4).into();
            row[format!("{name}_range")] = range(&ratios, 4);
        };
        ratio("iops_ratio_qsd", Turn::Qsd, iops);
        ratio("iops_per_cpu_ratio_qsd", Turn::Qsd, per_cpu);
        ratio("iops_per_cpu_ratio_best_mode", frugal, per_cpu);
        ratio("p99_ratio_qsd", Turn::Qsd, |figures| figures.p99_us);
        ratio("p999_ratio_qsd", Turn::Qsd, |figures| figures.p999_us);
        ratio("limit_ratio", Turn::Limit, iops);
        if self.names[Turn::Peer as usize].is_some() {
            ratio("iops_ratio_peer", Turn::Peer, iops);
            ratio("iops_per_cpu_ratio_peer", Turn::Peer, per_cpu);
            ratio("p99_ratio_peer", Turn::Peer, |figures| figures.p99_us);
        }
        for (turn, field) in Turn::ALL.into_iter().zip(["blk", "qsd", "qsd_per_cpu", "peer", "limit"]) {
            if let Some(name) = &self.names[turn as usize] {
                row[field] = self.summary(turn, name);
            }
        }
        row
    }

    /// Medians and ranges of one side.
    fn summary(&self, turn: Turn, name: &str) -> Value {
        let mut summary = json!({"what": name});
        let mut add = |name: &str, digits: i32, of: fn(&Figures) -> f64| {
            let samples = self.samples(turn, of);
            summary[name] = rounded(samples.median(), digits).into();
            summary[format!("{name}_range")] = range(&samples, digits);
        };
        add("iops", 0, |figures| figures.iops);
        add("iops_per_cpu", 0, |figures| figures.iops_per_cpu);
        add("cpu_s", 4, |figures| figures.cpu_s);
        if turn != Turn::Limit {
            add("p50_us", 1, |figures| figures.p50_us);
            add("p99_us", 1, |figures| figures.p99_us);
            add("p999_us", 1, |figures| figures.p999_us);
        }
        summary
    }

    fn samples(&self, turn: Turn, of: fn(&Figures) -> f64) -> Samples {
        let mut samples = Samples::default();
        self.pairs.iter().filter_map(|pair| pair.of(turn)).for_each(|figures| samples.push(of(figures)));
        samples
    }

    /// blk over another, pair by pair.
    fn ratios(&self, other: Turn, of: fn(&Figures) -> f64) -> Samples {
        let mut samples = Samples::default();
        for pair in &self.pairs {
            if let (Some(blk), Some(other)) = (pair.of(Turn::Blk), pair.of(other)) {
                samples.push(of(blk) / of(other));
            }
        }
        samples
    }
}

fn range(samples: &Samples, digits: i32) -> Value {
    let (min, max) = samples.range();
    json!([rounded(min, digits), rounded(max, digits)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::blk::cell::{Asked, Medium};

    const CELL: Cell = Cell { medium: Medium::Disk, asked: Asked::SmallReads, depth: 32, queues: 1 };

    fn figures(iops: f64, cpu_s: f64, p99_us: f64) -> Figures {
        let run = Run { completed: iops as u64, iops, p50_us: 1.0, p99_us, p999_us: 2.0 * p99_us };
        Figures::of_run(&run, (cpu_s * 1e9) as u64)
    }

    fn pair(blk: Figures, qsd: Figures, limit: Figures) -> Pair {
        let mut pair = Pair::default();
        pair.add(Turn::Limit, limit, 0.0);
        pair.add(Turn::Qsd, qsd, 0.25);
        pair.add(Turn::Blk, blk, 0.125);
        pair
    }

    fn measured(pairs: Vec<Pair>) -> Measured {
        let name = |name: &str| Some(name.to_owned());
        let names = [name("blk"), name("native"), None, None, name("pread")];
        Measured { names, tried: Vec::new(), limit_tried: Vec::new(), blk_engine: None, pairs }
    }

    #[test]
    fn ratios_are_blk_over_the_other_and_medians_are_of_ratios_not_of_figures() {
        let limit = figures(1000.0, 1.0, 0.0);
        let row = measured(vec![
            pair(figures(200.0, 0.5, 10.0), figures(100.0, 1.0, 20.0), limit),
            pair(figures(300.0, 0.5, 10.0), figures(300.0, 1.0, 20.0), limit),
            pair(figures(900.0, 0.5, 30.0), figures(300.0, 1.0, 20.0), limit),
        ])
        .row(&CELL);
        assert_eq!(row["iops_ratio_qsd"], 2.0);
        assert_eq!(row["iops_ratio_qsd_range"], json!([1.0, 3.0]));
        assert_eq!(row["iops_per_cpu_ratio_qsd"], 4.0);
        assert_eq!((&row["p99_ratio_qsd"], &row["limit_ratio"]), (&json!(0.5), &json!(0.3)));
        assert_eq!((&row["iops"], &row["qsd"]["iops"]), (&json!(300.0), &json!(300.0)));
        assert_eq!(row["idle_cores_max"], 0.25);
        assert_eq!(row["name"], "disk read 4k qd32 q1");
    }

    #[test]
    fn the_best_mode_per_processor_time_is_qsd_itself_unless_another_took_part() {
        let (blk, qsd) = (figures(100.0, 1.0, 1.0), figures(100.0, 0.5, 1.0));
        let mut measured = measured(vec![pair(blk, qsd, qsd)]);
        let row = measured.row(&CELL);
        assert_eq!(row["iops_per_cpu_ratio_best_mode"], row["iops_per_cpu_ratio_qsd"]);
        assert!(row["qsd_per_cpu"].is_null());
        measured.names[Turn::Frugal as usize] = Some("threads".to_owned());
        measured.pairs[0].add(Turn::Frugal, figures(40.0, 0.1, 1.0), 0.0);
        let row = measured.row(&CELL);
        assert_eq!(row["iops_per_cpu_ratio_qsd"], 0.5);
        assert_eq!(row["iops_per_cpu_ratio_best_mode"], 0.25);
        assert_eq!(row["qsd_per_cpu"]["what"], "threads");
    }

    #[test]
    fn another_backend_has_ratios_only_where_it_took_part() {
        let (blk, peer) = (figures(100.0, 1.0, 1.0), figures(400.0, 2.0, 0.5));
        let mut measured = measured(vec![pair(blk, blk, blk)]);
        assert!(measured.row(&CELL)["iops_ratio_peer"].is_null());
        measured.names[Turn::Peer as usize] = Some("another".to_owned());
        measured.pairs[0].add(Turn::Peer, peer, 0.0);
        let row = measured.row(&CELL);
        assert_eq!((&row["iops_ratio_peer"], &row["iops_per_cpu_ratio_peer"]), (&json!(0.25), &json!(0.5)));
        assert_eq!((&row["p99_ratio_peer"], &row["peer"]["what"]), (&json!(2.0), &json!("another")));
    }
}
