//! A side store in an object store: a folder that all workers share, or a bucket.
//!
//! An object is one object of the store, put at once or not at all, behind a head of 24 bytes that says what it should be. What a
//! put acknowledged is at rest: a bucket says so of itself, files and their folders are synced.
//!
//! The store knows no quotas, so they are counted: listed when a shelf is made, when it seems full and now and then, and tracked
//! between, over all that this process puts. Other workers' puts are seen at the next listing: a shelf can go past its quota by what they
//! put meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};
use tokio::time::Instant;
use twox_hash::XxHash64;
use wallaby_model::{Attempt, FlowId};

use super::{Quotas, Shelf, ShelfUsage, SideGroup, SideKey, SideStore, path};
use crate::error::{Result, StagingError};
use crate::metrics;

/// What parts are cut to: a request of an object store costs milliseconds, whatever its size.
const TARGET_BYTES: usize = 4 << 20;
/// More goes in several requests, which end as one object.
const SINGLE_PUT_MAX: usize = 16 << 20;
const PIECE_BYTES: usize = 8 << 20;
/// What was counted longer ago is counted again, because of other workers' puts.
const COUNT_AGE_MAX: Duration = Duration::from_secs(60);
/// A shelf that seems full is counted again; one that was just counted and not put to since is full.
const COUNT_AGE_MIN: Duration = Duration::from_millis(500);
/// Removals on their way at a time.
const DELETES_IN_FLIGHT: usize = 16;
/// Begins every object: `WSD` and the version of this form.
const MAGIC: &[u8; 8] = b"WSD\x00\x00\x00\x00\x01";
/// Magic, bytes, checksum.
const HEAD_BYTES: usize = 24;

/// The side store of one flow in an object store.
#[derive(Debug)]
pub struct ObjectSide {
    flow: FlowId,
    /// The URL, for messages.
    place: String,
    store: Arc<dyn ObjectStore>,
    /// Where the flow's objects stand in the store.
    prefix: String,
    /// The folder that `prefix` stands in, when the store is one.
    folder: Option<PathBuf>,
    quotas: Quotas,
    counts: Arc<Counts>,
}

/// What is known of the two shelves of a flow at one place.
type Counts = [Mutex<Option<Counted>>; 2];

/// What this process counts, by place, for as long as anybody has it open: each task opens the side store, and together they keep to it.
static COUNTS: LazyLock<Mutex<HashMap<String, Weak<Counts>>>> = LazyLock::new(Mutex::default);

fn counts_of(place: String) -> Arc<Counts> {
    let mut all = lock(&COUNTS);
    if let Some(counts) = all.get(&place).and_then(Weak::upgrade) {
        return counts;
    }
    all.retain(|_, counts| counts.strong_count() > 0);
    let counts = Arc::new([Mutex::new(None), Mutex::new(None)]);
    all.insert(place, Arc::downgrade(&counts));
    counts
}

/// What is known of a shelf that was made.
#[derive(Clone, Copy, Debug)]
struct Counted {
    bytes: u64,
    /// Bytes that were put from here since the shelf is known.
    put: u64,
    /// Whether something was put or removed since it was counted: what replaces an object counts twice until then, and what is gone counts.
    is_tracked: bool,
    in_flight: u64,
    at: Instant,
}

/// Room that was taken for a put. Dropped without [`Room::used`], it is given back.
struct Room<'a> {
    shelf: &'a Mutex<Option<Counted>>,
    bytes: u64,
}

