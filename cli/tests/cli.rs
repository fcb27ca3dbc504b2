//! The `wallaby` command as people run it, against a controller with real servers behind it.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use clap::Parser;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use wallaby_controller::{Controller, Options};
use wallaby_testkit::{Database, EtcdScope, NatsScope, PortLease, eventually, unique};

const PATIENCE: Duration = Duration::from_secs(20);

const FLOW: &str = "\
apiVersion: wallaby/v1
kind: Flow
metadata: { name: shop }
spec:
  source:
    postgres:
      dsn: { env: WALLABY_TEST_DSN }
      publication: { tables: [public.*] }
      snapshot: never
  sinks:
    - name: warehouse
      postgres: { dsn: { env: WAREHOUSE_DSN } }
";

/// What a run of the command came to.
#[derive(Debug)]
struct Outcome {
    code: i32,
    out: String,
    err: String,
}

impl Outcome {
    #[track_caller]
    fn is(self, code: i32, parts: &[&str]) -> Outcome {
        assert_eq!(self.code, code, "{self:?}");
        for part in parts {
            assert!(self.out.contains(part) || self.err.contains(part), "{part:?} is missing: {self:?}");
        }
        self
    }
}

/// A shell at a controller.
struct Shell {
    server: String,
    env: Vec<(String, String)>,
}

