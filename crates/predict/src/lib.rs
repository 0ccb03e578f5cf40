//! The statistical profile of a component: what is measured, how ticks become windows, and what a window is as bytes.
//!
//! ```text
//! sources ──▶ Measure (one tick) ──▶ Profiler ──┬─▶ Record of the tick
//!                                               └─▶ Record of the window, every so many ticks
//! ```
//! A source puts what it saw into a [`Measure`]: sums and what they are to be divided by, greatest and latest values, latencies. Measures
//! of successive ticks merge without loss, so that a window is exactly what one long tick would have been. A [`Record`] is what is left
//! when sums are divided and quantiles taken: fixed in size, versioned, with a mask of what is missing. A value that no source had is
//! missing and never zero.
//!
//! What there is to measure is one table, [`FEATURES`], from which the names in every output and the table in the documentation are made.
//!
//! No clock, no allocation after construction, no `std`.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod counter;
mod evidence;
mod exhaust;
mod hazard;
mod inputs;
mod knowledge;
mod math;
mod measure;
mod model;
mod outcomes;
mod pages;
mod profiler;
mod record;
mod regress;
mod relation;
mod scale;
mod schema;
mod series;
mod state;
mod trained;
mod verdict;

pub use counter::Counter;
pub use evidence::Evidence;
pub use exhaust::{Exhaustion, Forecast};
pub use hazard::{BINS, HORIZON_COUNT, HORIZONS, Hazard, LOGIT_STEP};
pub use inputs::{INPUT_COUNT, INPUTS, Input};
pub use measure::{LatencyKind, Measure};
pub use model::{COMMIT_EVERY, Model, WARM_AFTER, WINDOWS_PER_FALSE_ALARM};
pub use outcomes::{CONTEXT_COUNT, Kind, OUTCOME_COUNT, OUTCOMES, context, outcome};
pub use pages::{PAGES_KEPT, Pages};
pub use profiler::{Profiler, Recorded};
pub use record::{DecodeError, Grain, RECORD_BYTES, Record, SCHEMA_VERSION};
pub use regress::{Gain, Regression};
pub use relation::Relation;
pub use scale::{Scale, Z_MAX};
pub use schema::{FEATURE_COUNT, FEATURES, Feature, Role, Source, Spec, Summary, Unit};
pub use series::{CONTEXT_MAX, ColumnCause, Scored, SeriesDetector};
pub use state::{MODEL_STATE_BYTES, StateError};
pub use trained::{TRAINED_BYTES, Trained, TrainedError, load_trained_model};
pub use verdict::{Alarm, Cause, Law, Verdict};
