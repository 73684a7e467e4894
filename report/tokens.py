"""What each token of a text cost a model, what it expected instead, and what it would have said after each layer.

python -m report.tokens --model runs/shakespeare --text "To be, or not to be"
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from command import MODEL_HELP
from report.page import command_line, token_labels, write_page

if TYPE_CHECKING:
    from torch import Tensor

    from model import GPT

ALTERNATIVES = 8


def add_arguments(add: Callable[..., Any]) -> None:
    add("--model", help=f"{MODEL_HELP} (default: the newest run)")
    add("--text", required=True, help="what the model reads")
    add("--out", type=Path, default=Path("tokens.html"), metavar="FILE", help="default: tokens.html")


class Reading(NamedTuple):
    """What a model makes of T tokens, each predicted from those before it."""

    losses: Tensor  # (T,) nats
    ranks: Tensor  # (T,) how many tokens were thought likelier
    alternatives: Tensor  # (T, k) ids of the likeliest tokens
    probabilities: Tensor  # (T, k) theirs
    lens_tokens: Tensor  # (L + 1, T) the likeliest id after the embeddings and after each block
    lens_probabilities: Tensor  # (L + 1, T) its probability
    lens_actual: Tensor  # (L + 1, T) that of the token that stands there


def read(model: GPT, ids: Sequence[int], eot: int) -> Reading:
    """Let a model read `ids` after `eot`, the id of end-of-text, as texts begin in training.

    The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") puts the last LayerNorm and the head on
    the hidden states after each layer. Raises ValueError for a text that is empty or longer than the model reads.
    """
    import torch

    config, T = model.config, len(ids)
    if not 0 < T <= config.block_size:
        raise ValueError(f"--text has {T} tokens: expected 1 to {config.block_size}, what the model reads at once")
    inputs, actual = torch.tensor([[eot, *ids[:-1]]]), torch.tensor(ids)[:, None]
    with torch.no_grad():
        states = model(inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
        lens = []
        for layer, state in enumerate(states):
            x = state[0] if layer == config.n_layer else model.transformer.ln_f(state[0])
            log_p = (x @ model.transformer.wte.weight.T).log_softmax(dim=-1)  # (T, V), of one layer at a time
            best, token = log_p.max(dim=-1)
            lens.append((token, best.exp(), log_p.gather(1, actual)[:, 0].exp()))
        likeliest = log_p.topk(min(ALTERNATIVES, config.vocab_size))
        own = log_p.gather(1, actual)
    return Reading(
        -own[:, 0],
        (log_p > own).sum(dim=-1),
        likeliest.indices,
        likeliest.values.exp(),
        *(torch.stack(part) for part in zip(*lens, strict=True)),
    )


def run(args: argparse.Namespace) -> None:
    """Load the model, let it read the text, write the page."""
    from pretrained import load_model

    model, tokenizer, name = load_model(args.model)
    ids = tokenizer.encode(args.text)
    reading = read(model, ids, tokenizer.eot)

    def rounded(tensor: Tensor) -> list[Any]:
        return [[round(value, 7) for value in row] for row in tensor.tolist()]

    used = sorted({*reading.alternatives.flatten().tolist(), *reading.lens_tokens.flatten().tolist()})
    number = {token: i for i, token in enumerate(used)}
    total = reading.losses.sum().item()
    write_page(
        args.out,
        "tokens.html",
        title=f"Tokens as {name} reads them",
        loss=total / len(ids),
        bits_per_byte=total / math.log(2) / len(args.text.encode()),
        count=len(ids),
        unsure=math.log(tokenizer.vocab_size),
        data={
            "tokens": token_labels(tokenizer, ids),
            "labels": token_labels(tokenizer, used),
            "losses": reading.losses.tolist(),
            "ranks": reading.ranks.tolist(),
            "alternatives": [[number[token] for token in row] for row in reading.alternatives.tolist()],
            "probabilities": rounded(reading.probabilities),
            "lensTokens": [[number[token] for token in row] for row in reading.lens_tokens.tolist()],
            "lensProbabilities": rounded(reading.lens_probabilities),
            "lensActual": rounded(reading.lens_actual),
            "unsure": math.log(tokenizer.vocab_size),
        },
    )


if __name__ == "__main__":
    command_line("report.tokens", __doc__, add_arguments, run)
