"""loss.png: a run's training and validation loss against tokens, beside GPT-2's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

SMOOTHING = 0.02  # of the steps so far: the width of the average drawn over the single steps' losses


def draw_loss(
    metrics: Sequence[dict[str, Any]], path: Path, title: str, references: Sequence[tuple[str, float]] = ()
) -> None:
    """Write a PNG of the losses in `metrics`, the records of a metrics.jsonl.

    `references` are losses on the same validation set to beat, each (whose, nats a token), drawn as level lines.
    """
    mpl.use("agg")
    from matplotlib import pyplot as plt

    train = [(m["tokens"], m["loss"]) for m in metrics if m["split"] == "train" and m["loss"] is not None]
    val = [(m["tokens"], m["loss"]) for m in metrics if m["split"] == "val"]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    if train:
        tokens, losses = np.array(train).T
        axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smooth(losses), color="tab:blue", label="train (running mean)")
    if val:
        tokens, losses = np.array(val).T
        best = losses.min()
        axes.plot(tokens, losses, "o-", color="tab:orange", markersize=3.5, label=f"validation (best {best:.4f})")
    for (name, loss), style in zip(references, ("--", ":", "-.", (0, (1, 4))), strict=False):
        axes.axhline(loss, color="black", linewidth=1, linestyle=style, label=f"{name} ({loss:.4f})")
    axes.set(xlabel="tokens", ylabel="loss, nats a token", title=title)
    axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if train or val or references:
        axes.legend(frameon=False)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)  # whoever has the picture open never sees half of it
    plt.close(figure)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it in a window of SMOOTHING of their number. (n,) -> (n,)"""
    width = max(1, round(SMOOTHING * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - width)
    return (sums[last] - sums[first]) / (last - first)
