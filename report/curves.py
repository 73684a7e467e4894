"""PNGs: loss.png, a run's losses against tokens beside GPT-2's, and the charts of the report."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from report.runs import Chart

# Told apart by readers with any kind of colour blindness: four of Okabe and Ito's, and a violet.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#785ef0")
SMOOTHING = 0.02  # of the steps so far: the width of the average drawn over the single steps' losses


def draw_loss(
    metrics: Sequence[dict[str, Any]], path: Path, title: str, references: Sequence[tuple[str, float]] = ()
) -> None:
    """Write a PNG of the losses in `metrics`, the records of a metrics.jsonl; one that is null was not a number.

    `references` are losses on the same validation set to beat, each (whose, nats a token), drawn as level lines.
    """
    plt = _pyplot()
    train = [(m["tokens"], m["loss"]) for m in metrics if m["split"] == "train" and m["loss"] is not None]
    val = [(m["tokens"], m["loss"]) for m in metrics if m["split"] == "val" and m["loss"] is not None]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    if train:
        tokens, losses = np.array(train).T
        axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smooth(losses), color="tab:blue", label="train (running mean)")
    if val:
        tokens, losses = np.array(val).T
        best = losses.min()
        axes.plot(tokens, losses, "o-", color="tab:orange", markersize=3.5, label=f"validation (best {best:.4f})")
    _draw_levels(axes, references)
    axes.set(xlabel="tokens", ylabel="loss, nats a token", title=title)
    _save(figure, axes, path, tokens=True)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it in a window of SMOOTHING of their number. (n,) -> (n,)"""
    width = max(1, round(SMOOTHING * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - width)
    return (sums[last] - sums[first]) / (last - first)


def draw_chart(chart: Chart, names: Sequence[str], path: Path) -> None:
    """Write a PNG of a chart of the report; `names` are those of the runs."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    kinds = {"step": "each step", "mean": "running mean"}
    named: set[str] = set()
    for series in chart.series:
        if not len(series.steps) or (series.kind == "step" and len(names) > 1):
            continue
        label = names[series.run] if len(names) > 1 else kinds.get(series.kind, series.kind)
        axes.plot(
            chart.x_values(series),
            series.values,
            color=COLORS[(1 if len(names) == 1 and series.kind == "validation" else series.run) % len(COLORS)],
            linestyle=("-", "--", ":")[series.run % 3],
            linewidth=0.8 if series.kind == "step" else 1.5,
            alpha=0.35 if series.kind == "step" else 1,
            marker="o" if series.kind == "validation" else None,
            markersize=3.5,
            label=label if label not in named else None,
        )
        named.add(label)
    _draw_levels(axes, chart.levels)
    unit, _ = chart.x_unit
    axes.set(xlabel=unit if chart.x == "tokens" else f"training time, {unit}", ylabel=chart.y)
    dots = ", dots: validation" if len(names) > 1 and chart.y.startswith("loss") else ""
    axes.set(ylim=chart.y_range, title=chart.title + dots)
    _save(figure, axes, path, tokens=chart.x == "tokens")


def _pyplot() -> Any:
    """Imported when something is drawn: `train.py --help` need not wait for it."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    return pyplot


def _draw_levels(axes: Axes, levels: Sequence[tuple[str, float]]) -> None:
    for (name, value), style in zip(levels, itertools.cycle(["--", ":", "-.", (0, (1, 4))])):
        axes.axhline(value, color="black", linewidth=1, linestyle=style, label=f"{name} ({value:.4f})")


def _save(figure: Figure, axes: Axes, path: Path, *, tokens: bool) -> None:
    from matplotlib.ticker import EngFormatter

    if tokens:
        formatter = EngFormatter(sep="")
        formatter.ENG_PREFIXES = {**formatter.ENG_PREFIXES, 9: "B"}  # tokens are counted in billions, not in giga
        axes.xaxis.set_major_formatter(formatter)
    axes.grid(alpha=0.3)
    entries = axes.get_legend_handles_labels()[1]
    if entries:  # below the axes: to look for the best place among many points takes seconds
        columns = max(1, min(3, 90 // max(map(len, entries))))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)  # whoever has the picture open never sees half of it
    _pyplot().close(figure)
