//! The suite of `connectors/api`, on the sink and on a sink that breaks what each case is about.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

mod target;

use target::Target;
use wallaby_connector_api::conformance::{Broken, CASES, Case, LARGE_CASES, LOAD_CASES};

fn cases() -> impl Iterator<Item = &'static Case> {
    [CASES, LARGE_CASES, LOAD_CASES].into_iter().flatten()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_passes() {
    for case in cases() {
        let target = Target::fresh("conformance").await;
        if let Err(reason) = case.run(&target).await {
            panic!("{}: {reason}", case.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_case_fails_on_a_sink_that_breaks_its_promise() {
    for case in cases() {
        let target = Target::fresh("broken").await;
        match case.run(&Broken::for_case(case, &target)).await {
            Ok(()) => panic!("{} passes although {:?}", case.name, case.breaks),
            Err(reason) => eprintln!("{}, {:?}: {reason}", case.name, case.breaks),
        }
    }
}
