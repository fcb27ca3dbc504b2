//! The Postgres sink: state, upserted, exactly once.
//!
//! A batch becomes one transaction: the checkpoint row is moved first, guarded by epoch and position; then tables are
//! brought into shape, and the net effect of the batch goes through COPY into temporary tables and a few statements per
//! table. What the sink guarantees is declared in [`capabilities`] and printed to `docs/sinks/postgres.md`.
//!
//! | module | holds |
//! |---|---|
//! | `config`, `tls` | settings, connection |
//! | `session` | one connection, its prepared statements and temporary tables |
//! | `checkpoint` | the checkpoint row, taking over from older owners |
//! | `schema`, `catalog` | tables: planning (pure), reading and changing |
//! | `assemble`, `collapse` | a batch by table and shape, and its net effect (pure) |
//! | `encode`, `write` | COPY BINARY (pure), the statements |
//! | `sink` | the contract: open, and which of the others does what |
//! | `transaction`, `large` | one transaction of the sink: a batch, small steps after a violation; a transaction in portions |
//! | `marks`, `loads`, `loader`, `extras` | the first load: a state for each table, the hand-over, chunks, indexes and constraints |
//! | `verify` | this side of `wallaby verify` |
//! | `error` | SQLSTATE to retry, stop or give up |

mod assemble;
mod catalog;
mod checkpoint;
mod collapse;
mod columns;
mod config;
mod encode;
mod error;
mod extras;
mod large;
mod loader;
mod loads;
mod marks;
mod metrics;
mod schema;
mod session;
mod sink;
mod transaction;
mod verify;
mod write;

pub use config::PostgresSinkConfig;
pub use metrics::describe_metrics;
pub use sink::{PostgresSink, PostgresSinkFactory, capabilities};
pub use verify::PostgresVerify;