impl Shell {
    fn at(server: impl Into<String>) -> Shell {
        Shell { server: server.into(), env: Vec::new() }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wallaby"));
        command.args(words).env("WALLABY_SERVER", &self.server).envs(self.env.iter().cloned()).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    async fn run(&self, words: &[&str]) -> Outcome {
        self.run_with(words, "").await
    }

    async fn run_with(&self, words: &[&str], input: &str) -> Outcome {
        let mut child = self.command(words).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("the command ends").unwrap();
        Outcome {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// A controller with a shell at it.
struct Place {
    controller: Controller,
    shell: Shell,
    etcd: EtcdScope<'static>,
    _nats: NatsScope<'static>,
}

impl Place {
    async fn create(hint: &str) -> Place {
        let etcd = EtcdScope::create(hint).await;
        let nats = NatsScope::one_node(hint).await;
        let options = Options::try_parse_from([
            "wallaby-controller",
            "--listen=127.0.0.1:0",
            &format!("--etcd={}", etcd.endpoints().join(",")),
            &format!("--etcd-prefix={}", etcd.prefix().trim_end_matches('/')),
            &format!("--nats={}", nats.url()),
            &format!("--pool={}", unique("pool").replace('_', "-")),
        ]);
        let controller = Controller::start(options.unwrap()).await.unwrap();
        let shell = Shell::at(controller.address().to_string());
        eventually(PATIENCE, "the controller answers", async || {
            let outcome = shell.run(&["get", "flows"]).await;
            if outcome.code == 0 { Ok(()) } else { Err(outcome) }
        })
        .await;
        Place { controller, shell, etcd, _nats: nats }
    }
}

#[tokio::test]
async fn a_flow_lives_through_the_command() {
    let place = Place::create("cli").await;
    let shell = &place.shell;
    shell.run(&["get", "flows"]).await.is(0, &["no flows"]);
    shell.run(&["workers"]).await.is(0, &["no workers", "`wallaby-worker`"]);
    shell.run_with(&["apply", "-f", "-"], FLOW).await.is(0, &["flow shop created"]);
    shell.run_with(&["apply", "-f", "-"], FLOW).await.is(0, &["flow shop unchanged"]);
    let changed = FLOW.replace("{ name: shop }", "{ name: shop, labels: { team: web } }");
    shell.run_with(&["apply", "-f", "-", "-o", "json"], &changed).await.is(0, &["\"result\": \"updated\""]);

    shell.run(&["get", "flow", "shop"]).await.is(0, &["NAME", "shop", "Pending"]);
    shell.run(&["get", "sinks"]).await.is(0, &["shop/warehouse", "False"]);
    shell.run(&["describe", "flow", "shop"]).await.is(0, &["NoWorker", "start one with", "wallaby_shop", "team=web"]);
    shell.run(&["describe", "shop/warehouse"]).await.is(0, &["sink shop/warehouse"]);
    shell.run(&["status"]).await.is(0, &["shop", "-> shop/warehouse", "OFFERED"]);
    let json = shell.run(&["get", "flows", "-o", "json"]).await.is(0, &[]);
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(value[0]["status"]["phase"], "Pending");

    // What was printed can be applied again, status and all.
    let yaml =
        shell.run(&["get", "flow", "shop", "-o", "yaml"]).await.is(0, &["apiVersion: wallaby/v1", "phase: Pending"]);
    shell.run_with(&["apply", "-f", "-"], &yaml.out).await.is(0, &["flow shop unchanged"]);

    // A file that does not speak of pauses leaves them alone.
    shell.run(&["pause", "shop"]).await.is(0, &["flow shop paused", "wallaby resume shop"]);
    shell.run_with(&["apply", "-f", "-"], FLOW).await.is(0, &["flow shop updated", "note: flow shop stays paused"]);
    shell.run(&["get", "flows"]).await.is(0, &["Paused"]);
    shell.run(&["resume", "shop"]).await.is(0, &["flow shop resumed"]);
    shell.run(&["pause", "shop/warehouse"]).await.is(0, &["sink shop/warehouse paused", "it is cut off", "detach"]);
    shell.run_with(&["apply", "-f", "-"], FLOW).await.is(0, &["unchanged", "sink shop/warehouse stays paused"]);
    shell.run(&["resume", "sink", "shop/warehouse"]).await.is(0, &["resumed"]);

    shell.run_with(&["apply", "-f", "-", "--wait", "--timeout", "3s"], FLOW).await.is(6, &["not done", "no worker"]);
    shell.run(&["delete", "shop", "--wait"]).await.is(0, &["flow shop deleted"]);
    shell.run(&["delete", "shop"]).await.is(1, &["there is no flow shop", "[FLOW_NOT_FOUND]"]);
    shell.run(&["delete", "shop", "--if-exists"]).await.is(0, &["not there"]);
    shell.run(&["drain", "w1"]).await.is(1, &["no worker w1", "wallaby workers"]);
    place.controller.stop().await;
}

/// What a command printed, as JSON.
#[track_caller]
fn json(outcome: &Outcome) -> serde_json::Value {
    serde_json::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error}: {outcome:?}"))
}

#[tokio::test]
async fn every_verb_prints_json_for_programs() {
    let place = Place::create("json").await;
    let shell = &place.shell;
    let waits = FLOW.replace("name: warehouse", "name: warehouse\n      onOverrun: backpressure");
    let checked = shell.run_with(&["apply", "-f", "-", "--dry-run", "-o", "json"], &waits).await.is(0, &[]);
    assert_eq!(json(&checked), serde_json::json!([{ "flow": "shop", "problems": [] }]));
    shell.run_with(&["apply", "-f", "-"], &waits).await.is(0, &["created"]);

    let paused = json(&shell.run(&["pause", "shop", "-o", "json"]).await.is(0, &[]));
    assert_eq!((&paused["metadata"]["name"], &paused["status"]["phase"]), (&"shop".into(), &"Paused".into()));
    let resumed = json(&shell.run(&["resume", "shop", "-o", "json"]).await.is(0, &[]));
    assert_eq!((&resumed["metadata"]["name"], &resumed["status"]["phase"]), (&"shop".into(), &"Pending".into()));
    let sink = json(&shell.run(&["pause", "shop/warehouse", "-o", "json"]).await.is(0, &[]));
    assert_eq!((&sink["name"], &sink["paused"]), (&"flows/shop/sinks/warehouse".into(), &true.into()));
    let sink = json(&shell.run(&["resume", "shop/warehouse", "-o", "json"]).await.is(0, &[]));
    assert_eq!(sink["paused"], false);
    // Nobody compares, as there is no worker: it goes on until it is cancelled.
    let comparing = shell.command(&["verify", "shop"]).spawn().unwrap();
    let cancelled = eventually(PATIENCE, "the comparison is asked for", async || {
        let outcome = shell.run(&["verify", "shop", "--cancel", "1", "-o", "json"]).await;
        if outcome.code == 0 { Ok(outcome) } else { Err(outcome) }
    })
    .await;
    assert_eq!(json(&cancelled)["name"], "flows/shop/operations/1");
    drop(comparing);
    shell.run(&["pause", "shop/warehouse"]).await.is(0, &["the flow waits for it", "backpressure"]);

    let gone = json(&shell.run(&["delete", "shop", "--wait", "-o", "json"]).await.is(0, &[]));
    assert_eq!(gone, serde_json::json!([{ "flow": "shop", "result": "deleted" }]));
    let absent = json(&shell.run(&["delete", "shop", "--if-exists", "-o", "json"]).await.is(0, &[]));
    assert_eq!(absent, serde_json::json!([{ "flow": "shop", "result": "absent" }]));

    // Workers as they say of themselves, without a process behind them.
    let mut etcd = place.etcd.client();
    let key = |what: &str| format!("{}{what}", place.etcd.prefix());
    let worker = serde_json::json!({
        "capacity": 8, "load": 0, "version": "1", "zone": null, "capabilities": [], "address": "h:1", "draining": false,
        "started_at": 1,
    });
    for name in ["w1", "w2"] {
        etcd.put(key(&format!("workers/{name}")), worker.to_string(), None).await.unwrap();
    }
    let drained = json(&shell.run(&["drain", "w1", "-o", "json"]).await.is(0, &[]));
    assert_eq!(drained, serde_json::json!({ "worker": "w1", "result": "draining" }));
    let ends = async {
        eventually(PATIENCE, "the worker is asked to drain", async || {
            let asked = place.etcd.client().get(key("drains/w2"), None).await.unwrap();
            if asked.kvs().is_empty() { Err("it is not asked") } else { Ok(()) }
        })
        .await;
        etcd.delete(key("workers/w2"), None).await.unwrap();
    };
    let (drained, ()) = tokio::join!(shell.run(&["drain", "w2", "--wait", "-o", "json"]), ends);
    assert_eq!(json(&drained.is(0, &[])), serde_json::json!({ "worker": "w2", "result": "gone" }));
    place.controller.stop().await;
}

/// What is only looked at: each as JSON and as YAML, which say the same.
#[tokio::test]
async fn whatever_is_shown_is_shown_to_programs_too() {
    let place = Place::create("shown").await;
    let shell = &place.shell;
    shell.run_with(&["apply", "-f", "-"], &FLOW.replace("never", "initial")).await.is(0, &["created"]);
    let worker = serde_json::json!({
        "capacity": 8, "load": 0, "version": "1", "zone": null, "capabilities": [], "address": "h:1", "draining": false,
        "started_at": 1,
    });
    let key = format!("{}workers/w1", place.etcd.prefix());
    place.etcd.client().put(key, worker.to_string(), None).await.unwrap();
    eventually(PATIENCE, "the controller sees the worker", async || {
        let outcome = shell.run(&["workers", "-o", "json"]).await;
        if outcome.code == 0 && outcome.out.contains("w1") { Ok(()) } else { Err(outcome) }
    })
    .await;
    // What is typed, where in the answer one thing is looked for, and what is there.
    let shown: [(&[&str], &str, serde_json::Value); 13] = [
        (&["describe", "shop"], "/status/sinks/0/name", "flows/shop/sinks/warehouse".into()),
        (&["describe", "shop/warehouse"], "/name", "flows/shop/sinks/warehouse".into()),
        (&["status"], "/0/metadata/name", "shop".into()),
        (&["status", "shop"], "/0/status/rowsPerSecond", serde_json::Value::Null),
        (&["workers"], "/0/name", "w1".into()),
        (&["get", "workers"], "/0/capacity", 8.into()),
        (&["get", "worker", "w1"], "/address", "h:1".into()),
        (&["get", "flows"], "/0/metadata/name", "shop".into()),
        (&["get", "flow", "shop"], "/spec/source/postgres/snapshot", "initial".into()),
        (&["get", "sinks"], "/0/paused", false.into()),
        (&["get", "sink", "shop/warehouse"], "/paused", false.into()),
        (&["snapshot", "list"], "/0/reason", "FirstLoad".into()),
        (&["snapshot", "get", "shop"], "/name", "flows/shop/snapshots/1".into()),
    ];
    for (words, place, wanted) in shown {
        for format in ["json", "yaml"] {
            let outcome = shell.run(&[words, &["-o", format]].concat()).await.is(0, &[]);
            let value: serde_json::Value = match format {
                "json" => json(&outcome),
                _ => serde_yaml_ng::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error}: {outcome:?}")),
            };
            assert_eq!(value.pointer(place), Some(&wanted), "{words:?} as {format}: {value}");
            let is_json = outcome.out.starts_with(['{', '[']);
            assert_eq!(is_json, format == "json", "{words:?} as {format}: {}", outcome.out);
            assert_eq!(outcome.err, "", "{words:?} as {format}");
        }
    }
    place.controller.stop().await;
}

#[tokio::test]
async fn a_dry_run_says_what_is_wrong_and_makes_nothing() {
    let place = Place::create("dry-run").await;
    let shell = &place.shell;
    shell.run_with(&["apply", "-f", "-", "--dry-run"], FLOW).await.is(0, &["the flow is valid"]);
    let bad = FLOW.replace("snapshot: never", "snapshot: never\n      slot: { name: Not-A-Slot }");
    let said = ["standard input: line 10", "is not a slot name"];
    shell.run_with(&["apply", "-f", "-", "--dry-run"], &bad).await.is(2, &said);
    shell.run(&["get", "flows"]).await.is(0, &["no flows"]);
    place.controller.stop().await;
}

#[tokio::test]
async fn an_apply_that_is_refused_each_time_says_why() {
    let place = Place::create("moved").await;
    let shell = &place.shell;
    shell.run_with(&["apply", "-f", "-"], FLOW).await.is(0, &["created"]);
    // The log is gone, and was purged up to here: a sink that is new finds no place in it to begin at.
    let key = format!("{}flows/shop/purge", place.etcd.prefix());
    let purged = r#"{"position":"0000000000000007-0000000000000000-00000000"}"#;
    place.etcd.client().put(key, purged, None).await.unwrap();
    let second = "    - name: second\n      postgres: { dsn: { env: WAREHOUSE_DSN } }\n";
    let refused = eventually(PATIENCE, "the controller reaches NATS", async || {
        let outcome = shell.run_with(&["apply", "-f", "-"], &format!("{FLOW}{second}")).await;
        if outcome.code == 4 { Err(outcome) } else { Ok(outcome) }
    })
    .await;
    let refused = refused.is(1, &["[LOG_MOVED]", "was purged up to"]);
    assert!(!refused.err.contains("changed by others"), "nobody else changed it: {refused:?}");
    place.controller.stop().await;
}

#[tokio::test]
async fn a_diff_shows_what_an_apply_would_do_and_does_nothing() {
    let place = Place::create("diff").await;
    let shell = &place.shell;
    let first = shell.run_with(&["diff", "-f", "-"], FLOW).await;
    first.is(3, &["flow shop would be created", "capture", "CREATED", "sink warehouse"]);
    shell.run(&["get", "flows"]).await.is(0, &["no flows"]);
    shell.run_with(&["apply", "-f", "-"], FLOW).await.is(0, &["created"]);
    shell.run_with(&["diff", "-f", "-"], FLOW).await.is(0, &["flow shop is as the file says"]);

    let loads = FLOW.replace("never", "initial");
    let said = ["snapshot: \"never\" -> \"initial\"", "capture", "RESTARTS", "run", "a snapshot run loads public.*"];
    shell.run_with(&["diff", "-f", "-"], &loads).await.is(3, &said);
    let renamed = FLOW.replace("snapshot: never", "snapshot: never\n      slot: { name: other }");
    shell.run_with(&["diff", "-f", "-"], &renamed).await.is(3, &["cannot be updated so", "refused", "create it again"]);
    shell.run_with(&["apply", "-f", "-"], &renamed).await.is(1, &["[FIELD_IMMUTABLE]"]);
    let json = shell.run_with(&["diff", "-f", "-", "-o", "json"], &loads).await.is(3, &[]);
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&value[0]["exists"], &value[0]["effects"][0]["effect"]), (&true.into(), &"RESTARTS".into()));

