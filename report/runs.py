"""What runs left behind, made ready to be shown: series, published lines to compare with, and tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from data.shards import read_meta
from data.tokenizer import load_tokenizer
from eval.reference import losses_to_beat, published, published_losses
from files import file_sha256
from model import PRESETS
from training.metrics import duration, read_metrics

POINTS = 2000  # that a series keeps: more than a screen has columns
SIZES = dict(zip(PRESETS, ("124M", "350M", "774M", "1558M"), strict=True))
TRAIN_FIELDS = ("loss", "lr", "grad_norm", "tokens_per_second")


class ValidationSet(NamedTuple):
    """What a validation loss was measured on: losses on two that differ say nothing of one another."""

    data: str  # sha256 of the shards where they can be looked up, else the directory's name
    tokens: int  # at most so many of the split; 0 for prompts and completions, of which each counts whole
    sequence_length: int
    tokenizer: str

    def __str__(self) -> str:
        if not self.tokens:
            return f"completions in at most {self.sequence_length} tokens"
        return f"{self.tokens:,} tokens in windows of {self.sequence_length}"


@dataclass
class Run:
    """A run's directory, read. `splits` holds the columns of metrics.jsonl, (n,) each, NaN where there is no value."""

    name: str
    directory: Path
    config: dict[str, Any]
    provenance: list[dict[str, Any]]
    status: str
    splits: dict[str, dict[str, np.ndarray]]
    convention: str  # of HellaSwag
    source: str  # of the data set
    validation: ValidationSet
    levels: list[tuple[str, float]]  # published or kept losses on the validation set: whose, nats a token
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[str, list[str]]] = field(default_factory=list)  # "step 500", texts

    def seconds(self, steps: np.ndarray) -> np.ndarray:
        """Seconds of training up to `steps`, (n,) -> (n,), validation and checkpoints not counted."""
        train = self.splits["train"]
        if not len(train["step"]):
            return np.full(len(steps), np.nan)
        return np.interp(steps, np.append(0, train["step"]), np.append(0.0, train["seconds"]))


def read_run(directory: Path, name: str) -> Run:
    """Read what train.py, and eval.run with --json, left in a run's directory.

    Raises FileNotFoundError where that is no run's, ValueError where there is nothing to show or a file is damaged.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no run: it has no metrics.jsonl. Give a directory that train.py made")
    records = read_metrics(path)
    if not records:
        raise ValueError(f"{path} has no whole record yet: let the run take a step, or leave it out")
    splits = {
        "train": _columns(records, "train", ("step", "tokens", "seconds", *TRAIN_FIELDS)),
        "val": _columns(records, "val", ("step", "tokens", "loss", "bits_per_byte")),
        "hellaswag": _columns(records, "hellaswag", ("step", "tokens", "acc", "acc_norm")),
    }
    conventions = [record["convention"] for record in records if record["split"] == "hellaswag"]
    config = _read(directory / "config.yaml", yaml.safe_load, {})
    source, validation, levels = _validation(config, directory)
    run = Run(
        name=name,
        directory=directory,
        config=config,
        provenance=_read(directory / "provenance.json", json.loads, []),
        status=_read(directory / "status.json", json.loads, {}).get("status", "not known"),
        splits=splits,
        convention=conventions[-1] if conventions else "",
        source=source,
        validation=validation,
        levels=levels,
        samples=list(_samples(directory / "samples.txt")),
    )
    run.evaluations = list(_evaluations(run))
    return run


def _columns(records: Sequence[dict[str, Any]], split: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    rows = [record for record in records if record["split"] == split]
    return {name: np.array([row.get(name) for row in rows], np.float64) for name in names}


def _read(path: Path, parse: Any, missing: Any) -> Any:
    if not path.exists():
        return missing
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _validation(config: dict[str, Any], run: Path) -> tuple[str, ValidationSet, list[tuple[str, float]]]:
    """The data set's source, which part of it the run was validated on, and others' losses there."""
    data, limit = config.get("data", {}), config.get("eval", {}).get("tokens", 0)
    directory = Path(data.get("dir", ""))
    if data.get("format") == "completions":
        file, checkpoints = directory / "val.jsonl", sorted((run / "checkpoints").glob("step-*[0-9]"))
        texts = file_sha256(file) if file.is_file() else str(directory)
        kind = load_tokenizer(checkpoints[-1]).kind if checkpoints else ""
        return directory.name, ValidationSet(texts, 0, data.get("sequence_length", 0), kind), []
    meta = read_meta(directory) if data.get("dir") and directory.is_dir() else None
    if meta is None:
        kind = "gpt2" if directory.is_dir() else ""  # bare shards are GPT-2 tokens; of data that is gone, who knows
        validation = ValidationSet(str(directory), limit, data.get("sequence_length", 0), kind)
        source = directory.name
    else:
        shards = " ".join(shard.sha256 for shard in meta.shards["val"])
        tokens = min(limit, meta.tokens["val"])
        validation = ValidationSet(shards, tokens, data.get("sequence_length", 0), meta.tokenizer)
        source = meta.source
    levels = losses_to_beat(directory, source, validation.tokenizer) if data else []
    table = published_losses(source) if validation.tokenizer == "gpt2" else {}
    known = {name.removesuffix(", published") for name, _ in levels}
    levels += [(f"{name}, published", loss) for name, loss in table.items() if name not in known]
    return source, validation, levels


def _samples(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(step, texts) in the order they were written."""
    if not path.exists():
        return
    heading, texts = "", list[str]()
    for part in f"\n{path.read_text(encoding='utf-8', errors='replace')}".split("\n==== ")[1:]:
        title, _, text = part.partition("\n")
        step = title.partition(",")[0]
        if step != heading and texts:
            yield heading, texts
            texts = []
        heading = step
        texts.append(text.rstrip("\n"))
    if texts:
        yield heading, texts


