//! Several runs side by side, in Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::Value;

use super::checks;

/// One run.
struct Run {
    name: String,
    /// Result by check.
    results: BTreeMap<String, String>,
    drain: String,
}

/// A table with a column for each file, which is named as the file is.
pub(super) fn of(files: &[PathBuf]) -> anyhow::Result<String> {
    let runs = files.iter().map(|file| read(file)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut text = String::from("| check |");
    let row = |text: &mut String, cells: &mut dyn Iterator<Item = String>| {
        cells.for_each(|cell| {
            let _written = write!(text, " {cell} |");
        });
        text.push('\n');
    };
    row(&mut text, &mut runs.iter().map(|run| run.name.clone()));
    text.push_str("|---|");
    row(&mut text, &mut runs.iter().map(|_| "---".to_owned()));
    for check in checks::all() {
        let _written = write!(text, "| `{}` {} |", check.id, check.name);
        row(&mut text, &mut runs.iter().map(|run| cell(run.results.get(check.id).map(String::as_str)).to_owned()));
    }
    text.push_str("| **passed** |");
    let passed = |run: &Run| run.results.values().filter(|result| *result == "pass").count();
    let made = |run: &Run| run.results.values().filter(|result| *result != "not-applicable").count();
    row(&mut text, &mut runs.iter().map(|run| format!("**{} of {}**", passed(run), made(run))));
    text.push_str("| **drained by** |");
    row(&mut text, &mut runs.iter().map(|run| run.drain.clone()));
    Ok(text)
}

fn cell(result: Option<&str>) -> &'static str {
    match result {
        Some("pass") => "✓",
        Some("fail") => "**fail**",
        Some("crash") => "**crash**",
        Some("timeout") => "**timeout**",
        _ => "–",
    }
}

fn read(file: &Path) -> anyhow::Result<Run> {
    let wrong = || format!("{} is not what `lab conform --json` prints", file.display());
    let text = std::fs::read(file).with_context(|| file.display().to_string())?;
    let run: Value = serde_json::from_slice(&text).with_context(wrong)?;
    let checks = run["checks"].as_array().with_context(wrong)?;
    let word = |check: &Value, key: &str| check[key].as_str().map(str::to_owned).with_context(wrong);
    let results = checks.iter().map(|check| Ok((word(check, "id")?, word(check, "result")?)));
    let measured = run["drain"]["stop"].is_boolean();
    let first = run["drain"]["first"].as_str();
    Ok(Run {
        name: file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned()),
        results: results.collect::<anyhow::Result<_>>()?,
        drain: match first {
            Some(method) => format!("`{method}`"),
            None if measured => "none".to_owned(),
            None => "–".to_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_stand_side_by_side_and_what_was_not_made_is_a_dash() {
        let dir = std::env::temp_dir().join(format!("conform-table-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let run = |name: &str, text: &str| {
            let path = dir.join(format!("{name}.json"));
            std::fs::write(&path, text).expect("a file");
            path
        };
        let good = r#"{"checks":[{"id":"base","result":"pass"},{"id":"call","result":"not-applicable"}],"drain":{"first":"stop","stop":true}}"#;
        let bad = r#"{"checks":[{"id":"base","result":"crash"},{"id":"call","result":"fail"}],"drain":{"first":null,"stop":false}}"#;
        let text = of(&[run("good", good), run("bad", bad)]).expect("a table");
        for line in
            ["| check | good | bad |", "| **passed** | **1 of 1** | **0 of 2** |", "| **drained by** | `stop` | none |"]
        {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        let base = text.lines().find(|line| line.contains("`base`")).expect("a line");
        assert!(base.ends_with("| ✓ | **crash** |"), "{base}");
        let serves = text.lines().find(|line| line.contains("`serves`")).expect("a line");
        assert!(serves.ends_with("| – | – |"), "{serves}");
        of(&[run("none", "{}")]).expect_err("it is no run");
        std::fs::remove_dir_all(&dir).expect("clean up");
    }
}
