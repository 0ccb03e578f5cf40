//! `warmswap model`: the trained model that every device begins with, and what the failure model of one device has learnt.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use warmswap_predict::{HORIZONS, INPUTS, Model, OUTCOMES, StateError, TRAINED_BYTES, Trained, load_trained_model};

use super::{Control, Failure, plain, show};
use crate::control::hex;

/// What is done with it.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// What a trained model knows: the shipped one, or that in a file. With --name, what a device's model has learnt
    Show {
        /// A file with a trained model
        file: Option<PathBuf>,
        /// Of this device
        #[arg(long, conflicts_with = "file")]
        name: Option<String>,
        #[command(flatten)]
        control: Control,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Writes the shipped model into a file. With --name, what a device's model has learnt
    Export {
        /// Where it goes
        file: PathBuf,
        /// Of this device
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        control: Control,
    },
    /// Has the model of a device go on with what `export --name` or `snapshot export --model` wrote
    Load {
        /// The file
        file: PathBuf,
        /// The device
        #[arg(long)]
        name: String,
        #[command(flatten)]
        control: Control,
    },
    /// Has the model of a device begin anew: after its disk or its work was changed for good
    Reset {
        /// The device
        #[arg(long)]
        name: String,
        #[command(flatten)]
        control: Control,
    },
}

/// Runs `warmswap model`.
pub(super) fn run(verb: &Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Show { name: Some(name), control, json, .. } => show_learnt(name, control, *json),
        Verb::Show { file, json, .. } => show_trained(file.as_deref(), *json),
        Verb::Export { file, name, control } => {
            let bytes = match name {
                Some(name) => learnt(name, control)?,
                None => load_trained_model().encode().to_vec(),
            };
            super::write_own(file, &bytes)?;
            Ok(0)
        }
        Verb::Load { file, name, control } => {
            let fail = |what: &dyn std::fmt::Display| Failure::new(1, format!("{}: {what}", file.display()));
            let bytes = std::fs::read(file).map_err(|error| fail(&error))?;
            // Its broker may have another trained model; what is no state at all is found here.
            Model::decode(&load_trained_model(), &bytes).map(drop).or_else(|error| {
                let other = matches!(error, StateError::Trained { .. });
                if other { Ok(()) } else { Err(fail(&format!("{error}{}", super::hint(&bytes)))) }
            })?;
            let answer = ask(name, control, &json!({"verb": "model", "state": hex::encode(&bytes)}))?;
            writeln!(std::io::stdout(), "{name}: goes on with {} windows learnt", answer["windows_learnt"])?;
            Ok(0)
        }
        Verb::Reset { name, control } => {
            ask(name, control, &json!({"verb": "model", "reset": true}))?;
            writeln!(std::io::stdout(), "{name}: begins anew")?;
            Ok(0)
        }
    }
}

fn ask(name: &str, control: &Control, command: &Value) -> Result<Value, Failure> {
    Ok(show::connect(name, control)?.ask(command)?)
}

/// What a device's model has learnt, as bytes.
fn learnt(name: &str, control: &Control) -> Result<Vec<u8>, Failure> {
    let answer = ask(name, control, &json!({"verb": "model"}))?;
    let state = answer["state"].as_str().map(hex::decode).and_then(Result::ok).filter(|it| !it.is_empty());
    state.ok_or_else(|| Failure::new(1, format!("{name}: its broker says nothing of a model")))
}

fn show_learnt(name: &str, control: &Control, as_json: bool) -> Result<u8, Failure> {
    let mut answer = ask(name, control, &json!({"verb": "model"}))?;
    if let Some(members) = answer.as_object_mut() {
        members.remove("state");
    }
    let mut out = std::io::stdout().lock();
    if as_json {
        writeln!(out, "{}", plain::json_line(&answer.to_string()))?;
        return Ok(0);
    }
    let learning = if answer["is_warm"] == true { "" } else { ", still learning what is usual" };
    writeln!(out, "{name}: {} windows learnt{learning}", answer["windows_learnt"])?;
    Ok(0)
}

/// Reads a trained model.
pub(super) fn read(path: &Path) -> Result<Trained, Failure> {
    let fail = |what: &dyn std::fmt::Display| Failure::new(1, format!("{}: {what}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| fail(&error))?;
    Trained::decode(&bytes).map_err(|error| fail(&format!("{error}{}", super::hint(&bytes))))
}

/// How much an input adds to the logit of a failure within a minute of windows, at most.
fn weights(trained: &Trained) -> Vec<(String, f32)> {
    const MINUTE: usize = 2;
    let mut weights: Vec<(String, f32)> = INPUTS
        .iter()
        .enumerate()
        .map(|(at, input)| {
            let kind = input.kind().map_or(String::new(), |kind| format!(" ({})", kind.name()));
            (format!("{}{kind}", input.name()), trained.hazard.contribution(at, MINUTE, f32::MAX))
        })
        .filter(|(_, weight)| *weight > 0.0)
        .collect();
    weights.sort_by(|one, two| two.1.total_cmp(&one.1).then(one.0.cmp(&two.0)));
    weights
}

fn show_trained(file: Option<&Path>, json: bool) -> Result<u8, Failure> {
    let trained = file.map_or_else(|| Ok(load_trained_model()), read)?;
    let digest = format!("{:08x}", trained.digest());
    let weights = weights(&trained);
    let mut out = std::io::stdout().lock();
    if json {
        let weights: Vec<_> =
            weights.iter().map(|(input, weight)| json!({"input": input, "logit_max": weight})).collect();
        let whole = json!({
            "digest": digest,
            "bytes": TRAINED_BYTES,
            "outcomes": OUTCOMES.iter().map(|(feature, _)| feature.name()).collect::<Vec<_>>(),
            "horizons_windows": HORIZONS,
            "tolerances": {"harm": trained.tolerances[0], "risk": trained.tolerances[1]},
            "inputs": weights,
        });
        writeln!(out, "{}", plain::json_line(&whole.to_string()))?;
        return Ok(0);
    }
    writeln!(
        out,
        "trained model {digest}, {TRAINED_BYTES} bytes: {} outcomes, {} inputs",
        OUTCOMES.len(),
        INPUTS.len()
    )?;
    let [harm, risk] = trained.tolerances;
    writeln!(out, "borne with until a device has a history of its own: harm {harm:.2}, risk {risk:.2}")?;
    writeln!(out, "\n{:<40} LOGIT AT MOST, FAILURE WITHIN {} WINDOWS", "INPUT", HORIZONS[2])?;
    for (input, weight) in weights {
        writeln!(out, "{input:<40} {weight:.2}")?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_model_is_refused_by_name() {
        let path = std::env::temp_dir().join(format!("warmswap-model-{}", std::process::id()));
        std::fs::write(&path, b"wsMd and nothing more").expect("a temporary file");
        let failure = read(&path).expect_err("it is none");
        assert!(format!("{failure:?}").contains("trained model"), "{failure:?}");
        std::fs::write(&path, load_trained_model().encode()).expect("a temporary file");
        assert_eq!(read(&path).expect("it is one"), load_trained_model());
        std::fs::remove_file(&path).expect("it is there");
        assert!(!weights(&load_trained_model()).is_empty());
    }
}
