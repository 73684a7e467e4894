"""Make the charts of the page about runs: choose the points of their lines, and draw the charts as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.reference import published
from model import PRESETS
from report.curves import draw_references, late_range, new_figure, save_figure, smooth
from report.run_log import RunLog, ValidationSet

POINTS = 2000  # largest number of points in a line; a screen has too few columns of pixels to show more points
SIZES = dict(zip(PRESETS, ("124M", "350M", "774M", "1558M"), strict=True))
# The colors of the runs, distinct with any type of color blindness: four of Okabe and Ito's palette, and a violet.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#785ef0")


@dataclass
class Series:
    """A line of a chart. It has the n points that `thin` (below) selected, and its arrays have the shape (n,)."""

    run: int  # index of the run
    # "step" (the value of each step), "mean" (the running mean of these values), "validation", or "value" (the value of
    # each step in a chart without running means, such as the learning rate)
    kind: str
    steps: np.ndarray  # number of the optimizer step at each point
    tokens: np.ndarray  # number of training tokens up to this step
    seconds: np.ndarray  # training time up to this step
    values: np.ndarray  # y value of each point


@dataclass
class Chart:
    """A chart, which is drawn on the page and as a PNG file."""

    key: str  # part of the PNG's file name
    title: str
    x: str  # quantity of the x axis: "tokens" or "seconds"
    y: str  # label of the y axis, with its unit
    digits: str  # format of the y values in tooltips, in the syntax of d3-format (JavaScript)
    series: list[Series]
    references: list[tuple[str, float]] = field(default_factory=list)  # (name, value), drawn as horizontal lines

    @property
    def x_unit(self) -> tuple[str, float]:
        """The unit of the x axis, and how many tokens or seconds a unit is, for example ("minutes", 60.0).

        The longest run determines the unit of time.
        """
        if self.x == "tokens":
            return "tokens", 1.0
        longest = max((float(series.seconds[-1]) for series in self.series if len(series.seconds)), default=0.0)
        return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)

    def x_values(self, series: Series) -> np.ndarray:
        """Return the x values of a line in the unit of the axis, (n,)."""
        return (series.tokens if self.x == "tokens" else series.seconds) / self.x_unit[1]

    @property
    def y_range(self) -> tuple[float, float] | None:
        """The y range (low, high) that the chart shows at first, or None for a chart without a running mean.

        `late_range` computes it. With several runs, the values of single steps have no influence on the range, because
        these values are hidden at first.
        """
        if not any(series.kind == "mean" for series in self.series):
            return None
        kinds = {"mean", "validation"} | ({"step"} if len({series.run for series in self.series}) == 1 else set())
        lines = [(series.steps, series.values) for series in self.series if series.kind in kinds]
        return late_range(lines, [value for _, value in self.references])


def make_charts(logs: Sequence[RunLog]) -> list[Chart]:
    """Return all charts that have data.

    Losses on different validation sets cannot be compared, so they have separate charts. The same is true of HellaSwag
    results with different conventions.
    """
    charts = [*_loss_charts(logs), *_hellaswag_charts(logs)]
    for name, title, unit, digits in (
        ("lr", "Learning rate", "learning rate", ".3e"),
        ("grad_norm", "Gradient norm, before clipping", "gradient norm", ".4f"),
        ("tokens_per_second", "Throughput", "tokens per second", ",.0f"),
    ):
        kinds = ["value"] if name == "lr" else ["step", "mean"]
        series = [make_series(i, log, "train", name, kind) for i, log in enumerate(logs) for kind in kinds]
        charts.append(Chart(name.replace("_", "-"), title, "tokens", unit, digits, series))
    return [chart for chart in charts if any(len(series.steps) for series in chart.series)]


def _loss_charts(logs: Sequence[RunLog]) -> list[Chart]:
    charts = []
    for number, members in enumerate(by_validation_set(logs), 1):
        all_runs = len(members) == len(logs)
        references = named_references([logs[i] for i in members])
        series = [s for i in members for s in loss_series(i, logs[i])]
        for x, against in (("tokens", "tokens"), ("seconds", "training time")):
            title = f"Loss against {against}" + ("" if all_runs else f", validation set {number}")
            key = f"loss-{against.split()[-1]}" + ("" if all_runs else f"-{number}")
            charts.append(Chart(key, title, x, "loss, nats per token", ".4f", series, references))
    return charts


def _hellaswag_charts(logs: Sequence[RunLog]) -> list[Chart]:
    charts = []
    for convention in sorted({log.convention for log in logs if log.convention}):
        members = [i for i, log in enumerate(logs) if log.convention == convention]
        released = published("hellaswag", convention, "acc_norm")
        charts.append(
            Chart(
                key=f"hellaswag-{convention}",
                title=f"HellaSwag ({convention} convention)",
                x="tokens",
                y="normalized accuracy (chance 0.25)",
                digits=".4f",
                series=[make_series(i, logs[i], "hellaswag", "acc_norm", "validation") for i in members],
                references=[(f"GPT-2 {SIZES[name]}, published", value) for name, value in released.items()],
            )
        )
    return charts


def by_validation_set(logs: Sequence[RunLog]) -> list[list[int]]:
    """Return the indices of the runs in groups: each group has the runs that were validated on the same set."""
    groups: dict[ValidationSet, list[int]] = {}
    for i, log in enumerate(logs):
        groups.setdefault(log.validation, []).append(i)
    return list(groups.values())


def named_references(logs: Sequence[RunLog]) -> list[tuple[str, float]]:
    """Return pairs (name, loss) of other models, which the runs have as references. No pair occurs twice.

    A released model is named by its size, such as "GPT-2 124M".
    """
    losses = dict.fromkeys(loss for log in logs for loss in log.reference_losses)

    def readable(name: str) -> str:
        model, comma, rest = name.partition(",")
        return f"GPT-2 {SIZES[model]}{comma}{rest}" if model in SIZES else name

    return [(readable(name), loss) for name, loss in losses]


def loss_series(index: int, log: RunLog) -> list[Series]:
    """Return three series of the run with this index: the loss of each step, its running mean, the validation loss."""
    train = [make_series(index, log, "train", "loss", kind) for kind in ("step", "mean")]
    return [*train, make_series(index, log, "val", "loss", "validation")]


def make_series(index: int, log: RunLog, split: str, name: str, kind: str) -> Series:
    """Return the column `name` of a split as a series or, if `kind` is "mean", the running mean of the column.

    Steps without a value are left out. For example, a skipped step has no loss.
    """
    columns = log.splits[split]
    present = np.flatnonzero(np.isfinite(columns[name]))
    values = columns[name][present]
    values = smooth(values) if kind == "mean" and len(values) else values
    selected = thin(values, POINTS // 2 if kind == "mean" else POINTS)
    steps = columns["step"][present[selected]]
    return Series(index, kind, steps, columns["tokens"][present[selected]], log.seconds(steps), values[selected])


def thin(values: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Return the indices of at most `points` values that keep the shape of a curve. (n,) without NaN -> (m,)

    A longer curve is divided into points / 2 - 1 intervals. The minimum and the maximum of each interval are kept, and
    the first and the last value. So the peak of a single step is never lost.
    """
    n = len(values)
    if n <= points:
        return np.arange(n)
    edges = np.linspace(0, n, points // 2).astype(int)  # the edges of points / 2 - 1 intervals
    intervals = [(a, values[a:b]) for a, b in itertools.pairwise(edges)]
    lowest = [start + part.argmin() for start, part in intervals]
    highest = [start + part.argmax() for start, part in intervals]
    return np.unique([0, n - 1, *lowest, *highest])


def draw_chart(chart: Chart, names: Sequence[str], path: Path) -> None:
    """Draw a chart, and write it to a PNG file. `names[i]` is the name of run i."""
    figure, axes = new_figure()
    kinds = {"step": "each step", "mean": "running mean"}
    in_legend: set[str] = set()
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
            label=label if label not in in_legend else None,
        )
        in_legend.add(label)
    draw_references(axes, chart.references)
    unit, _ = chart.x_unit
    axes.set(xlabel=unit if chart.x == "tokens" else f"training time, {unit}", ylabel=chart.y)
    dots = ", dots: validation" if len(names) > 1 and chart.y.startswith("loss") else ""
    axes.set(ylim=chart.y_range, title=chart.title + dots)
    save_figure(figure, axes, path, x_is_tokens=chart.x == "tokens")
