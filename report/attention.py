"""Where each token of a text looks: a page with every layer and head of a model.

python -m report.attention --model runs/shakespeare --text "To be, or not to be"
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from command import MODEL_HELP
from report.page import command_line, token_labels, write_page

if TYPE_CHECKING:
    from model import GPT

LIMIT = 18_000_000  # characters of base64: the page stays under 20 MB


def add_arguments(add: Callable[..., Any]) -> None:
    add("--model", help=f"{MODEL_HELP} (default: the newest run)")
    add("--text", required=True, help="what the model reads")
    add("--out", type=Path, default=Path("attention.html"), metavar="FILE", help="default: attention.html")


def run(args: argparse.Namespace) -> None:
    """Load the model, let it read the text, write the page."""
    from pretrained import load_model

    model, tokenizer, name = load_model(args.model)
    ids = tokenizer.encode(args.text)
    weights = packed_attentions(model, ids)
    config = model.config
    write_page(
        args.out,
        "attention.html",
        title=f"Attention of {name}",
        data={
            "tokens": token_labels(tokenizer, ids),
            "layers": config.n_layer,
            "heads": config.n_head,
            "weights": base64.b64encode(weights).decode(),
        },
    )


def packed_attentions(model: GPT, ids: Sequence[int]) -> bytes:
    """The model's attention weights over T tokens, a byte each: 255 √w, rounded, so that small ones stay apart.

    Of each layer's each head the lower triangle, row after row: L x H x T (T + 1) / 2 bytes. Raises ValueError for a
    text that is empty, longer than the model reads, or too long for a page.
    """
    import torch

    config, T = model.config, len(ids)
    if not config.causal:
        raise ValueError("the model is not causal: this page shows where a token looks back")
    heads = config.n_layer * config.n_head
    most = min(config.block_size, int((2 * LIMIT * 3 / 4 / heads) ** 0.5))
    if not 0 < T <= most:
        raise ValueError(
            f"--text has {T} tokens: expected 1 to {most} for {config.n_layer} layers of {config.n_head} heads"
        )
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True, logits_to_keep=1).attentions
    rows, columns = np.tril_indices(T)
    return b"".join(
        (layer[0, :, rows, columns].sqrt() * 255).round().to(torch.uint8).numpy().tobytes() for layer in attentions
    )


if __name__ == "__main__":
    command_line("report.attention", __doc__, add_arguments, run)
