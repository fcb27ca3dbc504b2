//! The Postgres sink: state, upserted, exactly once.
