// Runs all test binaries of the workspace, one after the other, and measures each test.
//
// Stable libtest tells no times. Its JSON output does, behind a switch that it reads from the environment of the test binary; the
// compiler itself stays as it is. A test that prints a line `skipped: <why>` counts as skipped, and so does an ignored one.
import { spawn } from "node:child_process";
import { dirname, relative } from "node:path";
import { createInterface } from "node:readline";

const SLOWEST = 10;
/** A binary that takes longer than this is killed and counts as failed, in seconds. */
const TIMEOUT_S = Number(process.env.WALLABY_TEST_TIMEOUT_S ?? (process.env.WALLABY_PROVE ? 10800 : 1800));
/** At full size, a test that took at least this many seconds is told of when it ends, with what it printed: takeover times, memory, rates. */
const TELL_S = process.env.WALLABY_PROVE ? 5 : Infinity;

/** A line of a program's log, with or without colours. */
const LOGGED = /^(\x1b\[\d+m)?\d{4}-\d\d-\d\dT/;

const separator = process.argv.indexOf("--");
const cargoOptions = process.argv.slice(2, separator < 0 ? undefined : separator);
const testOptions = separator < 0 ? [] : process.argv.slice(separator + 1);
const scope = cargoOptions.some((option) => /^(-p|--package)/.test(option)) ? [] : ["--workspace"];

const totals = { passed: 0, failed: 0, skipped: 0 };
const times = [];
const failures = [];
const skips = [];

/** Runs a program, hands over each line of its output, and resolves to how it ended. */
function run(program, args, options, onLine) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { stdio: ["ignore", "pipe", "inherit"], ...options });
    const timer = setTimeout(() => child.kill("SIGKILL"), TIMEOUT_S * 1000);
    createInterface({ input: child.stdout }).on("line", onLine);
    child.on("error", reject);
    child.on("close", (code, signal) => {
      clearTimeout(timer);
      resolve({ code, signal });
    });
  });
}

const parse = (line) => {
  try {
    return JSON.parse(line);
  } catch {
    return null;
  }
};
const seconds = (since) => `${((Date.now() - since) / 1000).toFixed(1)} s`;

/** The order of the workspace's members is the order of the layers. */
async function memberOrder() {
  let text = "";
  await run("cargo", ["metadata", "--no-deps", "--format-version", "1"], {}, (line) => (text += line));
  return JSON.parse(text).workspace_members;
}

async function build() {
  const started = Date.now();
  const binaries = [];
  const args = ["test", "--locked", "--no-run", "--message-format=json-render-diagnostics", ...scope, ...cargoOptions];
  const { code } = await run("cargo", args, {}, (line) => {
    const message = parse(line);
    if (message?.reason === "compiler-artifact" && message.profile.test && message.executable) binaries.push(message);
  });
  if (code !== 0) {
    console.log("the tests do not build: 0 passed, 1 failed, 0 skipped");
    process.exit(1);
  }
  // Whole-system tests start our programs; built here, they are as new as the tests.
  const programs = await run("cargo", ["build", "--locked", "--quiet", "--bins", ...scope], {}, (line) => console.log(line));
  if (programs.code !== 0) {
    console.log("the programs do not build: 0 passed, 1 failed, 0 skipped");
    process.exit(1);
  }
  console.log(`built ${binaries.length} test binaries and the programs in ${seconds(started)}`);
  const order = await memberOrder();
  const kinds = (binary) => (binary.target.kind.includes("test") ? 1 : 0);
  return binaries.sort((a, b) => order.indexOf(a.package_id) - order.indexOf(b.package_id) || kinds(a) - kinds(b));
}

