//! A flow on a database of its own.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use wallaby_model::flow::Failover;
use wallaby_model::{Epoch, Lsn, Op, Position, SegmentBody};
use wallaby_postgres_source::{
    Capture, CaptureEvent, CaptureOptions, ConnectConfig, Control, Feedback, PublicationWanted, SegmentDraft,
    SessionOwner, SlotState, SlotWanted, SourceError, SourceIdentity, connect_control, ensure_publication, ensure_slot,
};
use wallaby_testkit::Database;

/// No wait in these tests is meant to take this long.
pub const LIMIT: Duration = Duration::from_secs(20);

pub struct Flow {
    pub config: ConnectConfig,
    pub control: Control,
    pub name: String,
    pub slot: SlotState,
}

/// The database as a role with the password `pw` sees it.
pub fn as_user(db: &Database<'_>, user: &str) -> ConnectConfig {
    let port = db.postgres().port();
    ConnectConfig::parse(&format!("host=127.0.0.1 port={port} user={user} password=pw dbname={}", db.name())).unwrap()
}

pub fn owner(name: &str, epoch: u64) -> SessionOwner {
    SessionOwner { prefix: format!("wallaby/{name}/"), epoch: Epoch(epoch) }
}

pub fn publication(name: &str, tables: &[&str]) -> PublicationWanted {
    let tables = tables.iter().map(|table| (*table).to_owned()).collect();
    PublicationWanted { name: name.to_owned(), create: true, tables, exclude: Vec::new() }
}

pub fn slot(name: &str) -> SlotWanted {
    SlotWanted { name: name.to_owned(), create: true, failover: Failover::Auto, timeout: Duration::from_secs(10) }
}

impl Flow {
    /// Publication for all tables of `public`, then the slot.
    pub async fn create(db: &Database<'_>) -> Flow {
        let config = ConnectConfig::parse(&db.dsn()).unwrap();
        let control = connect_control(&config).await.unwrap();
        let name = db.name().to_owned();
        ensure_publication(&control, &publication(&name, &["public.*"])).await.unwrap();
        let slot = ensure_slot(&config, &control, &slot(&name)).await.unwrap();
        Flow { config, control, name, slot }
    }

    pub fn options(&self, epoch: u64) -> CaptureOptions {
        CaptureOptions::new(self.config.clone(), owner(&self.name, epoch), &self.name, &self.name)
    }

    pub fn first_position(&self) -> Position {
        Position::before(self.slot.confirmed_flush)
    }

    pub async fn start_with(&self, options: CaptureOptions, log_end: Position) -> Result<Running, SourceError> {
        self.start_after(options, log_end, None).await
    }

    /// `previous` is the server that the log was made from.
    pub async fn start_after(
        &self,
        options: CaptureOptions,
        log_end: Position,
        previous: Option<&SourceIdentity>,
    ) -> Result<Running, SourceError> {
        let prepared = Capture::prepare(options).await?;
        let (capture, feedback) = prepared.start(log_end, previous).await?;
        let (in_flight, watch) = watch::channel(0);
        Ok(Running { capture, feedback, in_flight, watch, end: log_end })
    }

    pub async fn start(&self, epoch: u64, log_end: Position) -> Running {
        self.start_with(self.options(epoch), log_end).await.unwrap()
    }
}

pub struct Running {
    pub capture: Capture,
    pub feedback: Feedback,
    pub in_flight: watch::Sender<u32>,
    watch: watch::Receiver<u32>,
    pub end: Position,
}

impl Running {
    /// The next event; positions must go up.
    pub async fn next(&mut self) -> Result<CaptureEvent, SourceError> {
        let event = timeout(LIMIT, self.capture.next(&mut self.watch)).await.expect("no event in time")?;
        let to = match &event {
            CaptureEvent::Segment(segment) => {
                assert!(segment.complete_to <= segment.to);
                segment.to
            }
            CaptureEvent::Heartbeat { to } => {
                assert!(to.is_between_transactions());
                *to
            }
            CaptureEvent::Splice(splice) => {
                assert!(splice.to.is_between_transactions());
                splice.to
            }
            // Nothing that a reader of the log sees.
            CaptureEvent::Part(_) | CaptureEvent::Abandoned { .. } => return Ok(event),
        };
        assert!(to > self.end, "{to:?} does not go past {:?}", self.end);
        self.end = to;
        Ok(event)
    }

