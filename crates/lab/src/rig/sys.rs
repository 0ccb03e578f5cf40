//! The rig's few calls that need `unsafe`: a process made to spin.

use std::io;

/// `jmp .`, in a word as PTRACE_POKETEXT writes it.
const JUMP_TO_ITSELF: u64 = 0xfeeb;

/// Makes the main thread of `pid` spin for ever: its next instruction becomes a jump to itself. Only that process is
/// changed, for the kernel gives it a private copy of the page.
///
/// # Errors
/// The process cannot be traced, is gone, or does not stop.
pub(crate) fn make_it_spin(pid: u32) -> io::Result<()> {
    let pid = pid.cast_signed();
    trace(libc::PTRACE_SEIZE, pid, 0)?;
    let spinning = spin_stopped(pid);
    // Detaching fails only where the process is gone, and then there is nothing to detach from.
    let _ = trace(libc::PTRACE_DETACH, pid, 0);
    spinning
}

fn spin_stopped(pid: i32) -> io::Result<()> {
    trace(libc::PTRACE_INTERRUPT, pid, 0)?;
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    if unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } != pid {
        return Err(io::Error::last_os_error());
    }
    if !libc::WIFSTOPPED(status) {
        return Err(io::Error::other("the process ended while it was being stopped"));
    }
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    // SAFETY: `registers` is large enough for what PTRACE_GETREGS writes.
    if unsafe { libc::ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut registers) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // A thread stopped in a system call returns with RIP behind the instruction, or two bytes before it to restart.
    // Both places get the jump, so whichever comes first spins.
    poke(pid, registers.rip, JUMP_TO_ITSELF)?;
    let restarted = registers.rip.wrapping_sub(2);
    if registers.orig_rax.cast_signed() >= 0 { poke(pid, restarted, JUMP_TO_ITSELF) } else { Ok(()) }
}

/// Overwrites the two bytes at `address`.
fn poke(pid: i32, address: u64, two_bytes: u64) -> io::Result<()> {
    // SAFETY: PEEKTEXT reads the traced process, not us. It reports errors through errno only.
    let word = unsafe {
        *libc::__errno_location() = 0;
        libc::ptrace(libc::PTRACE_PEEKTEXT, pid, address, 0)
    };
    let error = io::Error::last_os_error();
    if word == -1 && error.raw_os_error() != Some(0) {
        return Err(error);
    }
    let word = word.cast_unsigned() & !0xffff | two_bytes;
    // SAFETY: POKETEXT writes the traced process, not us.
    if unsafe { libc::ptrace(libc::PTRACE_POKETEXT, pid, address, word) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn trace(request: libc::c_uint, pid: i32, data: usize) -> io::Result<()> {
    // SAFETY: these requests take no pointer.
    if unsafe { libc::ptrace(request, pid, 0_usize, data) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::process::die_with_parent;
    use std::process::Command;
    use std::time::{Duration, Instant};

    /// State letter and user-mode ticks of a process.
    fn state_and_ticks(pid: u32) -> (String, u64) {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
        let fields: Vec<&str> = stat.rsplit_once(") ").expect("a name").1.split_whitespace().collect();
        (fields[0].to_owned(), fields[11].parse().expect("ticks"))
    }

    #[test]
    fn a_sleeping_process_is_made_to_spin() {
        let mut child = die_with_parent(Command::new("sleep").arg("60")).spawn().expect("sleep");
        // Let it come to its system call; a process caught before that spins just as well.
        std::thread::sleep(Duration::from_millis(20));
        make_it_spin(child.id()).expect("ptrace");
        let deadline = Instant::now() + Duration::from_secs(10);
        while state_and_ticks(child.id()).1 < 2 {
            assert!(Instant::now() < deadline, "it does not spin: {:?}", state_and_ticks(child.id()));
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(state_and_ticks(child.id()).0, "R");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
}
