//! Everything that a profile holds: the one table.
//!
//! The order is that of the values in a [`Record`](crate::Record). A feature is appended, never moved or given another meaning, without a
//! new [`SCHEMA_VERSION`](crate::SCHEMA_VERSION).

/// What a feature tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// What the guest asks for: it explains outcomes and is no fault by itself.
    Context,
    /// How well the component does it.
    Outcome,
    /// How near a bound is.
    Limit,
    /// How good the measurement itself was.
    Quality,
}

/// Where a feature comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The rings, followed by the broker: exact.
    Rings,
    /// Requests that are followed closely now and then, from submission to completion: a sample.
    Probe,
    /// The backend's process, as the kernel accounts for it.
    Process,
    /// Its control group.
    Group,
    /// The host: pressure, the block device below a local image, its file system.
    Host,
    /// The backend's telemetry page, if it has one.
    Page,
    /// The control connection and the canary.
    Control,
    /// The sampler itself.
    Sampler,
}

/// What one is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Per second.
    PerSecond,
    /// Microseconds.
    Micros,
    /// Bytes.
    Bytes,
    /// Bytes per second.
    BytesPerSecond,
    /// Part of a whole, 0 to 1.
    Share,
    /// Processors kept busy.
    Cores,
    /// A number of things.
    Count,
}

/// How measures of it merge, and what is left of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Summary {
    /// The sum of what was counted over the sum of what it is related to: a rate, a share, a mean.
    Ratio,
    /// The greatest.
    Max,
    /// The latest.
    Last,
    /// A quantile of the latencies, in millionths.
    Quantile(super::LatencyKind, u32),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Name with its unit at the end, the same in every output.
    pub name: &'static str,
    /// Unit.
    pub unit: Unit,
    /// Role.
    pub role: Role,
    /// Source, the best where there are several.
    pub source: Source,
    /// How measures merge.
    pub summary: Summary,
    /// What it is.
    pub meaning: &'static str,
}

impl Role {
    /// The word used in every output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Context => "context",
            Role::Outcome => "outcome",
            Role::Limit => "limit",
            Role::Quality => "quality",
        }
    }
}

impl Source {
    /// The word used in every output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Source::Rings => "rings",
            Source::Probe => "probe",
            Source::Process => "process",
            Source::Group => "group",
            Source::Host => "host",
            Source::Page => "page",
            Source::Control => "control",
            Source::Sampler => "sampler",
        }
    }
}

