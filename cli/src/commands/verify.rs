//! `wallaby verify`: compares the source with a sink, shows how far it is, prints what was found.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use wallaby_model::{FlowId, api};
use wallaby_proto::v1;

use super::{LOOK_AGAIN, Lasting, Target};
use crate::args::{Global, Output, Verify};
use crate::failure::Failure;
use crate::render;
use crate::server::Server;

/// How much longer than the comparison itself may take somebody waits for a worker and for the controller.
const GRACE: Duration = Duration::from_secs(30);

pub async fn run(global: &Global, options: &Verify) -> Result<(), Failure> {
    let (flow, sink) = match (Target::parse(&options.words)?, &options.sink) {
        (Target::Flow(flow), sink) => (flow, sink.clone().unwrap_or_default()),
        // Comparing either of them would say something of a sink that was not meant.
        (Target::Sink(flow, sink), Some(other)) if sink.as_str() != other => {
            return Err(Failure::Invalid(format!(
                "{flow}/{sink} names the sink {sink}, and --sink names {other}: give one of them"
            )));
        }
        (Target::Sink(flow, sink), _) => (flow, sink.to_string()),
    };
    let server = Server::connect(global).await?;
    if let Some(number) = options.cancel {
        let name = format!("flows/{flow}/operations/{number}");
        let request = server.request(v1::CancelOperationRequest { name });
        let answer = server.operations().cancel_operation(request).await.map_err(|status| server.failure(&status))?;
        return match global.output {
            Output::Table => render::print(&format!("comparison {number} of flow {flow} is being cancelled\n")),
            output => render::print_value(output, &value(&answer.into_inner().operation.unwrap_or_default())),
        };
    }
    let spec = v1::VerifySpec {
        sink,
        tables: options.tables.clone(),
        show: options.show,
        timeout: Some(api::duration_to_message(options.within)),
    };
    let request = server.request(v1::VerifyRequest { parent: api::flow_name(&flow), spec: Some(spec) });
    let answer = server.verify().verify(request).await.map_err(|status| server.failure(&status))?;
    let operation = answer.into_inner().operation.unwrap_or_default();
    let operation = until_over(&server, &flow, operation, options.within + GRACE).await?;
    print(global.output, &operation)?;
    conclude(&operation)
}

/// The time between two looks at whether the comparison can come to its end.
const LOOK_AT_TASKS_EVERY: Duration = Duration::from_secs(1);

