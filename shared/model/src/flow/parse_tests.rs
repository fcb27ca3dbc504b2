//! Bad files and what is said about them.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::time::Duration;

use super::super::check::{LOG_MAX, MAX_TABLES};
use super::super::*;
use super::*;

const GOOD: &str = "\
apiVersion: wallaby/v1
kind: Flow
metadata: { name: shop }
spec:
  source:
    postgres:
      dsn: { env: SHOP_DSN }
      publication: { tables: [public.*] }
      snapshot: never
  sinks:
    - name: warehouse
      postgres: { dsn: { file: /run/secrets/wh } }
";

fn message_of(text: &str) -> String {
    parse_all(text, "flow.yaml").unwrap_err().to_string()
}

/// Replaces one part of the good file and returns what is said.
fn with(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    message_of(&GOOD.replace(from, to))
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

#[test]
fn defaults_are_filled_in() {
    let flow = parse(GOOD, "flow.yaml").unwrap();
    assert_eq!(flow.spec.log, LogSpec::default());
    assert_eq!(flow.spec.source.postgres.large_transaction_bytes, ByteSize(64 << 20));
    assert_eq!(flow.spec.source.postgres.slot, SlotSpec::default());
    assert_eq!(flow.slot_name(), "wallaby_shop");
    assert_eq!(flow.spec.sinks[0].postgres.schema, "{{ .schema }}");
    assert!(!flow.spec.paused);
}

#[test]
fn a_misspelt_key_is_named_with_line_and_suggestion() {
    let message = with("snapshot: never", "snapshots: never");
    says(
        &message,
        &["flow.yaml: line 9, column 7", "unknown key `snapshots`", "at line 9", "did you mean `snapshot`?"],
    );
    assert_eq!(message.lines().count(), 1, "the missing `snapshot` is not reported on top: {message}");
    says(&with("    - name", "    - nmae: x\n      name"), &["line 11, column 7", "did you mean `name`?"]);
    says(
        &with("kind: Flow", "kind: Flow\nfrobnicate: 1"),
        &["unknown key `frobnicate`", "known keys are `apiVersion`"],
    );
    says(&with("tables:", "Tables:"), &["did you mean `tables`?"]);
}

#[test]
fn existing_rows_are_loaded_or_not() {
    for (word, mode) in
        [("initial", SnapshotMode::Initial), ("never", SnapshotMode::Never), ("only", SnapshotMode::Only)]
    {
        let flow = parse(&GOOD.replace("never", word), "flow.yaml").unwrap();
        assert_eq!(flow.spec.source.postgres.snapshot, mode);
        assert_eq!(flow.spec.source.postgres.safety.snapshot_max, Span(Duration::from_secs(1800)));
        assert_eq!(flow.spec.sinks[0].on_overrun, OnOverrun::Detach);
    }
    let bounds = "snapshot: never\n      safety: { snapshotMax: 90s, onExceeded: pauseSnapshot }";
    let flow = parse(&GOOD.replace("snapshot: never", bounds), "flow.yaml").unwrap();
    let safety = &flow.spec.source.postgres.safety;
    assert_eq!((safety.snapshot_max.0.as_secs(), safety.on_exceeded), (90, OnExceeded::PauseSnapshot));
    let too_short = "snapshot: never\n      safety: { snapshotMax: 10ms }";
    says(&with("snapshot: never", too_short), &["line 10", "snapshotMax", "at least 1s"]);
}

#[test]
fn what_is_not_built_says_so() {
    says(&with("wh } }", "wh }, mode: append }"), &["not available yet", "only `upsert`"]);
    says(&with("  sinks:", "  streams: []\n  sinks:"), &["line 10", "spec.streams: not available yet"]);
    says(&with("postgres: { dsn: { file: /run/secrets/wh } }", "objectStore: { url: x }"), &["not available yet"]);
    says(&with("snapshot: never", "snapshot: never\n      safety: { onExceeded: dropSlot }"), &["not available yet"]);
    says(&with("never", "sometimes"), &["`sometimes` is not one of `initial`, `never`, `only`"]);
}

#[test]
fn wrong_values_are_named_where_they_stand() {
    says(&with("name: shop", "name: Shop"), &["line 3, column 19", "`Shop` is not a name"]);
    says(
        &with("tables: [public.*]", "tables: public"),
        &["line 8", "publication.tables: expected a list, found a text"],
    );
    says(&with("tables: [public.*]", "tables: [1]"), &["expected a text, found a number", "in quotes"]);
    says(&with("  sinks:", "  paused: yes\n  sinks:"), &["expected true or false, found `yes`"]);
    says(&with("  sinks:", "  log: { maxBytes: 10Q }\n  sinks:"), &["line 10", "\"10Q\" is not a size"]);
    says(&with("  sinks:", "  log: { maxBytes: 1Mi }\n  sinks:"), &["1Mi is too small: at least 32Mi"]);
    let small_log = "  log: { maxBytes: 64Mi }\n  sinks:";
    // The file does not have that key: the line is that of the one which it has.
    let by_default = [
        "line 10",
        "spec.log.maxBytes: 64Mi is too small",
        "`spec.source.postgres.largeTransactionBytes`, which is 64Mi",
    ];
    says(&with("  sinks:", small_log), &by_default);
    says(&with("  sinks:", small_log), &["at least 80Mi, or set that to at most 48Mi"]);
    let set = GOOD
        .replace("snapshot: never", "snapshot: never\n      largeTransactionBytes: 50Mi")
        .replace("  sinks:", small_log);
    says(&message_of(&set), &["line 10", "50Mi does not fit into the log", "at most 48Mi", "at least 66Mi"]);
    let vast = with("snapshot: never", "snapshot: never\n      largeTransactionBytes: 16000000T");
    says(&vast, &["15258789062500Mi does not fit into the log"]);
    assert!(!vast.contains("maxBytes"), "no log is so large: {vast}");
    says(&with("  sinks:", "  log: { replayWindow: 1w }\n  sinks:"), &["is not a length of time"]);
    says(&with("  sinks:", "  log: { replicas: 2 }\n  sinks:"), &["`2` is not one of `auto`, `1`, `3`, `5`"]);
    says(&with("spec:", "spec: 3\nx:"), &["spec: expected a map with `source`"]);
    says(&with("name: warehouse", "name:"), &["`name` is empty"]);
}

/// NATS counts bytes in 63 bits: what is larger would be cut down to what fits, and is refused by the servers at the latest.
#[test]
fn sizes_that_no_server_can_count_are_refused() {
    let log = |log: &str| format!("  log: {{ {log} }}\n  sinks:");
    for size in ["18446744073709551615", "9223372036854775807", "8388608Ti"] {
        let refused = with("  sinks:", &log(&format!("maxBytes: {size}")));
        says(&refused, &["line 10", "spec.log.maxBytes", "is too large: at most 8388607Ti"]);
        assert_eq!(refused.lines().count(), 1, "it is said once: {refused}");
        let refused = with("  sinks:", &log(&format!("sideStore: {{ jetstream: {{ chunksMax: {size} }} }}")));
        says(&refused, &["line 10", "jetstream.chunksMax", "is too large: at most 8388607Ti"]);
    }
    let largest = GOOD.replace("  sinks:", &log("maxBytes: 8388607Ti"));
    assert!(parse(&largest, "flow.yaml").is_ok());
    assert!(i64::try_from(LOG_MAX.0).is_ok());
}

/// The controller looks at each flow each second: a check has to be short whatever a flow names.
#[test]
fn tables_and_exclusions_have_a_bound() {
    let names = |count: usize| (0..count).map(|number| format!("s{number}.t")).collect::<Vec<_>>().join(", ");
    let at_most = with("[public.*]", &format!("[{}]", names(MAX_TABLES + 1)));
    says(&at_most, &["line 8", "20001 entries; at most 20000", "schema.*"]);
    assert_eq!(at_most.lines().count(), 1, "one problem, not one for each entry");
    let excluded = with("[public.*]", &format!("[public.*], exclude: [{}]", names(MAX_TABLES + 1)));
    says(&excluded, &["20001 entries; at most 20000"]);
    let text = GOOD.replace("[public.*]", &format!("[{}]", names(MAX_TABLES)));
    assert!(parse(&text, "flow.yaml").is_ok());
    // A name that begins with a schema's is not of that schema.
    says(&with("[public.*]", "[public.*, a.b], exclude: [publi.c]"), &["excludes nothing: `tables` has no `publi.*`"]);
    says(&with("[public.*]", "[a.*], exclude: [a.b, b.*]"), &["excludes nothing: `tables` has no `b.*`"]);
}

#[test]
fn rules_between_keys_are_checked() {
    says(&with("tables: [public.*]", "create: true"), &["line 8", "at least one table is needed"]);
    says(&with("tables: [public.*]", "tables: []"), &["at least one table is needed"]);
    says(&with("[public.*]", "[orders]"), &["line 8", "`orders` has no schema: write `public.orders`"]);
    says(&with("[public.*]", "[public.o*]"), &["not a table"]);
    says(&with("[public.*]", "[a.b, a.b]"), &["`a.b` is listed twice"]);
    says(&with("[public.*]", "[public.a], exclude: [public.b]"), &["excludes nothing"]);
    says(&with("{ tables", "{ create: false, tables"), &["publication's own tables count"]);
    let double = format!("{GOOD}    - name: warehouse\n      postgres: {{ dsn: {{ env: A }} }}\n");
    says(&message_of(&double), &["line 13, column 7", "a sink named `warehouse` is there already"]);
    let (head, _) = GOOD.split_once("  sinks:").unwrap();
    says(&message_of(head), &["`sinks` is missing"]);
    says(&message_of(&format!("{head}  sinks: []\n")), &["at least one sink"]);
    says(&with("env: SHOP_DSN", "env: $SHOP"), &["name of an environment variable"]);
    says(&with("/run/secrets/wh", "wh"), &["absolute path"]);
    says(&with("{ file: /run/secrets/wh }", "{ value: (hidden) }"), &["in the place of a secret"]);
    says(&with("snapshot", "slot: { name: A-b }\n      snapshot"), &["not a slot name"]);
    says(&with("wh } }", "wh }, schema: '{{ .db }}' }"), &["only `{{ .schema }}`"]);
}

#[test]
fn a_secret_is_never_repeated() {
    for text in
        ["postgres://u:hunter2@h/d", "[hunter2]", "{ url: hunter2 }", "{ env: A, value: hunter2 }", "{ env: hunter2! }"]
    {
        let message = with("{ env: SHOP_DSN }", text);
        assert!(!message.contains("hunter2"), "{message}");
        says(&message, &["line 7"]);
    }
    let text = GOOD.replace("{ env: SHOP_DSN }", "{ value: hunter2 }");
    let flow = parse(&text, "-").unwrap();
    assert!(!format!("{flow:?}").contains("hunter2"));
    assert!(!flow.without_secrets().to_yaml().unwrap().contains("hunter2"));
}

#[test]
fn several_problems_come_at_once_in_the_order_of_lines() {
    let text = GOOD.replace("name: shop", "name: Shop").replace("never", "sometimes").replace("- name", "- nam");
    let lines: Vec<String> = message_of(&text).lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    for (line, at) in lines.iter().zip(["line 3", "line 9", "line 11"]) {
        assert!(line.contains(at), "{line}");
    }
}

#[test]
fn broken_yaml_and_odd_files() {
    says(&message_of(""), &["the file is empty"]);
    says(&message_of("# nothing\n"), &["the file is empty"]);
    says(&message_of("a: [1"), &["not valid YAML or JSON", "line"]);
    says(&message_of("a:\n\tb: 1\n"), &["not valid YAML or JSON", "line 2"]);
    says(&message_of("[]"), &["expected a map"]);
    says(&message_of("a: &x 1"), &["anchors", "not supported"]);
    says(&message_of("a: !x 1"), &["tags", "not supported"]);
    says(&message_of("a: b\na: c"), &["key `a` is given twice, first at line 1"]);
    says(&message_of(&"[".repeat(1000)), &["recursion limit"]);
    says(&message_of(&"x".repeat(MAX_FILE_BYTES + 1)), &["bytes"]);
    says(&message_of(&"{a: ".repeat(30)), &["levels deep"]);
}

#[test]
fn several_documents_and_json() {
    let two = format!("{GOOD}---\n{}", GOOD.replace("shop", "shop-two"));
    let flows = parse_all(&two, "-").unwrap();
    assert_eq!(flows.len(), 2);
    says(&parse(&two, "-").unwrap_err().to_string(), &["more than one flow"]);
    says(&message_of(&format!("{GOOD}---\n{GOOD}")), &["flow `shop` is in this file twice", "first at line 3"]);
    let second_is_bad = format!("{GOOD}---\n{}", GOOD.replace("snapshot", "snap"));
    says(&message_of(&second_is_bad), &["line 22"]);

    let flow = parse(GOOD, "-").unwrap();
    let json = serde_json::to_string_pretty(&flow).unwrap();
    assert_eq!(parse(&json, "flow.json").unwrap(), flow);
    let compact = json.replace('\n', "\n\t").replace("snapshot", "snapshat");
    says(&message_of(&compact), &["did you mean `snapshot`?"]);
}

#[test]
fn a_printed_flow_is_read_back() {
    let text = GOOD
        .replace("wh } }", "wh }, schema: 'x_{{ .schema }}' }\n      paused: true")
        .replace("name: shop }", "name: shop, labels: { a: '1', b: 'true', c: '', d: \"x: y\" } }")
        .replace(
            "  sinks:",
            "  paused: true\n  log: { replicas: 3, maxBytes: 1G, replayWindow: 90s, codec: none }\n  sinks:",
        );
    let flow = parse(&text, "-").unwrap();
    let printed = flow.to_yaml().unwrap();
    assert_eq!(parse(&printed, "-").unwrap(), flow, "{printed}");
    let with_status = format!("{printed}status: {{ phase: Running, tasks: [1] }}\n");
    assert_eq!(parse(&with_status, "-").unwrap(), flow);
}

#[test]
fn the_file_knows_what_it_mentions() {
    let flows = parse_all(GOOD, "-").unwrap();
    assert!(flows[0].mentions("spec.sinks[0].name"));
    assert!(!flows[0].mentions("spec.paused"));
}

/// Every key that the types write is in the table, with the same default; so the docs and the parser know all of them.
#[test]
fn the_table_of_fields_agrees_with_the_types() {
    let mut flow = parse(GOOD, "-").unwrap();
    let minimal = serde_json::to_value(&flow).unwrap();
    defaults_agree(&minimal, &fields::DOCUMENT, "");

    flow.metadata.labels.insert("a".into(), "b".into());
    flow.spec.paused = true;
    flow.spec.sinks[0].paused = true;
    let source = &mut flow.spec.source.postgres;
    source.slot.name = Some("s".into());
    source.publication.name = Some("p".into());
    source.publication.exclude.push("public.x".into());
    let size = Some(ByteSize(1 << 30));
    for side in [
        SideStoreSpec::Jetstream(JetStreamSideSpec { transactions_max: size, chunks_max: size }),
        SideStoreSpec::ObjectStore(ObjectSideSpec { url: "s3://b/p".into(), transactions_max: size, chunks_max: size }),
    ] {
        flow.spec.log.side_store = side;
        let full = serde_json::to_value(&flow).unwrap();
        keys_agree(&full, &fields::DOCUMENT, "");
    }
}

#[test]
fn the_side_store_is_read_checked_and_printed() {
    let log = |side: &str| format!("  log: {{ maxBytes: 128Mi, sideStore: {side} }}\n  sinks:");
    let read = |side: &str| parse(&GOOD.replace("  sinks:", &log(side)), "-").unwrap();
    let flow = read("{ jetstream: { chunksMax: 2Gi } }");
    assert_eq!(flow.spec.log.side_chunks_max(), ByteSize(2 << 30));
    assert_eq!(flow.spec.log.side_transactions_max(), ByteSize(128 << 20), "as many as the log's");
    let objects = read("{ objectStore: { url: 's3://b/wallaby', transactionsMax: 1Gi } }");
    for flow in [&flow, &objects] {
        assert_eq!(&parse(&flow.to_yaml().unwrap(), "-").unwrap(), flow);
        #[cfg(feature = "api")]
        assert_eq!(&crate::api::flow_from_message(&crate::api::flow_to_message(flow)).unwrap(), flow);
    }
    let refused = |side: &str| with("  sinks:", &log(side));
    says(&refused("{ jetstream: {}, objectStore: { url: 's3://b' } }"), &["sideStore"]);
    says(&refused("{ jetstream: { chunksMax: 1k } }"), &["jetstream.chunksMax", "at least 1Mi"]);
    says(&refused("{ objectStore: {} }"), &["`url` is missing"]);
    for (url, what) in [
        ("s3://k:s@b", "no user, password"),
        ("s3://b?x=1", "no user, password, query"),
        ("s3:///b", "names no bucket"),
        ("file://b", "no absolute folder"),
        ("file:///a/../b", "`..`"),
        ("gs://b", "must begin with `s3://`"),
        ("/a", "must be `s3://"),
    ] {
        says(&refused(&format!("{{ objectStore: {{ url: '{url}' }} }}")), &["objectStore.url", what]);
    }
    // What the log refers to stands there.
    assert_eq!(flow.refused_changes(&objects)[0].path, "spec.log.sideStore");
    let larger = read("{ objectStore: { url: 's3://b/wallaby', transactionsMax: 2Gi } }");
    assert_eq!(objects.refused_changes(&larger), []);
}

fn defaults_agree(value: &serde_json::Value, object: &'static fields::Object, path: &str) {
    for field in object.fields {
        let here = format!("{path}.{}", field.key);
        let Some(child) = value.get(field.key) else { continue };
        let mentioned = GOOD.contains(&format!("{}:", field.key));
        match &field.shape {
            fields::Shape::Object(inner) => defaults_agree(child, inner, &here),
            fields::Shape::List(fields::Shape::Object(inner)) => defaults_agree(&child[0], inner, &here),
            _ if field.required || mentioned => {}
            _ => {
                let text = child.as_str().map_or_else(|| child.to_string(), str::to_owned);
                assert_eq!(text, field.default, "{here}");
            }
        }
    }
}

fn keys_agree(value: &serde_json::Value, object: &'static fields::Object, path: &str) {
    let serde_json::Value::Object(map) = value else { panic!("{path} is not a map") };
    for key in map.keys() {
        assert!(object.field(key).is_some(), "{path}.{key} is not in the table of fields");
    }
    for field in object.fields.iter().filter(|field| field.not_yet.is_none() && !field.ignored) {
        let here = format!("{path}.{}", field.key);
        let child = map.get(field.key);
        assert!(object.one_of || child.is_some(), "{here} is in the table, but the types do not write it");
        match (&field.shape, child) {
            (fields::Shape::Object(inner), Some(child)) => keys_agree(child, inner, &here),
            (fields::Shape::List(fields::Shape::Object(inner)), Some(child)) => keys_agree(&child[0], inner, &here),
            _ => {}
        }
    }
}

proptest::proptest! {
    /// Whatever a file holds: an answer and no panic, and lines that exist.
    #[test]
    fn damaged_files_get_an_answer(cut in 0usize..GOOD.len(), len in 0usize..40, junk in "[-{}\\[\\]:,&*!|>'\"%#?@ \n\ta-z0-9é]{0,12}") {
        let end = (cut + len).min(GOOD.len());
        let text = format!("{}{junk}{}", &GOOD[..cut], &GOOD[end..]);
        if let Err(error) = parse_all(&text, "-") {
            let lines = text.lines().count() + 1;
            proptest::prop_assert!(error.problems.iter().all(|p| (1..=lines).contains(&p.line)), "{error} in {text:?}");
        }
    }
}