macro_rules! features {
    ($($(#[$group:meta])* $feature:ident $name:literal $unit:ident $role:ident $source:ident $summary:expr; $meaning:literal)*) => {
        /// A feature: an index into [`FEATURES`] and into the values of a record.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Feature {
            $(#[doc = $meaning] $feature,)*
        }

        impl Feature {
            /// Every feature in the order of the table.
            pub const ALL: [Feature; FEATURE_COUNT] = [$(Feature::$feature,)*];
        }

        /// Number of features.
        pub const FEATURE_COUNT: usize = [$($name,)*].len();

        /// The table.
        pub const FEATURES: [Spec; FEATURE_COUNT] = [$(Spec {
            name: $name,
            unit: Unit::$unit,
            role: Role::$role,
            source: Source::$source,
            summary: $summary,
            meaning: $meaning,
        },)*];
    };
}

use crate::LatencyKind::{All, Flushes, Reads, Writes};
use Summary::{Last, Max, Quantile, Ratio};

features! {
    // What the guest asks for.
    Arrivals "arrivals_per_s" PerSecond Context Rings Ratio; "Requests that the driver made available."
    Completions "completions_per_s" PerSecond Context Rings Ratio; "Requests that the backend completed."
    Depth "depth_mean" Count Context Rings Ratio; "Requests in flight, mean over time."
    DepthMax "depth_max" Count Context Rings Max; "Requests in flight on one ring, greatest seen."
    Bytes "bytes_per_s" BytesPerSecond Context Page Ratio; "Bytes moved; without a telemetry page reckoned from sampled requests."
    Size "size_mean_bytes" Bytes Context Page Ratio; "Bytes of a read or write, mean."
    ReadShare "read_share" Share Context Page Ratio; "Reads among the requests; for other devices than disks, requests the backend only writes into."
    WriteShare "write_share" Share Context Page Ratio; "Writes among the requests."
    FlushShare "flush_share" Share Context Page Ratio; "Flushes among the requests."
    DiscardShare "discard_share" Share Context Page Ratio; "Discards and write-zeroes among the requests."
    SequentialShare "sequential_share" Share Context Probe Ratio; "Reads and writes that begin where the one before them on that ring ended; between sampled ones that are of one length, where as many of that length as came between would have ended."
    RingsBusy "rings_busy" Count Context Rings Max; "Rings on which something was completed."

    // How well the backend does it.
    LatencyMean "latency_mean_us" Micros Outcome Rings Ratio; "From available to used, mean by Little's law: requests in flight over completions per second."
    LatencyP50 "latency_p50_us" Micros Outcome Probe Quantile(All, 500_000); "From available to used, median."
    LatencyP90 "latency_p90_us" Micros Outcome Probe Quantile(All, 900_000); "90th percentile."
    LatencyP99 "latency_p99_us" Micros Outcome Probe Quantile(All, 990_000); "99th percentile."
    LatencyP999 "latency_p999_us" Micros Outcome Probe Quantile(All, 999_000); "99.9th percentile."
    LatencyMax "latency_max_us" Micros Outcome Probe Max; "Longest that was seen to end."
    ReadP50 "read_latency_p50_us" Micros Outcome Probe Quantile(Reads, 500_000); "Median of reads; where a telemetry page tells, from taken by the backend to answered."
    ReadP99 "read_latency_p99_us" Micros Outcome Probe Quantile(Reads, 990_000); "99th percentile of reads; where a telemetry page tells, from taken by the backend to answered."
    WriteP50 "write_latency_p50_us" Micros Outcome Probe Quantile(Writes, 500_000); "Median of writes; where a telemetry page tells, from taken by the backend to answered."
    WriteP99 "write_latency_p99_us" Micros Outcome Probe Quantile(Writes, 990_000); "99th percentile of writes; where a telemetry page tells, from taken by the backend to answered."
    FlushP50 "flush_latency_p50_us" Micros Outcome Probe Quantile(Flushes, 500_000); "Median of flushes; where a telemetry page tells, from taken by the backend to answered."
    FlushP99 "flush_latency_p99_us" Micros Outcome Probe Quantile(Flushes, 990_000); "99th percentile of flushes; where a telemetry page tells, from taken by the backend to answered."
    OldestAge "oldest_age_us" Micros Outcome Rings Max; "Age of the oldest request in flight, greatest seen: at least that, at most the distance of two looks more; missing while it is not known."
    Gap "completion_gap_max_us" Micros Outcome Rings Max; "Longest time without a completion while requests were in flight: at least that, at most the distance of two looks more."
    Pickup "pickup_us" Micros Outcome Probe Ratio; "From a due kick to the first sign that the backend looked at the ring, mean; an upper bound."
    ErrorShare "error_share" Share Outcome Page Ratio; "Requests answered with an error among those whose answer was seen."
    Errors "errors_per_s" PerSecond Outcome Page Ratio; "Requests answered with an error; without a telemetry page reckoned from sampled requests."
    Retries "retries_per_s" PerSecond Outcome Page Ratio; "I/O that came back short or interrupted and was gone on with."
    Malformed "malformed_per_s" PerSecond Outcome Page Ratio; "Requests too broken to have a kind."

    // Kicks and interrupts.
    KickShare "kick_due_share" Share Context Probe Ratio; "Submissions for which the driver had to kick."
    Kicks "kicks_per_s" PerSecond Context Page Ratio; "Kicks; without a telemetry page reckoned from sampled submissions."
    CallShare "call_due_share" Share Context Probe Ratio; "Completions for which the backend had to interrupt."
    Calls "calls_per_s" PerSecond Outcome Page Ratio; "Interrupts; without a telemetry page reckoned from sampled completions."
    CallsSuppressed "calls_suppressed_per_s" PerSecond Context Page Ratio; "Completions that needed no interrupt."
    Reaction "call_reaction_us" Micros Outcome Probe Ratio; "From a due interrupt to the first sign that the driver took completions, mean."
    ReactionMax "call_reaction_max_us" Micros Outcome Probe Max; "The longest of these."
    CallOverdue "call_overdue_us" Micros Outcome Probe Max; "For how long an interrupt that was due has had no effect, greatest seen: a lost interrupt, or a guest that does not run."
    KickOverdue "kick_overdue_us" Micros Outcome Probe Max; "For how long a submission with a due kick showed no sign of a backend that looks: a lost kick, or a backend that does not run."

    // Memory of the guest, as the device uses it.
    WorkingSet "working_set_pages" Count Context Probe Last; "Guest pages that the device reads or writes, estimated."
    PageReuse "page_reuse" Count Context Probe Last; "Touches per page among sampled pages."
    PageLocality "page_locality_share" Share Context Probe Ratio; "Sampled buffers that begin in the page in which the last one ended, or in the next."
    DeviceWrites "device_write_share" Share Context Probe Ratio; "Bytes that the device writes into guest memory among all it moves."

    // The backend's processor time.
    Cpu "cpu_cores" Cores Outcome Process Ratio; "Processor time."
    CpuSystem "cpu_system_cores" Cores Outcome Process Ratio; "The part of it in the kernel."
    CpuPerRequest "cpu_per_request_us" Micros Outcome Process Ratio; "Processor time per completed request."
    RunDelay "run_delay_share" Share Outcome Process Ratio; "Time in which a thread could run and had no processor, per time, summed over threads: it may be more than 1."
    BusiestThread "busiest_thread_cores" Cores Outcome Process Max; "Processor time of the busiest thread."
    SwitchesVoluntary "voluntary_switches_per_s" PerSecond Outcome Process Ratio; "Sleeps."
    SwitchesInvoluntary "involuntary_switches_per_s" PerSecond Outcome Process Ratio; "Times a thread lost its processor."
    Throttled "cpu_throttled_share" Share Outcome Group Ratio; "Time in which the group's quota was used up."
    Wakes "wakes_per_s" PerSecond Outcome Page Ratio; "Returns from sleep, as the backend counts them."
    Polls "polls_per_s" PerSecond Outcome Page Ratio; "Polls that found work, as the backend counts them."

    // The backend's memory.
    Rss "rss_bytes" Bytes Limit Process Last; "Resident memory."
    RssAnon "rss_anon_bytes" Bytes Limit Process Last; "Resident memory that is not of files: what leaks."
    Pss "pss_bytes" Bytes Limit Process Last; "Resident memory, shared pages divided among those who share them."
    Referenced "referenced_bytes" Bytes Outcome Process Last; "Resident memory that was used lately."
    Swap "swap_bytes" Bytes Limit Process Last; "Memory that was swapped out."
    MinorFaults "minor_faults_per_s" PerSecond Outcome Process Ratio; "Page faults without I/O."
    MajorFaults "major_faults_per_s" PerSecond Outcome Process Ratio; "Page faults with I/O."
    ReadBytes "storage_read_bytes_per_s" BytesPerSecond Outcome Process Ratio; "Bytes that the process had read from storage."
    WriteBytes "storage_write_bytes_per_s" BytesPerSecond Outcome Process Ratio; "Bytes that the process had written to storage."

    // Bounds.
    MemoryShare "memory_limit_share" Share Limit Group Last; "Memory of the control group against its limit."
    Descriptors "descriptors" Count Limit Process Last; "Open descriptors."
    DescriptorShare "descriptor_limit_share" Share Limit Process Last; "Open descriptors against their limit."
    Threads "threads" Count Limit Process Last; "Threads."
    ThreadShare "thread_limit_share" Share Limit Group Last; "Tasks of the control group against its limit."
    RingShare "ring_used_share" Share Limit Rings Max; "Requests in flight against the ring's size."
    StoreFree "store_free_bytes" Bytes Limit Host Last; "Free bytes of the file system that holds the image."
    StoreShare "store_used_share" Share Limit Host Last; "Used part of that file system."

    // Pressure and the device below.
    HostCpuPressure "host_cpu_pressure_share" Share Context Host Ratio; "Time in which some task of the host waited for a processor."
    HostMemoryPressure "host_memory_pressure_share" Share Context Host Ratio; "Time in which some task of the host waited for memory."
    HostIoPressure "host_io_pressure_share" Share Context Host Ratio; "Time in which some task of the host waited for I/O."
    GroupCpuPressure "group_cpu_pressure_share" Share Outcome Group Ratio; "The same of the control group."
    GroupMemoryPressure "group_memory_pressure_share" Share Outcome Group Ratio; "The same of the control group."
    GroupIoPressure "group_io_pressure_share" Share Outcome Group Ratio; "The same of the control group."
    DiskBusy "disk_busy_share" Share Context Host Ratio; "Time in which the block device below the image had something to do."
    DiskDepth "disk_depth_mean" Count Context Host Ratio; "Requests in the block device's queue, mean over time."
    DiskWait "disk_wait_us" Micros Outcome Host Ratio; "Time a request spent in the block device and its queue, mean."

    // The control connection.
    ControlRoundTrip "control_round_trip_us" Micros Outcome Control Last; "A question to the backend until its answer."
    Canary "canary_us" Micros Outcome Control Last; "The shadow's last read of its canary."
    Backlog "telemetry_age_us" Micros Quality Page Max; "Age of the telemetry page's last update while requests were in flight."

    // The measurement.
    LatencySamples "latency_samples" Count Quality Probe Last; "Requests behind the quantiles of this record."
    Inexact "inexact_share" Share Quality Rings Ratio; "Time in which it was not known which requests were in flight."
    TicksLost "ticks_lost" Count Quality Sampler Last; "Ticks of this record that were measured too late or not at all."
    StreamLost "records_lost" Count Quality Sampler Last; "Records that found no room on their way to the predictor since the last one."
    SamplerDelay "sampler_delay_us" Micros Quality Sampler Max; "How late the sampler was."
}

impl Feature {
    /// Its row of the table.
    #[must_use]
    pub const fn spec(self) -> &'static Spec {
        &FEATURES[self as usize]
    }

    /// Its name with the unit.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.spec().name
    }

    /// The feature of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Feature> {
        Feature::ALL.into_iter().find(|feature| feature.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unlike_and_say_their_unit() {
        for (index, feature) in Feature::ALL.into_iter().enumerate() {
            let spec = feature.spec();
            assert_eq!(feature as usize, index);
            assert_eq!(Feature::from_name(spec.name), Some(feature), "{}", spec.name);
            let ending = match spec.unit {
                Unit::PerSecond | Unit::BytesPerSecond => "_per_s",
                Unit::Micros => "_us",
                Unit::Bytes => "_bytes",
                Unit::Share => "_share",
                Unit::Cores => "_cores",
                Unit::Count => "",
            };
            assert!(spec.name.ends_with(ending), "{}", spec.name);
        }
    }
}
