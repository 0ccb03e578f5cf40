//! What a process uses, from outside.

use anyhow::Context;

/// Processor time of all its threads so far, in nanoseconds, as the scheduler accounts it. Threads that have ended are not
/// in it; a broker at rest or under load starts and ends none.
pub(super) fn processor_ns(pid: u32) -> anyhow::Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path().join("schedstat");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let first = text.split_whitespace().next().context("schedstat is empty")?;
        sum += first.parse::<u64>()?;
    }
    Ok(sum)
}

/// Resident memory in bytes: now, and at most so far.
pub(super) fn resident_bytes(pid: u32) -> anyhow::Result<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> anyhow::Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_seen_and_sleep_is_not() {
        let pid = std::process::id();
        let before = processor_ns(pid).expect("proc");
        let until = std::time::Instant::now() + std::time::Duration::from_millis(60);
        while std::time::Instant::now() < until {
            std::hint::black_box(0);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert!(processor_ns(pid).expect("proc") > before);
        let (resident, peak) = resident_bytes(pid).expect("proc");
        assert!(resident > 0 && peak >= resident);
    }
}
