//! What a process uses, from outside.

use anyhow::{Context, ensure};

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

/// The same of its threads of these names. An error if there is none of them.
pub(super) fn threads_ns(pid: u32, names: &[&str]) -> anyhow::Result<u64> {
    let (mut sum, mut found) = (0, false);
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        // Threads may end meanwhile.
        let Ok(name) = std::fs::read_to_string(task.join("comm")) else { continue };
        if names.contains(&name.trim()) {
            found = true;
            let text = std::fs::read_to_string(task.join("schedstat"))?;
            sum += text.split_whitespace().next().context("schedstat is empty")?.parse::<u64>()?;
        }
    }
    ensure!(found, "process {pid} has no thread named {}", names.join(" or "));
    Ok(sum)
}

/// Open descriptors.
pub(super) fn descriptors(pid: u32) -> anyhow::Result<u64> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64)
}

/// Processor time of the whole process so far, in nanoseconds, by its own clock: threads that have ended are in it, and so are
/// the workers of its io_urings, which are threads of it. What the kernel does elsewhere for it (interrupts, its own threads)
/// is not.
pub(super) fn process_ns(pid: u32) -> anyhow::Result<u64> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: the pointer is to a variable of ours that outlives the call.
    let error = unsafe { libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) };
    ensure!(error == 0, "the clock of process {pid}: {}", std::io::Error::from_raw_os_error(error));
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a variable of ours that outlives the call.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("the clock of process {pid}"));
    }
    Ok(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
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
        let whole = process_ns(pid).expect("clock");
        std::thread::spawn(|| {
            let until = std::time::Instant::now() + std::time::Duration::from_millis(60);
            while std::time::Instant::now() < until {}
        })
        .join()
        .expect("no panic");
        // A busy machine may have given the thread little; that it has ended loses nothing of what it had.
        assert!(process_ns(pid).expect("clock") > whole + 1_000_000);
        let (resident, peak) = resident_bytes(pid).expect("proc");
        assert!(resident > 0 && peak >= resident);
    }
}
