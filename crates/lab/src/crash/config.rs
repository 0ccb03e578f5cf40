//! What varies from one series of deaths to another.

use std::fmt;

use crate::common::blk::Engine;

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Switch {
    /// It is.
    On,
    /// It is not.
    Off,
}

impl Switch {
    fn of(on: bool) -> Self {
        if on { Switch::On } else { Switch::Off }
    }
}

/// How requests are described.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Chains {
    /// By chains of descriptors in the ring.
    Direct,
    /// By tables, and some by chains.
    Indirect,
}

/// From where the front-end says that the next back-end goes on, and what else it does when it connects again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Base {
    /// QEMU: `used.idx`. Call descriptors are set once more when the rings run.
    Used,
    /// Cloud Hypervisor: `avail.idx`. Call descriptors are set before the rings are started, and not again.
    Avail,
}

/// One series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Config {
    /// Entries of the ring.
    pub(super) size: u16,
    /// How the back-end does its I/O.
    pub(super) engine: Engine,
    /// EVENT_IDX.
    pub(super) event_idx: bool,
    /// Descriptors.
    pub(super) chains: Chains,
    /// Where the next one goes on.
    pub(super) base: Base,
    /// Reads take longer than writes, so that completions come out of order.
    pub(super) slow_reads: bool,
    /// The region is handed to the next back-end. Without it the run is a control: it must go wrong.
    pub(super) region: bool,
}

/// What the command line asks for; all that it leaves open is gone through.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    pub(super) size: Option<u16>,
    pub(super) engine: Option<Engine>,
    pub(super) event_idx: Option<Switch>,
    pub(super) chains: Option<Chains>,
    pub(super) base: Option<Base>,
    pub(super) slow_reads: Option<Switch>,
}

impl Wanted {
    fn has(&self, config: &Config) -> bool {
        self.size.is_none_or(|it| it == config.size)
            && self.engine.is_none_or(|it| it == config.engine)
            && self.event_idx.is_none_or(|it| it == Switch::of(config.event_idx))
            && self.chains.is_none_or(|it| it == config.chains)
            && self.base.is_none_or(|it| it == config.base)
            && self.slow_reads.is_none_or(|it| it == Switch::of(config.slow_reads))
    }
}

/// Every series with a region that is wanted, the longest first.
pub(super) fn all(wanted: &Wanted) -> Vec<Config> {
    let mut all = Vec::new();
    for size in [8, 4, 2] {
        for number in 0..32_u8 {
            let bit = |at: u8| number >> at & 1 == 1;
            let config = Config {
                size,
                engine: if bit(0) { Engine::Sync } else { Engine::Uring },
                event_idx: !bit(1),
                chains: if bit(2) { Chains::Direct } else { Chains::Indirect },
                base: if bit(3) { Base::Avail } else { Base::Used },
                slow_reads: bit(4),
                region: true,
            };
            // The chain of a read has three descriptors.
            let fits = size > 2 || config.chains == Chains::Indirect;
            // One read in flight is not overtaken. How the driver is called has nothing to do with the order.
            let overtaken = size > 4 || config.chains == Chains::Indirect;
            let apart = config.event_idx && overtaken;
            if fits && (apart || !config.slow_reads) && wanted.has(&config) {
                all.push(config);
            }
        }
    }
    all
}

/// The controls: several in flight, completed out of order, and nobody who knows of it.
pub(super) fn controls() -> Vec<Config> {
    let control = Config {
        size: 8,
        engine: Engine::Uring,
        event_idx: true,
        chains: Chains::Indirect,
        base: Base::Used,
        slow_reads: true,
        region: false,
    };
    vec![
        control,
        Config { engine: Engine::Sync, ..control },
        Config { base: Base::Avail, ..control },
        Config { base: Base::Avail, engine: Engine::Sync, ..control },
    ]
}

impl Config {
    /// A number of its own, for streams of choices.
    pub(super) fn stream(&self) -> u64 {
        let bits = [
            self.engine == Engine::Sync,
            self.event_idx,
            self.chains == Chains::Direct,
            self.base == Base::Avail,
            self.slow_reads,
            self.region,
        ];
        bits.iter().fold(u64::from(self.size), |number, bit| number << 1 | u64::from(*bit))
    }

    /// The second back-end dies at each of its stores, for each death of the first. Takes long: with the smallest
    /// rings, and two series that have nothing else in common.
    pub(super) fn dies_twice_everywhere(&self) -> bool {
        let one = (Engine::Uring, true, Base::Used);
        let other = (Engine::Sync, false, Base::Avail);
        let this = (self.engine, self.event_idx, self.base);
        self.size == 2 && !self.slow_reads && (this == one || this == other)
    }

    /// The faults of a life that ends before that store into shared memory.
    pub(super) fn faults(&self, store: Option<u64>) -> Option<String> {
        let slow = self.slow_reads.then(|| "latency:us=300,of=read".to_owned());
        let kill = store.map(|store| format!("kill:store={store}"));
        let faults: Vec<String> = slow.into_iter().chain(kill).collect();
        (!faults.is_empty()).then(|| faults.join(";"))
    }

    /// Options of `lab crash` that leave this series alone.
    pub(super) fn options(&self) -> String {
        let Config { size, engine, event_idx, chains, base, slow_reads, region } = self;
        let switch = |on: bool| if on { "on" } else { "off" };
        format!(
            "--queue-size {size} --engine {} --event-idx {} --chains {} --base {} --slow-reads {}{}",
            if *engine == Engine::Sync { "sync" } else { "uring" },
            switch(*event_idx),
            if *chains == Chains::Direct { "direct" } else { "indirect" },
            if *base == Base::Avail { "avail" } else { "used" },
            switch(*slow_reads),
            if *region { "" } else { " --lose-region" },
        )
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config { size, engine, event_idx, chains, base, slow_reads, .. } = self;
        let engine = if *engine == Engine::Sync { "sync" } else { "uring" };
        let chains = if *chains == Chains::Direct { "direct" } else { "indirect" };
        let event = if *event_idx { "event-idx" } else { "flags" };
        let base = if *base == Base::Avail { "avail.idx" } else { "used.idx" };
        let order = if *slow_reads { "out of order" } else { "in order" };
        write!(f, "{size} {engine:<5} {chains:<8} {event:<9} {base:<9} {order}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_open_is_gone_through_and_nothing_twice() {
        let every = all(&Wanted::default());
        assert_eq!(every.len(), 24 + 20 + 12);
        assert_eq!(every.iter().filter(|config| config.dies_twice_everywhere()).count(), 2);
        for (at, config) in every.iter().enumerate() {
            assert!(every[at + 1..].iter().all(|other| other != config && other.stream() != config.stream()));
        }
        let one = Wanted { size: Some(8), engine: Some(Engine::Sync), base: Some(Base::Avail), ..Wanted::default() };
        assert_eq!(all(&one).len(), 6);
        assert!(controls().iter().all(|control| !control.region));
    }

    #[test]
    fn a_life_is_told_how_it_ends() {
        let config = Config { slow_reads: false, ..controls()[0] };
        assert_eq!(config.faults(None), None);
        assert_eq!(config.faults(Some(3)).as_deref(), Some("kill:store=3"));
        let slow = Config { slow_reads: true, ..config };
        assert_eq!(slow.faults(Some(3)).as_deref(), Some("latency:us=300,of=read;kill:store=3"));
        assert!(slow.options().ends_with("--slow-reads on --lose-region"));
    }
}
