//! How many chunks are read or loaded here at a time: as many as memory allows.
//!
//! Each sink has places of its own, and the reading too: a sink that does not move delays nobody else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wallaby_model::{FlowId, SinkId, TaskId, TaskKind};

/// A place in use; it is free again when this is dropped.
pub type Place = OwnedSemaphorePermit;

/// Who shares places.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Line {
    /// Whoever reads chunks.
    Reading,
    /// Whoever loads chunks into a sink.
    Loading(FlowId, SinkId),
}

impl Line {
    fn of(task: &TaskId) -> Option<Line> {
        match &task.kind {
            TaskKind::Chunk(..) => Some(Line::Reading),
            TaskKind::Load(sink, ..) => Some(Line::Loading(task.flow.clone(), sink.clone())),
            _ => None,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Places {
    each: usize,
    lines: Mutex<HashMap<Line, Arc<Semaphore>>>,
}

impl Places {
    /// `each` for the reading, and for every sink.
    pub fn new(each: usize) -> Places {
        Places { each, lines: Mutex::default() }
    }

    fn line(&self, line: Line) -> Arc<Semaphore> {
        // A map of plain values, whole after any panic.
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.retain(|_, places| Arc::strong_count(places) > 1);
        Arc::clone(lines.entry(line).or_insert_with(|| Arc::new(Semaphore::new(self.each))))
    }

    /// A place for a task, if there is one now. `Ok(None)`: the task needs none.
    ///
    /// # Errors
    /// When all are in use.
    pub fn now(&self, task: &TaskId) -> Result<Option<Place>, AllInUse> {
        match Line::of(task) {
            None => Ok(None),
            Some(line) => self.line(line).try_acquire_owned().map(Some).map_err(|_| AllInUse),
        }
    }

    /// Waits for a place.
    pub async fn wait(&self, task: &TaskId) -> Option<Place> {
        self.line(Line::of(task)?).acquire_owned().await.ok()
    }
}

/// No place is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllInUse;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use wallaby_model::{ChunkId, RunId};

    use super::*;

    #[test]
    fn each_sink_and_the_reading_have_places_of_their_own() {
        let flow = FlowId::new("shop").unwrap();
        let chunk = |number| ChunkId { table: 0, restart: 0, number };
        let task = |kind| TaskId { flow: flow.clone(), kind };
        let read = |number| task(TaskKind::Chunk(RunId(1), chunk(number)));
        let load = |sink: &str, number| task(TaskKind::Load(SinkId::new(sink).unwrap(), RunId(1), chunk(number)));
        let places = Places::new(2);
        let first = places.now(&load("a", 1)).unwrap().unwrap();
        let _second = places.now(&load("a", 2)).unwrap().unwrap();
        assert_eq!(places.now(&load("a", 3)).unwrap_err(), AllInUse);
        let _other = places.now(&load("b", 1)).unwrap().unwrap();
        let _reading = (places.now(&read(1)).unwrap().unwrap(), places.now(&read(2)).unwrap().unwrap());
        assert!(places.now(&read(3)).is_err());
        assert!(places.now(&TaskId::capture(&flow)).unwrap().is_none());
        drop(first);
        assert!(places.now(&load("a", 3)).unwrap().is_some());
    }
}
