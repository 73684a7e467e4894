"""Runs of train.py in processes of their own, on a small dataset that needs no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from scripts.gpu_check.report import Settings

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def write_dataset(directory: Path, settings: Settings) -> Path:
    """Write a dataset with characters as tokens, from the documentation of this repository."""
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    out = directory / "dataset"
    command = ["data.prepare", "text", *map(str, texts), "--out", str(out), "--tokenizer", "char"]
    result = run_module(*command, "--val-tokens", str(20 * settings.small_shape.block_size))
    if result.returncode:
        raise RuntimeError(f"data.prepare failed: {result.stderr.strip()}")
    return out


def write_config(settings: Settings, directory: Path, dataset: Path, name: str, changes: dict[str, Any]) -> Path:
    """Write the configuration of a short run of the small model. `changes` are fields by section."""
    shape = settings.small_shape
    config: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(directory / "runs")},
        "model": {"preset": None, "block_size": shape.block_size}
        | {field: getattr(shape, field) for field in ("n_layer", "n_head", "n_embd")},
        "data": {"dir": str(dataset), "batch_tokens": 8 * shape.block_size, "sequence_length": shape.block_size},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "steps": 40},
        "eval": {"every": 0, "samples": 0, "hellaswag": False},
        "checkpoint": {"every": 8},
        "system": {"device": settings.device, "compile": False},
    }
    config["data"]["micro_batch"] = 4
    for section, fields in changes.items():
        config[section] |= fields
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def run_train(
    settings: Settings, directory: Path, dataset: Path, name: str, changes: dict[str, Any], windows: int
) -> subprocess.CompletedProcess[str]:
    """Run train.py for one step of `windows` sequences with the model of `settings.shape`."""
    shape = settings.shape
    model = {field: getattr(shape, field) for field in ("n_layer", "n_head", "n_embd", "block_size")}
    base = {
        "model": model,
        "data": {"batch_tokens": windows * shape.block_size, "sequence_length": shape.block_size},
        "optim": {"steps": 1, "warmup_steps": 0},
    }
    for section, fields in changes.items():
        base[section] = base.get(section, {}) | fields
    path = write_config(settings, directory, dataset, name, base)
    return subprocess.run([sys.executable, "train.py", "--config", str(path)], cwd=ROOT, capture_output=True, text=True)


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module ...` in the repository."""
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
