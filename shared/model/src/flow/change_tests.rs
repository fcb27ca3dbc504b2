//! What each change does, row by row of the table in the docs.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use super::*;
use crate::flow::{ByteSize, OnOverrun, SecretRef, page::EXAMPLE, parse};

fn flow() -> FlowDocument {
    let mut document = parse(EXAMPLE, "-").unwrap();
    document.spec.source.postgres.snapshot = SnapshotMode::Initial;
    document
}

/// What a change does, as `subject WORD` in order; refusals as `refused path`.
fn does(edit: impl FnOnce(&mut FlowDocument)) -> Vec<String> {
    does_while(&UnderWay::default(), flow(), edit)
}

fn does_while(under_way: &UnderWay, before: FlowDocument, edit: impl FnOnce(&mut FlowDocument)) -> Vec<String> {
    let mut after = before.clone();
    edit(&mut after);
    let change = flow_change(Some(&before), &after, under_way);
    assert_eq!(change.changes.is_empty(), before == after);
    let effects = change.effects.iter().map(|effect| format!("{} {}", effect.subject, effect.effect.word()));
    let refused = change.refused.iter().map(|problem| format!("refused {}", problem.path));
    refused.chain(effects).collect()
}

fn another_sink(document: &mut FlowDocument) {
    let mut second = document.spec.sinks[0].clone();
    second.name = SinkId::new("second").unwrap();
    document.spec.sinks.push(second);
}

const BOTH_RESTART: [&str; 2] = ["capture RESTARTS", "sink warehouse RESTARTS"];

#[test]
fn each_change_does_what_the_docs_say() {
    assert_eq!(does(|_| ()), [""; 0]);
    assert_eq!(does(|flow| drop(flow.metadata.labels.insert("a".into(), "b".into()))), [""; 0]);
    assert_eq!(does(|flow| flow.spec.paused = true), ["capture PAUSED", "sink warehouse PAUSED"]);
    assert_eq!(
        does(|flow| flow.spec.source.postgres.safety.retained_wal_max = ByteSize(1 << 30)),
        ["capture RESTARTS"]
    );
    assert_eq!(does(|flow| flow.spec.source.postgres.dsn = SecretRef::Env("OTHER".into())), BOTH_RESTART);
    let renamed = does(|flow| flow.spec.source.postgres.slot.name = Some("other".into()));
    assert_eq!(renamed[0], "refused spec.source.postgres.slot");
    let renamed = does(|flow| flow.spec.source.postgres.publication.name = Some("other".into()));
    assert_eq!(renamed[0], "refused spec.source.postgres.publication");
    let added = does(|flow| flow.spec.source.postgres.publication.tables.push("shop.orders".into()));
    assert_eq!(added, ["capture RESTARTS", "run CREATED"]);
    let removed = does(|flow| flow.spec.source.postgres.publication.exclude.push("public.log".into()));
    assert_eq!(removed, ["capture RESTARTS"]);
    let mode = does(|flow| flow.spec.source.postgres.snapshot = SnapshotMode::Never);
    assert_eq!(mode[0], "refused spec.source.postgres.snapshot");
    assert_eq!(does(|flow| flow.spec.log.max_bytes = ByteSize(1 << 30)), ["capture RESTARTS"]);
    assert_eq!(does(another_sink), ["sink second CREATED", "run CREATED"]);
    assert_eq!(does(|flow| flow.spec.sinks.clear()), ["sink warehouse REMOVED"]);
    assert_eq!(does(|flow| flow.spec.sinks[0].paused = true), ["sink warehouse PAUSED"]);
    let schema = does(|flow| flow.spec.sinks[0].postgres.schema = "other".into());
    assert_eq!(schema[0], "refused spec.sinks[0].postgres.schema");
    let waits = does(|flow| flow.spec.sinks[0].on_overrun = OnOverrun::Backpressure);
    assert_eq!(waits, ["sink warehouse RESTARTS"]);
}