    // What is under way is named, too.
    shell.run(&["snapshot", "start", "shop"]).await.is(0, &[]);
    let comparing = shell.command(&["verify", "shop"]).spawn().unwrap();
    let stops = FLOW.replace("spec:\n", "spec:\n  paused: true\n");
    eventually(PATIENCE, "the diff names the run and the comparison", async || {
        let said = shell.run_with(&["diff", "-f", "-"], &stops).await.out;
        let is_there = ["run 1", "comparison 1"].iter().all(|subject| said.contains(&format!("{subject} ")));
        if is_there { Ok(()) } else { Err(said) }
    })
    .await;
    drop(comparing);

    // Paused by hand: the file does not speak of it, so nothing would change.
    shell.run(&["pause", "shop"]).await.is(0, &[]);
    shell.run_with(&["diff", "-f", "-"], FLOW).await.is(0, &["as the file says", "stays paused"]);
}

#[tokio::test]
async fn snapshot_runs_are_started_shown_and_cancelled() {
    let place = Place::create("snapshots").await;
    let shell = &place.shell;
    let apply = shell.run_with(&["apply", "-f", "-"], &FLOW.replace("never", "initial")).await;
    apply.is(0, &["created"]);
    shell.run(&["snapshot", "list"]).await.is(0, &["shop/1", "Planning", "FirstLoad"]);
    shell.run(&["snapshot", "get", "shop"]).await.is(0, &["snapshot shop/1", "no worker is alive", "shop/warehouse"]);
    shell.run(&["status"]).await.is(0, &["<- snapshot shop/1"]);
    shell.run(&["describe", "shop"]).await.is(0, &["SnapshotComplete", "run 1: 0 of 0 chunks are read"]);
    let overlap = shell.run(&["snapshot", "start", "shop", "public.orders"]).await;
    overlap
        .is(1, &["run 1 of flow shop is not over", "(public.orders)", "[SNAPSHOT_OVERLAPS]", "snapshot cancel shop 1"]);
    shell.run(&["snapshot", "start", "shop", "crm.x"]).await.is(2, &["does not capture `crm.x`"]);
    shell.run(&["snapshot", "start", "shop", "orders"]).await.is(2, &["has no schema"]);
    shell.run(&["snapshot", "start", "shop", "--sinks", "nobody"]).await.is(1, &["[SINK_NOT_FOUND]"]);
    shell.run(&["snapshot", "start", "nothing"]).await.is(1, &["[FLOW_NOT_FOUND]"]);
    shell.run(&["snapshot", "start", "shop", "--readers", "0"]).await.is(2, &["--readers"]);
    shell.run(&["snapshot", "pause", "shop"]).await.is(0, &["shop/1 paused"]);
    shell.run(&["snapshot", "get", "shop/1"]).await.is(0, &["Paused", "wallaby snapshot resume shop 1"]);
    shell.run(&["snapshot", "resume", "shop", "1"]).await.is(0, &["resumed"]);
    let waited = shell.run(&["snapshot", "get", "shop", "--wait", "--timeout", "3s"]).await;
    waited.is(6, &["not done", "it goes on by itself"]);
    let waited = shell.run(&["snapshot", "get", "shop", "--wait", "--timeout", "1s"]).await.is(6, &["not done"]);
    assert_eq!(waited.err.lines().count(), 1, "a worker may take it yet: {waited:?}");
    let waited = shell.run(&["snapshot", "cancel", "shop", "--wait", "--timeout", "3s", "-o", "json"]).await;
    assert_eq!(json(&waited.is(6, &["not done"]))["state"], "Cancelling", "one value, as far as it came");
    shell.run(&["snapshot", "cancel", "shop"]).await.is(0, &["is being cancelled"]);
    shell.run(&["snapshot", "resume", "shop", "1"]).await.is(1, &["[SNAPSHOT_OVER]"]);
    let start =
        ["snapshot", "start", "shop", "public.orders", "--sinks", "warehouse", "--rows-per-second", "5", "-o", "json"];
    let json = shell.run(&start).await.is(0, &[]);
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&value["name"], &value["spec"]["rowsPerSecond"]), (&"flows/shop/snapshots/2".into(), &5.into()));
    shell.run(&["snapshot", "get", "shop", "9"]).await.is(1, &["[SNAPSHOT_NOT_FOUND]"]);
    shell.run(&["snapshot", "get", "shop", "x"]).await.is(2, &["is not the number of a snapshot run"]);
}

