//! Tables that are made while the flow runs and that its patterns have: the publication takes them in.

use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;
use wallaby_model::TaskId;
use wallaby_postgres_source::{ConnectConfig, PublicationWanted, SourceError, connect_control, ensure_publication};

use crate::flows::CaptureDemand;

/// How often it is looked. What is written before the publication has a table is loaded by a run.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The publication as the flow wants it.
pub fn wanted(demand: &CaptureDemand) -> PublicationWanted {
    let publication = &demand.source.publication;
    PublicationWanted {
        name: demand.publication.clone(),
        create: publication.create,
        tables: publication.tables.clone(),
        exclude: publication.exclude.clone(),
    }
}

/// Keeps the publication as it is wanted, when patterns say what that is; ends when the handle is dropped.
pub fn start(config: &ConnectConfig, demand: &CaptureDemand, task: &TaskId) -> Option<AbortOnDropHandle<()>> {
    let wanted = wanted(demand);
    if !wanted.create || !wanted.tables.iter().any(|pattern| pattern.ends_with('*')) {
        return None;
    }
    let (config, task) = (config.clone(), task.clone());
    Some(AbortOnDropHandle::new(tokio::spawn(async move {
        let mut said = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let error = look(&config, &wanted).await.err();
            // A table without a key under the pattern stays out until it has one; said once, not at every look.
            let told = error.as_ref().map(SourceError::to_string);
            if let Some(error) = error.filter(|error| !error.is_transient() && told != said) {
                tracing::warn!(%task, %error, remedy = error.remedy(), "the publication was left as it is");
            }
            said = told;
        }
    })))
}

async fn look(config: &ConnectConfig, wanted: &PublicationWanted) -> Result<(), SourceError> {
    ensure_publication(&connect_control(config).await?, wanted).await
}
