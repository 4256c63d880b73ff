# SelectiveViT: `make help` lists the targets. Needs Python 3.10 or newer, make and git; everything else is installed
# into .venv, once, and again when the pins change.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.made
JOBS   ?= 2
REPO   ?=

export UV_HTTP_TIMEOUT ?= 300
export PYTHONNOUSERSITE := 1
export PYTHONUTF8 ?= 1
# uv's --torch-backend, for example `make walkthrough TORCH=cpu` on Linux without an NVIDIA GPU (a far smaller download)
TORCH  ?=

# One thread in each of JOBS workers is faster here than all threads in one, and gives the same numbers everywhere.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  settings: PYTHON=python3.12  JOBS=2  TORCH=cpu  REPO=owner/name (for links)  CHAPTER=01 (for stored, lab)"

.PHONY: environment
environment: $(STAMP) ## make .venv with the tested set of packages

$(STAMP): requirements.txt pyproject.toml $(shell find tools/jupyter/everyone -type f)
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' here; name a Python 3.10 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version); name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the environment in $(VENV) (once; a few minutes, mostly downloads)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian or Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(PY) -m uv pip install --python $(PY) $(if $(TORCH),--torch-backend=$(TORCH)) -r requirements.txt
	$(PY) -m uv pip install --python $(PY) --no-deps -e .
	@mkdir -p $(VENV)/etc/jupyter && cp -R tools/jupyter/everyone/. $(VENV)/etc/jupyter/  # see tools/lab.py
	$(PY) -m svit_utils doctor
	@touch $@

.PHONY: walkthrough
walkthrough: $(STAMP) ## run the chapters, print a table, write the book of that run to build/walkthrough/
	$(PY) -m tools.walkthrough

.PHONY: site
site: $(STAMP) ## the book from the stored outputs: build/site/ (REPO=owner/name: launch buttons)
	$(PY) -m tools.book $(if $(REPO),--repository $(REPO))

.PHONY: pdf
pdf: $(STAMP) ## the whole book as build/selectivevit.pdf (needs Chromium, or CHROMIUM=/path/to/it)
	$(PY) -m tools.book --pdf

.PHONY: lab
lab: $(STAMP) ## open JupyterLab on chapter 1 (CHAPTER=03; ROOT=yes: although you are root; NBGRADER=yes: with its menus)
	$(PY) -m tools.lab $(or $(CHAPTER),01) $(if $(ROOT),--root) $(if $(NBGRADER),--nbgrader)

.PHONY: doctor
doctor: $(STAMP) ## versions, device, data and weights found
	$(PY) -m svit_utils doctor

.PHONY: test
test: test-unit test-notebooks test-mutants ## everything but browser and attacks: unit tests, every chapter's outputs, two chapters' mutants

.PHONY: test-unit
test-unit: $(STAMP) ## unit, property and parity tests
	$(ONE_THREAD) $(PY) -m pytest -q tests -n $(JOBS) --dist loadfile

.PHONY: test-notebooks
test-notebooks: $(STAMP) ## run every chapter and compare its stored outputs
	$(ONE_THREAD) $(PY) -m pytest -q --nbval notebooks -n $(JOBS) --dist loadfile

.PHONY: test-alone
test-alone: $(STAMP) ## each chapter alone in an empty folder, with the wheel installed
	SVIT_ALONE=1 $(ONE_THREAD) $(PY) -m pytest -q tests/infra/test_wheel.py -n $(JOBS)

.PHONY: test-mutants
test-mutants: $(STAMP) ## the two quickest chapters must notice a broken operator
	$(PY) -m tools.mutants --quick --jobs $(JOBS)

.PHONY: mutants
mutants: $(STAMP) ## every chapter must notice a broken operator
	$(PY) -m tools.mutants --jobs $(JOBS)

.PHONY: test-grader
test-grader: $(STAMP) ## attacks on the grader (Linux; fails where there is no sandbox to attack)
	$(ONE_THREAD) $(PY) -m pytest -q tests/grader -m grader -n $(JOBS) --dist loadfile

.PHONY: test-browser
test-browser: $(STAMP) ## JupyterLab and the book in headless Chromium (needs Chromium, or CHROMIUM=/path/to/it)
	$(PY) -m pytest -q tests/browser -m browser

