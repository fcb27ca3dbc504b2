//! The demo of the README, as `make demo` runs it, with less to watch.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;
use wallaby_stack::Folder;
use wallaby_tests::programs::program;
use wallaby_tests::{PATIENCE, alone};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_kills_a_worker_and_ends_with_equal_tables() {
    let _alone = alone().await;
    let folder = Folder::temporary("demo").unwrap();
    let flow = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/shop/flow.yaml");
    let mut command = Command::new(program("wallaby-demo"));
    command.arg("--folder").arg(folder.path().join("demo")).arg("--flow").arg(flow);
    command.args(["--seconds", "1", "--rows-per-second", "500"]).env_remove("KEEP");
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(2 * PATIENCE, command.output()).await.expect("the demo ends").unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for part in ["The rows that were there are loaded", "kill -9 worker-", "took over", "EQUAL: "] {
        assert!(said.contains(part), "{part:?} is missing: {said}");
    }
}
