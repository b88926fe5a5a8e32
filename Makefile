SHELL := /bin/bash
OBJECTIVE ?= topd
ARGS ?=
KILLS ?= 100

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint bench bench-async chaos lock audit docker docker-demo clean

# Models and prompts come from this folder: nothing here asks a model hub.
demo test test-long bench chaos: export HF_HUB_OFFLINE := 1

help:
	@echo "make demo    train the embedded student on this machine and print the table (OBJECTIVE=topd|opd)"
	@echo "make test    lint, import contracts, types and tests"
	@echo "make test-long   the tests that make test has no time for"
	@echo "make lint    the same without the tests"
	@echo "make bench   measure against TRL, Liger and POT in about ten minutes; write bench/results/cpu.json"
	@echo "make bench-async   measure the asynchronous driver over engines that sleep; write bench/results/async.json"
	@echo "make chaos   kill workers and drivers of runs at random moments (KILLS=100); write runs/chaos/summary.json"
	@echo "make lock    remake requirements/cpu.txt, gpu.txt and bench.txt (UPGRADE=1: newest versions)"
	@echo "make audit   ask for known vulnerabilities of every package of the locks (needs pypi.org)"
	@echo "make docker  build the container image; make docker-demo runs the demo in it (docs/docker.md)"
	@echo "make clean   delete .venv, .venv-bench, build/ and caches; keeps runs/"
	@echo
	@echo "demo, test, lint and bench set .venv up first: PYTHON=path and DEVICE=cpu|gpu override what is found."
	@echo 'ARGS="..." goes on to the command: make demo ARGS="run.steps=10", make test ARGS="-k buffer", make bench ARGS=loss'

setup:
	@bash requirements/setup.sh

demo: setup
	.venv/bin/topd run jobs/demo.yaml run.name=demo-$(OBJECTIVE) objective.method=$(OBJECTIVE) $(ARGS)

test: setup
	@bash tests/run.sh lint tests $(ARGS)

test-long: setup
	@bash tests/run.sh lint tests -m long $(ARGS)

lint: setup
	@bash tests/run.sh lint

bench: setup
	@bash requirements/bench.sh
	.venv-bench/bin/python -m bench $(ARGS)

bench-async: setup
	.venv/bin/python -m bench.asynchronous

chaos: setup
	.venv/bin/python -m tests.chaos $(KILLS) $(ARGS)

lock:
	@bash requirements/lock.sh

audit:
	@bash requirements/audit.sh

docker:
	@bash cluster/image.sh build $(ARGS)

docker-demo:
	@bash cluster/image.sh demo $(OBJECTIVE) $(ARGS)

clean:
	rm -rf .venv .venv-bench build topd_ray.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
