//! What can go wrong, and which of the contract's errors it becomes.
//!
//! The one place where a SQLSTATE decides whether the task tries again, stops for a person, or looks closer. Messages of
//! Postgres are passed on only for classes whose messages hold names and no values.

use tokio_postgres::error::{DbError, SqlState};
use wallaby_connector_api::SinkError;
use wallaby_model::{Position, TableName};

use crate::collapse::CollapseError;
use crate::extras::NOT_YET_DEFERRABLE;

/// An error inside the sink.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PostgresError {
    /// A statement or the connection failed.
    #[error("{doing}: {source}")]
    Sql {
        /// What was being done, as in "applying rows to public.orders".
        doing: String,
        /// The failure.
        source: tokio_postgres::Error,
    },
    /// A table at the sink does not fit the shape that the source has from `first` on.
    #[error("{reason}")]
    Shape {
        /// What differs.
        reason: String,
        /// The statements to run at the sink.
        remedy: String,
        /// The first row in that shape.
        first: Position,
    },
    /// No net effect.
    #[error(transparent)]
    Collapse(#[from] CollapseError),
    /// Already in the contract's terms.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// Adds what was being done to an error of tokio-postgres.
pub(crate) trait Doing<T> {
    /// `doing` as in "reading the checkpoint".
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, PostgresError>;
}

impl<T> Doing<T> for Result<T, tokio_postgres::Error> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, PostgresError> {
        self.map_err(|source| PostgresError::Sql { doing: doing(), source })
    }
}

impl PostgresError {
    /// The server's SQLSTATE, if the server answered.
    pub(crate) fn sqlstate(&self) -> Option<&SqlState> {
        match self {
            PostgresError::Sql { source, .. } => source.code(),
            _ => None,
        }
    }

    /// Whether a smaller step could go through, or would at least tell which row it is: a violated constraint, or a
    /// value that the sink does not take.
    pub(crate) fn is_of_the_data(&self) -> bool {
        self.sqlstate().is_some_and(|state| state.code().starts_with("23") || state.code().starts_with("22"))
    }

    /// The index that refused a row, quoted, if that is one that is to belong to a DEFERRABLE constraint and does not yet.
    pub(crate) fn not_yet_deferrable(&self) -> Option<String> {
        let PostgresError::Sql { source, .. } = self else { return None };
        let refused = source.as_db_error()?;
        let index = refused.constraint().filter(|name| name.starts_with(NOT_YET_DEFERRABLE))?;
        Some(TableName::new(refused.schema()?, index).quoted())
    }

    /// In the contract's terms. `role` is who is connected, for grants.
    pub(crate) fn into_sink(self, role: &str) -> SinkError {
        match self {
            PostgresError::Sink(error) => error,
            PostgresError::Shape { reason, remedy, .. } => SinkError::Configuration { reason, remedy },
            PostgresError::Collapse(error) => SinkError::Data {
                reason: error.to_string(),
                remedy: "This is a fault of the log's content: report it, with the table and the position".to_owned(),
            },
            PostgresError::Sql { doing, source } => match source.as_db_error() {
                Some(db) => classify(&doing, db, role),
                None => SinkError::Transient(format!("{doing}: {}", without_server(&source))),
            },
        }
    }
}

