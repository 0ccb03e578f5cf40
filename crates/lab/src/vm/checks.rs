//! What the host checks by itself once the guest is off: the file system, every block's stamp, fio's headers, and that
//! the guest read at the end what lies in the image.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;

use super::layout::{BLOCK, EXT4, FIO, MIB, STAMP};
use super::rng::digest;
use super::stamp::{BLOCKS, Block, table_digest};
use super::watch::Account;

/// The host's findings on the image.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Findings {
    /// `e2fsck -fn` found nothing to complain of.
    pub(crate) fsck_clean: bool,
    /// What it said otherwise.
    pub(crate) fsck_said: String,
    /// Blocks whose fio header or checksum is bad.
    pub(crate) fio_bad: u64,
    /// Stamp blocks that are damaged, plus one if the generations are not those the guest was promised.
    pub(crate) stamps_bad: u64,
    /// Mebibytes the guest read otherwise than they lie in the image.
    pub(crate) digests_differ: u64,
    /// Mebibytes compared.
    pub(crate) digests_compared: u64,
}

/// Checks `image` against what the guest said.
pub(crate) fn check(image: &Path, seed: u64, account: &Account) -> anyhow::Result<Findings> {
    let mut findings = Findings::default();
    (findings.fsck_clean, findings.fsck_said) = fsck(image)?;
    findings.fio_bad = fio_headers(image)?;
    let file = File::open(image).context("opening the image")?;
    findings.stamps_bad = stamps(&file, seed, account.stamp_table)?;
    for (mib, heard) in (0_u64..).zip(&account.digests) {
        let Some(heard) = heard else { continue };
        findings.digests_compared += 1;
        findings.digests_differ += u64::from(mebibyte_digest(&file, mib)? != *heard);
    }
    Ok(findings)
}

/// Runs the file system check without repairs.
fn fsck(image: &Path) -> anyhow::Result<(bool, String)> {
    let ran = Command::new("/sbin/e2fsck")
        .arg("-fn")
        .arg(format!("{}?offset={}", image.display(), EXT4.offset))
        .stdin(Stdio::null())
        .output()
        .context("running e2fsck")?;
    if ran.status.success() {
        return Ok((true, String::new()));
    }
    let said = String::from_utf8_lossy(&ran.stdout)
        .lines()
        .chain(String::from_utf8_lossy(&ran.stderr).lines())
        .take(12)
        .collect::<Vec<_>>()
        .join("; ");
    Ok((false, said))
}

/// Reads fio's part of the image with fio: every block must hold a whole header and content that fits its checksum.
fn fio_headers(image: &Path) -> anyhow::Result<u64> {
    let ran = Command::new("fio")
        .args(["--name=image", "--rw=read", "--ioengine=psync", "--verify=crc32c", "--verify_fatal=0"])
        .args(["--continue_on_error=verify", "--verify_state_save=0", "--output-format=json"])
        .arg(format!("--filename={}", image.display()))
        .arg(format!("--bs={BLOCK}"))
        .arg(format!("--offset={}", FIO.offset))
        .arg(format!("--size={}", FIO.bytes))
        .stdin(Stdio::null())
        .output()
        .context("running fio on the image")?;
    let text = String::from_utf8_lossy(&ran.stdout);
    let json: Value = text.find('{').and_then(|at| serde_json::from_str(&text[at..]).ok()).unwrap_or_default();
    let job = &json["jobs"][0];
    let read = job["read"]["total_ios"].as_u64().unwrap_or(0);
    let unread = (FIO.bytes / BLOCK).saturating_sub(read);
    let errors = job["total_err"].as_u64().unwrap_or(0);
    Ok(errors.max(unread).max(u64::from(!ran.status.success())))
}

/// Reads every stamp; `promised` is the digest of what the guest was promised.
fn stamps(image: &File, seed: u64, promised: Option<u64>) -> anyhow::Result<u64> {
    let mut block = Block::zeroed();
    let (mut bad, mut generations) = (0, Vec::new());
    for index in 0..BLOCKS {
        image.read_exact_at(&mut block.0, STAMP.offset + index * BLOCK)?;
        let generation = block.generation(seed, index);
        bad += u64::from(generation.is_err());
        generations.push(generation.unwrap_or(u64::MAX));
    }
    Ok(bad + u64::from(promised.is_some_and(|promised| promised != table_digest(&generations))))
}

/// The digest of one mebibyte, made as the guest makes it.
fn mebibyte_digest(image: &File, mib: u64) -> anyhow::Result<u64> {
    let mut bytes = vec![0; usize::try_from(MIB)?];
    image.read_exact_at(&mut bytes, mib * MIB)?;
    let sums: Vec<u8> = bytes.chunks(usize::try_from(BLOCK)?).flat_map(|block| digest(block).to_le_bytes()).collect();
    Ok(digest(&sums))
}
