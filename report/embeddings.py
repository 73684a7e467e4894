"""A model's position embeddings: as an image, some of their dimensions as curves, and how alike positions are.

python -m report.embeddings --model runs/shakespeare
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from command import MODEL_HELP
from report.page import command_line, pack, plotly_script, write_page

SIMILAR_POSITIONS = 512  # rows of the similarity matrix at most


def add_arguments(add: Callable[..., Any]) -> None:
    add("--model", help=f"{MODEL_HELP} (default: the newest run)")
    add("--out", type=Path, default=Path("embeddings.html"), metavar="FILE", help="default: embeddings.html")


def similarity(embeddings: np.ndarray) -> tuple[int, np.ndarray]:
    """Every how many positions are taken, and their cosines with one another. (n, C) -> k, (m, m)"""
    every = math.ceil(len(embeddings) / SIMILAR_POSITIONS)
    taken = embeddings[::every]
    unit = taken / np.linalg.norm(taken, axis=1, keepdims=True).clip(min=1e-12)
    return every, unit @ unit.T


def run(args: argparse.Namespace) -> None:
    """Load the model, write the page."""
    from pretrained import load_model

    model, _, name = load_model(args.model)
    embeddings = model.transformer.wpe.weight.detach().numpy()
    every, cosines = similarity(embeddings)
    n, width = embeddings.shape
    chosen = [round(width * share) for share in (0.2, 0.26, 0.33)]  # of GPT-2's 768: 154, 200 and 253
    write_page(
        args.out,
        "embeddings.html",
        title=f"Position embeddings of {name}",
        positions=n,
        width=width,
        every=every,
        chosen=", ".join(map(str, chosen)),
        data={
            "embeddings": pack(embeddings),
            "width": width,
            "every": every,
            "cosines": pack(cosines),
            # a few values are far larger than the rest, and would leave it pale
            "scale": float(np.quantile(np.abs(embeddings), 0.99)) or 1.0,
        },
        plotly=plotly_script(),
    )


if __name__ == "__main__":
    command_line("report.embeddings", __doc__, add_arguments, run)
