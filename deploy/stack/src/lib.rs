//! Starts, identifies, supervises and ends local servers: Postgres, NATS, etcd.
