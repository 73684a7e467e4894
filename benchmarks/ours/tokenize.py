"""Preparation of shards from text with the command `python -m data.prepare text`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.clock import Run

ROOT = Path(__file__).resolve().parents[2]  # the root of this repository


def tokenize(corpus: Path) -> Run:
    """Set up `data.prepare text` for the .jsonl file `corpus`. Each run writes to a new directory beside this file."""
    command = [sys.executable, "-m", "data.prepare", "text", str(corpus), "--val-fraction", "0", "--out"]

    def run() -> None:
        subprocess.run([*command, tempfile.mkdtemp(dir=corpus.parent)], check=True, capture_output=True, cwd=ROOT)

    return run
