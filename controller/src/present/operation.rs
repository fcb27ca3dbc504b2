//! Operations as the API shows them.

use wallaby_coordination::OperationEntry;
use wallaby_model::verify::{
    DifferenceKind, OperationState, RowDifference, TableReport, Verdict, VerifyPhase, VerifyReport,
};
use wallaby_model::{FlowId, Position, TaskId, TaskKind, api};
use wallaby_proto::v1;

use super::timestamp;
use crate::view::View;

/// `flows/{flow}/operations/{number}`.
pub fn operation_name(flow: &FlowId, number: u32) -> String {
    format!("flows/{flow}/operations/{number}")
}

/// An operation.
pub fn operation(view: &View, flow: &FlowId, entry: &OperationEntry) -> v1::Operation {
    let task = view.task(&TaskId { flow: flow.clone(), kind: TaskKind::Verify(entry.number) });
    let worker = task.lock.map(|lock| lock.holder.worker.to_string()).unwrap_or_default();
    let (spec, result) = (&entry.spec, &entry.result);
    let state = match result.state {
        OperationState::Running if worker.is_empty() => v1::OperationState::Pending,
        OperationState::Pending => v1::OperationState::Pending,
        OperationState::Running => v1::OperationState::Running,
        OperationState::Done => v1::OperationState::Done,
        OperationState::Failed => v1::OperationState::Failed,
        OperationState::TimedOut => v1::OperationState::TimedOut,
        OperationState::Cancelled => v1::OperationState::Cancelled,
    };
    let message = if state == v1::OperationState::Pending && result.message.is_empty() {
        "it waits for a worker with room: `wallaby workers` lists them".to_owned()
    } else {
        result.message.clone()
    };
    let timeout = std::time::Duration::from_secs(u64::from(spec.verify.timeout_seconds));
    let progress = &result.progress;
    v1::Operation {
        name: operation_name(flow, entry.number),
        verify: Some(v1::VerifySpec {
            sink: spec.verify.sink.to_string(),
            tables: spec.verify.tables.clone(),
            show: spec.verify.show,
            timeout: Some(api::duration_to_message(timeout)),
        }),
        state: state.into(),
        message,
        progress: Some(v1::VerifyProgress {
            phase: phase(progress.phase).to_owned(),
            table: progress.table.clone(),
            tables_done: progress.tables_done,
            tables_total: progress.tables_total,
            rows_done: progress.rows_done,
            rows_estimated: progress.rows_estimated,
            position: progress.position.map(lsn).unwrap_or_default(),
            sink_position: progress.sink_position.map(lsn).unwrap_or_default(),
        }),
        report: result.report.as_ref().map(report),
        create_time: Some(timestamp(spec.created_at)),
        update_time: (result.at.0 > 0).then(|| timestamp(result.at)),
        worker,
    }
}

fn lsn(position: Position) -> String {
    position.commit.to_string()
}

fn report(report: &VerifyReport) -> v1::VerifyReport {
    v1::VerifyReport {
        verdict: verdict(report.verdict()).to_owned(),
        position: lsn(report.position),
        sink_position: lsn(report.sink_position),
        tables: report.tables.iter().map(table).collect(),
    }
}

fn table(table: &TableReport) -> v1::TableReport {
    v1::TableReport {
        table: table.table.to_string(),
        sink_table: table.sink_table.to_string(),
        verdict: verdict(table.verdict).to_owned(),
        rows_source: table.rows_source,
        rows_sink: table.rows_sink,
        missing: table.missing,
        extra: table.extra,
        different: table.different,
        unsettled: table.unsettled,
        settled: table.settled,
        seen_once: table.seen_once,
        differences: table.differences.iter().map(difference).collect(),
        shape: table.shape.clone(),
        columns_ignored: table.columns_ignored.clone(),
        ranges: table.ranges,
        ranges_differing: table.ranges_differing,
        rows_read: table.rows_read,
        has_key: table.has_key,
    }
}

fn difference(row: &RowDifference) -> v1::RowDifference {
    let kind = match row.kind {
        DifferenceKind::Missing => "missing",
        DifferenceKind::Extra => "extra",
        DifferenceKind::Different => "different",
    };
    v1::RowDifference { kind: kind.to_owned(), key: row.key.clone(), columns: row.columns.clone() }
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Equal => "equal",
        Verdict::Different => "different",
        Verdict::Unsettled => "unsettled",
    }
}

fn phase(phase: VerifyPhase) -> &'static str {
    match phase {
        VerifyPhase::Preparing => "preparing",
        VerifyPhase::WaitingForSink => "waiting_for_sink",
        VerifyPhase::Comparing => "comparing",
        VerifyPhase::ReadingRows => "reading_rows",
        VerifyPhase::LookingAgain => "looking_again",
    }
}
