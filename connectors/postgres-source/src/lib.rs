//! Reads the WAL of one PostgreSQL database through its own replication client.
