//! `warmswap show`.

use std::io::Write;

use serde_json::{Value, json};
use warmswap_predict::{FEATURES, Feature, Role, Unit};

use super::profile::{self, Profile, Window, amount, unit_name};
use super::{Control, Failure, plain, show};
use crate::journal::timestamp;

/// Options of `warmswap show`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    #[command(flatten)]
    control: Control,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let dir = args.control.dir();
    show::names(std::slice::from_ref(&args.name), &dir)?;
    let (mut status, client) = show::ask(&dir, &args.name);
    let answered = client.is_some();
    let profile = match client {
        Some(mut client) => profile::ask(&mut client)?,
        None => None,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let whole = to_json(&args.name, &status, profile.as_ref()).to_string();
        writeln!(out, "{}", plain::json_line(&whole))?;
    } else {
        plain::clean_value(&mut status);
        show::table(&mut out, std::slice::from_ref(&status))?;
        if answered {
            print(&mut out, profile.as_ref())?;
        }
    }
    Ok(if answered { 0 } else { 4 })
}

/// The outward form: the members are always there, `null` where there is nothing. Windows are passed on as they were sent, so that what a
/// newer broker measures is not lost.
fn to_json(name: &str, status: &Value, profile: Option<&Value>) -> Value {
    let object = |value: &Value| if value.is_object() { value.clone() } else { Value::Null };
    let profile = profile.map(|profile| {
        json!({
            "schema_version": profile["schema_version"],
            "window": profile["windows"].as_array().and_then(|windows| windows.last()).map_or(Value::Null, object),
            "tick": object(&profile["tick"]),
            "verdict": object(&profile["verdict"]),
            "records_lost": profile["records_lost"],
        })
    });
    json!({ "name": name, "status": status, "profile": profile })
}

fn print(out: &mut dyn Write, answer: Option<&Value>) -> std::io::Result<()> {
    let Some(answer) = answer else {
        return writeln!(out, "\nno profile: the broker keeps none");
    };
    let profile = Profile::read(answer);
    let window = profile.windows.last();
    let head = |window: Option<&Window>, value: Option<&Value>| -> String {
        let Some(window) = window else { return "none yet".to_owned() };
        let number =
            |number: Option<u64>| number.map_or_else(|| profile::MISSING.to_owned(), |number| number.to_string());
        let mut text = format!("{} of backend {}", number(window.number), number(window.backend));
        if let Some(span) = window.span_ms {
            text.push_str(&format!(", over {}", amount(Some(span * 1e3), Unit::Micros)));
        }
        let end = value.and_then(|value| value["end_unix_ms"].as_u64());
        let end = end.and_then(|end| std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_millis(end)));
        if let Some(end) = end.filter(|end| end.elapsed().is_ok()) {
            text.push_str(&format!(", ended {}", timestamp(end)));
        }
        text
    };
    writeln!(out, "\nwindow {}", head(window, answer["windows"].as_array().and_then(|windows| windows.last())))?;
    writeln!(out, "tick   {}", head(profile.tick.as_ref(), Some(&answer["tick"])))?;
    if let Some(lost) = profile.records_lost.filter(|lost| *lost > 0) {
        writeln!(out, "{lost} records were lost on their way to the predictor")?;
    }
    print_verdict(out, &answer["verdict"])?;
    let value = |window: Option<&Window>, feature: Feature| {
        amount(window.and_then(|window| window.value(feature)), feature.spec().unit)
    };
    for role in [Role::Context, Role::Outcome, Role::Limit, Role::Quality] {
        writeln!(out, "\n{:<30} {:>12} {:>12}  {:<17} SOURCE", role.name().to_uppercase(), "WINDOW", "TICK", "UNIT")?;
        for (feature, spec) in Feature::ALL.into_iter().zip(FEATURES).filter(|(_, spec)| spec.role == role) {
            let (now, tick) = (value(window, feature), value(profile.tick.as_ref(), feature));
            let unit = unit_name(spec.unit);
            writeln!(out, "{:<30} {now:>12} {tick:>12}  {unit:<17} {}", spec.name, spec.source.name())?;
        }
    }
    match window.map_or(0, |window| window.unknown) {
        0 => Ok(()),
        unknown => writeln!(out, "\nvalues of the window that this version does not know: {unknown}; --json has them"),
    }
}

/// What the failure model says.
fn print_verdict(out: &mut dyn Write, verdict: &Value) -> std::io::Result<()> {
    if !verdict.is_object() {
        return Ok(());
    }
    let part = |value: &Value| amount(value.as_f64(), Unit::Share);
    let learning = if verdict["is_warm"] == true { "" } else { ", still learning what is usual" };
    writeln!(
        out,
        "\nfailure within 60 windows {}, harm {}, evidence {}{learning}",
        part(&verdict["risk_within_windows"]["60"]),
        part(&verdict["harm"]),
        part(&verdict["evidence"])
    )?;
    if let Some(reason) = verdict["reason"].as_str() {
        writeln!(out, "ALARM: {}", plain::clean(reason))?;
    }
    let causes = verdict["causes"].as_array().map_or(&[][..], Vec::as_slice);
    for cause in causes.iter().take(3) {
        let name = plain::clean(cause["feature"].as_str().unwrap_or(profile::MISSING));
        writeln!(out, "cause {name}, {} of what speaks for a failure", part(&cause["share"]))?;
    }
    if let Some(feature) = verdict["exhaustion"]["feature"].as_str() {
        let windows = verdict["exhaustion"]["windows"].as_f64().unwrap_or(f64::INFINITY);
        writeln!(out, "{} reaches its bound in {windows:.0} windows", plain::clean(feature))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_members_of_the_outward_form_are_always_there() {
        let status = json!({"name": "disk", "state": "dead"});
        let none = to_json("disk", &status, None);
        assert_eq!(none.to_string(), r#"{"name":"disk","profile":null,"status":{"name":"disk","state":"dead"}}"#);
        for hostile in [json!(1), json!([]), json!({"windows": {}, "tick": 3}), json!({"windows": [7]})] {
            let profile = &to_json("disk", &status, Some(&hostile))["profile"];
            assert_eq!((&profile["window"], &profile["tick"]), (&Value::Null, &Value::Null), "{hostile}");
            print(&mut Vec::new(), Some(&hostile)).expect("memory takes everything");
        }
        let one =
            json!({"schema_version": 1, "windows": [{"number": 1}, {"number": 2}], "tick": {}, "records_lost": 3});
        let expected =
            json!({"schema_version": 1, "window": {"number": 2}, "tick": {}, "verdict": null, "records_lost": 3});
        assert_eq!(to_json("disk", &status, Some(&one))["profile"], expected);
    }

    #[test]
    fn absurd_times_are_not_told() {
        let answer = json!({"windows": [{"end_unix_ms": u64::MAX, "span_ms": 1e300, "values": {}}]});
        let mut out = Vec::new();
        print(&mut out, Some(&answer)).expect("memory takes everything");
        let text = String::from_utf8(out).expect("plain text");
        assert!(text.contains("window - of backend -"), "{text}");
        assert!(!text.contains("ended"), "{text}");
    }
}
