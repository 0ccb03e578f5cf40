//! The seeds of a target: few and small, made by the project's own encoders. `WARMSWAP_SEEDS=write cargo test hostile` makes them anew.

use std::path::Path;

/// Most bytes of all seeds of a target.
const BYTES_MAX: usize = 24 * 1024;

/// Holds the seeds in the tree against those that the encoders make, and runs the target on every one there is: what a fuzzer found once
/// and was kept is among them.
///
/// # Panics
/// If one is missing or another than it would be made now, or the target fails on one.
pub(crate) fn check(target: &str, made: &[(&str, Vec<u8>)], run: impl Fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let writes = std::env::var_os("WARMSWAP_SEEDS").is_some_and(|what| what == "write");
    if writes {
        std::fs::create_dir_all(&directory).expect("the tree can be written");
    }
    for (name, bytes) in made {
        let path = directory.join(format!("{name}.seed"));
        if writes {
            std::fs::write(&path, bytes).expect("the tree can be written");
        }
        let found = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(found, *bytes, "{}: WARMSWAP_SEEDS=write makes it anew", path.display());
    }
    let (mut total, mut count) = (0, 0);
    for entry in std::fs::read_dir(&directory).expect("it is there") {
        let path = entry.expect("it can be read").path();
        if path.extension().is_some_and(|ending| ending == "seed") {
            let bytes = std::fs::read(&path).expect("it is there");
            (total, count) = (total + bytes.len(), count + 1);
            run(&bytes);
        }
    }
    assert!(count >= made.len() && total <= BYTES_MAX, "{count} seeds of {total} bytes, at most {BYTES_MAX}");
}