impl Room<'_> {
    /// The object is there.
    fn used(self) {
        if let Some(counted) = lock(self.shelf).as_mut() {
            counted.bytes += self.bytes;
            counted.put += self.bytes;
            counted.is_tracked = true;
        }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if let Some(counted) = lock(self.shelf).as_mut() {
            counted.in_flight = counted.in_flight.saturating_sub(self.bytes);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ObjectSide {
    /// In `store`, below `prefix` (no slash at its ends, may be empty); no I/O. `place` is how the store is called in messages.
    pub fn new(store: Arc<dyn ObjectStore>, place: String, prefix: &str, flow: FlowId, quotas: Quotas) -> ObjectSide {
        let prefix = if prefix.is_empty() { flow.to_string() } else { format!("{prefix}/{flow}") };
        let counts = counts_of(format!("{place} {prefix}"));
        ObjectSide { flow, place, store, prefix, folder: None, quotas, counts }
    }

    /// In a folder that is there. All workers must share it.
    ///
    /// # Errors
    /// `SidePlace` when it is not there: on a worker where it is not mounted nothing may be written in its place.
    pub fn in_folder(folder: &std::path::Path, flow: FlowId, quotas: Quotas) -> Result<ObjectSide> {
        let place = format!("file://{}", folder.display());
        let store =
            object_store::local::LocalFileSystem::new_with_prefix(folder).map_err(|error| StagingError::SidePlace {
                flow: flow.clone(),
                place: place.clone(),
                reason: format!("{error}; make the folder, or mount it on every worker"),
            })?;
        let side = ObjectSide::new(Arc::new(store.with_fsync(true)), place, "", flow, quotas);
        Ok(ObjectSide { folder: Some(folder.to_owned()), ..side })
    }

    fn shelf(&self, shelf: Shelf) -> &Mutex<Option<Counted>> {
        match shelf {
            Shelf::Transactions => &self.counts[0],
            Shelf::Chunks => &self.counts[1],
        }
    }

    fn path(&self, below: &str) -> Path {
        Path::from(format!("{}/{below}", self.prefix))
    }

    fn roots(shelf: Shelf) -> &'static [&'static str] {
        match shelf {
            Shelf::Transactions => &[path::MANIFEST, path::PART],
            Shelf::Chunks => &[path::CHUNK],
        }
    }

    fn failed(&self, what: &str, error: Error) -> StagingError {
        match error {
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => StagingError::SidePlace {
                flow: self.flow.clone(),
                place: self.place.clone(),
                reason: format!(
                    "{error}; give the workers' credentials the right to read, write, list and delete there"
                ),
            },
            error => StagingError::unavailable(format!("{what} at {}", self.place), error),
        }
    }

    /// All objects of a shelf: their place below the flow's, and their bytes.
    async fn each(&self, shelf: Shelf, mut take: impl FnMut(&str, u64) + Send) -> Result<()> {
        for root in Self::roots(shelf) {
            let mut objects = self.store.list(Some(&self.path(root)));
            while let Some(object) = objects.next().await {
                let object = object.map_err(|error| self.failed("listing the side store", error))?;
                if let Some(below) = object.location.as_ref().strip_prefix(&format!("{}/", self.prefix)) {
                    take(below, object.size);
                }
            }
        }
        Ok(())
    }

    async fn count(&self, shelf: Shelf) -> Result<u64> {
        let put_before = lock(self.shelf(shelf)).map(|counted| counted.put);
        let mut bytes = 0;
        self.each(shelf, |_, size| bytes += size).await?;
        if let Some(counted) = lock(self.shelf(shelf)).as_mut() {
            // What came meanwhile may have been listed or not.
            let meanwhile = counted.put.saturating_sub(put_before.unwrap_or_default());
            counted.bytes = bytes + meanwhile;
            counted.is_tracked = meanwhile > 0;
            counted.at = Instant::now();
        }
        Ok(bytes)
    }

    /// Takes room for an object; `None` when there is none.
    async fn room(&self, shelf: Shelf, bytes: u64) -> Result<Option<Room<'_>>> {
        let mut age_max = COUNT_AGE_MAX;
        loop {
            let age = {
                let mut counted = lock(self.shelf(shelf));
                let Some(counted) = counted.as_mut() else {
                    return Err(StagingError::SideMissing { shelf: format!("{}/{}", self.place, self.prefix) });
                };
                let fits = counted.bytes + counted.in_flight + bytes <= self.quotas.on(shelf);
                let age = counted.at.elapsed();
                if age < age_max {
                    if fits {
                        counted.in_flight += bytes;
                        return Ok(Some(Room { shelf: self.shelf(shelf), bytes }));
                    }
                    // Counted once more it is full, also where others went on putting meanwhile.
                    if age < COUNT_AGE_MIN && (!counted.is_tracked || age_max == Duration::MAX) {
                        return Ok(None);
                    }
                }
                age
            };
            tracing::debug!(flow = %self.flow, ?shelf, ?age, "counting the side store again");
            self.count(shelf).await?;
            age_max = Duration::MAX;
        }
    }

    /// Puts again what is there already: also a full shelf has it.
    async fn has(&self, location: &Path, body: &Bytes) -> bool {
        matches!(self.read(location).await, Ok(Some(Some(there))) if there == *body)
    }

    /// `None`: not there. `Some(None)`: damaged.
    async fn read(&self, location: &Path) -> Result<Option<Option<Bytes>>> {
        let failed = |error| self.failed("an object of the side store", error);
        let bytes = match self.store.get(location).await {
            Ok(object) => object.bytes().await.map_err(failed)?,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        Ok(Some(opened(bytes)))
    }

    async fn find(&self, shelf: Shelf, location: &Path) -> Result<Option<Bytes>> {
        let found = self.read(location).await?;
        if found == Some(None) {
            tracing::warn!(%location, "an object of the side store is damaged: it counts as not there");
            metrics::side_damaged(&self.flow, shelf);
        }
        Ok(found.flatten())
    }

    async fn write(&self, location: &Path, body: Bytes) -> Result<()> {
        let failed = |error| self.failed("a put into the side store", error);
        let head = head_of(&body);
        if body.len() <= SINGLE_PUT_MAX {
            let payload = PutPayload::from_iter([head, body]);
            return self.store.put(location, payload).await.map(|_| ()).map_err(failed);
        }
        let upload = self.store.put_multipart(location).await.map_err(failed)?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PIECE_BYTES);
        upload.put(head);
        for at in (0..body.len()).step_by(PIECE_BYTES) {
            upload.wait_for_capacity(2).await.map_err(failed)?;
            upload.put(body.slice(at..body.len().min(at + PIECE_BYTES)));
        }
        // What fails is given up by `finish`; pieces of a killed one are no object.
        upload.finish().await.map(|_| ()).map_err(failed)
    }

    async fn remove_below(&self, below: &str) -> Result<()> {
        let location = self.path(below);
        if let Some(folder) = &self.folder {
            // With the folders, and with what killed puts left beside the objects.
            return match tokio::fs::remove_dir_all(folder.join(location.as_ref())).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(StagingError::unavailable(format!("removing {location} at {}", self.place), error))
                }
                _ => Ok(()),
            };
        }
        let objects = self.store.list(Some(&location));
        objects
            .map_err(|error| self.failed("listing the side store", error))
            .try_for_each_concurrent(DELETES_IN_FLIGHT, |object| async move {
                match self.store.delete(&object.location).await {
                    Err(error) if !matches!(error, Error::NotFound { .. }) => {
                        Err(self.failed("removing from the side store", error))
                    }
                    _ => Ok(()),
                }
            })
            .await
    }
}

