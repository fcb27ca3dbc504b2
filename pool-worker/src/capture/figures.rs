//! What the source says of the slot, asked every few seconds over a connection of its own.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use wallaby_postgres_source::{ConnectConfig, SourceStatus, connect_control, source_status};

const EVERY: Duration = Duration::from_secs(5);

/// Starts asking; the receiver has the latest answer. Ends when dropped.
pub fn start(config: ConnectConfig, slot: String) -> (watch::Receiver<Option<SourceStatus>>, AbortOnDropHandle<()>) {
    let (sender, receiver) = watch::channel(None);
    let task = tokio::spawn(async move {
        loop {
            match connect_control(&config).await {
                Ok(control) => {
                    while let Ok(status) = source_status(&control, &slot).await {
                        sender.send_replace(Some(status));
                        tokio::time::sleep(EVERY).await;
                    }
                }
                Err(error) => tracing::debug!(%error, "the source's figures could not be read"),
            }
            tokio::time::sleep(EVERY).await;
        }
    });
    (receiver, AbortOnDropHandle::new(task))
}