#[tokio::test]
async fn an_invalid_file_is_named_with_its_line() {
    // Not one of these needs a controller.
    let shell = Shell::at("127.0.0.1:1");
    let misspelt = FLOW.replace("snapshot", "snapshots");
    let said = ["standard input: line 9", "unknown key `snapshots`", "did you mean `snapshot`?"];
    shell.run_with(&["apply", "-f", "-"], &misspelt).await.is(2, &said);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), FLOW.replace("never", "sometimes")).unwrap();
    let path = file.path().to_str().unwrap();
    shell.run(&["apply", "-f", path]).await.is(2, &[path, "line 9", "`sometimes` is not one of"]);
    shell.run(&["apply", "-f", "/nowhere.yaml"]).await.is(2, &["cannot read /nowhere.yaml"]);
    shell.run_with(&["apply", "-f", "-", "-f", path], FLOW).await.is(2, &[]);
    shell.run(&["describe", "Not-A-Name"]).await.is(2, &["is not a valid flow name"]);
    shell.run(&["delete", "shop/warehouse"]).await.is(2, &["is a sink"]);
    shell.run(&["frobnicate"]).await.is(2, &["unrecognized subcommand"]);
    shell.run(&["get", "flows", "--server", "::bad::"]).await.is(2, &["--server"]);
    shell.run(&["get", "flows", "--server", "https://127.0.0.1:1"]).await.is(2, &["--ca-cert"]);
    let both = ["shop/warehouse", "names the sink warehouse", "--sink names lake"];
    shell.run(&["verify", "shop/warehouse", "--sink", "lake"]).await.is(2, &both);
}

