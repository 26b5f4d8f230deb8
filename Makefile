# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own virtual environment first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow check forgeries bench bench-anon bench-hospitals bench-secagg bench-audit bench-dp bench-accuracy bench-round bench-place bench-proposal bench-mnist bench-simulate wheel clean

demo: $(STAMP)
	$(BIN)/fedveil demo

test: $(STAMP)
	$(BIN)/pytest -q -m "not slow and not gpu and not bench" -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/pytest -q -m "slow and not gpu and not bench"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

.PHONY: docs docs-look

# The documents as a site in build/site; its pages open as files. First the pages that say what the code says.
docs: $(STAMP)
	$(BIN)/python docs/site/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Opens every page of the site in a headless Chromium, and searches; fails on what the browser complains about.
docs-look: docs
	$(BIN)/python tests/docs/open_site.py

# What can be forged of a report and which check finds it: docs/forgeries.md.
forgeries: $(STAMP)
	$(BIN)/python tests/hostile/forgery_table.py

bench: $(STAMP)
	$(BIN)/pytest -q -m bench tests/bench -s

bench-anon: $(STAMP)
	$(BIN)/python tests/bench/anon_table.py

bench-secagg: $(STAMP)
	$(BIN)/python tests/bench/secagg_table.py

bench-audit: $(STAMP)
	$(BIN)/python tests/bench/audit_table.py

bench-dp: $(STAMP)
	$(BIN)/python tests/bench/dp_table.py

bench-accuracy: $(STAMP)
	$(BIN)/python tests/bench/accuracy_table.py

bench-place: $(STAMP)
	$(BIN)/python tests/bench/place_table.py

# PFL_PYTHON and FLOWER_PYTHON may name interpreters with pfl-research, and with flwr[simulation], for two more columns.
bench-simulate: $(STAMP)
	$(BIN)/python tests/bench/simulate_table.py

# PFL_PYTHON may name an interpreter with pfl-research, for one more column. The images: FEDVEIL_DATA or ../shared/data.
bench-mnist: $(STAMP)
	$(BIN)/python tests/bench/mnist_table.py

bench-proposal: $(STAMP)
	$(BIN)/python tests/bench/proposal_table.py

bench-round: $(STAMP)
	$(BIN)/python tests/bench/round_table.py

.PHONY: test-hostile fuzz bench-transport

# Everything that a hostile site, server or stranger may try, the minute of malformed frames and a stranger's Flower bundle included.
test-hostile: $(STAMP)
	$(BIN)/pytest -q -m "not gpu and not bench" tests/hostile tests/client/test_hostile_server.py tests/client/test_what_leaves.py tests/server/test_strategy_hostile_sites.py tests/deploy/transport/test_grpc_hostile.py tests/deploy/transport/test_grpc_entry.py tests/client/test_revoked_peers.py tests/deploy/superlink

# Five minutes of coverage-guided fuzzing of everything that parses a peer's bytes.
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/fuzzer.py 300

bench-transport: $(STAMP)
	$(BIN)/python tests/bench/transport_table.py

bench-hospitals: $(STAMP)
	$(BIN)/python tests/bench/hospitals_table.py

.PHONY: test-deep wheelhouse

# Property tests with random examples, EXAMPLES times as many as in the default suite, whose examples never change.
EXAMPLES ?= 20
test-deep: $(STAMP)
	FEDVEIL_EXAMPLES=$(EXAMPLES) $(BIN)/pytest -q -m "not slow and not gpu and not bench" -n 2 --timeout 3600 $$(grep -rl hypothesis tests --include='test_*.py')

# Everything that an air-gapped machine needs, as wheels with checksums in build/wheelhouse. Make it on a machine with the
# same system and Python; EXTRAS=server for a coordinator. There: WHEELHOUSE=$$PWD/wheelhouse sh deploy/packaging/install.sh
# cpu, or: pip install --no-index --find-links wheelhouse 'fedveil[client,sql]'. For torch without CUDA say
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu here.
EXTRAS ?= client,sql
wheelhouse: $(STAMP)
	rm -rf build/wheelhouse
	$(BIN)/pip wheel -q --disable-pip-version-check -c constraints.txt -w build/wheelhouse '.[$(EXTRAS)]'
	cd build/wheelhouse && sha256sum *.whl > SHA256SUMS
	@echo "$$(ls build/wheelhouse/*.whl | wc -l) wheels in build/wheelhouse"

wheel: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)
