# Two commands on a fresh machine: `make quickstart` and `make test`. Every target installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
PORT ?= 8000
RETRIKT_DATA ?= ../shared
export RETRIKT_DATA
.DEFAULT_GOAL := help
.PHONY: help install install-dev install-bench quickstart test test-slow test-gpu lint format docs serve bench-quality bench-corpus bench-arms bench-harvest bench-reinforce bench-annotator bench-algorithms bench-lexical bench-generate bench-generate-gpu bench-generate-workers bench-texts bench-estimate bench-latency bench-serve \
  bench-scale bench-workers bench-duplicates bench-index-build bench-index-memory bench-index-query bench-index-edit bench-faults bench-fuzz soak test-openapi drill-autoscale drill-nodes drill-leases clean

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.base
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	@touch $@

install: $(VENV)/.base ## Install the package into .venv

install-dev: $(VENV)/.dev

install-bench: $(VENV)/.bench

quickstart: install ## The whole run on the packaged task and language model, offline, a few minutes
	$(BIN)/retrikt quickstart --out $(RUN)

test: install-dev ## All tests but the slow and GPU ones, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install-dev $(VENV)-openapi/.done ## The slow tests
	$(BIN)/python -m pytest -m slow

$(VENV)-openapi/.done: # an environment of its own: it asks for another typer than the hub's client
	$(PYTHON) -m venv $(VENV)-openapi
	$(VENV)-openapi/bin/pip install -q openapi-python-client==0.29.1
	@touch $@

test-openapi: install-dev $(VENV)-openapi/.done ## A client generated from /openapi.json, used
	$(BIN)/python -m pytest -m slow tests/serving/test_generated.py

test-gpu: install-dev ## The tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: install-dev ## ruff, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy retrikt_ray

format: install-dev ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install ## Write docs/configuration.md from the models
	$(BIN)/python -m retrikt_ray.config > docs/configuration.md

serve: install ## Serve RUN on PORT of this machine
	$(BIN)/retrikt serve $(RUN) --port $(PORT)

$(VENV)-autofaiss/.done: # an environment of its own: it needs numpy 1
	$(PYTHON) -m venv $(VENV)-autofaiss
	$(VENV)-autofaiss/bin/pip install -q autofaiss==2.18.0 "pyarrow<20" "faiss-cpu<1.12" # later ones do not go with it
	@touch $@

bench-quality: install-bench ## RetriKT beside cheaper systems: tasks x seeds x protocols; resumes (needs RETRIKT_DATA; hours). BENCH="seeds=[0]": a part
	$(BIN)/python -m jobs.bench jobs/bench.yaml $(BENCH)

bench-corpus: install-bench ## A corpus as the store's source beside generated texts, and both (needs RETRIKT_DATA with text/; an hour). BENCH as above
	$(BIN)/python -m jobs.bench jobs/bench_corpus.yaml --out runs/bench-corpus $(BENCH)

bench-arms: install-dev install-bench ## Reinforcement beside the supervised prompt and beside more texts, by what student and TF-IDF score (needs RETRIKT_DATA; hours). BENCH as above
	$(BIN)/python -m jobs.bench jobs/bench_arms.yaml --out runs/bench-arms $(BENCH)

bench-harvest: install ## Time and memory of harvesting 10, 40 and all MB of RETRIKT_DATA's text/ for RUN
	$(BIN)/python -m jobs.bench_harvest $(RUN)

bench-generate: install ## Tokens a second beside PeftModel.generate and a hand-batched generate; prefixes of 150 classes
	$(BIN)/python -m jobs.bench_generate speed
	$(BIN)/python -m jobs.bench_generate prefixes

bench-generate-gpu: install ## The same on a CUDA device, a model of 0.5B with random weights: kernel by kernel, recorded, beside PEFT and vLLM
	$(BIN)/python -m jobs.bench_generate_gpu --profile

bench-generate-workers: install ## Two workers beside one on the texts of RUN, three times in turn
	$(BIN)/python -m jobs.bench_generate workers $(RUN)

bench-texts: install ## How texts of quick start, SST-2 and TREC begin, beside the rows, and whether they are as asked (needs RETRIKT_DATA)
	$(BIN)/python -m jobs.bench_texts

