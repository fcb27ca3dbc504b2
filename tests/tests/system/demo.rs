//! The demo of the README, as `make demo` runs it, with less to watch.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use wallaby_stack::Folder;
use wallaby_testkit::eventually;
use wallaby_tests::programs::program;
use wallaby_tests::traffic::connect;
use wallaby_tests::{PATIENCE, alone};

const KEEPS: &str = "Everything keeps running until you press Ctrl-C.";

/// The running demo, and what it has said so far.
struct Demo {
    child: Child,
    said: Arc<Mutex<String>>,
    reading: Vec<JoinHandle<()>>,
    folder: Folder,
}

impl Demo {
    fn start(arguments: &[&str], variables: &[(&str, &str)]) -> Demo {
        let folder = Folder::temporary("demo").unwrap();
        let flow = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/shop/flow.yaml");
        let mut command = Command::new(program("wallaby-demo"));
        command.arg("--folder").arg(folder.path().join("demo")).arg("--flow").arg(flow);
        command.args(["--seconds", "1", "--rows-per-second", "500"]).args(arguments);
        command.env_remove("KEEP").envs(variables.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let out = tokio::spawn(keep(child.stdout.take().unwrap(), Arc::clone(&said)));
        let err = tokio::spawn(keep(child.stderr.take().unwrap(), Arc::clone(&said)));
        Demo { child, said, reading: vec![out, err], folder }
    }

    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Waits until it has said something; everything that it has said.
    async fn says(&mut self, part: &str) -> String {
        eventually(2 * PATIENCE, &format!("the demo says {part:?}"), async || {
            let (said, ended) = (self.said(), self.child.try_wait().unwrap());
            assert!(ended.is_none() || said.contains(part), "the demo ended before it said {part:?}: {said}");
            if said.contains(part) { Ok(said) } else { Err(said) }
        })
        .await
    }

    fn interrupt(&self) {
        let pid = self.child.id().unwrap().to_string();
        assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    }

    /// Waits for its end: the exit code, all that it said, and its folder. Nothing that it started may be left.
    async fn ends(mut self) -> (Option<i32>, String, Folder) {
        let status = tokio::time::timeout(2 * PATIENCE, self.child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("the demo does not end: {}", self.said())).unwrap();
        for reading in std::mem::take(&mut self.reading) {
            reading.await.unwrap();
        }
        assert_eq!(processes(self.folder.path()), Vec::<String>::new(), "all is gone when the demo is");
        (status.code(), self.said(), self.folder)
    }

    fn files(folder: &Folder) -> BTreeSet<String> {
        let entries = std::fs::read_dir(folder.path().join("demo")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }
}

/// Keeps every line of a pipe.
async fn keep(pipe: impl AsyncRead + Unpin, said: Arc<Mutex<String>>) {
    let mut lines = BufReader::new(pipe).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        let mut said = said.lock().unwrap();
        said.push_str(&line);
        said.push('\n');
    }
}

/// Everything that works in a folder.
fn processes(folder: &Path) -> Vec<String> {
    let folder = folder.canonicalize().unwrap();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let here =
        entries.filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&folder)));
    let line = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
    here.map(line).filter(|line| !line.is_empty()).map(|line| line.replace('\0', " ")).collect()
}