#[test]
fn a_change_says_what_becomes_of_runs_and_comparisons_that_are_under_way() {
    let name = |text: &str| SinkId::new(text).unwrap();
    let run = |number, sinks: &[&str]| RunUnderWay {
        run: RunId(number),
        sinks: sinks.iter().map(|sink| name(sink)).collect(),
        is_paused: false,
        holds_snapshot: true,
    };
    let under_way = UnderWay {
        runs: vec![
            run(3, &["warehouse", "second"]),
            RunUnderWay { is_paused: true, ..run(4, &["warehouse"]) },
            run(5, &["second"]),
        ],
        comparisons: vec![ComparisonUnderWay { number: 2, sink: name("warehouse") }],
    };
    let mut before = flow();
    another_sink(&mut before);
    let does = |edit: fn(&mut FlowDocument)| does_while(&under_way, before.clone(), edit);
    let all = |word: &str| ["run 3", "run 5", "comparison 2"].map(|subject| format!("{subject} {word}"));
    assert_eq!(does(|flow| flow.spec.paused = true)[3..], all("PAUSED"));
    assert_eq!(does(|flow| flow.spec.source.postgres.dsn = SecretRef::Env("OTHER".into()))[3..], all("RESTARTS"));
    assert_eq!(does(|flow| flow.spec.sinks[0].paused = true), ["sink warehouse PAUSED", "comparison 2 RESTARTS"]);
    assert_eq!(does(|flow| flow.spec.log.max_bytes = ByteSize(1 << 30)), ["capture RESTARTS"]);
    let second_gone = does(|flow| drop(flow.spec.sinks.pop()));
    assert_eq!(second_gone, ["sink second REMOVED", "run 5 REMOVED", "comparison 2 RESTARTS"]);
    let first_gone = does(|flow| drop(flow.spec.sinks.remove(0)));
    assert_eq!(first_gone, ["sink warehouse REMOVED", "run 4 REMOVED", "comparison 2 REMOVED"]);
    let mut paused = before.clone();
    paused.spec.paused = true;
    assert_eq!(does_while(&under_way, paused.clone(), |flow| flow.spec.paused = false)[3..], all("RESUMED"));
    let moved = does_while(&under_way, paused, |flow| flow.spec.source.postgres.dsn = SecretRef::Env("OTHER".into()));
    assert_eq!(moved, [""; 0], "nobody is at it");

    // Only what holds a snapshot loses it.
    let said = |holds_snapshot| {
        let under_way =
            UnderWay { runs: vec![RunUnderWay { holds_snapshot, ..run(3, &["warehouse"]) }], ..UnderWay::default() };
        let mut after = before.clone();
        after.spec.paused = true;
        flow_change(Some(&before), &after, &under_way).effects.pop().unwrap().message
    };
    assert!(said(true).contains("lets its snapshot go") && !said(false).contains("snapshot"), "{}", said(false));
}

#[test]
fn another_order_of_the_sinks_is_no_change() {
    let mut before = flow();
    another_sink(&mut before);
    let under_way = UnderWay {
        comparisons: vec![ComparisonUnderWay { number: 1, sink: SinkId::new("second").unwrap() }],
        ..UnderWay::default()
    };
    let mut after = before.clone();
    after.spec.sinks.reverse();
    let change = flow_change(Some(&before), &after, &under_way);
    assert_eq!((change.changes.len(), change.effects.len()), (0, 0), "{change:?}");
}

#[test]
fn another_database_is_refused_where_it_can_be_seen() {
    let with = |url: &str| {
        let mut document = flow();
        document.spec.source.postgres.dsn = SecretRef::Value(url.into());
        document
    };
    let before = with("postgres://u:old-secret@h:1/shop?sslmode=disable");
    let moved = flow_change(Some(&before), &with("postgres://u:new-secret@other:2/shop"), &UnderWay::default());
    assert!(moved.refused.is_empty());
    assert_eq!(moved.changes.len(), 1);
    assert!(!format!("{moved:?}").contains("secret"), "{moved:?}");
    let other = flow_change(Some(&before), &with("postgres://u@h:1/crm"), &UnderWay::default());
    assert_eq!(other.refused[0].path, "spec.source.postgres.dsn");
}