def _evaluations(run: Run) -> Iterator[dict[str, Any]]:
    """The figures to set beside the released models': those of the run's own log, and of eval.run's --json files."""
    val, hellaswag = run.splits["val"], run.splits["hellaswag"]
    if len(val["step"]):
        released = {name.removesuffix(", published"): loss for name, loss in run.levels}
        convention = f"{run.source}, {run.validation}"
        yield {"task": "validation", "convention": convention, "metric": "loss", "value": val["loss"][-1]} | {
            "published": released
        }
    for metric in ("acc", "acc_norm") if len(hellaswag["step"]) else ():
        yield {"task": "hellaswag", "convention": run.convention, "metric": metric, "value": hellaswag[metric][-1]} | {
            "published": published("hellaswag", run.convention, metric)
        }
    for path in sorted(run.directory.glob("*.json"), key=lambda path: path.stat().st_mtime):
        rows = _read(path, json.loads, None)
        if isinstance(rows, list):
            yield from (row for row in rows if isinstance(row, dict) and {"task", "metric", "value"} <= row.keys())


# ---------------------------------------------------------------------------------------------------------------------
# Series and charts


def thin(values: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Indices of at most `points` of `values`, in order: first, last, and each stretch's lowest and highest.

    So a spike of a single step stays where it was. (n,) without NaN -> (at most points,)
    """
    n = len(values)
    if n <= points:
        return np.arange(n)
    edges = np.linspace(0, n, points // 2).astype(int)  # one stretch fewer than this: room for both ends
    stretches = [(a, values[a:b]) for a, b in itertools.pairwise(edges)]
    lowest = [start + part.argmin() for start, part in stretches]
    highest = [start + part.argmax() for start, part in stretches]
    return np.unique([0, n - 1, *lowest, *highest])


@dataclass
class Series:
    """A line of a chart, thinned: (n,) each."""

    run: int  # index among the runs
    kind: str  # "step", its running "mean", "validation", or "value", which is always shown
    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass
class Chart:
    """What is drawn on one pair of axes, on the page and as a PNG."""

    key: str  # names the PNG
    title: str
    x: str  # "tokens" or "seconds"
    y: str  # label, with its unit
    digits: str  # d3-format of a value
    series: list[Series]
    levels: list[tuple[str, float]] = field(default_factory=list)

    @property
    def x_unit(self) -> tuple[str, float]:
        """The unit of the x axis, and how many tokens or seconds it is: the longest run decides."""
        if self.x == "tokens":
            return "tokens", 1.0
        longest = max((float(series.seconds[-1]) for series in self.series if len(series.seconds)), default=0.0)
        return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)

    def x_values(self, series: Series) -> np.ndarray:
        """A line's x, in that unit. (n,)"""
        return (series.tokens if self.x == "tokens" else series.seconds) / self.x_unit[1]

    @property
    def y_range(self) -> tuple[float, float] | None:
        """What is shown at first beside a running mean: all but the first 5% of the steps, which flatten the rest.

        The single steps count where they are shown at first, of one run alone.
        """
        kinds = {"mean", "validation"} | ({"step"} if len({series.run for series in self.series}) == 1 else set())
        late = [s.values[s.steps >= 0.05 * s.steps[-1]] for s in self.series if len(s.steps) and s.kind in kinds]
        if not any(series.kind == "mean" for series in self.series) or not late:
            return None
        shown = np.concatenate([*late, [value for _, value in self.levels]])
        low, high = float(shown.min()), float(shown.max())
        margin = 0.04 * (high - low) or 0.1
        return low - margin, high + margin


def make_charts(runs: Sequence[Run]) -> list[Chart]:
    """All charts; losses on different validation sets, and HellaSwag by different conventions, on axes of their own."""
    charts = []
    for number, members in enumerate(by_validation_set(runs), 1):
        of_set = f", validation set {number}" if len(members) < len(runs) else ""
        levels = named_levels([runs[i] for i in members])
        series = [s for i in members for s in loss_series(i, runs[i])]
        suffix = f"-{number}" if of_set else ""
        for x, against in (("tokens", "tokens"), ("seconds", "training time")):
            title = f"Loss against {against}{of_set}"
            key = f"loss-{against.split()[-1]}{suffix}"
            charts.append(Chart(key, title, x, "loss, nats a token", ".4f", series, levels))
    for convention in sorted({run.convention for run in runs if run.convention}):
        members = [i for i, run in enumerate(runs) if run.convention == convention]
        figures = published("hellaswag", convention, "acc_norm")
        levels = [(f"GPT-2 {SIZES[name]}, published", figure) for name, figure in figures.items()]
        charts.append(
            Chart(
                key=f"hellaswag-{convention}",
                title=f"HellaSwag ({convention} convention)",
                x="tokens",
                y="normalised accuracy (chance 0.25)",
                digits=".4f",
                series=[make_series(i, runs[i], "hellaswag", "acc_norm", "validation") for i in members],
                levels=levels,
            )
        )
    for name, title, unit, digits in (
        ("lr", "Learning rate", "learning rate", ".3e"),
        ("grad_norm", "Gradient norm, before clipping", "gradient norm", ".4f"),
        ("tokens_per_second", "Throughput", "tokens a second", ",.0f"),
    ):
        kinds = ["value"] if name == "lr" else ["step", "mean"]
        series = [make_series(i, run, "train", name, kind) for i, run in enumerate(runs) for kind in kinds]
        charts.append(Chart(name.replace("_", "-"), title, "tokens", unit, digits, series))
    return [chart for chart in charts if any(len(series.steps) for series in chart.series)]


def named_levels(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """The levels of the runs, each once; GPT-2's sizes, which are named as on the hub, by their parameters."""
    levels = dict.fromkeys(level for run in runs for level in run.levels)

    def named(name: str) -> str:
        model, comma, rest = name.partition(",")
        return f"GPT-2 {SIZES[model]}{comma}{rest}" if model in SIZES else name

    return [(named(name), loss) for name, loss in levels]


def make_series(index: int, run: Run, split: str, name: str, kind: str) -> Series:
    """A column of a split against the others, without what is missing (a skipped step has no loss)."""
    from report.curves import smooth

    columns = run.splits[split]
    present = np.flatnonzero(np.isfinite(columns[name]))
    values = columns[name][present]
    values = smooth(values) if kind == "mean" and len(values) else values
    kept = thin(values, POINTS // 2 if kind == "mean" else POINTS)
    steps = columns["step"][present[kept]]
    return Series(index, kind, steps, columns["tokens"][present[kept]], run.seconds(steps), values[kept])


def loss_series(index: int, run: Run) -> list[Series]:
    """The loss of each step, its running mean, and the validation loss."""
    train = [make_series(index, run, "train", "loss", kind) for kind in ("step", "mean")]
    return [*train, make_series(index, run, "val", "loss", "validation")]


def by_validation_set(runs: Sequence[Run]) -> list[list[int]]:
    """Indices of the runs, those with the same validation set together."""
    groups: dict[ValidationSet, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(run.validation, []).append(i)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def loss_levels(runs: Sequence[Run], count: int = 6) -> list[tuple[str, float]]:
    """Losses worth asking for, highest first: the published ones, each run's best, and round ones above the best."""
    from matplotlib.ticker import MaxNLocator

    measured = [run for run in runs if np.isfinite(run.splits["val"]["loss"]).any()]
    if not measured:
        return []
    best = {f"best of {run.name}": float(np.nanmin(run.splits["val"]["loss"])) for run in measured}
    # the first losses, near a random guess, are passed within minutes
    highest = float(np.nanquantile(np.concatenate([run.splits["val"]["loss"] for run in measured]), 0.8))
    round_levels = MaxNLocator(count).tick_values(min(best.values()), highest)
    levels = [("", float(loss)) for loss in round_levels if min(best.values()) < loss < highest]
    levels += named_levels(runs)
    return sorted([*levels, *best.items()], key=lambda level: -level[1])


def reached(run: Run, loss: float) -> str:
    """Tokens and training time at the run's first validation at or under `loss`."""
    val = run.splits["val"]
    under = np.flatnonzero(val["loss"] <= loss)
    if not len(under):
        return "not reached"
    first = under[:1]
    return f"{short(val['tokens'][first][0])} · {duration(run.seconds(val['step'][first])[0])}"


def evaluation_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a figure: task, convention, metric, a cell a run, and the published figures of the four GPT-2 sizes."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for i, run in enumerate(runs):
        for figure in run.evaluations:
            key = (figure["task"], figure.get("convention", ""), figure["metric"])
            row = rows.setdefault(key, {"key": key, "cells": [""] * len(runs), "published": [""] * len(SIZES)})
            error = f" ± {figure['stderr']:.4f}" if figure.get("stderr") else ""
            row["cells"][i] = f"{figure['value']:.4f}{error}"
            known = figure.get("published") or {}
            row["published"] = [f"{known[name]:.4f}" if name in known else "" for name in SIZES]
    return list(rows.values())


def summary(run: Run) -> dict[str, str]:
    """A run in a line."""
    train, val = run.splits["train"], run.splits["val"]
    last = {name: f"{column[-1]:.4f}" if len(column) else "" for name, column in val.items()}
    steps = int(max([*train["step"], *val["step"]], default=0))
    return {
        "status": run.status,
        "steps": f"{steps:,}",
        "tokens": short(float(max([*train["tokens"], *val["tokens"]], default=0.0))),
        "training time": duration(train["seconds"][-1]) if len(train["seconds"]) else "",
        "best validation loss": f"{np.nanmin(val['loss']):.4f}" if np.isfinite(val["loss"]).any() else "",
        "last validation loss": last["loss"],
        "last bits per byte": last["bits_per_byte"],
    }


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The fields of the configurations that are not the same in all runs, with each run's value."""

    def flat(config: dict[str, Any]) -> dict[str, str]:
        return {f"{section}.{name}": str(value) for section, fields in config.items() for name, value in fields.items()}

    configs = [flat(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [config.get(name, "") for config in configs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def short(count: float) -> str:
    """1.06M, 10.3B: three digits."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
