# Two commands matter: `make demo` and `make test`. Each installs what it lacks.
# Plain recipes: macOS has GNU make 3.81, without .ONESHELL.
.DEFAULT_GOAL := help
.PHONY: help setup elixir demo test test-slow test-dspy test-small test-optimizers test-install check dialyzer docs fuzz soak sim bench costs growth lock package format clean

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
HARNESS := elixir_harness
# The versions that are tested, and that `mix dspex.setup` installs, with their hashes.
PINS := $(HARNESS)/priv/python/requirements.txt
# Those that `--with litellm` and `--with optimizers` add to them.
EXTRAS := litellm optimizers
ALL_PINS := $(PINS) $(EXTRAS:%=$(HARNESS)/priv/python/%.txt)
# The uv that installs them.
UV_PIN := $(HARNESS)/priv/python/uv.txt
# The tests and the demo of the harness run the peer with this interpreter.
export DSPY_BRIDGE_PYTHON := $(CURDIR)/$(PY)
# Without bytecode in $(VENV) each of hundreds of peers would compile DSPy again.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.installed elixir ## make .venv with the package and its tools; install Elixir through apt if it is missing

# Made anew when the dependencies change.
$(VENV)/.installed: pyproject.toml $(ALL_PINS) $(UV_PIN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; install it, or name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed; install python3-venv (Debian, Ubuntu) and try again"; rm -rf $(VENV); exit 1; }
	@# uv installs all of it in the time that pip takes to look for it.
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r $(UV_PIN)
	$(VENV)/bin/uv pip install --quiet --python $(PY) $(addprefix -c ,$(ALL_PINS)) -e '.[dev]'
	@touch $@

elixir:
	@if command -v mix > /dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "installing Elixir with apt-get" && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends elixir erlang-dev > /dev/null; \
	else \
	  echo "Elixir is missing; install 1.18 or newer: sudo apt-get install elixir erlang-dev, or brew install elixir"; \
	  exit 1; \
	fi
	@elixir -e 'System.version() |> Version.match?(">= 1.18.0") || System.halt(1)' || \
	  { echo "Elixir 1.18 or newer is needed, on OTP 26 or newer"; exit 1; }

demo: setup ## make one call through all layers, with the built-in LM or DSPY_BRIDGE_LM=openai/gpt-4o-mini
	@cd $(HARNESS) && mix run --no-start demo.exs

test: setup ## the fast tests of both sides, pytest and ExUnit
	@tests/both quick

test-slow: setup ## the slow tests of both sides: load, long recoveries, large frames
	@tests/both slow

test-dspy: $(VENV)/.installed ## the tests of LMs and programs with another DSPy: VERSION=3.4.1, or VERSION=pre for the newest pre-release
	@test -n "$(VERSION)" || { echo "name a version: make test-dspy VERSION=pre"; exit 1; }
	$(VENV)/bin/uv venv --quiet --allow-existing --python $(PY) $(VENV)/dspy-$(VERSION)
	@# The other pins hold for DSPy's releases; a pre-release may need what is newer. No hashes: that of DSPy is missing.
	@sed -e '/^dspy==/d' -e '/^ *--hash/d' -e 's/ *\\$$//' $(if $(filter pre,$(VERSION)),/dev/null,$(ALL_PINS)) \
	  > $(VENV)/dspy-$(VERSION)/pins.txt
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/dspy-$(VERSION)/bin/python -c $(VENV)/dspy-$(VERSION)/pins.txt \
	  --upgrade-package dspy -e '.[dev]' '$(if $(filter pre,$(VERSION)),dspy>=0a0,dspy==$(VERSION))'
	$(VENV)/dspy-$(VERSION)/bin/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal -m "not slow" \
	  $(addprefix tests/end_to_end/,lm programs optimizing streaming commands) $(addprefix tests/,lm programs optimizing signatures streaming commands runtime root)

# One of each: the commands, streams, what `meta` has, tools, LMs.
SMALL = tests/end_to_end/commands/test_commands.py tests/end_to_end/streaming tests/end_to_end/programs/test_tools.py \
  tests/end_to_end/lm/metering/test_meta.py tests/end_to_end/lm/test_lm.py tests/end_to_end/lm/test_small_install.py

test-small: setup ## tests of what users call, with what `mix dspex.setup` installs: without LiteLLM
	$(VENV)/bin/uv venv --quiet --allow-existing --python $(PY) $(VENV)/small
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/small/bin/python --no-deps --require-hashes -r $(PINS)
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/small/bin/python hypothesis packaging pytest pytest-timeout pytest-xdist
	$(VENV)/small/bin/python -m pytest -q -n logical --dist worksteal -m "not slow" -k "not litellm" $(SMALL)

test-optimizers: setup ## the tests of optimizations with every optimizer, in 3 minutes; `make test` takes two of them
	EVERY_OPTIMIZER=1 $(PY) -m pytest -q -n logical --dist worksteal tests/end_to_end/optimizing tests/optimizing/test_costs.py

test-install: setup ## install the packages into a new Mix application, and test it
	$(PY) -m pytest -q tests/install

check: setup dialyzer ## linters, formats, types, import rules, warnings, dialyzer, lines of code
	$(PY) tests/project/sizes.py
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@if test -x $(VENV)/bin/lint-imports; then $(VENV)/bin/lint-imports --no-logo --no-cache; \
	else echo "not checked: the imports between folders; import-linter needs Python 3.11"; fi
	cd $(HARNESS) && mix format --check-formatted && MIX_ENV=test mix compile --warnings-as-errors
	@# No module imports one that imports it, by whatever way.
	cd $(HARNESS) && MIX_ENV=test mix xref graph --format cycles --fail-above 0
	@# No module imports one of a layer above it.
	@cd $(HARNESS) && MIX_ENV=test mix xref graph --format plain | ../$(PY) ../tests/project/layers.py
	@# What OTP 28 refuses to compile shows on older ones too.
	cd $(HARNESS) && mix test test/attribute_regexes_test.exs

# What dialyzer knows of OTP and Elixir serves all checkouts, as with dialyxir.
PLT = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dspy_bridge/$(shell elixir -e \
  'IO.write(Enum.join([System.version(), System.otp_release(), :erlang.system_info(:version)], "-"))').plt
ELIXIR_LIB = $$(elixir -e 'IO.write(Path.expand(Path.dirname(:code.lib_dir(:elixir))))')

dialyzer: setup ## check the harness's types; the first run takes some 40 s longer
	@command -v dialyzer > /dev/null || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends erlang-dialyzer > /dev/null; } || \
	  { echo "dialyzer is missing; it is part of OTP: sudo apt-get install erlang-dialyzer"; exit 1; }
	cd $(HARNESS) && MIX_ENV=dev mix compile --warnings-as-errors
	@# Its status is 2 for functions that OTP itself does not know.
	@plt=$(PLT); test -f $$plt || { lib=$(ELIXIR_LIB); mkdir -p $$(dirname $$plt); \
	  ERL_LIBS=$$lib dialyzer --build_plt --output_plt $$plt.$$$$ --apps erts kernel stdlib crypto \
	  -r $$lib/elixir/ebin $$lib/logger/ebin $$lib/mix/ebin > /dev/null; mv $$plt.$$$$ $$plt; }
	ERL_LIBS=$(ELIXIR_LIB) dialyzer --quiet -Wno_unknown --plt $(PLT) -r $(HARNESS)/_build/dev/lib/dspex/ebin

