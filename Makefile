# WALlaby: what can be done with this checkout. `make` lists it.
SHELL := bash
.DEFAULT_GOAL := help

export WALLABY_CACHE ?= $(HOME)/.cache/wallaby
export CARGO_TARGET_DIR ?= $(WALLABY_CACHE)/target

.PHONY: help tools build test prove lint

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

tools: ## Install protoc, nats-server, etcd and PostgreSQL into the cache, once (2 minutes cold)
	@tools/install.sh protoc nats-server etcd postgres

build: tools ## Build everything
	cargo build --locked --workspace

test: tools ## Run all tests against real servers; prints the slowest ten and the totals
	@tools/test.sh

prove: tools ## Run the tests at full size too (those marked #[ignore]): takes long
	@tools/test.sh -- --include-ignored

lint: ## Check format, clippy, licences and dependencies, and the protocol for breaking changes
	@tools/lint.sh
