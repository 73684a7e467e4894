"""Preparation of shards from text with the command `python -m data.prepare text`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.clock import Run

ROOT = Path(__file__).resolve().parents[2]  # the root of this repository


def tokenize(corpus: Path) -> Run:
    """Set up the command for the .jsonl file `corpus`. Each run writes its dataset to a new directory beside it."""
    command = [sys.executable, "-m", "data.prepare", "text", str(corpus), "--val-fraction", "0", "--out"]

    def run() -> None:
        subprocess.run([*command, tempfile.mkdtemp(dir=corpus.parent)], check=True, capture_output=True, cwd=ROOT)

    return run
