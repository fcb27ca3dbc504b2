//! Tables that are made while the flow runs and that its patterns have: the publication takes them in.

use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use wallaby_coordination::TaskLock;
use wallaby_model::flow::PublicationSpec;
use wallaby_postgres_source::{ConnectConfig, PublicationWanted, SourceError, connect_control, widen_publication};

/// How often it is looked. What is written before the publication has a table is loaded by a run.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The publication of this name as the flow wants it.
pub fn wanted(name: String, spec: &PublicationSpec) -> PublicationWanted {
    PublicationWanted { name, create: spec.create, tables: spec.tables.clone(), exclude: spec.exclude.clone() }
}

/// Takes into the publication what its patterns have by now; ends when the handle is dropped, or the lock is no longer ours. What is
/// not wanted any more stays in: another specification means another capture, and only that one takes tables out.
pub fn start(config: &ConnectConfig, wanted: PublicationWanted, lock: TaskLock) -> Option<AbortOnDropHandle<()>> {
    if !wanted.create || !wanted.tables.iter().any(|pattern| pattern.ends_with('*')) {
        return None;
    }
    let config = config.clone();
    Some(AbortOnDropHandle::new(tokio::spawn(async move {
        let mut said = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if !lock.is_valid_now() {
                return;
            }
            let error = look(&config, &wanted).await.err();
            // A table without a key under the pattern stays out until it has one; said once, not at every look.
            let told = error.as_ref().map(SourceError::to_string);
            if let Some(error) = error.filter(|error| !error.is_transient() && told != said) {
                tracing::warn!(task = %lock.task(), %error, remedy = error.remedy(), "the publication was left as it is");
            }
            said = told;
        }
    })))
}

async fn look(config: &ConnectConfig, wanted: &PublicationWanted) -> Result<(), SourceError> {
    widen_publication(&connect_control(config).await?, wanted).await
}
