//! The guest's initial file system: busybox, fio with its libraries, the devices' kernel modules, and this program.
//!
//! It is two archives in one file. The first changes only with the machine's packages and is cached; the second holds
//! this program and is made for each run.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::cache::{self, Kernel};
use super::cpio::Archive;
use super::device::Device;

const BUSYBOX: &str = "/bin/busybox";
const FIO: &str = "/usr/bin/fio";
/// Where this program lies in the guest.
const LAB: &str = "/lab";
/// The module of the bus. With a device's driver, and what both depend on, the device works.
const TRANSPORT: &str = "virtio_pci";

/// The first process of the guest. What it prints goes to the kernel's console.
const INIT: &str = r#"#!/bin/busybox sh
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sysfs /sys
$busybox mount -t devtmpfs devtmpfs /dev
read -r line < /proc/cmdline
for word in $line; do
    case $word in lab.device=*) device=${word#lab.device=} ;; esac
done
while read -r module; do $busybox insmod /modules/$module.ko; done < /modules/order-$device
$busybox stty -F /dev/ttyS1 raw -echo 115200
/lab vm --guest
status=$?
[ $status = 0 ] || echo "LAB failed status=$status" > /dev/ttyS1
$busybox sync
$busybox sleep 0.2
$busybox poweroff -f
"#;

/// Writes the initial file system for `kernel` to `target`.
pub(crate) fn build(kernel: &Kernel, scratch: &Path, target: &Path) -> anyhow::Result<()> {
    let mut bytes = std::fs::read(cached_base(kernel)?)?;
    bytes.extend_from_slice(&overlay(scratch)?);
    std::fs::write(target, bytes).context("writing the initramfs")
}

/// The part that depends on packages only, made if it is not there or its inputs changed.
fn cached_base(kernel: &Kernel) -> anyhow::Result<PathBuf> {
    let mut orders = Vec::new();
    for device in Device::ALL {
        orders.push((device, modules_in_order(kernel, device)?));
    }
    let modules: BTreeMap<&String, &PathBuf> =
        orders.iter().flat_map(|(_, order)| order.iter().map(|(name, path)| (name, path))).collect();
    let mut files = vec![PathBuf::from(BUSYBOX), PathBuf::from(FIO)];
    files.extend(libraries(Path::new(FIO))?);
    let inputs = modules.values().copied().chain(&files);
    let path = cache::directory().join(format!("initramfs-{:016x}.cpio", fingerprint(inputs)?));
    if path.exists() {
        return Ok(path);
    }
    let mut archive = Archive::default();
    for directory in ["proc", "sys", "dev", "tmp", "mnt"] {
        archive.directory(directory);
    }
    archive.file("init", INIT.as_bytes());
    for file in &files {
        archive.file(&file.to_string_lossy(), &read(file)?);
    }
    for (device, order) in &orders {
        let order: String = order.iter().map(|(name, _)| format!("{name}\n")).collect();
        archive.file(&format!("modules/order-{}", device.name()), order.as_bytes());
    }
    for (name, file) in &modules {
        archive.file(&format!("modules/{name}.ko"), &read(file)?);
    }
    forget_older()?;
    // Two runs may do this at once: the name appears only when the content is whole.
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&unfinished, archive.finish()).context("writing to the cache")?;
    std::fs::rename(&unfinished, &path)?;
    Ok(path)
}

/// Removes archives made from other packages.
fn forget_older() -> anyhow::Result<()> {
    for entry in std::fs::read_dir(cache::directory())?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("initramfs-") && name.ends_with(".cpio") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// This program and its libraries.
fn overlay(scratch: &Path) -> anyhow::Result<Vec<u8>> {
    // A copy, because the program's own file may be replaced by a build in the middle of a run.
    let (whole, stripped) = (scratch.join("lab-whole"), scratch.join("lab-stripped"));
    std::fs::write(&whole, read(Path::new("/proc/self/exe"))?)?;
    // Without `strip` the guest only takes a little longer to unpack its files.
    let small =
        Command::new("strip").arg("-o").arg(&stripped).arg(&whole).status().is_ok_and(|status| status.success());
    let program = if small { &stripped } else { &whole };
    let mut archive = Archive::default();
    archive.file(LAB, &read(program)?);
    for library in libraries(program)? {
        archive.file(&library.to_string_lossy(), &read(&library)?);
    }
    let _ = std::fs::remove_file(&whole);
    let _ = std::fs::remove_file(&stripped);
    Ok(archive.finish())
}

/// The shared libraries a program loads, its interpreter among them.
fn libraries(program: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    anyhow::ensure!(output.status.success(), "ldd {} failed", program.display());
    let text = String::from_utf8_lossy(&output.stdout);
    anyhow::ensure!(!text.contains("not found"), "{} lacks a library:\n{text}", program.display());
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

/// The modules of a device, each after those it depends on.
fn modules_in_order(kernel: &Kernel, device: Device) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut order = Vec::new();
    for name in std::iter::once(&TRANSPORT).chain(device.drivers()) {
        add_module(kernel, name, &mut order)?;
    }
    Ok(order)
}

fn add_module(kernel: &Kernel, name: &str, order: &mut Vec<(String, PathBuf)>) -> anyhow::Result<()> {
    if order.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let path = find_module(&kernel.modules, name).with_context(|| format!("the kernel has no module {name}"))?;
    for dependency in module_dependencies(&read(&path)?) {
        add_module(kernel, &dependency, order)?;
    }
    order.push((name.to_owned(), path));
    Ok(())
}

/// The module's own list of modules it needs (the package has no `modules.dep`; installing it would make one).
fn module_dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let list = &module[at + KEY.len()..];
    let list = &list[..list.iter().position(|&byte| byte == 0).unwrap_or(list.len())];
    String::from_utf8_lossy(list).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn find_module(directory: &Path, name: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(directory).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find_module(&path, name) {
                return Some(found);
            }
        } else if path.file_name().is_some_and(|file| file.to_string_lossy().replace('-', "_") == format!("{name}.ko"))
        {
            return Some(path);
        }
    }
    None
}

/// A number that changes when a file or the init script changes.
fn fingerprint<'a>(files: impl Iterator<Item = &'a PathBuf>) -> anyhow::Result<u64> {
    let mut hasher = DefaultHasher::new();
    INIT.hash(&mut hasher);
    for file in files {
        let meta = std::fs::metadata(file)
            .with_context(|| format!("{} is missing: run `cargo xtask setup`", file.display()))?;
        (file, meta.size(), meta.mtime(), meta.mtime_nsec()).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        let module = b"junk\0license=GPL\0depends=virtio_ring,virtio\0retpoline=Y\0";
        assert_eq!(module_dependencies(module), ["virtio_ring", "virtio"]);
        assert!(module_dependencies(b"\0depends=\0intree=Y\0").is_empty());
    }
}
