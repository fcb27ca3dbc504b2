#!/usr/bin/env bash
# Builds and runs the tests, cheapest layer first; prints the slowest ten and the totals.
#
#   tools/test.sh [cargo options, such as -p wallaby-model] [-- options of the test binaries, such as a filter or --include-ignored]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export WALLABY_CACHE=${WALLABY_CACHE:-$HOME/.cache/wallaby}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$WALLABY_CACHE/target}
command -v node >/dev/null 2>&1 || { echo "tools/test.sh: node is needed and is not on the PATH. Install Node.js 20 or newer." >&2; exit 1; }
exec node tools/run-tests.mjs "$@"
