"""Runs of train.py in separate processes, on a small dataset that can be written without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.shards import DatasetMeta, ShardWriter
from data.tokenizer import train_tokenizer
from scripts.gpu_check.report import Settings

ROOT = Path(__file__).resolve().parents[2]  # the root of this repository
SHARD_TOKENS = 100_000_000  # largest number of tokens in a shard


def write_dataset(directory: Path) -> Path:
    """Write a dataset without a validation split: this repository's documentation, with characters as tokens.

    `python -m data.prepare` is not used, because it needs packages that training does not need.
    """
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text, out = "\n\n".join(path.read_text(encoding="utf-8") for path in documents), directory / "dataset"
    tokenizer = train_tokenizer("char", [text])
    out.mkdir()
    tokenizer.save(out)
    writer = ShardWriter(out, "train", SHARD_TOKENS, tokenizer.eot)
    writer.write(np.array([tokenizer.eot, *tokenizer.encode(text)], np.uint16))
    meta = DatasetMeta(
        tokenizer=tokenizer.kind,
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        source="the documentation of this repository",
        revision="",
        filter="",
        validation="none",
        shard_tokens=SHARD_TOKENS,
        shards={"train": writer.finish()},
        tokens={"train": writer.n_tokens},
        documents={"train": writer.n_documents},
        text_bytes={"train": len(text.encode())},
    )
    meta.save(out)
    return out


def write_config(settings: Settings, directory: Path, dataset: Path, name: str, changes: dict[str, Any]) -> Path:
    """Write the configuration of a short run with the model `settings.small_shape`. Return the path of the file.

    `changes` is {section: {field: value}}. These values replace those of this function.
    """
    shape = settings.small_shape
    config: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(directory / "runs")},
        "model": {"preset": None, "block_size": shape.block_size}
        | {field: getattr(shape, field) for field in ("n_layer", "n_head", "n_embd")},
        "data": {
            "dir": str(dataset),
            "batch_tokens": 8 * shape.block_size,
            "sequence_length": shape.block_size,
            "micro_batch": 4,
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2, "steps": 40},
        "eval": {"every": 0, "samples": 0, "hellaswag": False},
        "checkpoint": {"every": 8},
        "system": {"device": settings.device, "compile": False},
    }
    for section, fields in changes.items():
        config[section] |= fields
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def run_one_step(settings: Settings, directory: Path, *, windows: int) -> subprocess.CompletedProcess[str]:
    """Run train.py for one step of a micro-batch of `windows` sequences with the model of `settings.shape`."""
    shape = settings.shape
    changes = {
        "model": {field: getattr(shape, field) for field in ("n_layer", "n_head", "n_embd", "block_size")},
        "data": {
            "batch_tokens": windows * shape.block_size,
            "sequence_length": shape.block_size,
            "micro_batch": windows,
        },
        "optim": {"steps": 1, "warmup_steps": 0},
    }
    path = write_config(settings, directory, write_dataset(directory), "one-step", changes)
    return subprocess.run([sys.executable, "train.py", "--config", str(path)], cwd=ROOT, capture_output=True, text=True)


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module ...` in the repository."""
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
