# Every target sets up .venv first and skips what is there. Set-up uses the package index; nothing after it uses a network.

BIN := .venv/bin
SETUP := .venv/.complete
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test golden soak fuzz bench lint clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

# Large arrays stay in the heap, on huge pages: a training step on a CPU spends a third of its time less on page faults.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000:glibc.malloc.top_pad=268435456
demo: $(SETUP) ## the almanac: from nothing to a trained, gated, evaluated and exported ExpertRAG (6 to 20 minutes, by machine)
	$(BIN)/expertrag demo --gin_file=runs/almanac.gin

test: $(SETUP) ## unit and end-to-end tests (EXPERTRAG_DATA=folder adds those on real text; WORKERS=1 for less memory)
	$(PYTEST) tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

golden: $(SETUP) ## rewrite the golden files that tests compare with
	JAX_PLATFORMS=cpu $(BIN)/python tests/golden_shardings.py

soak: $(SETUP) ## kill a training run 30 times and compare its end with an uninterrupted one (3 minutes; ARGS="--experts --processes 2": up to 25)
	JAX_PLATFORMS=cpu $(BIN)/python tests/soak/soak.py $(ARGS)

fuzz: $(SETUP) ## damage what the commands read, 1,000 times, and check how they respond (40 minutes; ARGS="--cases 100 --seed 3")
	JAX_PLATFORMS=cpu $(BIN)/python tests/fuzz/fuzz.py $(ARGS)

bench: $(SETUP) ## step time, memory and scaling of models and MoE layers; tables here, rows in runs/bench/*.json (20 minutes)
	mkdir -p runs/bench
	for name in moe train_step accumulation scaling rag; do \
	  JAX_PLATFORMS=cpu $(BIN)/python benchmarks/$$name.py --json runs/bench/$$name.json || exit 1; done

lint: $(SETUP) ## ruff
	$(BIN)/ruff check .

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(SETUP): setup.py constraints.txt .ci/setup
	@.ci/setup
	@touch $@