# Debian's ex_doc is next to Elixir's own libraries; Mix finds any other.
MIX_DOCS = ERL_LIBS=$(ELIXIR_LIB) mix

docs: setup ## write the guides and modules as HTML into elixir_harness/doc; its diagrams need a network
	@cd $(HARNESS) && { $(MIX_DOCS) help docs > /dev/null 2>&1 || { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends elixir-ex-doc > /dev/null; } || \
	  { echo "ex_doc is missing; it is a package of Debian: sudo apt-get install elixir-ex-doc"; exit 1; }; }
	@# Of a reference that leads nowhere it only warns.
	cd $(HARNESS) && mkdir -p _build && MIX_ENV=dev $(MIX_DOCS) docs > _build/docs.log 2>&1 || { cat _build/docs.log; exit 1; }
	@! grep -q 'warning:' $(HARNESS)/_build/docs.log || { cat $(HARNESS)/_build/docs.log; exit 1; }
	@echo "$(HARNESS)/doc/index.html"

fuzz: setup ## send 100,000 mutated frames (FUZZ_FRAMES=)
	$(PY) tests/support/fuzz.py $(FUZZ_FRAMES)

soak: setup ## 10 minutes (SOAK_MINUTES=) of calls with random kills; fails if a call is lost, memory grows or a process is left
	cd $(HARNESS) && mix run --no-start ../tests/soak/soak.exs