/// An error that did not come from the server: the connection, or a wrong use of the protocol.
fn without_server(error: &tokio_postgres::Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// The server's function that refuses what row-level security would cut: its SQLSTATE is that of any missing privilege, and its
/// words are in the server's language.
const ROW_SECURITY_ROUTINE: &str = "check_enable_rls";

fn classify(doing: &str, db: &DbError, role: &str) -> SinkError {
    let code = db.code().code();
    let message = db.message();
    let configuration =
        |remedy: String| SinkError::Configuration { reason: format!("{doing}: {message} (SQLSTATE {code})"), remedy };
    match (&code[..2], code) {
        (_, "42501") if db.routine() == Some(ROW_SECURITY_ROUTINE) => configuration(format!(
            "Rows that the role does not see would be passed over. Run at the sink: ALTER ROLE {role} BYPASSRLS; or make it a member of \
             the table's owner where row-level security is not forced on the owner; where a trigger, function or view of yours reads the \
             table, the role that it runs as. Then wallaby resume",
            role = wallaby_model::schema::quote_identifier(role),
        )),
        (_, "42501") => configuration(format!(
            "Grant it at the sink: GRANT CREATE, TEMPORARY ON DATABASE {database} TO {role}; and for schemas that exist GRANT \
             USAGE, CREATE ON SCHEMA <schema> TO {role}; GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES \
             IN SCHEMA <schema> TO {role}. A table that gets columns must belong to {role}. Then run wallaby resume",
            database = "<database>",
            role = wallaby_model::schema::quote_identifier(role),
        )),
        ("28", _) => configuration("Correct user and password in the sink's dsn".to_owned()),
        (_, "3D000") => configuration("Create the database, or correct its name in the sink's dsn".to_owned()),
        // Of class 55 only a lock that is not free passes by itself.
        ("08" | "57" | "40" | "53" | "58" | "XX", _) | (_, "25006" | "25P03" | "55P03") => {
            SinkError::Transient(format!("{doing}: {message} (SQLSTATE {code})"))
        }
        // What is in use here is in use by our own transaction: it has changes of a table whose triggers fire at its end only.
        (_, "55006") => configuration(
            "Drop foreign keys and constraint triggers of the table at the sink that are DEFERRABLE, run wallaby resume, and \
             make them again when the sink is past this"
                .to_owned(),
        ),
        // Not in a state for what is asked: a table that is published on without an identity, a view, an index that is not valid.
        ("55", _) => {
            let hint = db.hint().map(|hint| format!("{hint} ")).unwrap_or_default();
            configuration(format!("{hint}Mend it at the sink, then run wallaby resume"))
        }
        ("22", _) => SinkError::Data {
            reason: format!("{doing}: a value does not fit ({}, SQLSTATE {code})", value_fault(code)),
            remedy: match code {
                "22P02" => {
                    "Change the column's type, or add the label to the enum (ALTER TYPE … ADD VALUE), at the sink"
                }
                _ => "Widen the column at the sink",
            }
            .to_owned()
                + ", then run wallaby resume",
        },
        ("23", _) => violation(doing, db),
        _ => configuration("Mend it at the sink, then run wallaby resume".to_owned()),
    }
}

/// Classes 22 and 23 quote values in their messages: only what names the fault is passed on.
fn value_fault(code: &str) -> &'static str {
    match code {
        "22001" => "too long",
        "22003" => "out of range",
        "22P02" => "not of the column's type",
        "22P03" => "not of the column's binary form",
        "22008" => "a date or time out of range",
        "22021" | "22P05" => "not in the sink's encoding",
        _ => "not accepted",
    }
}

fn violation(doing: &str, db: &DbError) -> SinkError {
    let code = db.code().code();
    let constraint = db.constraint().map(|name| format!(" {name:?}")).unwrap_or_default();
    let table = match (db.schema(), db.table()) {
        (Some(schema), Some(table)) => format!(" of {}", TableName::new(schema, table)),
        _ => String::new(),
    };
    if code == "23505" && db.constraint().is_some_and(|name| name.starts_with(NOT_YET_DEFERRABLE)) {
        return SinkError::Transient(format!(
            "{doing}: rows are in each other's way as a DEFERRABLE unique constraint{table} lets them be, whose index does not \
             belong to it yet: it is tried again (SQLSTATE {code})"
        ));
    }
    let column = db.column().map(|name| format!(" in column {name:?}")).unwrap_or_default();
    let (what, remedy) = match code {
        "23505" => ("unique constraint", "Remove the row that is in the way, or make the constraint DEFERRABLE"),
        "23503" => ("foreign key", "Insert the row that is referred to, drop the foreign key, or make it DEFERRABLE"),
        "23502" => ("NOT NULL", "ALTER TABLE … ALTER COLUMN … DROP NOT NULL"),
        "23514" => ("check constraint", "Drop the constraint: the source does not have it, or has another"),
        "23P01" => ("exclusion constraint", "Remove the row that is in the way, or make the constraint DEFERRABLE"),
        _ => ("constraint", "Drop the constraint, or mend the rows"),
    };
    // "Key (a)=(1) already exists." names keys, which a person needs; "Failing row contains (…)" would show the row.
    let keys = match code {
        "23505" | "23503" => db.detail().map(|detail| format!(": {detail}")).unwrap_or_default(),
        _ => String::new(),
    };
    SinkError::Data {
        reason: format!("{doing}: {what}{constraint}{table}{column} is violated (SQLSTATE {code}){keys}"),
        remedy: format!("{remedy} at the sink, then run wallaby resume"),
    }
}
