//! `warmswap schema`: the table of features.

use std::io::Write;

use serde_json::{Value, json};
use warmswap_predict::{FEATURES, SCHEMA_VERSION, Spec, Summary, Unit};

use super::Failure;

/// The word for a unit.
fn unit(unit: Unit) -> &'static str {
    match unit {
        Unit::PerSecond => "per second",
        Unit::Micros => "microseconds",
        Unit::Bytes => "bytes",
        Unit::BytesPerSecond => "bytes per second",
        Unit::Share => "0 to 1",
        Unit::Cores => "processors",
        Unit::Count => "number",
    }
}

/// What a window says of its ticks.
fn summary(spec: &Spec) -> String {
    match spec.summary {
        Summary::Ratio => "ratio".to_owned(),
        Summary::Max => "greatest".to_owned(),
        Summary::Last => "latest".to_owned(),
        Summary::Quantile(_, millionths) => format!("quantile {}", f64::from(millionths) / 1e6),
    }
}

fn as_json() -> Value {
    let features: Vec<Value> = FEATURES
        .iter()
        .map(|spec| {
            json!({
                "name": spec.name,
                "unit": unit(spec.unit),
                "role": spec.role.name(),
                "source": spec.source.name(),
                "summary": summary(spec),
                "meaning": spec.meaning,
            })
        })
        .collect();
    json!({ "schema_version": SCHEMA_VERSION, "features": features })
}

/// The table as it is in the documentation.
fn markdown() -> String {
    let mut text = String::from("| Name | Unit | Role | Source | Window | Meaning |\n|---|---|---|---|---|---|\n");
    for spec in &FEATURES {
        let (name, unit, role, source) = (spec.name, unit(spec.unit), spec.role.name(), spec.source.name());
        let (summary, meaning) = (summary(spec), spec.meaning.replace('|', "\\|"));
        text.push_str(&format!("| `{name}` | {unit} | {role} | {source} | {summary} | {meaning} |\n"));
    }
    text
}

fn plain(out: &mut dyn Write) -> std::io::Result<()> {
    let row = |out: &mut dyn Write, cells: [&str; 6]| {
        let [name, unit, role, source, summary, meaning] = cells;
        writeln!(out, "{name:<28} {unit:<16} {role:<8} {source:<8} {summary:<14} {meaning}")
    };
    row(out, ["NAME", "UNIT", "ROLE", "SOURCE", "WINDOW", "MEANING"])?;
    for spec in &FEATURES {
        let (role, source) = (spec.role.name(), spec.source.name());
        row(out, [spec.name, unit(spec.unit), role, source, &summary(spec), spec.meaning])?;
    }
    Ok(())
}

/// Runs the command.
pub(super) fn run(json: bool, in_markdown: bool) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    match (json, in_markdown) {
        (true, _) => writeln!(out, "{}", as_json())?,
        (_, true) => write!(out, "{}", markdown())?,
        _ => plain(&mut out)?,
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const BEGIN: &str = "<!-- the table of `warmswap schema --markdown` begins here -->\n";
    const END: &str = "<!-- the table ends here -->\n";

    /// With `UPDATE_EXPECT=1` the document is written anew.
    #[test]
    fn the_documentation_holds_the_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/profile.md");
        let text = std::fs::read_to_string(&path).expect("docs/profile.md is there");
        let (before, rest) = text.split_once(BEGIN).expect("the table begins");
        let (_, after) = rest.split_once(END).expect("the table ends");
        let expected = format!("{before}{BEGIN}\n{}\n{END}{after}", markdown());
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            std::fs::write(&path, &expected).expect("it can be written");
        } else if text != expected {
            panic!(
                "docs/profile.md does not hold the table of features: UPDATE_EXPECT=1 cargo test -p warmswap --lib schema"
            );
        }
    }

    #[test]
    fn every_feature_is_in_every_form() {
        let (json, markdown, mut text) = (as_json(), markdown(), Vec::new());
        plain(&mut text).expect("memory has room");
        let text = String::from_utf8(text).expect("it is text");
        assert_eq!(json["features"].as_array().map(Vec::len), Some(FEATURES.len()));
        assert_eq!((markdown.lines().count(), text.lines().count()), (FEATURES.len() + 2, FEATURES.len() + 1));
        for spec in &FEATURES {
            assert!(markdown.contains(&format!("| `{}` |", spec.name)) && text.contains(spec.name), "{}", spec.name);
        }
    }
}
