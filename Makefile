# The front door: `make demo` runs Shoal on this machine, `make test` proves it. Both set up what they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# One target folder outside the clone: RocksDB's C++ takes a quarter of an hour, and a second clone should not pay it again.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/shoal/target
BIN := $(CARGO_TARGET_DIR)/release
SOURCE ?=
NODES ?= 4
JSON ?=

.PHONY: build demo test bench lint fuzz setup

setup:
	@scripts/setup

build: setup
	cargo build --release --workspace --locked
	@echo "$(BIN)"

demo: setup
	cargo build --release --package shoal --locked
	"$(BIN)/shoal" demo --nodes $(NODES) $(if $(SOURCE),--source "$(SOURCE)") $(if $(JSON),--json > "$(JSON)")

test: setup
	scripts/test

bench: setup
	scripts/bench $(if $(JSON),"$(JSON)")

lint: setup
	scripts/lint

fuzz: setup
	scripts/fuzz
