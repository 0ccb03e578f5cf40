//! A `warmswap blk` under test.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal};

use super::{Disk, Scratch, Vmm, wait_for};

/// A running back-end. Killed on drop.
pub(crate) struct Backend {
    child: Child,
    pub(crate) socket: PathBuf,
    /// What it says on standard error, in full.
    told: PathBuf,
}

impl Backend {
    /// Starts one on an image, and waits until a front-end may connect.
    pub(crate) fn start(scratch: &Scratch, image: &Path, options: &[&str]) -> Self {
        let (socket, told) = (scratch.path("blk.sock"), scratch.path("blk.log"));
        let log = std::fs::File::create(&told).expect("a file");
        let mut command = Command::new(env!("CARGO_BIN_EXE_warmswap"));
        command.args(["blk", "--socket-path"]).arg(&socket).arg("--blk-file").arg(image).args(options);
        let child = command.stdin(Stdio::null()).stderr(log).spawn().expect("the program starts");
        let mut backend = Backend { child, socket, told };
        wait_for("a back-end that listens", || {
            backend.assert_alive();
            UnixStream::connect(&backend.socket).is_ok()
        });
        backend
    }

    /// What it has told, for a failed test.
    pub(crate) fn told(&self) -> String {
        let mut text = Vec::new();
        let _read = std::fs::File::open(&self.told).and_then(|mut file| file.read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub(crate) fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("our own child") {
            panic!("the back-end ended: {status}\n{}", self.told());
        }
    }

    /// A front-end that keeps the rules writes a sector and reads it back.
    pub(crate) fn assert_serves(&mut self, byte: u8) {
        self.assert_alive();
        let mut vmm = Vmm::connect(&self.socket);
        let disk = Disk::new();
        let started = vmm.start(&disk);
        assert!(started.is_ok(), "{started:?}\n{}", self.told());
        let mut disk = disk;
        disk.write(&mut vmm, 3, byte);
        assert_eq!(disk.read(&mut vmm, 3), vec![byte; 512]);
        drop(vmm);
        self.assert_alive();
    }

    /// Asks it to end, and sees that it does so in order.
    pub(crate) fn end(mut self) {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::TERM).expect("our own child");
        let mut status = None;
        wait_for("the end of the back-end", || {
            status = self.child.try_wait().expect("our own child");
            status.is_some()
        });
        assert!(status.is_some_and(|it| it.success()), "{status:?}\n{}", self.told());
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}
