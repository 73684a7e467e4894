"""Draw loss.png, the loss plot of a run. report/charts.py also uses the smaller functions of this file."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from files import PARTIAL_SUFFIX

if TYPE_CHECKING:  # matplotlib is imported only when something is drawn, see `new_figure`
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 0.02  # width of the running mean, as a fraction of the number of steps


def draw_loss(
    metrics: Sequence[dict[str, Any]], path: Path, title: str, references: Sequence[tuple[str, float]] = ()
) -> None:
    """Draw training and validation loss against tokens, and write the plot to a PNG file.

    Args:
        metrics: records of a metrics.jsonl. A loss of None was not finite and is left out.
        references: (model, nats per token) of other models on the same validation set, drawn as horizontal lines.
    """
    train = [(m["tokens"], m["loss"]) for m in metrics if m["split"] == "train" and m["loss"] is not None]
    val = [(m["tokens"], m["loss"]) for m in metrics if m["split"] == "val" and m["loss"] is not None]
    figure, axes = new_figure()
    lines = [np.array(line).T for line in (train, val) if line]
    if train:
        tokens, losses = lines[0]
        axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smooth(losses), color="tab:blue", label="train (running mean)")
    if val:
        tokens, losses = lines[-1]
        best = losses.min()
        axes.plot(tokens, losses, "o-", color="tab:orange", markersize=3.5, label=f"validation (best {best:.4f})")
    draw_references(axes, references)
    y_range = late_range([(tokens, losses) for tokens, losses in lines], [value for _, value in references])
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=title, ylim=y_range)
    save_figure(figure, axes, path, x_is_tokens=True)
    del figure, axes
    # train.py draws many figures, which contain reference cycles. Without this call, old ones would hold dozens of MB.
    gc.collect()


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean of `values` over a window of about SMOOTHING * n values. (n,) -> (n,)

    The window is centered on each value, and shorter near both ends. If it had only the earlier values, the mean would
    lie above a falling curve.
    """
    n, half = len(values), round(SMOOTHING * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = np.maximum(0, np.arange(n) - half), np.minimum(n, np.arange(n) + half + 1)
    return (sums[last] - sums[first]) / (last - first)


def late_range(
    lines: Sequence[tuple[np.ndarray, np.ndarray]], references: Sequence[float]
) -> tuple[float, float] | None:
    """Return the y range (low, high) that shows the lines (x, y) and the references, or None if there are no lines.

    The points in the first 5% of a line's x range have no influence: with their high losses, the rest would look flat.
    """
    late = [y[x >= 0.05 * x[-1]] for x, y in lines if len(x)]
    if not late:
        return None
    shown = np.concatenate([*late, references])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.04 * (high - low) or 0.1
    return low - margin, high + margin


def new_figure() -> tuple[Figure, Axes]:
    """Return an empty figure and its axes. pyplot is not used, because it keeps every figure in memory."""
    # Imported here, because the import takes a second, and only the main process of a training run draws.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    return figure, figure.subplots()


def draw_references(axes: Axes, references: Sequence[tuple[str, float]]) -> None:
    """Draw a horizontal line for each (name, value)."""
    for (name, value), style in zip(references, itertools.cycle(["--", ":", "-.", (0, (1, 4))])):
        axes.axhline(value, color="black", linewidth=1, linestyle=style, label=f"{name} ({value:.4f})")


def save_figure(figure: Figure, axes: Axes, path: Path, *, x_is_tokens: bool) -> None:
    """Add grid and legend, format the x axis, and write the figure to a PNG file."""
    # Imported here for the same reason as in `new_figure`.
    from matplotlib import text, ticker

    if x_is_tokens:
        formatter = ticker.EngFormatter(sep="")
        # Token counts are given in billions (B), not with the SI prefix giga (G).
        formatter.ENG_PREFIXES = {**formatter.ENG_PREFIXES, 9: "B"}
        axes.xaxis.set_major_formatter(formatter)
    axes.grid(alpha=0.3)
    # get_legend_handles_labels would omit runs whose names begin with "_". Here, only lines without a label are left
    # out: matplotlib gives these the labels "_child0", "_child1", ...
    lines = [line for line in axes.get_lines() if not re.fullmatch(r"_child\d+", str(line.get_label()))]
    if lines:
        labels = [str(line.get_label()) for line in lines]
        # The legend is below the axes. Inside them, matplotlib would take seconds to find a place with few points.
        columns = max(1, min(3, 90 // max(map(len, labels))))
        figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
    for part in figure.findobj(text.Text):
        part.set_parse_math(False)  # otherwise "$" in the name of a run would begin a formula
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)  # atomic, so that an image viewer never reads an incomplete file
