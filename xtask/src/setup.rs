//! `cargo xtask setup`: what tests and demonstration need of Debian, and only what is missing of it.

use std::process::Command;

use super::parts::Part;
use super::{apt, shell};

/// A program that must be there, and the package that has it.
#[derive(Debug, Clone, Copy)]
struct Need {
    program: &'static str,
    package: &'static str,
    /// The first number of the version it must have, where that matters; such packages come from the backports.
    version: Option<&'static str>,
}

const NEEDS: [Need; 8] = [
    Need { program: "qemu-system-x86_64", package: "qemu-system-x86", version: Some("10") },
    Need { program: "qemu-storage-daemon", package: "qemu-utils", version: Some("10") },
    Need { program: "fio", package: "fio", version: None },
    Need { program: "busybox", package: "busybox-static", version: None },
    Need { program: "mke2fs", package: "e2fsprogs", version: None },
    Need { program: "nbdkit", package: "nbdkit", version: None },
    Need { program: "strip", package: "binutils", version: None },
    Need { program: "ldd", package: "libc-bin", version: None },
];

impl Need {
    fn met(self) -> bool {
        match self.version {
            None => shell::has(self.program),
            Some(version) => self.version().is_some_and(|found| found.split('.').next() == Some(version)),
        }
    }

    /// The version the program says it has.
    fn version(self) -> Option<String> {
        let text = shell::output(Command::new(self.program).arg("--version"))?;
        text.split_whitespace().skip_while(|word| *word != "version").nth(1).map(str::to_owned)
    }
}

/// Installs what is missing, or only says what that is.
pub(crate) fn run(dry_run: bool) -> anyhow::Result<()> {
    let (newer, plain): (Vec<Need>, Vec<Need>) =
        NEEDS.into_iter().filter(|need| !need.met()).partition(|need| need.version.is_some());
    let parts: Vec<Part> = [Part::Kernel, Part::OldQemu].into_iter().filter(|part| !part.present()).collect();
    if newer.is_empty() && plain.is_empty() && parts.is_empty() {
        println!("setup: everything is there");
        return Ok(());
    }
    for need in newer.iter().chain(&plain) {
        println!("setup: {} is missing (package {})", need.program, need.package);
    }
    for part in &parts {
        println!("setup: {} is missing in the cache", part.name());
    }
    if dry_run {
        return Ok(());
    }
    let packages = |needs: &[Need]| needs.iter().map(|need| need.package).collect::<Vec<_>>();
    if !(plain.is_empty() && newer.is_empty()) {
        apt::install(&packages(&plain), &packages(&newer))?;
    }
    for part in parts {
        println!("setup: fetching the {}", part.name());
        part.make()?;
    }
    let unmet: Vec<&str> = NEEDS.into_iter().filter(|need| !need.met()).map(|need| need.program).collect();
    anyhow::ensure!(unmet.is_empty(), "still missing after the installation: {}", unmet.join(", "));
    println!("setup: done");
    Ok(())
}