#[tokio::test]
async fn a_time_that_no_clock_can_count_is_refused_and_a_year_is_not() {
    let place = Place::create("patient").await;
    let shell = &place.shell;
    let long = "5000000000d";
    for (words, flag) in [
        (&["get", "flows", "--timeout", long][..], "--timeout"),
        (&["status", "--watch", "--interval", long][..], "--interval"),
        (&["verify", "shop", "--within", long][..], "--within"),
    ] {
        shell.run(words).await.is(2, &[flag, "5000000000d is too long", "at most 365d"]);
    }
    shell.run(&["get", "flows", "--timeout", "365d"]).await.is(0, &["no flows"]);
    shell.run(&["status", "--watch", "--interval", "365d"]).await.is(2, &["[ARGUMENT_INVALID]", "at most a day"]);
    place.controller.stop().await;
}

#[tokio::test]
async fn a_controller_that_is_not_there_is_said() {
    let port = PortLease::free().unwrap();
    let shell = Shell::at(format!("127.0.0.1:{}", port.port()));
    let said = [&format!("no controller answers at http://127.0.0.1:{}", port.port()), "WALLABY_SERVER", "refused"];
    shell.run_with(&["apply", "-f", "-"], FLOW).await.is(4, &said);
    shell.run(&["status"]).await.is(4, &said);
}

