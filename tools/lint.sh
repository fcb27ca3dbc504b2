#!/usr/bin/env bash
# Format, clippy, licences and dependencies, and the protocol's style and compatibility. Installs its own tools, once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export WALLABY_CACHE=${WALLABY_CACHE:-$HOME/.cache/wallaby}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$WALLABY_CACHE/target}

tools/install.sh protoc buf cargo-deny

step() { printf '== %s\n' "$*"; }

step "format"
cargo fmt --all --check

step "clippy"
cargo clippy --locked --workspace --all-targets --quiet -- -D warnings

step "licences, bans, sources"
"$WALLABY_CACHE/cargo/bin/cargo-deny" --locked --config deny.toml check --hide-inclusion-graph licenses bans sources

step "protocol"
"$WALLABY_CACHE/bin/buf" lint proto
if [ -f proto/image.binpb ]; then
  "$WALLABY_CACHE/bin/buf" breaking proto --against proto/image.binpb
else
  echo "no proto/image.binpb yet: nothing to compare the protocol with"
fi
