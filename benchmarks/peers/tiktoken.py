"""tiktoken, which encodes on all cores, as a contestant. This repository's code writes the shards."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import Run
from data.shards import ShardWriter
from data.tokenizer import load_tokenizer

BATCH_CHARACTERS = 1 << 26  # approximate number of characters that one call of tiktoken encodes


def tokenize(corpus: Path) -> Run:
    """Set up encoding of the .jsonl file `corpus` by tiktoken. Each run writes to a new directory beside this file."""
    tokenizer: Any = load_tokenizer("gpt2")

    def run() -> None:
        writer = ShardWriter(Path(tempfile.mkdtemp(dir=corpus.parent)), "train", 100_000_000, tokenizer.eot)
        for batch in read_batches(corpus):
            for ids in tokenizer._tiktoken.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1):
                writer.write(np.array([tokenizer.eot, *ids], np.uint16))
        writer.finish()

    return run


def read_batches(corpus: Path) -> Iterator[list[str]]:
    """Yield the documents of a .jsonl file in lists of about BATCH_CHARACTERS characters."""
    batch: list[str] = []
    size = 0
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            batch.append(json.loads(line)["text"])
            size += len(batch[-1])
            if size > BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    yield batch