#[tokio::test]
async fn a_port_that_cannot_be_one_is_named_as_such() {
    for server in ["notahost:99999", "http://notahost:99999"] {
        Shell::at(server).run(&["status"]).await.is(2, &["--server", server, "`99999` is not a port", "65535"]);
    }
}

/// It would wait for a sink that does not come to where the source is, until its time is over.
#[tokio::test]
async fn a_comparison_that_is_waited_for_ends_when_its_sink_stops() {
    let place = Place::create("stops").await;
    let shell = &place.shell;
    shell.run_with(&["apply", "-f", "-"], FLOW).await.is(0, &["created"]);
    let stops = async {
        let asked = eventually(PATIENCE, "the comparison is asked for", async || {
            let operation = format!("{}flows/shop/operations/1/spec", place.etcd.prefix());
            let asked = place.etcd.client().get(operation, None).await.unwrap();
            if asked.kvs().is_empty() { Err("it is not asked for") } else { Ok(()) }
        });
        asked.await;
        // As its worker says it, without a process behind it.
        let key = |what: &str| format!("{}tasks/shop.apply.warehouse/{what}", place.etcd.prefix());
        let lock = r#"{"worker":"w1","address":"h:1","attempt":"00000000-0000-0000-0000-000000000000"}"#;
        let status = r#"{"phase":"Stopped","phase_since":1,"worker":"w1","last_error":"the table is gone","progress":{},"at":1}"#;
        let mut etcd = place.etcd.client();
        etcd.put(key("lock"), lock, None).await.unwrap();
        etcd.put(key("status"), status, None).await.unwrap();
    };
    let (outcome, ()) = tokio::join!(shell.run(&["verify", "shop"]), stops);
    outcome.is(
        1,
        &["sink shop/warehouse is stopped", "the table is gone", "wallaby resume shop/warehouse", "is cancelled"],
    );
    let again = shell.run(&["verify", "shop"]).await;
    again.is(1, &["sink shop/warehouse is stopped", "the table is gone", "[TASK_STOPPED]"]);
    place.controller.stop().await;
}