bench-estimate: install ## `retrikt estimate` of three configs, and what their runs then take (needs RETRIKT_DATA; half an hour)
	$(BIN)/python -m jobs.bench_estimate

bench-reinforce: install ## Peak memory of an iteration of reinforcement beside plain generation, vocabulary of 152k
	$(BIN)/python -m jobs.bench_reinforce

bench-annotator: install ## Peak memory, checkpoint and time of tuning an annotator of 0.1B parameters whole and by low-rank adapters
	$(BIN)/python -m jobs.bench_annotator

bench-algorithms: install-dev ## Supervised prompt, PPO, RLOO and GRPO at equal numbers of texts, on the quick start's prompt
	$(BIN)/python -m jobs.bench_algorithms

bench-latency: install ## An answer of RUN beside its bare student and its teacher, one thread
	$(BIN)/python -m jobs.bench_latency $(RUN)

SCALE ?=
bench-scale: install-dev ## Time and memory of each stage and of a replica at 100k, 400k and 1.6M made-up rows (hours; SCALE="100000 400000": a part), and what S3 is asked
	$(BIN)/python -m jobs.bench_scale requests
	$(BIN)/python -m jobs.bench_scale $(SCALE)

bench-workers: install ## Two workers beside one: annotate, and what distill reads, made-up rows (minutes)
	$(BIN)/python -m jobs.bench_workers

bench-duplicates: install ## Time and memory of the search for near duplicates and leakage, 10k and 100k made-up rows
	$(BIN)/python -m jobs.bench_duplicates

bench-index-build: install-bench $(VENV)-autofaiss/.done ## Index of 1M vectors: ours, plain faiss, autofaiss
	$(BIN)/python -m jobs.bench_index build

bench-index-memory: install-bench ## Peak memory of a build, 250k to 2M vectors
	$(BIN)/python -m jobs.bench_index memory

bench-index-query: install-bench ## Latency of a query at 1M vectors beside plain faiss
	$(BIN)/python -m jobs.bench_index query

bench-index-edit: install-bench ## 10k rows added to 1M, found, compacted, compared with a fresh build
	$(BIN)/python -m jobs.bench_edit

bench-lexical: install ## Words at 2M rows: a question beside a plain scorer of all postings, and ten rows added at 100k and at 2M rows (minutes)
	$(BIN)/python -m jobs.bench_lexical edits
	$(BIN)/python -m jobs.bench_lexical search

drill-autoscale: install-dev ## A run on a cluster that autoscales, from no workers to a report and back, as a timeline (minutes)
	$(BIN)/python -m pytest -m slow -s tests/runtime/test_autoscaling.py

drill-nodes: install-dev ## A run on three local nodes and S3 as a job, a node killed in each stage, three times each, and under a Serve app that is asked
	$(BIN)/python -m pytest -m slow -s tests/test_nodes.py tests/serving/test_nodes.py

drill-leases: install-dev ## Two drivers of a run on S3, and two editors of its store, killed or paused at random, 50 rounds each: nothing lost, nothing sealed twice
	$(BIN)/python -m pytest -m bench -s tests/runtime/test_lease_faults.py

bench-serve: install ## `retrikt serve` of RUN beside a bare Serve ingress, and beside plain uvicorn: requests/s, latency
	$(BIN)/python -m jobs.bench_serve $(RUN)

bench-fuzz: install-dev ## 10,000 requests made up from the API's description, good and bad (schemathesis): no failure, no status it does not name
	$(BIN)/python -m pytest -m bench -s tests/serving/test_fuzz.py

SOAK_S ?= 900
soak: install-dev ## SOAK_S seconds of mixed load; in turn a replica killed, runs swapped, 1,000 writes, a flood, a damaged run: nothing fails
	SOAK_S=$(SOAK_S) $(BIN)/python -m pytest -m bench -s tests/serving/test_soak.py

bench-faults: install-dev ## 200 SIGKILLs while editing, 500 damaged index folders, 30 SIGKILLs while generating
	$(BIN)/python -m pytest -m bench -s tests/knowledge/test_faults.py tests/store/test_faults.py

clean: ## Remove the environment and the runs
	rm -rf $(VENV) $(VENV)-autofaiss $(VENV)-openapi runs