#[test]
fn a_flow_that_is_made_is_loaded_unless_told_never() {
    let made = flow_change(None, &flow(), &UnderWay::default());
    let subjects: Vec<&str> = made.effects.iter().map(|effect| effect.subject.as_str()).collect();
    assert_eq!(subjects, ["capture", "sink warehouse", "run"]);
    let mut never = flow();
    never.spec.source.postgres.snapshot = SnapshotMode::Never;
    assert_eq!(flow_change(None, &never, &UnderWay::default()).effects.len(), 2);
    let asked = flow_change(Some(&never), &flow(), &UnderWay::default());
    assert!(asked.refused.is_empty() && asked.effects.iter().any(|effect| effect.subject == "run"));
    let runs = planned_runs(Some(&never.spec), &flow().spec, Timestamp(1));
    assert_eq!((runs[0].tables.as_slice(), runs[0].reason), (["public.*".to_owned()].as_slice(), RunReason::FirstLoad));
}

#[test]
fn a_run_for_all_sinks_names_those_that_are_there_when_it_is_made() {
    let (before, mut after) = (flow(), flow());
    after.spec.source.postgres.publication.tables.push("shop.*".into());
    let mut never = before.clone();
    never.spec.source.postgres.snapshot = SnapshotMode::Never;
    for (before, after) in [(None, &before), (Some(&never.spec), &before), (Some(&before.spec), &after)] {
        let runs = planned_runs(before, &after.spec, Timestamp(1));
        assert_eq!(runs.len(), 1);
        assert_eq!(runs[0].sinks, [SinkId::new("warehouse").unwrap()], "{:?}", runs[0].reason);
        assert!(run_text(&runs[0], &after.spec).contains("into every sink:"), "{}", run_text(&runs[0], &after.spec));
    }
}

#[test]
fn sinks_and_tables_that_come_together_are_loaded_once_each() {
    let before = flow();
    let mut after = before.clone();
    another_sink(&mut after);
    after.spec.source.postgres.publication.tables.push("shop.*".into());
    let runs = planned_runs(Some(&before.spec), &after.spec, Timestamp(1));
    let names = |run: &RunSpec| run.sinks.iter().map(SinkId::to_string).collect::<Vec<_>>();
    assert_eq!((runs[0].reason, names(&runs[0])), (RunReason::TablesAdded, vec!["warehouse".to_owned()]));
    assert_eq!(runs[0].tables, ["shop.*"]);
    assert_eq!((runs[1].reason, names(&runs[1])), (RunReason::SinkAnew, vec!["second".to_owned()]));
    assert!(runs[1].tables.is_empty() && runs[0].overlap(&runs[1]).is_none());
}

#[test]
fn tables_that_are_new_are_told_from_those_that_were_captured() {
    let publication = |tables: &[&str], exclude: &[&str]| PublicationSpec {
        name: None,
        create: true,
        tables: tables.iter().map(|&table| table.to_owned()).collect(),
        exclude: exclude.iter().map(|&table| table.to_owned()).collect(),
    };
    for (before, after, tables, exclude) in [
        (publication(&["a.x"], &[]), publication(&["a.x", "a.y"], &[]), vec!["a.y"], vec![]),
        (publication(&["a.x"], &[]), publication(&["a.*"], &[]), vec!["a.*"], vec!["a.x"]),
        (publication(&["a.*"], &[]), publication(&["a.x"], &[]), vec![], vec![]),
        (publication(&["a.*"], &["a.x"]), publication(&["a.*"], &[]), vec!["a.x"], vec![]),
        (publication(&["a.*"], &["a.x"]), publication(&["a.*", "a.x"], &[]), vec!["a.x"], vec![]),
        (publication(&["a.*"], &["a.x"]), publication(&["a.*", "b.*"], &["a.x", "b.z"]), vec!["b.*"], vec!["b.z"]),
        (publication(&["a.*"], &["a.x"]), publication(&["b.y"], &[]), vec!["b.y"], vec![]),
    ] {
        let (found, left_out) = added_tables(&before, &after);
        assert_eq!(found, tables, "{before:?} {after:?}");
        assert_eq!(left_out, exclude, "{before:?} {after:?}");
    }
}