#[tokio::test]
async fn somebody_who_never_answers_is_waited_for_as_long_as_was_said() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let shell = Shell::at(listener.local_addr().unwrap().to_string());
    let silent = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            kept.push(stream);
        }
    });
    shell.run(&["get", "flows", "--timeout", "500ms"]).await.is(6, &["no answer", "in time", "--timeout"]);
    silent.abort();
}

#[tokio::test]
async fn help_and_completion_need_nobody() {
    let shell = Shell::at("127.0.0.1:1");
    shell.run(&["--help"]).await.is(0, &["Examples:", "Exit codes:", "apply", "doctor"]);
    shell.run(&["status", "--help"]).await.is(0, &["--watch", "wallaby status shop --watch"]);
    for name in ["bash", "zsh", "fish"] {
        shell.run(&["completion", name]).await.is(0, &["wallaby", "drain", "snapshot", "diff"]);
    }
}

#[tokio::test]
async fn a_watch_prints_plain_lines_survives_and_ends_at_ctrl_c() {
    let place = Place::create("watch").await;
    place.shell.run_with(&["apply", "-f", "-"], FLOW).await.is(0, &[]);
    let mut child = place.shell.command(&["status", "--watch", "--interval", "100ms"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut until = async |part: &str| {
        let found = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                assert!(!line.contains('\x1b'), "no cursor movements without a terminal: {line:?}");
                if line.contains(part) {
                    return;
                }
            }
            panic!("the watch ended before {part:?}");
        };
        tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("{part:?} was not printed"));
    };
    until("flow=shop phase=Pending").await;
    place.shell.run(&["pause", "shop"]).await.is(0, &[]);
    until("phase=Paused").await;
    // The controller goes: the watch says so and does not end.
    place.controller.stop().await;
    until("no controller answers").await;
    signal(&child, "INT").await;
    assert_eq!(ended(&mut child).await.code(), Some(130));
}

async fn signal(child: &tokio::process::Child, signal: &str) {
    let pid = child.id().unwrap().to_string();
    let sent = Command::new("kill").args([&format!("-{signal}"), &pid]).status().await.unwrap();
    assert!(sent.success());
}

async fn ended(child: &mut tokio::process::Child) -> ExitStatus {
    tokio::time::timeout(PATIENCE, child.wait()).await.expect("it ends").unwrap()
}

