//! The unpacked parts in the cache: a guest kernel, and an older QEMU beside the installed one. Nothing of them is
//! installed into the system.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::{apt, shell};

const KERNEL: &str = "linux-image-cloud-amd64";
const OLD_QEMU: [&str; 4] = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "qemu-utils"];
const OLD_QEMU_VERSION: &str = "7.2";
/// The file that says that a part is whole, and which packages it is made of.
const COMPLETE: &str = ".complete";

/// Where the parts lie: `WARMSWAP_CACHE`, else `.cache` in the repository.
pub(crate) fn cache() -> PathBuf {
    std::env::var_os("WARMSWAP_CACHE").map_or_else(|| shell::root().join(".cache"), PathBuf::from)
}

/// A part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Debian's kernel for cloud machines.
    Kernel,
    /// QEMU and its storage daemon as in the stable release.
    OldQemu,
}

impl Part {
    /// One word for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kernel => "guest kernel",
            Self::OldQemu => "QEMU 7.2 beside the installed one",
        }
    }

    /// The part's directory.
    pub(crate) fn directory(self) -> PathBuf {
        cache().join(match self {
            Self::Kernel => "kernel",
            Self::OldQemu => "qemu-7.2",
        })
    }

    /// Whether the part is there and whole.
    pub(crate) fn present(self) -> bool {
        self.directory().join(COMPLETE).is_file()
    }

    /// Downloads and unpacks the part. It gets its name only when it is whole.
    pub(crate) fn make(self) -> anyhow::Result<()> {
        let (target, unfinished) = (self.directory(), self.directory().with_extension("unfinished"));
        for old in [&target, &unfinished] {
            if old.exists() {
                std::fs::remove_dir_all(old)?;
            }
        }
        std::fs::create_dir_all(&unfinished)?;
        let packages = match self {
            Self::Kernel => make_kernel(&unfinished)?,
            Self::OldQemu => make_old_qemu(&unfinished)?,
        };
        std::fs::write(unfinished.join(COMPLETE), packages.join("\n") + "\n")?;
        std::fs::rename(&unfinished, &target)?;
        Ok(())
    }
}

fn make_kernel(target: &Path) -> anyhow::Result<Vec<String>> {
    let find = || apt::dependencies(KERNEL).into_iter().find(|name| name.starts_with("linux-image-"));
    let package = match find() {
        Some(package) => package,
        None => {
            apt::refresh_once()?;
            find().with_context(|| format!("no package source offers {KERNEL}"))?
        }
    };
    apt::unpack(std::slice::from_ref(&package), target)?;
    Ok(vec![package])
}

fn make_old_qemu(target: &Path) -> anyhow::Result<Vec<String>> {
    if apt::version(OLD_QEMU[0], OLD_QEMU_VERSION).is_none() {
        apt::refresh_once()?;
    }
    let mut packages = Vec::new();
    for name in OLD_QEMU {
        let version = apt::version(name, OLD_QEMU_VERSION)
            .with_context(|| format!("no package source offers {name} {OLD_QEMU_VERSION}: this needs Debian 12"))?;
        packages.push(format!("{name}={version}"));
    }
    apt::unpack(&packages, target)?;
    let libraries = add_missing_libraries(target, &packages)?;
    packages.extend(libraries);
    Ok(packages)
}

/// Unpacks the libraries the programs lack on this machine, and those that these need in turn.
fn add_missing_libraries(target: &Path, packages: &[String]) -> anyhow::Result<Vec<String>> {
    const DEPTH_MAX: usize = 4;
    let mut added = BTreeSet::new();
    let mut frontier = packages.to_vec();
    for _ in 0..DEPTH_MAX {
        let lacking = missing_libraries(target)?;
        if lacking.is_empty() {
            return Ok(added.into_iter().collect());
        }
        let wanted = |name: &String| name.starts_with("lib") && !apt::installed(name) && !added.contains(name);
        let mut next: Vec<String> =
            frontier.iter().flat_map(|package| apt::dependencies(package)).filter(wanted).collect();
        next.sort_unstable();
        next.dedup();
        anyhow::ensure!(!next.is_empty(), "no package found for {}", lacking.join(", "));
        apt::unpack(&next, target)?;
        added.extend(next.iter().cloned());
        frontier = next;
    }
    anyhow::bail!("libraries are still missing: {}", missing_libraries(target)?.join(", "))
}

/// The shared libraries the unpacked programs do not find.
fn missing_libraries(target: &Path) -> anyhow::Result<Vec<String>> {
    let mut missing = Vec::new();
    for program in ["qemu-system-x86_64", "qemu-storage-daemon"] {
        let program = target.join("usr/bin").join(program);
        anyhow::ensure!(program.is_file(), "the package holds no {}", program.display());
        let libraries = target.join("usr/lib/x86_64-linux-gnu");
        let text = shell::output(Command::new("ldd").arg(&program).env("LD_LIBRARY_PATH", libraries))
            .context("running ldd")?;
        let lacking =
            text.lines().filter(|line| line.contains("not found")).filter_map(|line| line.split_whitespace().next());
        missing.extend(lacking.map(str::to_owned));
    }
    Ok(missing)
}
