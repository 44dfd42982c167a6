# Entry points for people and for CI. `make` alone lists them; .ci/run calls `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CARGO ?= cargo
ARGS ?=
# Everything is built and tested with AWS, but for `make run`, whose first build is to be short.
FEATURES := --features aws,postgres
# How long each fuzz target runs under `make fuzz`, in seconds.
SECONDS_EACH ?= 60
# How many random schedules each model runs under `make test-race`.
SCHEDULES ?= 50000
# How long `make soak` takes once it is built, in minutes.
SOAK_MINUTES ?= 5
# How many secrets `make canaries` plants.
CANARIES ?= 10000

# One line a target: "name: prerequisites ## minutes cold / warm | what it does", minutes on 2 cores.

.PHONY: help
help: ## 0 / 0 | this list
	@echo 'make TARGET; minutes on 2 cores: nothing built yet / all built'
	@awk -F '## ' '/^[a-z][a-z-]*:.*## / { split($$1, t, ":"); split($$2, d, " \\| "); \
	  printf "  %-18s %9s   %s\n", t[1], d[1], d[2] }' $(firstword $(MAKEFILE_LIST))
	@echo 'ARGS="…" is passed on by run, test-unit, test-integration, test-api, kryoptic, bench, soak, canaries and faults.'

## Building

.PHONY: build-local
build-local: ## 7 / 1 | debug build
	$(CARGO) build $(FEATURES)

.PHONY: build
build: ## 8 / 1 | release build, for trying it out: target/release/polykey (make dist makes what is fast)
	$(CARGO) build --release $(FEATURES)

.PHONY: dist
dist: ## 15 / 4 | what packages ship: link-time optimised, target/dist/polykey
	$(CARGO) build --profile dist $(FEATURES)

.PHONY: run
run: ## 8 / 0 | a node for a laptop, everything in ./.polykey (ARGS="--listen …")
	$(CARGO) run --release -- dev $(ARGS)

## Testing

.PHONY: deps
deps: ## 1 / 0 | sets up what the tests need, or lists what is missing
	@.ci/deps

.PHONY: lint
lint: ## 4 / 1 | formatting, and clippy with warnings denied
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked $(FEATURES) -- -D warnings

.PHONY: test
test: deps lint ## 30 / 10 | everything CI runs: lint and all tests
	@.ci/test --workspace --locked $(FEATURES)

.PHONY: test-unit
test-unit: ## 8 / 2 | the tests inside the crates, no binary needed
	@.ci/test --workspace --lib $(FEATURES) $(ARGS)

.PHONY: test-integration
test-integration: deps ## 12 / 5 | the tests around the crates and the binary
	@.ci/test --workspace --test '*' $(FEATURES) $(ARGS)

.PHONY: test-api
test-api: deps ## 10 / 2 | the public contract: protos, API reference, network layer
	@.ci/test -p polykey-proto $(ARGS)
	@.ci/test --test net --test project $(FEATURES) $(ARGS)

.PHONY: test-race
test-race: ## 8 / 1 | random schedules over caches and epochs (SCHEDULES=50000)
	POLYKEY_SCHEDULES=$(SCHEDULES) .ci/test --test race $(FEATURES)

.PHONY: faults
faults: ## 38 / 25 | HSM faults, power cuts, kills, disk errors, tampering, revocation under load, replication, at release size
	@.ci/test -p polykey-storage --release --test power_cuts --test faults --test concurrency -- --nocapture $(ARGS)
	@POLYKEY_FAULTS=full .ci/test -p polykey-hsm --release --test pkcs11_faults -- --nocapture $(ARGS)
	@POLYKEY_FAULTS=full .ci/test -p polykey --release --test faults -- --nocapture --test-threads 1 $(ARGS)
	@POLYKEY_FAULTS=full .ci/test -p polykey --release $(FEATURES) --test api replication:: -- --nocapture --test-threads 1 $(ARGS)