#[tokio::test]
async fn doctor_says_what_to_mend_and_needs_no_controller() {
    let database = Database::create("doctor").await;
    database.client().batch_execute("CREATE TABLE orders (id int PRIMARY KEY, total numeric)").await.unwrap();
    let mut shell = Shell::at("127.0.0.1:1");
    shell.run(&["doctor"]).await.is(2, &["--dsn"]);
    shell.run_with(&["doctor", "-f", "-"], FLOW).await.is(2, &["WALLABY_TEST_DSN", "not set here"]);

    shell.env.push(("WALLABY_TEST_DSN".into(), database.dsn().to_string()));
    shell.run_with(&["doctor", "-f", "-"], FLOW).await.is(0, &["flow shop", "ready: 0 to mend"]);
    let json = shell.run_with(&["doctor", "-f", "-", "-o", "json"], FLOW).await.is(0, &[]);
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert!(!value[0]["findings"].as_array().unwrap().is_empty());

    let unknown = FLOW.replace("[public.*]", "[public.nothing]");
    shell.run_with(&["doctor", "-f", "-"], &unknown).await.is(3, &["FAIL", "public.nothing", "not ready"]);

    database.client().batch_execute("CREATE TABLE keyless (a int)").await.unwrap();
    let said = shell.run_with(&["doctor", "-f", "-"], FLOW).await;
    assert!(said.out.contains("ALTER TABLE"), "the statement that mends a table without a key: {said:?}");
    let wrong =
        database.dsn().to_string().replacen("postgres:", "postgres:x", 2).replace("postgres:x//", "postgres://");
    let said = shell.run(&["doctor", "--dsn", &wrong]).await;
    assert_eq!(said.code, 3, "{said:?}");
    let password = database.postgres().password().to_string();
    assert!(!said.out.contains(&password) && !said.err.contains(&password), "a secret was printed");
}

/// An authority, and what it signed for a server at 127.0.0.1 and for a client: PEM files in a folder.
fn write_certificates(folder: &std::path::Path) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    std::fs::write(folder.join("ca.pem"), ca_certificate.pem()).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    for (name, subject) in [("server", "127.0.0.1"), ("client", "somebody")] {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![subject.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

#[tokio::test]
async fn tls_with_client_certificates() {
    let folder = tempfile::tempdir().unwrap();
    write_certificates(folder.path());
    let file = |name: &str| folder.path().join(name).display().to_string();
    let options = Options::try_parse_from([
        "wallaby-controller",
        "--listen=127.0.0.1:0",
        // Nobody is there: it is the transport that is looked at.
        "--etcd=http://127.0.0.1:1",
        &format!("--tls-cert={}", file("server.pem")),
        &format!("--tls-key={}", file("server.key")),
        &format!("--tls-client-ca={}", file("ca.pem")),
    ]);
    let controller = Controller::start(options.unwrap()).await.unwrap();
    let shell = Shell::at(format!("https://{}", controller.address()));
    let (ca, certificate, key) = (file("ca.pem"), file("client.pem"), file("client.key"));
    let trusted = ["get", "flows", "--ca-cert", &ca, "--client-cert", &certificate, "--client-key", &key];
    shell.run(&trusted).await.is(4, &["[ETCD_UNREACHABLE]", "http://127.0.0.1:1"]);

    // The connection may break before the reason for it is read: then nobody answered.
    eventually(PATIENCE, "a client without a certificate is told so", async || {
        let anonymous = shell.run(&["get", "flows", "--ca-cert", &ca]).await;
        match anonymous.code {
            5 => Ok(anonymous.is(5, &["asks for a certificate", "--client-cert and --client-key"])),
            _ => Err(anonymous.is(4, &["no controller answers"])),
        }
    })
    .await;
    let plain = Shell::at(controller.address().to_string()).run(&["get", "flows"]).await;
    assert!(!plain.err.contains("ETCD"), "a client without TLS came in: {plain:?}");
    plain.is(4, &["no controller answers at http://"]);
    controller.stop().await;
}
