//! Backends of other kinds of devices, which others have written: from Debian's packages, or built by cargo into the cache.

use std::path::PathBuf;

use super::{apt, parts, shell};

/// A backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backend {
    /// The program, and where that is a crate, its name.
    program: &'static str,
    /// The device it serves.
    device: &'static str,
    source: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// A package of Debian's.
    Package(&'static str),
    /// A crate of this version, and the packages that building it needs.
    Crate { version: &'static str, locked: bool, libraries: &'static [&'static str] },
}

/// DPDK's test program: packets between ports.
const TESTPMD: Backend = Backend { program: "dpdk-testpmd", device: "net", source: Source::Package("dpdk-dev") };
/// Not locked: what it was published with (vhost-user-backend 0.10.0) cannot take over from another process, the correction of it can.
pub(crate) const RNG: Backend = Backend {
    program: "vhost-device-rng",
    device: "rng",
    source: Source::Crate { version: "0.1.0", locked: false, libraries: &[] },
};
const FS: Backend = Backend {
    program: "virtiofsd",
    device: "fs",
    source: Source::Crate { version: "1.14.0", locked: true, libraries: &["libcap-ng-dev", "libseccomp-dev"] },
};
/// Not locked, as [`RNG`].
const SCSI: Backend = Backend {
    program: "vhost-device-scsi",
    device: "scsi",
    source: Source::Crate { version: "0.1.0", locked: false, libraries: &[] },
};

/// All that there are tests for.
pub(crate) const ALL: [Backend; 4] = [TESTPMD, RNG, FS, SCSI];
/// Those that `cargo xtask test` gets for itself: about two minutes on two processors, once.
pub(crate) const QUICK: [Backend; 3] = [TESTPMD, RNG, FS];

impl Backend {
    /// The program and what it is for, for people.
    pub(crate) fn name(self) -> String {
        format!("{} ({})", self.program, self.device)
    }

    /// Whether it can be run.
    pub(crate) fn present(self) -> bool {
        match self.source {
            Source::Package(_) => shell::has(self.program),
            Source::Crate { .. } => self.path().is_file(),
        }
    }

    /// Where it lies, if it is built here.
    pub(crate) fn path(self) -> PathBuf {
        root().join("bin").join(self.program)
    }

    /// Installs or builds it.
    pub(crate) fn make(self) -> anyhow::Result<()> {
        match self.source {
            Source::Package(package) => apt::install(&[package], &[])?,
            Source::Crate { version, locked, libraries } => {
                let missing: Vec<&str> = libraries.iter().copied().filter(|name| !apt::installed(name)).collect();
                if !missing.is_empty() {
                    apt::install(&missing, &[])?;
                }
                build(&format!("{}@{version}", self.program), locked)?;
            }
        }
        anyhow::ensure!(self.present(), "{} is still missing after its installation", self.program);
        Ok(())
    }
}

fn root() -> PathBuf {
    parts::cache().join("backends")
}

/// What several of them are made of is compiled once.
fn build_directory() -> PathBuf {
    root().join("build")
}

fn build(program: &str, locked: bool) -> anyhow::Result<()> {
    let locked: &[&str] = if locked { &["--locked"] } else { &[] };
    let mut install = shell::cargo(&[&["install", "--quiet", "--force", program], locked, &["--root"]].concat());
    println!("  {}", shell::spelled(&install));
    shell::run(install.arg(root()).env("CARGO_TARGET_DIR", build_directory()))
}

/// Gets those of `wanted` that are missing, or only says which. One that cannot be had is said, and does not keep the others.
pub(crate) fn make_missing(wanted: &[Backend], dry_run: bool) -> anyhow::Result<()> {
    let missing: Vec<Backend> = wanted.iter().copied().filter(|backend| !backend.present()).collect();
    let mut failed = Vec::new();
    for backend in &missing {
        println!("backends: {} is missing", backend.name());
        if !dry_run && let Err(error) = backend.make() {
            println!("backends: there is no {}, and what needs it is skipped: {error:#}", backend.name());
            failed.push(backend.program);
        }
    }
    let build = build_directory();
    if build.exists() {
        std::fs::remove_dir_all(build)?;
    }
    anyhow::ensure!(failed.is_empty(), "these backends could not be had: {}", failed.join(", "));
    Ok(())
}
