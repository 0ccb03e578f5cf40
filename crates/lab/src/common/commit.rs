//! What a report says of the sources it was made with.

use std::process::Command;

/// The commit the sources are at, with a mark where they differ from it.
pub(crate) fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        Some(commit) if git(&["status", "--porcelain"]).is_some_and(|changes| changes.is_empty()) => commit,
        Some(commit) => format!("{commit}+changes"),
        None => "unknown".into(),
    }
}
