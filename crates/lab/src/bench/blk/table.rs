//! The report for people.

use serde_json::Value;

/// Columns: title, field, width.
const COLUMNS: [(&str, &str, usize); 14] = [
    ("blk/s", "iops", 10),
    ("/QSD", "iops_ratio_qsd", 20),
    ("per cpu /QSD", "iops_per_cpu_ratio_qsd", 20),
    ("/frugal QSD", "iops_per_cpu_ratio_best_mode", 20),
    ("p99 /QSD", "p99_ratio_qsd", 20),
    ("p99.9 /QSD", "p999_ratio_qsd", 20),
    ("/limit", "limit_ratio", 20),
    ("/peer", "iops_ratio_peer", 20),
    ("per cpu /peer", "iops_per_cpu_ratio_peer", 20),
    ("p99 /peer", "p99_ratio_peer", 20),
    ("blk", "blk_engine", 8),
    ("QSD", "qsd", 18),
    ("frugal QSD", "qsd_per_cpu", 18),
    ("limit", "limit", 20),
];

/// All cells.
pub(super) fn of(report: &Value) -> String {
    let mut text = format!("{:<26}", "cell");
    for (title, _, width) in COLUMNS {
        text += &format!("{title:>width$}");
    }
    for cell in report["cells"].as_array().into_iter().flatten() {
        text += &format!("\n{:<26}", cell["name"].as_str().unwrap_or_default());
        for (_, field, width) in COLUMNS {
            text += &format!("{:>width$}", shown(cell, field));
        }
    }
    text + "\n"
}

/// One cell, as it is measured.
pub(super) fn progress(cell: &Value) -> String {
    let [iops, qsd, per_cpu, p99, limit] =
        ["iops", "iops_ratio_qsd", "iops_per_cpu_ratio_qsd", "p99_ratio_qsd", "limit_ratio"]
            .map(|name| shown(cell, name));
    let mut text = format!(
        "{iops} requests per second: {qsd} of QSD's, {per_cpu} per processor time, {p99} of its p99, {limit} of the limit"
    );
    if !cell["peer"].is_null() {
        let [iops, per_cpu, p99] =
            ["iops_ratio_peer", "iops_per_cpu_ratio_peer", "p99_ratio_peer"].map(|name| shown(cell, name));
        text += &format!("; {iops} of the other backend's, {per_cpu} per processor time, {p99} of its p99");
    }
    text
}

/// A figure with its range, a word, or what a side was.
fn shown(cell: &Value, field: &str) -> String {
    let figure = |value: &Value| format!("{:.2}", value.as_f64().unwrap_or(f64::NAN));
    match (&cell[field], &cell[format!("{field}_range")]) {
        (value, Value::Array(range)) => format!("{} ({}..{})", figure(value), figure(&range[0]), figure(&range[1])),
        (Value::Object(side), _) => side["what"].as_str().unwrap_or_default().to_owned(),
        (Value::String(text), _) => text.clone(),
        (Value::Null, _) => "-".to_owned(),
        (value, _) => format!("{:.0}", value.as_f64().unwrap_or(f64::NAN)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_figure_stands_beside_its_range_and_a_side_is_named() {
        let cell =
            json!({"iops": 12.0, "limit_ratio": 0.5, "limit_ratio_range": [0.25, 1.0], "qsd": {"what": "native"}});
        let shown = ["iops", "limit_ratio", "qsd", "qsd_per_cpu"].map(|field| shown(&cell, field));
        assert_eq!(shown, ["12", "0.50 (0.25..1.00)", "native", "-"]);
    }
}