/// Polls until the operation is over; says on standard error how far it is.
async fn until_over(
    server: &Server,
    flow: &FlowId,
    first: v1::Operation,
    limit: Duration,
) -> Result<v1::Operation, Failure> {
    let deadline = Instant::now() + limit;
    let mut shown = Progress::default();
    let mut tasks_looked_at = Instant::now();
    let mut standstill = Lasting::default();
    let mut operation = first;
    loop {
        shown.show(&operation, Instant::now());
        if is_over(operation.state()) {
            shown.end();
            return Ok(operation);
        }
        if Instant::now() >= deadline {
            shown.end();
            return Err(Failure::TimedOut(format!("{} is not over: {}", operation.name, waits_for(&operation))));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        let request = server.request(v1::GetOperationRequest { name: operation.name.clone() });
        match server.operations().get_operation(request).await.map_err(|status| server.failure(&status)) {
            Ok(answer) => operation = answer.into_inner().operation.unwrap_or_default(),
            // A controller that restarts while we wait is not the outcome.
            Err(Failure::Unreachable(_)) if Instant::now() < deadline => {}
            Err(failure) => return Err(failure),
        }
        if tasks_looked_at.elapsed() < LOOK_AT_TASKS_EVERY || !waits_for_the_sink(&operation) {
            continue;
        }
        tasks_looked_at = Instant::now();
        let sink = operation.verify.as_ref().map_or("", |spec| spec.sink.as_str());
        let stopped = stopped_task(server, flow, sink).await;
        // A task that was just resumed is shown as stopped for a moment.
        let lasts = standstill.look(stopped.is_some(), Instant::now());
        if let Some(why) = stopped.filter(|_| lasts) {
            shown.end();
            let request = server.request(v1::CancelOperationRequest { name: operation.name.clone() });
            // It ends by itself too, later.
            let _ended = server.operations().cancel_operation(request).await;
            return Err(Failure::Failed(why));
        }
    }
}

/// Whether it has not begun to compare, and does not before the sink is where the source is.
fn waits_for_the_sink(operation: &v1::Operation) -> bool {
    let phase = operation.progress.as_ref().map_or("", |progress| progress.phase.as_str());
    !is_over(operation.state()) && matches!(phase, "" | "preparing" | "waiting_for_sink")
}

/// What the sink, or the capture that it waits for, stopped with, if one of them stands still for a person. The comparison would wait for it
/// until its time is over.
async fn stopped_task(server: &Server, flow: &FlowId, sink: &str) -> Option<String> {
    let request = server.request(v1::GetFlowRequest { name: api::flow_name(flow) });
    // Whoever cannot be asked now is asked again soon.
    let shown = server.flows().get_flow(request).await.ok()?.into_inner().flow?;
    let apply = format!("{flow}.apply.{sink}");
    let both = [(apply, format!("{flow}/{sink}")), (format!("{flow}.capture"), flow.to_string())];
    let tasks = shown.status?.tasks;
    both.into_iter().find_map(|(id, name)| {
        let task = tasks.iter().find(|task| task.task == id && task.stopped)?;
        let what = if name == flow.as_str() { format!("the capture of flow {flow}") } else { format!("sink {name}") };
        Some(format!(
            "{what} is stopped, so the sink does not come to where the source is: {}; mend it, then `wallaby resume {name}`. The comparison \
             is cancelled",
            task.last_error
        ))
    })
}

fn is_over(state: v1::OperationState) -> bool {
    use v1::OperationState as S;
    matches!(state, S::Done | S::Failed | S::TimedOut | S::Cancelled)
}

fn waits_for(operation: &v1::Operation) -> String {
    let progress = operation.progress.clone().unwrap_or_default();
    match progress.phase.as_str() {
        _ if !operation.message.is_empty() => operation.message.clone(),
        "waiting_for_sink" => {
            let stands = if progress.sink_position.is_empty() { "nowhere yet" } else { &progress.sink_position };
            format!("the sink stands at {stands} and is read at {}", progress.position)
        }
        "looking_again" => "rows that differed are looked at again".to_owned(),
        "comparing" | "reading_rows" => format!(
            "{} of {} tables, {} of about {} rows, at {}",
            progress.tables_done, progress.tables_total, progress.rows_done, progress.rows_estimated, progress.table
        ),
        _ => "preparing".to_owned(),
    }
}

/// What was said last, so that it is said once; on a terminal one line that is written over.
#[derive(Default)]
struct Progress {
    said: String,
    /// That it waits for a worker.
    waiting: Lasting,
}

impl Progress {
    /// What is to be said now; that it waits for a worker only once it lasts.
    fn news(&mut self, operation: &v1::Operation, now: Instant) -> Option<String> {
        let is_pending = operation.state() == v1::OperationState::Pending;
        if is_pending != self.waiting.look(is_pending, now) {
            return None;
        }
        let line = waits_for(operation);
        (line != self.said && !is_over(operation.state())).then_some(line)
    }

    fn show(&mut self, operation: &v1::Operation, now: Instant) {
        let Some(line) = self.news(operation, now) else { return };
        let mut out = std::io::stderr().lock();
        // Progress that cannot be shown is no reason to stop.
        let _ = if out.is_terminal() { write!(out, "\r\x1b[K{line}") } else { writeln!(out, "{line}") };
        let _ = out.flush();
        self.said = line;
    }

    fn end(&self) {
        let mut out = std::io::stderr().lock();
        if out.is_terminal() && !self.said.is_empty() {
            let _ = write!(out, "\r\x1b[K");
        }
    }
}

fn conclude(operation: &v1::Operation) -> Result<(), Failure> {
    use v1::OperationState as S;
    match operation.state() {
        S::Done => match operation.report.as_ref().map_or("", |report| report.verdict.as_str()) {
            "equal" => Ok(()),
            "different" => Err(Failure::Findings),
            _ => Err(Failure::TimedOut(
                "some rows went on changing, or too many differ to look at each again: stop the writers, or give more time with --within"
                    .to_owned(),
            )),
        },
        S::TimedOut => Err(Failure::TimedOut(operation.message.clone())),
        _ => Err(Failure::Failed(operation.message.clone())),
    }
}

fn print(output: Output, operation: &v1::Operation) -> Result<(), Failure> {
    match (output, &operation.report) {
        (Output::Table, None) => Ok(()),
        (Output::Table, Some(report)) => render::print(&text(report)),
        _ => render::print_value(output, &value(operation)),
    }
}

fn text(report: &v1::VerifyReport) -> String {
    let mut table = render::Table::new(&["TABLE", "RESULT", "ROWS", "AT THE SINK", "MISSING", "EXTRA", "DIFFERENT"]);
    for found in &report.tables {
        let counts = [found.rows_source, found.rows_sink, found.missing, found.extra, found.different];
        let [rows, there, missing, extra, different] = counts.map(|count| count.to_string());
        table.row([found.table.clone(), found.verdict.clone(), rows, there, missing, extra, different]);
    }
    let mut text = table.text();
    for found in &report.tables {
        let name = &found.table;
        for line in &found.shape {
            text.push_str(&format!("\n{name}: {line}"));
        }
        for row in &found.differences {
            let columns =
                if row.columns.is_empty() { String::new() } else { format!(" in {}", row.columns.join(", ")) };
            text.push_str(&format!("\n{name}: {} {}{columns}", row.kind, row.key));
        }
        let counted = found.missing + found.extra + found.different;
        let hidden = counted.saturating_sub(found.differences.len() as u64);
        // Of a table that the sink does not have, no row is named.
        if hidden > 0 && found.ranges > 0 {
            text.push_str(&format!("\n{name}: {hidden} more rows"));
        }
        if found.seen_once > 0 {
            text.push_str(&format!(
                "\n{name}: {} of them were seen once only: too many to look at each again",
                found.seen_once
            ));
        }
        if found.unsettled > 0 {
            text.push_str(&format!("\n{name}: {} rows went on changing", found.unsettled));
        }
        if !found.columns_ignored.is_empty() {
            text.push_str(&format!(
                "\n{name}: only the sink has, and nobody compared: {}",
                found.columns_ignored.join(", ")
            ));
        }
    }
    text.push_str(&format!(
        "\nThe source was read below {}, the sink at {}; rows that differed were looked at again until they stayed.\n",
        report.position, report.sink_position
    ));
    text
}

fn value(operation: &v1::Operation) -> Value {
    let report = operation.report.as_ref();
    let tables = report.map(|report| report.tables.iter().map(table_value).collect::<Vec<_>>());
    json!({
        "name": operation.name,
        "state": operation.state().as_str_name().trim_start_matches("OPERATION_STATE_").to_lowercase(),
        "message": operation.message,
        "sink": operation.verify.as_ref().map(|spec| spec.sink.clone()),
        "result": report.map(|report| report.verdict.clone()),
        "position": report.map(|report| report.position.clone()),
        "sinkPosition": report.map(|report| report.sink_position.clone()),
        "tables": tables,
    })
}

fn table_value(found: &v1::TableReport) -> Value {
    let rows = found.differences.iter();
    let rows: Vec<Value> =
        rows.map(|row| json!({ "kind": row.kind, "key": row.key, "columns": row.columns })).collect();
    json!({
        "table": found.table,
        "sinkTable": found.sink_table,
        "result": found.verdict,
        "rowsSource": found.rows_source,
        "rowsSink": found.rows_sink,
        "missing": found.missing,
        "extra": found.extra,
        "different": found.different,
        "unsettled": found.unsettled,
        "settled": found.settled,
        "seenOnce": found.seen_once,
        "differences": rows,
        "shape": found.shape,
        "columnsIgnored": found.columns_ignored,
        "hasKey": found.has_key,
        "ranges": found.ranges,
        "rangesDiffering": found.ranges_differing,
        "rowsRead": found.rows_read,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_for_a_worker_is_said_once_it_lasts() {
        let operation = |state: v1::OperationState, message: &str| v1::Operation {
            state: state.into(),
            message: message.to_owned(),
            ..v1::Operation::default()
        };
        let pending = operation(v1::OperationState::Pending, "it waits for a worker with room");
        let begun = Instant::now();
        let mut progress = Progress::default();
        assert_eq!(progress.news(&pending, begun), None);
        assert_eq!(progress.news(&pending, begun + Duration::from_millis(2_900)), None);
        let lasts = begun + Duration::from_secs(3);
        assert_eq!(progress.news(&pending, lasts).as_deref(), Some("it waits for a worker with room"));

        let mut progress = Progress::default();
        assert_eq!(progress.news(&pending, begun), None);
        let running = operation(v1::OperationState::Running, "");
        assert_eq!(progress.news(&running, begun + Duration::from_secs(1)).as_deref(), Some("preparing"));
        let its_worker_died = begun + Duration::from_secs(60);
        assert_eq!(progress.news(&pending, its_worker_died), None);
        assert!(progress.news(&pending, its_worker_died + Duration::from_secs(3)).is_some());
    }

    #[test]
    fn a_table_that_the_sink_does_not_have_is_said_to_be_missing_and_nothing_else() {
        let found = |shape: &[&str], ranges: u32, seen_once: u64| v1::TableReport {
            table: "public.orders".to_owned(),
            verdict: "different".to_owned(),
            rows_source: 4,
            missing: 4,
            seen_once,
            shape: shape.iter().map(ToString::to_string).collect(),
            ranges,
            ..v1::TableReport::default()
        };
        let said = |table| text(&v1::VerifyReport { tables: vec![table], ..v1::VerifyReport::default() });
        let no_table = said(found(&["the sink has no table public.orders"], 0, 0));
        assert!(no_table.contains("public.orders: the sink has no table public.orders"), "{no_table}");
        assert!(!no_table.contains("more rows"), "{no_table}");
        let too_many = said(found(&[], 1, 4));
        assert!(too_many.contains("public.orders: 4 more rows"), "{too_many}");
        assert!(too_many.contains("public.orders: 4 of them were seen once only: too many"), "{too_many}");
    }

    #[test]
    fn every_phase_says_how_far_it_is() {
        let line = |phase: &str, sink_position: &str, message: &str| {
            let progress = v1::VerifyProgress {
                phase: phase.to_owned(),
                table: "public.orders".to_owned(),
                tables_done: 2,
                tables_total: 5,
                rows_done: 40,
                rows_estimated: 100,
                position: "0/A0".to_owned(),
                sink_position: sink_position.to_owned(),
            };
            waits_for(&v1::Operation {
                progress: Some(progress),
                message: message.to_owned(),
                ..v1::Operation::default()
            })
        };
        for phase in ["comparing", "reading_rows"] {
            assert_eq!(line(phase, "0/90", ""), "2 of 5 tables, 40 of about 100 rows, at public.orders");
        }
        assert_eq!(line("waiting_for_sink", "0/90", ""), "the sink stands at 0/90 and is read at 0/A0");
        assert_eq!(line("waiting_for_sink", "", ""), "the sink stands at nowhere yet and is read at 0/A0");
        assert_eq!(line("looking_again", "0/90", ""), "rows that differed are looked at again");
        assert_eq!(line("preparing", "", ""), "preparing");
        assert_eq!(line("comparing", "0/90", "no worker is alive"), "no worker is alive");
    }
}
