//! Structured logs (`--log FILTER`): every observation as one `tracing` event, with its id and its cause's, beside what the servers
//! of the operator's side have to say. Lines of both hosts join into one story by those ids.
//!
//! What must never be in a log is never in an observation: keys, secrets of the guard, device state and guest memory have no field
//! there. What a peer can provoke is limited where it is noted ([`Observer::note_provoked`]).

use crate::exit::Exit;
use belay_vmm_glue::migrate::observation::{Kind, Observation};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::io;
use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people and grep
    Text,
    /// One JSON object a line
    Json,
}

/// Whether log lines take the place of sentences on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Logs(bool);

/// What a filter is made of.
const DIRECTIVES: &str = "error, warn, info, debug, trace, off, or TARGET=LEVEL, separated by commas";

/// Whether a lone word names no level and nothing here either: as a target it would silence everything there is.
fn is_no_directive(word: &str) -> bool {
    let is_lone = word.chars().all(|letter| letter.is_alphanumeric() || matches!(letter, '_' | '-' | ':'));
    is_lone && word.parse::<LevelFilter>().is_err() && !word.starts_with("belay")
}

/// Starts logging on stderr, if `filter` asks for it.
pub fn start(filter: Option<&str>, format: Option<LogFormat>) -> Result<Logs, Exit> {
    let Some(filter) = filter else { return Ok(Logs(false)) };
    if let Some(word) = filter.split(',').map(str::trim).find(|word| is_no_directive(word)) {
        eprintln!("belay: --log {filter}: {word:?} is neither a level nor something of belay's");
        eprintln!("       {DIRECTIVES}");
        return Err(Exit::Usage);
    }
    let filter = match EnvFilter::builder().parse(filter) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("belay: --log {filter}: {error}");
            eprintln!("       {DIRECTIVES}");
            return Err(Exit::Usage);
        }
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false);
    let started = match format.unwrap_or(LogFormat::Text) {
        LogFormat::Text => tracing::subscriber::set_global_default(lines.finish()),
        LogFormat::Json => tracing::subscriber::set_global_default(lines.json().flatten_event(true).finish()),
    };
    started.expect("logging is started once a process");
    Ok(Logs(true))
}

impl Logs {
    pub fn on(self) -> bool {
        self.0
    }
}

/// How much an observation is worth.
fn level(kind: &Kind) -> Level {
    match kind {
        Kind::Failed { .. } => Level::ERROR,
        Kind::Noticed { .. } => Level::WARN,
        Kind::Pull { .. } | Kind::Latency { .. } => Level::TRACE,
        Kind::Committed { .. } | Kind::Folded { .. } | Kind::Allocating { .. } | Kind::Registering { .. } => {
            Level::DEBUG
        }
        _ => Level::INFO,
    }
}

/// Logs an observation.
pub fn observed(seen: &Observation) {
    // Whether anybody wants it is asked before anything is made of it.
    macro_rules! log {
        ($($level:ident)|+) => {
            match level(&seen.kind) {
                $(Level::$level if tracing::enabled!(target: "belay::observation", Level::$level) => {
                    let what = serde_json::to_value(&seen.kind).unwrap_or_default();
                    let event = what["event"].as_str().unwrap_or_default();
                    let parent = seen.parent.as_ref().map(|parent| &*parent.0);
                    tracing::event!(target: "belay::observation", Level::$level, id = seen.id.0, parent, event, %what);
                })+
                _ => {}
            }
        };
    }
    log!(ERROR | WARN | INFO | DEBUG | TRACE);
}
