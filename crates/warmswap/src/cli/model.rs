//! `warmswap model`: the trained model that every device begins with.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;
use warmswap_predict::{HORIZONS, INPUTS, OUTCOMES, TRAINED_BYTES, Trained, load_trained_model};

use super::{Failure, plain};

/// What is done with it.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// What a trained model knows: the shipped one, or that in a file.
    Show {
        /// A file with a trained model.
        file: Option<PathBuf>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Writes the shipped model into a file.
    Export {
        /// Where it goes.
        file: PathBuf,
    },
}

/// Runs `warmswap model`.
pub(super) fn run(verb: &Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Show { file, json } => show(file.as_deref(), *json),
        Verb::Export { file } => {
            std::fs::write(file, load_trained_model().encode())
                .map_err(|error| Failure::new(1, format!("{}: {error}", file.display())))?;
            Ok(0)
        }
    }
}

fn read(path: &Path) -> Result<Trained, Failure> {
    let fail = |what: &dyn std::fmt::Display| Failure::new(1, format!("{}: {what}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| fail(&error))?;
    Trained::decode(&bytes).map_err(|error| fail(&error))
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

fn show(file: Option<&Path>, json: bool) -> Result<u8, Failure> {
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
