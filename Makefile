.DEFAULT_GOAL := help
.PHONY: help setup models ucx demo simulate mutants soak test test-fast check peers power-off bench-handover clean

VENV ?= $(if $(LMKV_VENV),$(LMKV_VENV),.venv)
BIN := $(VENV)/bin
export LMKV_VENV := $(VENV)

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

setup: ## make .venv (LMKV_SETUP=gpu for CUDA); a second run takes no time
	@scripts/setup.sh

models: setup ## the models of the demo and the tests
	@$(BIN)/python scripts/fetch_model.py all

ucx: setup ## a second environment for the tests of ucx://, which cannot share one with NIXL
	@scripts/setup_ucx.sh || echo 'tests of ucx:// are skipped'

demo: ## a handover between two engines, then a third that loads the KV from the pool
	@scripts/demo.sh $(ARGS)

test: models ucx ## all tests; those marked e2e start engines
	$(BIN)/python -m pytest $(ARGS)

test-fast: setup ## the tests that start no engine and compile no CUDA
	$(BIN)/python -m pytest -m "not e2e and not nvcc" $(ARGS)

simulate: setup ## worlds of simulated engines, every byte checked (ARGS="--worlds N --seed S --out F")
	$(BIN)/python -m tests.simulation $(ARGS)

mutants: setup ## bugs put back, each of which simulated worlds have to catch (ARGS="--only NAME --out F")
	$(BIN)/python -m tests.simulation.mutants $(ARGS)

check: setup ## linters, types, import floors, spelling
	@scripts/check.sh

peers: setup ## 5,000 peers that come and vanish: what engine, node, controller and router keep of them
	$(BIN)/python -m tests.scale.peers $(ARGS)

soak: models ## bursts of requests to real engines, each answer compared with plain vLLM's (ARGS="--model smollm2 --requests 200")
	@$(BIN)/python scripts/soak.py $(ARGS)

power-off: models ## a prefill host loses power in mid-push: the other pairs keep 0.9 of their goodput (root)
	LMKV_GOODPUT=0.9 $(BIN)/python -m pytest -s tests/e2e/test_power_off.py

bench-handover: models ## what a handover costs, beside vLLM's own connector
	$(BIN)/python scripts/bench_handover.py $(ARGS)

clean: ## remove caches, logs and models; .venv stays
	rm -rf .run models build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
