//! Secrets by reference, resolved here on the worker and nowhere else.

use wallaby_model::flow::SecretRef;

/// Why a secret could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The variable is not set, or is not text.
    #[error(
        "the environment variable {0} is not set for this worker: set it where the worker is started, or use `file`"
    )]
    Env(String),
    /// The file cannot be read.
    #[error("the secret file {path} cannot be read by this worker: {source}. Check that it is mounted and readable")]
    File {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// There is nothing in it.
    #[error("{0} is empty")]
    Empty(String),
}

/// Resolves a reference. A trailing line break of a file is left out.
///
/// # Errors
/// When it is not there, or empty. Never contains the secret.
pub fn resolve(reference: &SecretRef) -> Result<String, SecretError> {
    let value = match reference {
        SecretRef::Env(name) => std::env::var(name).map_err(|_| SecretError::Env(name.clone()))?,
        SecretRef::File(path) => std::fs::read_to_string(path)
            .map_err(|source| SecretError::File { path: path.clone(), source })?
            .trim_end_matches(['\n', '\r'])
            .to_owned(),
        SecretRef::Value(value) => value.clone(),
    };
    if value.is_empty() { Err(SecretError::Empty(format!("{reference:?}"))) } else { Ok(value) }
}
