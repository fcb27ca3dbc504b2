//! The worker: takes offers, owns tasks, captures and applies.
