//! Our own backend, `warmswap blk`: its command line. The lab is that program, too.

use std::path::PathBuf;

/// How it does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Engine {
    /// io_uring where there is one.
    Auto,
    /// io_uring.
    Uring,
    /// One call after the other.
    Sync,
}

/// A backend on one raw image.
#[derive(Clone, Debug)]
pub(crate) struct Blk {
    /// The image.
    pub(crate) image: PathBuf,
    /// Queues of the device.
    pub(crate) queues: u16,
    /// I/O engine.
    pub(crate) engine: Engine,
    /// O_DIRECT.
    pub(crate) direct: bool,
}

impl Blk {
    /// The whole command line with `socket` as its address.
    pub(crate) fn command_line(&self, socket: &str) -> Vec<String> {
        let program = std::env::current_exe().expect("a program that runs has a path");
        let engine = match self.engine {
            Engine::Auto => "auto",
            Engine::Uring => "uring",
            Engine::Sync => "sync",
        };
        let direct = if self.direct { "on" } else { "off" };
        let (program, image, queues) =
            (program.display().to_string(), self.image.display().to_string(), self.queues.to_string());
        let options = [
            "--socket-path",
            socket,
            "--blk-file",
            &image,
            "--num-queues",
            &queues,
            "--engine",
            engine,
            "--direct",
            direct,
        ];
        [&program, "blk"].into_iter().chain(options).map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_spaces_stay_one_word() {
        let blk = Blk { image: "/a b/image".into(), queues: 2, engine: Engine::Uring, direct: true };
        let line = blk.command_line("/c d/socket");
        assert_eq!(line[1..6], ["blk", "--socket-path", "/c d/socket", "--blk-file", "/a b/image"]);
        assert_eq!(line[6..], ["--num-queues", "2", "--engine", "uring", "--direct", "on"]);
    }
}
