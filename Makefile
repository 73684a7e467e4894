# `make help` lists the targets. Each one creates .venv first if it is missing.

PYTHON := .venv/bin/python
READY := .venv/.ready
# PyTorch's own index has a build without CUDA. The build for Linux on the package index (PyPI) contains CUDA. With
# `make CPU_INDEX=`, the build of the package index is always installed.
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-slow lint bench clean help

demo: $(READY) ## train a small GPT-2 in a few minutes on two CPU cores; again: continue where it was stopped
	@echo
	@echo "1 of 4: data. The plays of Shakespeare are cut into tokens, and three plays are"
	@echo "held out: the model never learns from them, so they show what it has learned."
	$(PYTHON) -m data.prepare shakespeare --out data/shakespeare \
		--tokenizer bpe:4096
	@echo
	@echo "2 of 4: training. In each of 1,200 steps, the model predicts 2,048 tokens of the"
	@echo "plays. The loss is the mean of -ln p, where p is the probability that the model"
	@echo "gave to the right token: lower is better. For scale, on the held-out plays:"
	@echo "  an untrained model       8.32 nats per token = 4.07 bits per byte (ln 4,096)"
	@echo "  gzip -9                                        3.17 bits per byte"
	@echo "Six times, the loss on a part of the held-out plays is measured, and a line"
	@echo "shows the beginning of a text by the model. The last time, also on all of them."
	@echo "Ctrl-C stops after the current step, and \`make demo\` continues from there."
	$(PYTHON) train.py --config configs/shakespeare.yaml
	@echo
	@echo "3 of 4: samples. The model continues a prompt, token by token."
	$(PYTHON) sample.py --model runs/shakespeare --prompt "HAMLET:" \
		--num-samples 3 --max-new-tokens 120 --seed 1
	@echo
	@echo "4 of 4: pages. They show the curves, and how the model reads a text."
	$(PYTHON) -m report --all runs/shakespeare
	@echo
	@echo "Finished. Open runs/shakespeare/report.html in a browser. What to try next:"
	@echo "  write     $(PYTHON) sample.py --model runs/shakespeare --interactive"
	@echo "  browser   $(PYTHON) sample.py --model runs/shakespeare --serve"
	@echo "  own text  $(PYTHON) -m data.prepare text FILE --out data/mine \\"
	@echo "                --tokenizer bpe:4096"
	@echo "            $(PYTHON) train.py --config configs/shakespeare.yaml \\"
	@echo "                --data.dir data/mine --run.name mine"

test: $(READY) ## the quick tests, in two processes
	$(PYTHON) -m pytest -n 2 --dist worksteal

test-slow: $(READY) ## the tests that take minutes: large shapes, many kills, long property tests
	$(PYTHON) -m pytest -n 2 --dist worksteal -m slow

lint: $(READY) ## ruff (format and rules) and mypy
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench: $(READY) ## speed of training, decoding, tokenizing and evaluation
	$(PYTHON) bench.py all

clean: ## delete everything that can be created again, except runs/ and datasets
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, but python3 is $$(python3 --version)"; exit 1; }
	@echo "Installing the packages of requirements.txt into .venv, once. This takes a few minutes."
	python3 -m venv .venv
	@if [ "$$(uname -s)" = Linux ] && [ -n "$(CPU_INDEX)" ] && ! nvidia-smi > /dev/null 2>&1; then \
		echo "There is no NVIDIA GPU: installing PyTorch's build for the CPU, 0.2 GB (with CUDA: 5.7 GB)."; \
		$(PYTHON) -m pip install --no-deps --retries 0 --timeout 20 --index-url $(CPU_INDEX) $$(grep '^torch==' requirements.txt) \
		|| echo "PyTorch's own index cannot be reached: installing the build of the package index."; \
	fi
	$(PYTHON) -m pip install --disable-pip-version-check -r requirements.txt
	touch $(READY)
