"""The Makefile: its help, and the scale that the demo prints beside its losses."""

import gzip
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data.shards import open_split
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def make():
    """`make(*arguments)`: what make prints."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return lambda *arguments: (
        subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


def test_help_lists_each_target(make):
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert re.findall(r"^make (\S+) +\S", make("help"), re.MULTILINE) == phony


def test_the_lines_of_the_demo_fit_on_80_columns():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ndemo: ")[2].partition("\n\n")[0]
    lines = re.findall(r'^\t@echo "(.*)"', recipe, re.MULTILINE)
    lines += re.findall(r"^\t([^@].*)", recipe, re.MULTILINE)  # make prints the commands
    shown = [line.replace("$(PYTHON)", ".venv/bin/python").replace(r"\`", "`") for line in lines]
    assert len(shown) > 10
    assert [line for line in shown if len(line) > 80] == []


@pytest.mark.slow
def test_the_demo_prints_the_losses_of_an_untrained_model_and_of_gzip(tmp_path, python):
    python("-m", "data.prepare", "shakespeare", "--out", tmp_path, "--tokenizer", "bpe:4096")
    tokenizer, split = load_tokenizer(tmp_path), open_split(tmp_path, "val")
    ids = np.empty(split.n_tokens, np.uint16)
    split.read(0, ids)
    text = tokenizer.decode_bytes([token for token in ids.tolist() if token != tokenizer.eot])
    nats = math.log(tokenizer.vocab_size)
    bits = nats / math.log(2) * (split.n_tokens - 1) / len(text)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"{nats:.2f} nats per token = {bits:.2f} bits per byte (ln 4,096)" in makefile
    assert re.search(rf"gzip -9 +{8 * len(gzip.compress(text, 9)) / len(text):.2f} bits per byte", makefile)