.PHONY: soak
soak: deps ## 18 / 6 | two nodes under load with a fault every 20 s, for SOAK_MINUTES=5: flat, explained, nothing lost
	@POLYKEY_FAULTS=full SOAK_MINUTES=$(SOAK_MINUTES) .ci/test -p polykey --release $(FEATURES) --test faults soak:: -- --nocapture $(ARGS)

.PHONY: canaries
canaries: deps ## 18 / 4 | CANARIES=10000 secrets through every call at TRACE level, and a search for them in all that is left
	@POLYKEY_CANARIES=$(CANARIES) .ci/test -p polykey --release $(FEATURES) --test api canary:: -- --nocapture $(ARGS)

.PHONY: kryoptic
kryoptic: ## 6 / 2 | the PKCS#11 tests over a second token, Kryoptic, which it builds (needs libclang)
	@module=$$(.ci/kryoptic) && export POLYKEY_KRYOPTIC=$$module && \
	  .ci/test -p polykey-hsm --test pkcs11 --test pkcs11_keys $(ARGS) && \
	  .ci/test -p polykey --test api $(FEATURES) rsa_key_decrypts

.PHONY: bench
bench: ## 16 / 5 | benchmarks on the dist profile, ratios within one run
	$(CARGO) bench --profile dist $(FEATURES) --bench polykey -- $(ARGS)

.PHONY: fuzz-replay
fuzz-replay: ## 8 / 1 | the fuzz corpora and mutations of them, as plain tests
	@.ci/test --test fuzz_replay $(FEATURES)

.PHONY: fuzz
fuzz: ## 15 / 10 | each fuzz target for SECONDS_EACH=60 (needs cargo-fuzz)
	@$(CARGO) fuzz --version >/dev/null 2>&1 || { echo 'cargo-fuzz is missing: cargo install cargo-fuzz (make fuzz-replay needs nothing)' >&2; exit 1; }
	@set -e; cd tests/fuzz; for target in $$(ls targets | sed 's/\.rs$$//'); do \
	  echo "== $$target"; RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --fuzz-dir . $$target -- -max_total_time=$(SECONDS_EACH) -max_len=65536; done

.PHONY: deny
deny: ## 1 / 0 | licences, sources and bans of dependencies (needs cargo-deny)
	@$(CARGO) deny --version >/dev/null 2>&1 || { echo 'cargo-deny is missing: cargo install cargo-deny' >&2; exit 1; }
	$(CARGO) deny check bans licenses sources

## Packaging

COMPOSE := packaging/compose.dev.yaml
.PHONY: compose-dev
compose-dev: ## 20 / 1 | a node in a container, with docker compose; without it, says what would run
	@if docker compose version >/dev/null 2>&1; then docker compose -f $(COMPOSE) up --build; \
	else echo 'docker compose is not here; this is what would run:'; \
	  echo '  docker compose -f $(COMPOSE) up --build'; \
	  $(MAKE) --no-print-directory deps build-local && .venv/bin/python tests/python/packaging_check.py; fi

# Packages are made here.
OUT := target/packages
.PHONY: sbom
sbom: ## 1 / 0 | what the binary is made of (CycloneDX), and the notices of others, in target/packages
	@mkdir -p $(OUT)
	@packaging/sbom --notices $(OUT)/THIRD-PARTY $(OUT)/sbom.cdx.json

.PHONY: deb
deb: dist sbom ## 16 / 5 | the Debian package of the dist build, in target/packages
	@packaging/build-deb --doc $(OUT)/sbom.cdx.json --doc $(OUT)/THIRD-PARTY target/dist/polykey $(OUT)

.PHONY: reproducible
reproducible: ## 30 / 30 | builds the last commit twice, compares, and prints the SHA-256 of what is released
	@packaging/reproducible $(OUT)

.PHONY: clean
clean: ## 0 / 0 | removes builds and the virtual environment, never a node's data
	$(CARGO) clean
	rm -rf .venv tests/fuzz/target