sim: setup ## simulate clusters of 3 to 200 nodes (SIM_SEEDS=200), for the table of docs/cluster.md; some 5 minutes
	cd $(HARNESS) && MIX_ENV=test mix run --no-start ../tests/sim/sim.exs

bench: setup ## measure the table of docs/performance.md, in 3 minutes; ROW=agent,tokens measures some rows alone
	@# Not with pip, which demands hashes for all if a constraint has one.
	$(VENV)/bin/uv pip install --quiet --python $(PY) $(addprefix -c ,$(ALL_PINS)) -e '.[bench]'
	@erl -noshell -eval 'halt(case code:which(httpc) of non_existing -> 1; _ -> 0 end).' || \
	  { echo "OTP's inets is missing, for the HTTP sidecar: sudo apt-get install erlang-inets"; exit 1; }
	$(PY) tests/bench/run.py

costs: setup ## measure what each optimizer costs, for the table of docs/optimizing.md, in 15 minutes
	$(PY) tests/optimizing/costs.py

growth: setup ## measure what runs and tokens cost as there are more of them, and memory after a million calls, in 10 minutes
	$(VENV)/bin/uv pip install --quiet --python $(PY) $(addprefix -c ,$(ALL_PINS)) -e '.[bench]'
	$(PY) tests/bench/growth.py

# For other files of the same versions, such as wheels that were added later: make lock UPGRADE=
UPGRADE := --upgrade
LOCK = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes $(UPGRADE) --no-header --no-annotate
# To what $(PINS) has.
ADDED = -c $(PINS) $$(sed -n 's/^\([^ =]*\)==.*/--no-emit-package \1/p' $(PINS) | sort -u)

lock: setup ## pin the newest versions that fit pyproject.toml, with their hashes; UPGRADE= for the hashes alone
	@# DSPy 3.4 requires both, but only the extra `litellm` has them.
	printf '%s\n' litellm openai > $(VENV)/left-out.txt
	$(LOCK) pyproject.toml --excludes $(VENV)/left-out.txt -o $(PINS)
	$(LOCK) pyproject.toml --extra litellm $(ADDED) -o $(word 2,$(ALL_PINS))
	$(LOCK) pyproject.toml --extra optimizers --excludes $(VENV)/left-out.txt $(ADDED) -c $(word 2,$(ALL_PINS)) -o $(word 3,$(ALL_PINS))
	echo uv | $(LOCK) - -o $(UV_PIN)

package: setup ## build the wheel, the sdist and, with Hex, the Hex package into dist/
	rm -rf dist
	$(PY) -m build --quiet --installer uv
	cd $(HARNESS) && MIX_ENV=dev mix compile
	@cd $(HARNESS) && if mix help hex.build > /dev/null 2>&1; then mix hex.build --output ../dist/dspex.tar; \
	else echo "no Hex here: dist/ has the Python packages alone"; fi

format: setup ## format Python and Elixir code
	$(PY) -m ruff format .
	cd $(HARNESS) && mix format

clean: ## delete build output and .venv
	rm -rf $(VENV) dist $(HARNESS)/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