.PHONY: stored
stored: $(STAMP) ## run the chapters (or CHAPTER=03) and store their outputs in the notebooks
	$(PY) -m tools.walkthrough --store $(CHAPTER)

.PHONY: links
links: $(STAMP) ## stamp the Colab and Binder links (REPO=owner/name where pyproject and git do not say)
	$(PY) -m tools.links $(if $(REPO),--repository $(REPO))

.PHONY: checkpoints
checkpoints: $(STAMP) ## train the shipped checkpoints anew (hours on a CPU)
	$(PY) -m tools.make_checkpoints

.PHONY: results
results: $(STAMP) ## write README.md's results, results/README.md and results/verdict/ from the records
	$(PY) -m tools.readme_results

.PHONY: study
study: $(STAMP) ## the referee's study, or what is missing of it (hours; PROFILE=smoke: two minutes, into build/study-smoke)
	$(ONE_THREAD) $(PY) -m research study --profile $(or $(PROFILE),full) --jobs $(JOBS)

.PHONY: study-tables
study-tables: $(STAMP) ## write the study's tables anew from its recorded scores
	$(ONE_THREAD) $(PY) -m research study --tables

.PHONY: bench
bench: $(STAMP) ## measure what the cut costs (about half an hour; nothing else should run), write results/bench/
	$(PY) -m benchmarks

.PHONY: gpu
gpu: $(STAMP) ## prove, measure and train on a GPU (PARTS=prove,measure,train MINUTES=5; DEVICE=cpu: a rehearsal, two minutes)
	PARTS="$(PARTS)" DEVICE="$(DEVICE)" MINUTES="$(MINUTES)" $(PY) -m benchmarks.gpu

.PHONY: check-results
check-results: $(STAMP) ## rerun the small rows of each results file and compare
	$(PY) -m tools.check_results

.PHONY: course
course: $(STAMP) ## build the coursework into build/course/ (REPO=owner/name: where student/ will be pushed to)
	$(PY) -m svit_course build $(if $(REPO),--repository $(REPO))

.PHONY: grade
grade: $(STAMP) ## grade a folder of submissions: make grade SUBMISSIONS=folder (ASSIGNMENT=b SECONDS=20 CELL=60 TOTAL=300 MEMORY=2 TRUST=yes)
	@test -n "$(SUBMISSIONS)" || { echo "make grade SUBMISSIONS=folder, with a folder per student in it; see notebooks/assignments/lecturer.md" >&2; exit 2; }
	$(PY) -m svit_course grade "$(SUBMISSIONS)" --jobs $(JOBS) $(if $(ASSIGNMENT),--assignment $(ASSIGNMENT)) \
	  $(if $(SECONDS),--seconds $(SECONDS)) $(if $(CELL),--cell $(CELL)) $(if $(TOTAL),--total $(TOTAL)) $(if $(MEMORY),--memory $(MEMORY)) $(if $(TRUST),--trust)

.PHONY: totals
totals: $(STAMP) ## take the marks by hand in build/grades/ into the totals and the feedback, without grading (ROSTER=names.csv)
	$(PY) -m svit_course totals $(if $(ROSTER),--roster "$(ROSTER)")

.PHONY: test-course
test-course: $(STAMP) ## only the coursework's tests: planted answers, grading, nbgrader
	$(ONE_THREAD) $(PY) -m pytest -q tests/course -n $(JOBS) --dist loadfile

.PHONY: lint
lint: $(STAMP) ## ruff, mypy, the import contracts and the notebook lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check svit_utils svit_course research tests tools benchmarks conftest.py
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m tools.lint_notebooks notebooks/*.ipynb notebooks/assignments/*.ipynb

.PHONY: pins
pins: $(STAMP) ## resolve requirements.txt anew from pyproject.toml
	$(PY) -m tools.pins

.PHONY: release
release: $(STAMP) ## build wheel and sdist into dist/ and check both (VERSION=0.2.0: write it and the changelog first)
	$(PY) -m tools.release $(if $(VERSION),--version $(VERSION))

.PHONY: clean
clean: ## remove build/, caches and .venv (data and results stay)
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