fn head_of(body: &Bytes) -> Bytes {
    let mut head = BytesMut::with_capacity(HEAD_BYTES);
    head.put_slice(MAGIC);
    head.put_u64(body.len() as u64);
    head.put_u64(XxHash64::oneshot(0, body));
    head.freeze()
}

/// The body behind a head that fits it.
fn opened(mut bytes: Bytes) -> Option<Bytes> {
    if bytes.len() < HEAD_BYTES {
        return None;
    }
    let body = bytes.split_off(HEAD_BYTES);
    (bytes == head_of(&body)).then_some(body)
}

#[async_trait]
impl SideStore for ObjectSide {
    fn part_bytes_target(&self) -> usize {
        TARGET_BYTES
    }

    async fn ensure(&self, shelf: Shelf) -> Result<()> {
        if lock(self.shelf(shelf)).is_some_and(|counted| counted.at.elapsed() < COUNT_AGE_MAX) {
            return Ok(());
        }
        let at = Instant::now();
        let bytes = self.count(shelf).await?;
        lock(self.shelf(shelf)).get_or_insert(Counted { bytes, put: 0, is_tracked: false, in_flight: 0, at });
        Ok(())
    }

    async fn put(&self, key: SideKey, body: Bytes) -> Result<()> {
        let shelf = key.shelf();
        let location = self.path(&path::object_path(&key, path::attempt_of(&key, &body)?, '/'));
        let bytes = (body.len() + HEAD_BYTES) as u64;
        let Some(room) = self.room(shelf, bytes).await? else {
            if self.has(&location, &body).await {
                return Ok(());
            }
            let used = lock(self.shelf(shelf)).map_or(0, |counted| counted.bytes);
            metrics::side_full(&self.flow, shelf);
            return Err(StagingError::SideFull { flow: self.flow.clone(), bytes, used, max: self.quotas.on(shelf) });
        };
        self.write(&location, body).await?;
        room.used();
        Ok(())
    }

    async fn get(&self, key: SideKey) -> Result<Option<Bytes>> {
        let shelf = key.shelf();
        let place = self.path(&path::object_path(&key, None, '/'));
        let SideKey::Manifest { .. } = key else {
            return self.find(shelf, &place).await;
        };
        let mut attempts = BTreeSet::new();
        let mut objects = self.store.list(Some(&place));
        while let Some(object) = objects.next().await {
            let object = object.map_err(|error| self.failed("listing the side store", error))?;
            attempts.extend(object.location.filename().and_then(|name| name.parse::<Attempt>().ok()));
        }
        for attempt in attempts.into_iter().rev() {
            let location = self.path(&path::object_path(&key, Some(attempt), '/'));
            if let Some(body) = self.find(shelf, &location).await? {
                return Ok(Some(body));
            }
        }
        Ok(None)
    }

    async fn delete(&self, group: SideGroup) -> Result<()> {
        self.remove_below(&path::group_path(&group, '/')).await?;
        // Counted again before a put is refused: not before each put, of which many are on their way while room is made.
        if let Some(counted) = lock(self.shelf(group.shelf())).as_mut() {
            counted.is_tracked = true;
        }
        Ok(())
    }

    async fn list(&self, shelf: Shelf) -> Result<Vec<SideGroup>> {
        let mut groups = BTreeSet::new();
        self.each(shelf, |below, _| groups.extend(path::group_of(below.split('/')))).await?;
        Ok(groups.into_iter().collect())
    }

    async fn usage(&self, shelf: Shelf) -> Result<ShelfUsage> {
        Ok(ShelfUsage { bytes: self.count(shelf).await?, bytes_max: self.quotas.on(shelf) })
    }

    async fn holders(&self, _: Shelf) -> Result<Vec<String>> {
        // What was acknowledged is at rest.
        Ok(Vec::new())
    }

    async fn remove_shelf(&self, shelf: Shelf) -> Result<()> {
        *lock(self.shelf(shelf)) = None;
        for root in Self::roots(shelf) {
            self.remove_below(root).await?;
        }
        Ok(())
    }
}