/// What a URL of `http://<address>/<path>` answers.
async fn get(url: &str) -> String {
    let (address, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap_or_else(|error| panic!("{url}: {error}"));
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

/// Types what the demo prints at its end: each address answers.
async fn look_around(said: &str) {
    let (_, shown) = said.split_once(KEEPS).unwrap();
    let of = |what: &str| shown.lines().find_map(|line| line.strip_prefix(what)).map(str::trim).map(str::to_owned);
    let words = of("The flow ").unwrap_or_else(|| panic!("no command that shows the flow: {shown}"));
    let mut words = words.split_whitespace();
    assert_eq!(words.next(), Some("wallaby"), "{shown}");
    let mut command = Command::new(program("wallaby"));
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut watch = command.spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let running = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.starts_with("flow=shop phase=Running") {
                return;
            }
        }
        panic!("the printed command shows no running flow: {shown}");
    };
    tokio::time::timeout(PATIENCE, running).await.expect("the printed command shows the flow");
    let urls: Vec<(&str, &str)> =
        shown.lines().filter_map(|line| line.strip_prefix("Metrics ")?.trim().split_once(' ')).collect();
    assert_eq!(urls.len(), 2, "the controller, and the worker that was not killed: {shown}");
    for (url, whose) in urls {
        let metric = if whose == "(controller)" { "wallaby_controller_flows 1" } else { "wallaby_tasks 2" };
        eventually(PATIENCE, &format!("{url} {whose} says {metric}"), async || {
            let answer = get(url).await;
            if answer.starts_with("HTTP/1.1 200") && answer.contains(metric) { Ok(()) } else { Err(answer) }
        })
        .await;
    }
    for (what, database) in [("The shop ", "shop"), ("The warehouse ", "warehouse")] {
        let shown = of(what).unwrap();
        let dsn = shown.strip_prefix("psql '").and_then(|dsn| dsn.strip_suffix('\'')).unwrap();
        let row = connect(dsn).await.unwrap().query_one("SELECT current_database()::text", &[]).await.unwrap();
        assert_eq!(row.get::<_, String>(0), database);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_kills_a_worker_ends_with_equal_tables_and_can_be_looked_at() {
    let _alone = alone().await;
    let mut demo = Demo::start(&[], &[("KEEP", "1")]);
    demo.says(KEEPS).await;
    let said = demo.says("/metrics (worker-").await;
    for part in ["The rows that were there are loaded", "kill -9 worker-", "took over", "EQUAL: "] {
        assert!(said.contains(part), "{part:?} is missing: {said}");
    }
    // The live table, as it is printed where there is no terminal: one line a second.
    let live: Vec<&str> = said.lines().filter(|line| line.contains(" s  shop ")).collect();
    for parts in [
        [" | shop.capture @ worker-", " STREAMING ", " rows/s, lag ", ", at "],
        [" | shop.apply.warehouse @ worker-", " STREAMING ", " rows/s, lag ", ", at "],
    ] {
        let is_shown = live.iter().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(is_shown, "no line of the table has {parts:?}: {live:#?}");
    }
    let owner = |line: &&str| Some(line.split_once(" | shop.capture @ ")?.1.split_once(' ')?.0.to_owned());
    let owners: BTreeSet<String> = live.iter().filter_map(owner).filter(|owner| owner != "nobody").collect();
    assert_eq!(owners.len(), 2, "the table shows the owner before the kill and the one after it: {live:#?}");
    let writes = |line: &&str| line.split_once(" s  shop ").is_some_and(|(_, rate)| !rate.starts_with("0 rows/s"));
    assert!(live.iter().any(writes), "no line says that the shop writes: {live:#?}");
    look_around(&said).await;
    demo.interrupt();
    let (code, said, folder) = demo.ends().await;
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(Demo::files(&folder), BTreeSet::from([".lock".to_owned()]), "what went well is not worth the disk");
}

/// A folder of programs: the real ones, of which the worker tells where the target is, and `wallaby` begins when it is let.
fn programs_that_wait(folder: &Path) -> PathBuf {
    let programs = folder.join("programs");
    std::fs::create_dir(&programs).unwrap();
    symlink(program("wallaby-controller"), programs.join("wallaby-controller")).unwrap();
    let place = programs.display();
    let worker =
        format!("printf %s \"$WAREHOUSE_DSN\" > {place}/dsn; exec {} \"$@\"", program("wallaby-worker").display());
    let cli = format!(
        "touch {place}/asked; while [ ! -e {place}/go ]; do sleep 0.02; done; exec {} \"$@\"",
        program("wallaby").display()
    );
    for (name, script) in [("wallaby-worker", worker), ("wallaby", cli)] {
        let path = programs.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    programs
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_demo_whose_tables_differ_says_so_and_leaves_everything_for_a_look() {
    let _alone = alone().await;
    let place = Folder::temporary("demo-programs").unwrap();
    let programs = programs_that_wait(place.path());
    let mut demo = Demo::start(&["--keep", "--programs", &programs.display().to_string()], &[]);
    demo.says("wallaby --server 127.0.0.1:").await;
    eventually(PATIENCE, "`wallaby verify` is about to begin", async || {
        if programs.join("asked").exists() { Ok(()) } else { Err(demo.said()) }
    })
    .await;
    let target = connect(&std::fs::read_to_string(programs.join("dsn")).unwrap()).await.unwrap();
    let sql = "DELETE FROM order_items WHERE ctid = (SELECT ctid FROM order_items LIMIT 1)";
    assert_eq!(target.execute(sql, &[]).await.unwrap(), 1);
    drop(target);
    std::fs::write(programs.join("go"), "").unwrap();

    demo.says(KEEPS).await;
    let said = demo.says("/metrics (worker-").await;
    assert!(said.contains("DIFFERENT: source and target are not equal"), "{said}");
    assert!(!said.contains("EQUAL: "), "{said}");
    let differs = |line: &str| line.split_whitespace().take(2).eq(["public.order_items", "different"]);
    assert!(said.lines().any(differs), "`wallaby verify` does not name the table: {said}");
    look_around(&said).await;
    demo.interrupt();
    let (code, said, folder) = demo.ends().await;
    assert_eq!(code, Some(3), "{said}");
    assert!(Demo::files(&folder).contains("controller.log"), "what differs is kept: {:?}", Demo::files(&folder));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_ends_the_demo_while_rows_flow() {
    let _alone = alone().await;
    let mut demo = Demo::start(&[], &[]);
    demo.says("The shop opens").await;
    demo.interrupt();
    let (code, said, _folder) = demo.ends().await;
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("Interrupted: ending everything."), "{said}");
}
