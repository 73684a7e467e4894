"""Reading of training batches with data/loader.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.clock import Run
from benchmarks.workload import LOADER_BATCH_TOKENS, LOADER_BATCHES, VOCAB
from data.loader import Loader, TokenWindows
from data.shards import ShardWriter, open_split


def load(directory: Path) -> Run:
    """Write a shard of random tokens to a directory, and set up reading batches from it."""
    writer = ShardWriter(directory, "train", 10_000_000, VOCAB - 1)
    writer.write(np.random.default_rng(0).integers(VOCAB, size=writer.shard_tokens, dtype=np.uint16))
    writer.finish()
    windows = TokenWindows(open_split(directory, "train"), 1024, VOCAB)
    loader = Loader(windows, batch_tokens=LOADER_BATCH_TOKENS, micro_batch=64, seed=0)
    return lambda: [next(loader) for _ in range(LOADER_BATCHES)]
