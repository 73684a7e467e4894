"""Load a model, divide the scoring between processes, and store scores so that a killed evaluation can continue."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data.tokenizer import load_tokenizer
from device import find_device, find_dtype, keep_freed_memory
from eval.hf_model import load_hf_model
from eval.likelihood import Request, Scores, check_pair, log_likelihoods
from files import PARTIAL_SUFFIX
from model import GPT, PRESETS
from pretrained import fit_vocabulary
from processes import Processes, stop_processes
from weights import find_config, read_json

# Requests are scored in groups of this many. The scores of a group are stored before the next group starts.
GROUP_SIZE = 1024


@dataclass
class Evaluator:
    """A model and its tokenizer, with everything that tasks need to score requests."""

    name: str
    model: Any
    tokenizer: Any
    processes: Processes
    batch_size: int
    cache: ScoreCache
    show_progress: bool

    def score(self, requests: Sequence[Request]) -> Scores:
        """Score requests in groups, with a progress bar. A group whose scores are in the cache is not scored again."""
        processes = self.processes
        parts: list[Scores] = []
        with tqdm(total=len(requests), unit="text", disable=not self.show_progress, leave=False) as bar:
            for start in range(0, len(requests), GROUP_SIZE):
                group = requests[start : start + GROUP_SIZE]
                key = self.cache.key(group)
                # All processes must take the same branch, but the cache file may be readable on some nodes only. So use
                # the cache only if every process has the group.
                if processes.all_reduce_min(int(key in self.cache.entries)):
                    entry = self.cache.entries[key]
                    parts.append(Scores(np.array(entry["log_probs"]), np.array(entry["greedy"])))
                    bar.update(len(group))
                    continue
                with processes.autocast():
                    scores = log_likelihoods(
                        self.model,
                        group,
                        batch_size=self.batch_size,
                        rank=processes.rank,
                        world_size=processes.world_size,
                        reduce=processes.all_reduce_sum,
                        progress=lambda n: bar.update(n * processes.world_size),
                    )
                parts.append(scores)
                if processes.is_main:
                    self.cache.add(key, scores)
        return Scores(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class ScoreCache:
    """Scores of finished groups (see GROUP_SIZE) in a JSON Lines file, so that a killed evaluation can continue.

    The key of a group is a hash of its requests and of `identity`, a text that describes everything else that the
    scores depend on, such as the model. If `path` is None, nothing is stored.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path = path
        self.identity = identity
        self.entries: dict[str, dict[str, list[Any]]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                # A line is incomplete if the process was killed while it wrote the line: skip it.
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    self.entries[entry.pop("key")] = entry

    def key(self, requests: Sequence[Request]) -> str:
        """Return the key of a group of requests."""
        return hashlib.sha256(repr((self.identity, [tuple(request) for request in requests])).encode()).hexdigest()

    def add(self, key: str, scores: Scores) -> None:
        """Append the scores of a group to the file, if there is one."""
        if self.path is not None:
            entry = {"key": key, "log_probs": scores.log_probs.tolist(), "greedy": scores.greedy.tolist()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(entry))  # on a new line, because the last line may be incomplete


def model_fingerprint(directory: Path, outputs: Sequence[Path]) -> str:
    """Return names, sizes and modification times of a model's files as a text, which changes when the model changes.

    A model may have files with any name, so all files in `directory` count, except `outputs`, which the evaluation
    itself writes, and files that another evaluation is writing.
    """
    written = {path.resolve() for path in outputs}
    files = sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.suffix != PARTIAL_SUFFIX and path.resolve() not in written
    )
    return str([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


@contextlib.contextmanager
def join_processes(device_name: str, dtype_name: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, and leave them when the `with` block ends.

    Without torchrun, this process works alone. Raises ValueError if the device is not available.
    """
    # processes.start_processes is not used, because it enables TF32, which would change float32 results on CUDA.
    device = find_device(device_name, "--device")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cpu":
        keep_freed_memory()
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world_size, device, find_dtype(dtype_name, device))
    finally:
        stop_processes()


def load_model_and_tokenizer(
    name: str, directory: Path, device: torch.device, *, through_transformers: bool
) -> tuple[Any, Any]:
    """Load the model `name` from the files in `directory`, and its tokenizer.

    transformers loads every model that is not a GPT-2. With `through_transformers`, it also loads GPT-2 models.

    Raises ValueError or OSError if model or tokenizer cannot be loaded, or if the two do not belong together.
    """
    config = find_config(directory)
    if not config.is_file():
        raise FileNotFoundError(f"{name} is not a model directory: it has no {config.name}")
    is_gpt2 = config.name == "hparams.json" or read_json(config).get("model_type") == "gpt2"
    model: Any
    tokenizer: Any
    if is_gpt2 and not through_transformers:
        model = GPT.from_pretrained(directory, dtype=torch.float32, device=device)
        tokenizer = load_tokenizer(name if name in PRESETS else directory)
        fit_vocabulary(model, tokenizer, directory)
    else:
        model, tokenizer = load_hf_model(directory, device)
    check_pair(model, tokenizer)
    return model, tokenizer
