//! Where `cargo xtask setup` put what a machine needs to run a guest: kernel, modules, and the older QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

/// The versions of QEMU (and of its storage daemon) the project is shown to work with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum QemuVersion {
    /// From the backports, installed.
    #[value(name = "10.0")]
    V10,
    /// From the release, unpacked beside it.
    #[value(name = "7.2")]
    V7,
}

/// The directory of the cache: `WARMSWAP_CACHE`, else `.cache` in the repository.
pub(crate) fn directory() -> PathBuf {
    match std::env::var_os("WARMSWAP_CACHE") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache"),
    }
}

/// A guest kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The compressed image.
    pub(crate) image: PathBuf,
    /// The directory of its modules.
    pub(crate) modules: PathBuf,
    /// Its release name.
    pub(crate) release: String,
}

impl Kernel {
    /// The kernel in the cache.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let root = directory().join("kernel");
        let images = std::fs::read_dir(root.join("boot")).with_context(|| missing("the guest kernel"))?;
        let release = images
            .flatten()
            .find_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
            .with_context(|| missing("the guest kernel"))?;
        let image = root.join("boot").join(format!("vmlinuz-{release}"));
        Ok(Self { image, modules: root.join("lib/modules").join(&release).join("kernel"), release })
    }
}

/// The programs of one version of QEMU.
#[derive(Debug, Clone)]
pub(crate) struct Qemu {
    /// The version meant.
    pub(crate) version: QemuVersion,
    /// What the program says of itself.
    pub(crate) banner: String,
    root: Option<PathBuf>,
}

impl Qemu {
    /// Finds the programs of `version` and checks that they are of that version.
    pub(crate) fn find(version: QemuVersion) -> anyhow::Result<Self> {
        let (root, wanted) = match version {
            QemuVersion::V10 => (None, "10."),
            QemuVersion::V7 => (Some(directory().join("qemu-7.2")), "7.2"),
        };
        let mut qemu = Self { version, banner: String::new(), root };
        for name in ["qemu-system-x86_64", "qemu-storage-daemon"] {
            let output = qemu.command(name).arg("--version").output().with_context(|| missing(name))?;
            let text = String::from_utf8_lossy(&output.stdout);
            let found = text.split_whitespace().skip_while(|word| *word != "version").nth(1).unwrap_or("").to_owned();
            anyhow::ensure!(
                found.starts_with(wanted),
                "{name} is of version {found:?}, not {wanted}*: {}",
                missing("it")
            );
            qemu.banner = found;
        }
        Ok(qemu)
    }

    /// A program of this version, with the environment it needs.
    pub(crate) fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.program(name));
        command.envs(self.environment());
        command
    }

    /// The path of a program of this version.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.root.as_ref().map_or_else(|| PathBuf::from(name), |root| root.join("usr/bin").join(name))
    }

    /// What the environment must hold for the unpacked programs to find their own parts.
    pub(crate) fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        let Some(root) = &self.root else { return Vec::new() };
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        vec![("QEMU_MODULE_DIR", libraries.join("qemu")), ("LD_LIBRARY_PATH", libraries)]
    }

    /// Directories with firmware, beyond those the program looks into by itself.
    pub(crate) fn firmware(&self) -> Vec<PathBuf> {
        let Some(root) = &self.root else { return Vec::new() };
        vec![root.join("usr/share/qemu"), root.join("usr/share/seabios"), PathBuf::from("/usr/share/seabios")]
    }
}

fn missing(what: &str) -> String {
    format!("{what} is not there: run `cargo xtask setup`")
}
