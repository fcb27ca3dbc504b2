//! What can go wrong in a workload or a comparison.

/// An error of this crate's library. Messages say what was being done and with which database.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Postgres could not be reached, or refused a statement.
    #[error("{doing}: {}", describe(source))]
    Postgres {
        /// What was being done.
        doing: String,
        /// The client's error.
        source: tokio_postgres::Error,
    },
    /// A table cannot be compared, or a workload cannot go on; the text says why and what to do.
    #[error("{0}")]
    Unusable(String),
}

impl Error {
    /// For `map_err`: an error of Postgres with what was being done.
    pub(crate) fn postgres(doing: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> Error {
        move |source| Error::Postgres { doing: doing.into(), source }
    }
}

/// The server's own sentence where there is one: the client's alone is "db error".
fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} ({})", db.message(), db.code().code()),
        None => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("{error}{cause}")
        }
    }
}
