//! The metrics of this crate: each is declared, described and written here and nowhere else.

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

const KEEPALIVES: &str = "wallaby_coordination_keepalives_total";
const KEEPALIVE_FAILURES: &str = "wallaby_coordination_keepalive_failures_total";
const SELF_FENCED: &str = "wallaby_coordination_self_fenced_total";
const LEASES_LOST: &str = "wallaby_coordination_leases_lost_total";
const LEASE_VALID: &str = "wallaby_coordination_lease_valid_seconds";
const LOCKS_HELD: &str = "wallaby_coordination_locks_held_count";
const LOCKS_LOST: &str = "wallaby_coordination_locks_lost_total";
const WRITES_REFUSED: &str = "wallaby_coordination_guarded_writes_refused_total";
const WATCH_RESTARTS: &str = "wallaby_coordination_watch_restarts_total";
const RETRIES: &str = "wallaby_coordination_request_retries_total";

/// Tells the recorder what each metric means. Call once, after the recorder is installed.
pub fn describe() {
    describe_counter!(KEEPALIVES, Unit::Count, "Keepalives of the process' lease that etcd answered.");
    describe_counter!(
        KEEPALIVE_FAILURES,
        Unit::Count,
        "Keepalives without an answer in time; each reopens the stream."
    );
    describe_counter!(
        SELF_FENCED,
        Unit::Count,
        "Times this process stopped itself because its lease might have run out."
    );
    describe_counter!(LEASES_LOST, Unit::Count, "Times etcd said that the lease of this process is gone.");
    describe_gauge!(LEASE_VALID, Unit::Seconds, "Time left until this process fences itself, at the last keepalive.");
    describe_gauge!(LOCKS_HELD, Unit::Count, "Task locks held by this process.");
    describe_counter!(LOCKS_LOST, Unit::Count, "Task locks that disappeared while held.");
    describe_counter!(
        WRITES_REFUSED,
        Unit::Count,
        "Writes to etcd refused because the task's lock is not ours, by write."
    );
    describe_counter!(WATCH_RESTARTS, Unit::Count, "Watches opened again, by cause.");
    describe_counter!(RETRIES, Unit::Count, "Requests to etcd repeated after no answer.");
}

pub(crate) fn keepalive_answered(valid_for: std::time::Duration) {
    counter!(KEEPALIVES).increment(1);
    gauge!(LEASE_VALID).set(valid_for.as_secs_f64());
}

pub(crate) fn keepalive_failed() {
    counter!(KEEPALIVE_FAILURES).increment(1);
}

pub(crate) fn self_fenced() {
    counter!(SELF_FENCED).increment(1);
    gauge!(LEASE_VALID).set(0.0);
}

pub(crate) fn lease_lost() {
    counter!(LEASES_LOST).increment(1);
    gauge!(LEASE_VALID).set(0.0);
}

pub(crate) fn lock_taken() {
    gauge!(LOCKS_HELD).increment(1.0);
}

pub(crate) fn lock_dropped() {
    gauge!(LOCKS_HELD).decrement(1.0);
}

pub(crate) fn lock_lost() {
    counter!(LOCKS_LOST).increment(1);
}

pub(crate) fn write_refused(write: &'static str) {
    counter!(WRITES_REFUSED, "write" => write).increment(1);
}

pub(crate) fn watch_restarted(cause: &'static str) {
    counter!(WATCH_RESTARTS, "cause" => cause).increment(1);
}

pub(crate) fn request_retried() {
    counter!(RETRIES).increment(1);
}