function record(name, event) {
  const skip = event.stdout?.match(/^skipped: .*$/m);
  if (event.event === "ignored" || (event.event === "ok" && skip)) {
    totals.skipped++;
    skips.push(`${name}: ${skip ? skip[0] : `ignored${event.message ? `: ${event.message}` : ""}`}`);
  } else if (event.event === "ok") totals.passed++;
  else if (event.event === "failed" || event.event === "timeout") {
    totals.failed++;
    failures.push(name);
    console.log(`FAILED ${name}\n${event.stdout ?? event.message ?? ""}`);
  }
  if (event.event === "ok" && event.exec_time >= TELL_S) {
    console.log(`${event.exec_time.toFixed(1).padStart(9)} s  ${name}`);
    const said = event.stdout?.split("\n").filter((line) => line && !LOGGED.test(line)) ?? [];
    for (const line of said) console.log(`             ${line}`);
  }
  if (event.exec_time !== undefined) times.push({ name, seconds: event.exec_time });
}

async function runBinary(binary) {
  const started = Date.now();
  const folder = dirname(binary.manifest_path);
  const label = `${relative(process.cwd(), folder)} ${binary.target.name}`;
  const before = { ...totals };
  const open = new Set();
  const options = {
    cwd: folder,
    env: { ...process.env, RUSTC_BOOTSTRAP: "1", CARGO_MANIFEST_DIR: folder, CARGO: "cargo" },
  };
  const args = ["-Zunstable-options", "--format=json", "--report-time", "--show-output", ...testOptions];
  const { code, signal } = await run(binary.executable, args, options, (line) => {
    const event = parse(line);
    if (event?.type !== "test") return;
    if (event.event === "started") open.add(event.name);
    else if (event.event !== "timeout") {
      open.delete(event.name);
      record(`${label} ${event.name}`, event);
    }
  });
  if (open.size > 0 || (code !== 0 && totals.failed === before.failed)) {
    totals.failed++;
    failures.push(label);
    const reason = signal ? `ended by ${signal}` : `exit code ${code}`;
    console.log(`FAILED ${label}: ${reason} while these ran: ${[...open].join(", ") || "none"}`);
  }
  const count = (key) => totals[key] - before[key];
  if (count("passed") + count("failed") + count("skipped") === 0) return;
  const verdict = count("failed") ? "FAILED" : "ok";
  console.log(`${verdict.padEnd(7)}${label}: ${count("passed")} passed, ${count("failed")} failed, ${count("skipped")} skipped, ${seconds(started)}`);
}

async function runDocs() {
  const started = Date.now();
  const before = { ...totals };
  const lines = [];
  const args = ["test", "--locked", "--doc", "--quiet", ...scope, ...cargoOptions];
  const { code } = await run("cargo", args, {}, (line) => {
    lines.push(line);
    const result = line.match(/^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored/);
    if (!result) return;
    totals.passed += Number(result[1]);
    totals.failed += Number(result[2]);
    totals.skipped += Number(result[3]);
  });
  if (code !== 0) {
    if (totals.failed === before.failed) totals.failed++;
    failures.push("documentation examples");
    console.log(lines.join("\n"));
  }
  const count = (key) => totals[key] - before[key];
  console.log(`${(code === 0 ? "ok" : "FAILED").padEnd(7)}documentation examples: ${count("passed")} passed, ${count("failed")} failed, ${count("skipped")} skipped, ${seconds(started)}`);
}

const started = Date.now();
for (const binary of await build()) await runBinary(binary);
// `--doc` goes with no other choice of targets.
const choosesTargets = cargoOptions.some((option) => /^--(test|lib|bin|example|bench)s?($|=)/.test(option));
if (testOptions.length === 0 && !choosesTargets) await runDocs();

times.sort((a, b) => b.seconds - a.seconds);
console.log(`\nslowest ${Math.min(SLOWEST, times.length)}:`);
for (const { name, seconds } of times.slice(0, SLOWEST)) console.log(`${seconds.toFixed(2).padStart(9)} s  ${name}`);
if (skips.length > 0) console.log(`\nskipped:\n  ${skips.join("\n  ")}`);
if (failures.length > 0) console.log(`\nfailed:\n  ${failures.join("\n  ")}`);
console.log(`\nall of it took ${seconds(started)}`);
console.log(`${totals.passed} passed, ${totals.failed} failed, ${totals.skipped} skipped`);
process.exit(totals.failed === 0 ? 0 : 1);
