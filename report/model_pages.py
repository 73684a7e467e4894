"""The pages about a model: attention weights, predictions for each token of a text, and position embeddings."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model import GPT
from pretrained import load_model as load_model  # exported again, because the commands import it from here
from report.page import pack, plotly_script, token_labels, write_page

MAX_ATTENTION_CHARACTERS = 18_000_000  # largest base64 text of the weights, so that the page stays under 20 MB
ALTERNATIVES = 8  # number of most probable tokens that are shown for each position
MAX_SIMILARITY_ROWS = 512  # largest number of rows (and of columns) of the matrix of cosine similarities


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def write_attention_page(
    model: GPT, tokenizer: Tokenizer, name: str, text: str, out: Path, links: Sequence[str] = ()
) -> None:
    """Write the page with the attention weights of every layer and head for a text.

    Raises ValueError as `packed_attentions` does, OSError if the file cannot be written.
    """
    ids = tokenizer.encode(text)
    weights = packed_attentions(model, ids)
    write_page(
        out,
        "attention.html",
        links=links,
        title=f"Attention of {name}",
        data={
            "tokens": token_labels(tokenizer, ids),
            "layers": model.config.n_layer,
            "heads": model.config.n_head,
            "weights": base64.b64encode(weights).decode(),
        },
    )


def packed_attentions(model: GPT, ids: Sequence[int]) -> bytes:
    """Return the attention weights over T tokens. A weight w is stored as one byte, 255 * sqrt(w), rounded.

    Because of the square root, fewer small weights are rounded to 0. For each of L layers and H heads, the bytes are
    the lower triangle of the matrix of weights, row by row: L * H * T (T + 1) / 2 bytes in total.

    Raises ValueError if the model is not causal, or if the text is empty or too long for the model or for a page.
    """
    config, T = model.config, len(ids)
    if not config.causal:
        raise ValueError("the model is not causal: this page shows attention to previous tokens only")
    heads = config.n_layer * config.n_head
    longest = min(config.block_size, int((2 * MAX_ATTENTION_CHARACTERS * 3 / 4 / heads) ** 0.5))
    if not 0 < T <= longest:
        raise ValueError(
            f"--text has {T} tokens: expected 1 to {longest} for {config.n_layer} layers of {config.n_head} heads"
        )
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True, logits_to_keep=1).attentions
    rows, columns = np.tril_indices(T)
    return b"".join(
        (layer[0, :, rows, columns].sqrt() * 255).round().to(torch.uint8).numpy().tobytes() for layer in attentions
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


class TokenPredictions(NamedTuple):
    """The predictions of a model with L layers for T tokens. Each token is predicted from the tokens before it.

    The fields whose names begin with `lens` are the results of the logit lens, see `predict_tokens`.
    """

    losses: Tensor  # (T,) in nats
    ranks: Tensor  # (T,) number of tokens that are more probable than the actual token
    alternatives: Tensor  # (T, k) ids of the k most probable tokens
    probabilities: Tensor  # (T, k) probabilities of the alternatives
    lens_tokens: Tensor  # (L + 1, T) id of the most probable token, from the output of the embeddings and of each block
    lens_probabilities: Tensor  # (L + 1, T) probability of this most probable token
    lens_actual: Tensor  # (L + 1, T) probability of the actual token


def predict_tokens(model: GPT, ids: Sequence[int], eot: int) -> TokenPredictions:
    """Predict each of `ids` from the ids before it. As in training, `eot` (end-of-text) comes before the first id.

    The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") shows what the model would predict
    without the later layers: it applies the last LayerNorm and the output head to the hidden states after each layer.

    Raises ValueError if the text is empty or longer than the model's block size.
    """
    config, T = model.config, len(ids)
    if not 0 < T <= config.block_size:
        raise ValueError(f"--text has {T} tokens: expected 1 to {config.block_size}, the model's block size")
    inputs, actual = torch.tensor([[eot, *ids[:-1]]]), torch.tensor(ids)[:, None]  # (1, T), (T, 1)
    with torch.no_grad():
        states = model(inputs, output_hidden_states=True, logits_to_keep=1).hidden_states
        lens = []
        for layer, state in enumerate(states):
            # The model has applied ln_f to the last state already.
            x = state[0] if layer == config.n_layer else model.transformer.ln_f(state[0])  # (T, C)
            log_p = (x @ model.transformer.wte.weight.T).log_softmax(dim=-1)  # (T, V)
            best, token = log_p.max(dim=-1)
            lens.append((token, best.exp(), log_p.gather(1, actual)[:, 0].exp()))
        # After the loop, log_p comes from the last layer, so it is the prediction of the model itself.
        most_probable = log_p.topk(min(ALTERNATIVES, config.vocab_size))
        own = log_p.gather(1, actual)
    return TokenPredictions(
        -own[:, 0],
        (log_p > own).sum(dim=-1),
        most_probable.indices,
        most_probable.values.exp(),
        *(torch.stack(values) for values in zip(*lens, strict=True)),
    )


def write_tokens_page(
    model: GPT, tokenizer: Tokenizer, name: str, text: str, out: Path, links: Sequence[str] = ()
) -> None:
    """Write the page with the loss, the most probable tokens and the logit lens for each token of a text.

    Raises ValueError as `predict_tokens` does, OSError if the file cannot be written.
    """
    ids = tokenizer.encode(text)
    predictions = predict_tokens(model, ids, tokenizer.eot)

    def rounded(tensor: Tensor) -> list[Any]:
        return [[round(value, 7) for value in row] for row in tensor.tolist()]

    # The page stores the text of each predicted token only once. The lists of predictions have its index instead.
    used = sorted({*predictions.alternatives.flatten().tolist(), *predictions.lens_tokens.flatten().tolist()})
    index = {token: i for i, token in enumerate(used)}
    total = predictions.losses.sum().item()
    write_page(
        out,
        "tokens.html",
        links=links,
        title=f"Predictions of {name}",
        loss=total / len(ids),
        bits_per_byte=total / math.log(2) / len(text.encode()),
        count=len(ids),
        uniform_loss=math.log(tokenizer.vocab_size),
        data={
            "tokens": token_labels(tokenizer, ids),
            "labels": token_labels(tokenizer, used),
            "losses": predictions.losses.tolist(),
            "ranks": predictions.ranks.tolist(),
            "alternatives": [[index[token] for token in row] for row in predictions.alternatives.tolist()],
            "probabilities": rounded(predictions.probabilities),
            "lensTokens": [[index[token] for token in row] for row in predictions.lens_tokens.tolist()],
            "lensProbabilities": rounded(predictions.lens_probabilities),
            "lensActual": rounded(predictions.lens_actual),
            "uniformLoss": math.log(tokenizer.vocab_size),
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Position embeddings


def similarity(embeddings: np.ndarray) -> tuple[int, np.ndarray]:
    """Return k, and the cosine similarities between the embeddings of every k-th position. (n, C) -> k, (m, m)

    m is ceil(n / k), and k is the smallest number for which m <= MAX_SIMILARITY_ROWS.
    """
    every = math.ceil(len(embeddings) / MAX_SIMILARITY_ROWS)
    taken = embeddings[::every]
    unit = taken / np.linalg.norm(taken, axis=1, keepdims=True).clip(min=1e-12)
    return every, unit @ unit.T


def write_embeddings_page(model: GPT, name: str, out: Path, links: Sequence[str] = ()) -> None:
    """Write the page with the position embeddings of a model. Raises OSError if the file cannot be written."""
    embeddings = model.transformer.wpe.weight.detach().numpy()  # (block_size, C)
    every, cosines = similarity(embeddings)
    n, width = embeddings.shape
    chosen = [round(width * fraction) for fraction in (0.2, 0.26, 0.33)]  # for GPT-2's 768: dimensions 154, 200, 253
    write_page(
        out,
        "embeddings.html",
        links=links,
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
            # A few values are much larger than the others. They must not determine the color scale.
            "scale": float(np.quantile(np.abs(embeddings), 0.99)) or 1.0,
        },
        plotly=plotly_script(),
    )