    /// The next segment, past heartbeats.
    pub async fn segment(&mut self) -> SegmentDraft {
        loop {
            if let CaptureEvent::Segment(segment) = self.next().await.unwrap() {
                return segment;
            }
        }
    }

    /// Segments until `rows` rows have come.
    pub async fn rows(&mut self, rows: usize) -> Vec<Row> {
        let mut all = Vec::new();
        while all.len() < rows {
            let segment = self.segment().await;
            assert!(segment.body.tables.iter().all(|table| table.is_well_formed(segment.body.transactions.len())));
            all.extend(rows_of(&segment.body));
        }
        assert_eq!(all.len(), rows, "{all:#?}");
        all
    }

    /// The error that ends it.
    pub async fn error(&mut self) -> SourceError {
        loop {
            if let Err(error) = self.next().await {
                return error;
            }
        }
    }
}

/// A row as text, in position order.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub position: Position,
    pub table: String,
    pub op: Op,
    pub values: Vec<String>,
}

/// All rows of a body in position order; before-images stay before their row.
pub fn rows_of(body: &SegmentBody) -> Vec<Row> {
    let mut rows = Vec::new();
    for table in &body.tables {
        for row in 0..table.rows.num_rows() {
            let values = (0..table.schema.columns.len()).map(|column| {
                if table.is_unchanged(row, column) {
                    return "(unchanged)".to_owned();
                }
                show(table.rows.column(wallaby_model::change::FIRST_COLUMN + column), row)
            });
            rows.push(Row {
                position: table.position(row, &body.transactions),
                table: table.schema.table.to_string(),
                op: table.op_at(row).unwrap(),
                values: values.collect(),
            });
        }
    }
    rows.sort_by_key(|row| row.position);
    rows
}

/// A value, plainly.
pub fn show(array: &dyn arrow_array::Array, row: usize) -> String {
    use arrow_array::cast::AsArray;
    use arrow_array::types::*;
    use arrow_schema::DataType as D;
    if array.is_null(row) {
        return "NULL".into();
    }
    match array.data_type() {
        D::Boolean => array.as_boolean().value(row).to_string(),
        D::Int16 => array.as_primitive::<Int16Type>().value(row).to_string(),
        D::Int32 => array.as_primitive::<Int32Type>().value(row).to_string(),
        D::Int64 => array.as_primitive::<Int64Type>().value(row).to_string(),
        D::UInt32 => array.as_primitive::<UInt32Type>().value(row).to_string(),
        D::Float32 => array.as_primitive::<Float32Type>().value(row).to_string(),
        D::Float64 => array.as_primitive::<Float64Type>().value(row).to_string(),
        D::Date32 => array.as_primitive::<Date32Type>().value(row).to_string(),
        D::Time64(_) => array.as_primitive::<Time64MicrosecondType>().value(row).to_string(),
        D::Utf8 => array.as_string::<i32>().value(row).to_owned(),
        D::Binary => hex(array.as_binary::<i32>().value(row)),
        D::FixedSizeBinary(_) => hex(array.as_fixed_size_binary().value(row)),
        D::Struct(_) => {
            let parts = array.as_struct();
            (0..3).map(|part| show(parts.column(part), row)).collect::<Vec<_>>().join("/")
        }
        other => panic!("{other}"),
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The server's end of WAL.
pub async fn wal_end(client: &tokio_postgres::Client) -> Lsn {
    let row = client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap();
    row.get::<_, String>(0).parse().unwrap()
}

/// The slot's confirmed position.
pub async fn confirmed(client: &tokio_postgres::Client, slot: &str) -> Lsn {
    let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    client.query_one(sql, &[&slot]).await.unwrap().get::<_, String>(0).parse().unwrap()
}
