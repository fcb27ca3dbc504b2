//! What the controller counts.

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

const OFFERS: &str = "wallaby_controller_offers_total";
const OFFER_FAILURES: &str = "wallaby_controller_offer_failures_total";
const QUEUE_RENEWED: &str = "wallaby_controller_offer_consumers_renewed_total";
const UNOWNED: &str = "wallaby_controller_unowned_tasks";
const FLOWS: &str = "wallaby_controller_flows";
const WORKERS: &str = "wallaby_controller_workers";
const LEADER: &str = "wallaby_controller_leader";
const REQUESTS_REFUSED: &str = "wallaby_controller_requests_refused_total";

/// Describes every metric of this crate; once, after the recorder is installed.
pub fn describe() {
    describe_counter!(OFFERS, Unit::Count, "Offers published: tasks without an owner, offered to the pool.");
    describe_counter!(OFFER_FAILURES, Unit::Count, "Offers that could not be published; they are tried again.");
    describe_counter!(
        QUEUE_RENEWED,
        Unit::Count,
        "Times that the queue's consumer was made anew: it delivered no offer although workers waited, or did not answer."
    );
    describe_gauge!(UNOWNED, Unit::Count, "Tasks that should run and have no owner.");
    describe_gauge!(FLOWS, Unit::Count, "Flows.");
    describe_gauge!(WORKERS, Unit::Count, "Workers that are alive.");
    describe_gauge!(LEADER, Unit::Count, "1 when this replica schedules, else 0.");
    describe_counter!(REQUESTS_REFUSED, Unit::Count, "Requests that were refused, by reason.");
}

pub(crate) fn offered() {
    counter!(OFFERS).increment(1);
}

pub(crate) fn offer_failed() {
    counter!(OFFER_FAILURES).increment(1);
}

pub(crate) fn queue_renewed() {
    counter!(QUEUE_RENEWED).increment(1);
}

#[expect(clippy::cast_precision_loss, reason = "counts of tasks are far below 2^52")]
pub(crate) fn seen(flows: usize, workers: usize, unowned: usize, is_leader: bool) {
    gauge!(FLOWS).set(flows as f64);
    gauge!(WORKERS).set(workers as f64);
    gauge!(UNOWNED).set(unowned as f64);
    gauge!(LEADER).set(if is_leader { 1.0 } else { 0.0 });
}

pub(crate) fn refused(reason: &'static str) {
    counter!(REQUESTS_REFUSED, "reason" => reason).increment(1);
}
