//! What can go wrong at a sink, and what is done about it.

use std::time::Duration;

/// What the apply task does after an error. The only place where retry, stop and give-up are decided is
/// [`SinkError::directive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directive {
    /// Open the sink again and go on, after a back-off of at least this long.
    Retry(Duration),
    /// Stop this sink, say why, and wait for a person (`wallaby resume`) or a changed spec.
    Stop,
    /// A younger owner exists: drop the task at once, without another write.
    GiveUp,
}

/// An error of a sink. Messages say what is wrong, where, and what to do; never a row's value.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The sink cannot be reached, is shutting down, or a lock or serialization failure asks for another try.
    #[error("{0}")]
    Transient(String),
    /// The sink's own settings, rights or tables do not fit; `remedy` is what a person runs.
    #[error("{reason}. {remedy}")]
    Configuration {
        /// What is wrong and where.
        reason: String,
        /// The statement to run, or the thing to change.
        remedy: String,
    },
    /// The data cannot be kept by the sink (a violated constraint, a value out of range).
    #[error("{reason}. {remedy}")]
    Data {
        /// The constraint and the keys.
        reason: String,
        /// What a person can do.
        remedy: String,
    },
    /// What was to be applied could not be read on: the log, or the side store. Whoever fed the sink knows more.
    #[error("what is to be applied could not be read on: {0}")]
    Interrupted(String),
    /// A write met a younger epoch, or our epoch was refused.
    #[error("fenced: {0}")]
    Fenced(String),
    /// The sink stands at another position than the batch begins at: open it again and read from there.
    #[error("the sink stands at {found}, not at {expected}")]
    Position {
        /// Where the batch begins.
        expected: wallaby_model::Position,
        /// Where the sink stands.
        found: wallaby_model::Position,
    },
}

impl SinkError {
    /// What to do after this error.
    pub fn directive(&self) -> Directive {
        match self {
            SinkError::Transient(_) | SinkError::Interrupted(_) => Directive::Retry(Duration::from_secs(1)),
            SinkError::Position { .. } => Directive::Retry(Duration::ZERO),
            SinkError::Configuration { .. } | SinkError::Data { .. } => Directive::Stop,
            SinkError::Fenced(_) => Directive::GiveUp,
        }
    }
}
