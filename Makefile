# WALlaby: what can be done with this checkout. `make` lists it.
SHELL := bash
.DEFAULT_GOAL := help

export WALLABY_CACHE ?= $(HOME)/.cache/wallaby
export CARGO_TARGET_DIR ?= $(WALLABY_CACHE)/target

.PHONY: help tools build demo test prove loadtest lint

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

tools: ## Install protoc, nats-server, etcd, PostgreSQL and versitygw into the cache, once (4 minutes cold)
	@tools/install.sh protoc nats-server etcd postgres versitygw

build: tools ## Build everything
	cargo build --locked --workspace

demo: ## Start everything here, kill a worker while rows flow, compare; KEEP=1 leaves it running
	@tools/install.sh protoc nats-server etcd postgres
	@cargo build --locked --workspace --bin wallaby --bin wallaby-controller --bin wallaby-worker --bin wallaby-demo
	@"$(CARGO_TARGET_DIR)/debug/wallaby-demo"

test: tools ## Run all tests against real servers; prints the slowest ten and the totals
	@tools/test.sh

prove: tools ## Run the tests at their full sizes, every fault several times, and what has a time bound in release mode. Takes long
	@WALLABY_PROVE=1 tools/test.sh
	@cargo build --locked --release --workspace --bin wallaby --bin wallaby-controller --bin wallaby-worker --bin wallaby-loadtest
	@"$(CARGO_TARGET_DIR)/release/wallaby-loadtest" add-table

loadtest: tools ## Measure on this machine, in release mode, and write a report (about twenty minutes, machine at rest)
	@cargo build --locked --release --workspace --bins
	@"$(CARGO_TARGET_DIR)/release/wallaby-loadtest" run

lint: ## Check format, clippy, licences and dependencies, and the protocol for breaking changes
	@tools/lint.sh
