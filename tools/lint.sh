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
# What the image does not know is compared with nothing.
remedy="after a change that breaks nobody: (cd proto && $WALLABY_CACHE/bin/buf build -o image.binpb)"
[ -f proto/image.binpb ] || { echo "proto/image.binpb is missing; $remedy" >&2; exit 1; }
known=$("$WALLABY_CACHE/bin/buf" ls-files proto/image.binpb)
for file in $(cd proto/proto && find . -name '*.proto' -printf '%P\n'); do
  grep -qxF "$file" <<<"$known" || { echo "proto/image.binpb does not know $file; $remedy" >&2; exit 1; }
done
"$WALLABY_CACHE/bin/buf" breaking proto --against proto/image.binpb
