"""Make the tables of the page about runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from report.charts import SIZES, named_references
from report.run_log import RunLog
from training.metrics import duration


def summary(log: RunLog) -> dict[str, str]:
    """Return the cells of a run's row in the summary table, by column."""
    train, val = log.splits["train"], log.splits["val"]
    last = {name: f"{column[-1]:.4f}" if len(column) else "" for name, column in val.items()}
    steps = int(max([*train["step"], *val["step"]], default=0))
    return {
        "status": log.status,
        "steps": f"{steps:,}",
        "tokens": format_count(float(max([*train["tokens"], *val["tokens"]], default=0.0))),
        "training time": duration(train["seconds"][-1]) if len(train["seconds"]) else "",
        "best validation loss": f"{np.nanmin(val['loss']):.4f}" if np.isfinite(val["loss"]).any() else "",
        "last validation loss": last["loss"],
        "last bits per byte": last["bits_per_byte"],
    }


def loss_thresholds(logs: Sequence[RunLog], count: int = 6) -> list[tuple[str, float]]:
    """Return the rows of a table that shows when each run reached which loss: (name, loss), the highest loss first.

    They are the losses of other models, the best loss of each run, and about `count` round values, whose name is "".
    """
    measured = [log for log in logs if np.isfinite(log.splits["val"]["loss"]).any()]
    if not measured:
        return []
    best = {f"best of {log.name}": float(np.nanmin(log.splits["val"]["loss"])) for log in measured}
    # The quantile leaves out the high losses of the first validations. They would put the round values too far apart.
    highest = float(np.nanquantile(np.concatenate([log.splits["val"]["loss"] for log in measured]), 0.8))
    round_values = MaxNLocator(count).tick_values(min(best.values()), highest)
    thresholds = [("", float(loss)) for loss in round_values if min(best.values()) < loss < highest]
    thresholds += named_references(logs)
    return sorted([*thresholds, *best.items()], key=lambda threshold: -threshold[1])


def reached(log: RunLog, loss: float) -> str:
    """Return tokens and training time at the first validation with a loss of at most `loss`, or "not reached"."""
    val = log.splits["val"]
    under = np.flatnonzero(val["loss"] <= loss)
    if not len(under):
        return "not reached"
    first = under[:1]
    return f"{format_count(val['tokens'][first][0])} · {duration(log.seconds(val['step'][first])[0])}"


def evaluation_table(logs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Return a row per task, convention (how the task is scored) and metric, with a cell per run and released model.

    If a run has several results for a row, its cell has the last one. The "details" of a cell are the checkpoint and
    the number of examples.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for i, log in enumerate(logs):
        for result in log.evaluations:
            key = (result["task"], result.get("convention", ""), result["metric"])
            empty = {"cells": [""] * len(logs), "details": [""] * len(logs), "published": [""] * len(SIZES)}
            row = rows.setdefault(key, {"key": key, **empty})
            stderr = f" ± {result['stderr']:.4f}" if result.get("stderr") else ""
            row["cells"][i] = f"{result['value']:.4f}{stderr}"
            row["details"][i] = ", ".join(evaluation_details(result))
            known = result.get("published") or {}
            row["published"] = [f"{known[name]:.4f}" if name in known else "" for name in SIZES]
    return list(rows.values())


def evaluation_details(result: dict[str, Any]) -> list[str]:
    """Return the checkpoint and the number of examples of an evaluation, as far as they are known."""
    details = []
    if checkpoint := result.get("checkpoint"):
        step = re.fullmatch(r"step-0*(\d+)", Path(checkpoint).name)
        details.append(f"step {step[1]}" if step else str(checkpoint))
    count = result.get("count")
    if count is not None and np.isfinite(count):
        details.append(f"{int(count):,} examples")
    return details


def differences(logs: Sequence[RunLog]) -> list[tuple[str, list[str]]]:
    """Return the configuration fields that differ between runs, with the value of each run."""

    def flatten(config: dict[str, Any]) -> dict[str, str]:
        return {f"{section}.{name}": str(value) for section, fields in config.items() for name, value in fields.items()}

    configs = [flatten(log.config) for log in logs]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [config.get(name, "") for config in configs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def format_count(count: float) -> str:
    """Format a number with three significant digits, for example 1.06M or 10.3B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
