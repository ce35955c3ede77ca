# The front door: `make demo` runs Shoal on this machine, `make test` proves it. Both set up what they need.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# One target folder outside the clone, and RocksDB's C++ compiled once beside it: a second clone does not pay again.
export SHOAL_CACHE ?= $(HOME)/.cache/shoal
export CARGO_TARGET_DIR ?= $(SHOAL_CACHE)/target
BIN := $(CARGO_TARGET_DIR)/release
SOURCE ?=
NODES ?= 4
JSON ?=
SCENARIO ?= simulations/scenarios/cluster-small.toml

.PHONY: build calibrate demo test bench bench-alone bench-build bench-check bench-cold-start bench-convert bench-many-files bench-mount bench-waiting cluster lint fuzz oracle setup interop

setup:
	@scripts/setup

build: setup
	scripts/cargo build --release --workspace --locked
	@echo "$(BIN)"

demo: setup
	scripts/cargo build --release --workspace --locked
	"$(BIN)/shoal" demo --nodes $(NODES) $(if $(SOURCE),--source "$(SOURCE)") $(if $(JSON),--json > "$(JSON)")

test: setup
	scripts/test

bench: setup
	scripts/bench $(if $(JSON),"$(JSON)")

# Takes minutes the first time: the other implementation is compiled in a workspace of its own.
bench-build:
	scripts/bench-build "$(or $(SOURCE),/usr/lib)" $(if $(JSON),"$(JSON)")

# Makes an image of half a gigabyte the first time, which takes minutes.
bench-cold-start:
	SHOAL_SETUP=test scripts/setup
	scripts/cargo build --release --workspace --locked
	"$(BIN)/shoal-cold-start" "$$(scripts/cold-start-image)" $(if $(JSON),--json "$(JSON)")

# The same image, unless SOURCE says another: what `shoal image copy` takes.
bench-convert:
	SHOAL_SETUP=test scripts/setup
	scripts/cargo build --release --workspace --locked
	source="$(SOURCE)"; "$(BIN)/shoal-conversion" "$${source:-oci:$$(scripts/cold-start-image):1}" $(if $(JSON),--json "$(JSON)")

bench-check: setup
	scripts/cargo build --release --workspace --locked
	"$(BIN)/shoal-image-check" $(MIB) $(if $(SOURCE),--source "$(SOURCE)") $(if $(JSON),--json "$(JSON)")

# With PEER=1 the other implementation is compiled first, which takes minutes, and measured as well; as it is once it is there.
bench-mount:
	SHOAL_SETUP=bench scripts/setup
	scripts/cargo build --release --workspace --locked
	peer="$$(PEER_DAEMON="$(PEER_DAEMON)" PEER="$(PEER)" scripts/peer-daemon)"; \
	    env -u PEER_DAEMON "$(BIN)/shoal-mounts" $(if $(SOURCE),"$(SOURCE)") $${peer:+--peer "$$peer"} $(if $(JSON),--json "$(JSON)")

bench-alone:
	SHOAL_SETUP=test scripts/setup
	scripts/cargo build --release --workspace --locked
	"$(BIN)/shoal-alone" $(if $(JSON),--json "$(JSON)")

bench-waiting: setup
	scripts/cargo build --release --workspace --locked
	"$(BIN)/shoal-waiting" $(if $(JSON),--json "$(JSON)")

bench-many-files: setup
	scripts/cargo build --release --workspace --locked
	"$(BIN)/shoal-many-files" $(if $(FILES),"$(FILES)") $(if $(JSON),--json "$(JSON)")

oracle:
	scripts/oracle

# Compiles BuildKit the first time, which takes minutes.
interop:
	SHOAL_SETUP=test scripts/setup
	scripts/cargo build --release --workspace --locked
	scripts/interop "$(BIN)"

# Forty seconds and more for each of twelve runs; on a machine that does nothing else.
calibrate: setup
	scripts/cargo build --release --workspace --locked
	"$(BIN)/shoal-calibrate" simulations/scenarios/calibrate-*.toml $(if $(JSON),--json "$(JSON)")

cluster: setup
	scripts/cargo build --release --workspace --locked
	"$(BIN)/shoal-cluster" "$(SCENARIO)" $(if $(JSON),--json "$(JSON)")

lint: setup
	scripts/lint

fuzz: setup
	scripts/fuzz
