"""Published figures of GPT-2, to be shown beside ours. Each table says who published it.

Models are named as on the hub: gpt2 (124M), gpt2-medium (350M), gpt2-large (774M), gpt2-xl (1558M). A figure that was
not found published is absent: `None` never stands for one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from files import write_json


class Table(NamedTuple):
    """Figures by model, and who published them."""

    figures: dict[str, float]
    source: str


def _sizes(*figures: float | None) -> dict[str, float]:
    names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    return {name: figure for name, figure in zip(names, figures, strict=True) if figure is not None}


# Validation loss of the released models in nats a token, by a pattern for a data set's name among a source's words.
# FineWeb and FineWeb-Edu are two data sets, and their losses, 3.42 and 3.29, are often taken for one another; FineWeb 2
# is a third.
VALIDATION_LOSS: dict[str, Table] = {
    "openwebtext": Table(_sizes(3.12, 2.84, 2.67, 2.54), "nanoGPT, README"),
    "fineweb(-10b|10B(-gpt2)?)?": Table(_sizes(3.424958, 3.083089, 3.000580, 2.831273), "llm.c"),
    "fineweb-edu(-10b)?": Table(_sizes(3.2924, None, None, None), "build-nanogpt"),
}

_BUILD_NANOGPT = "the 124M and the 1558M: build-nanogpt, hellaswag.py; the others: published in the same convention"
_HARNESS = "lm-evaluation-harness, as quoted in build-nanogpt, hellaswag.py"
_HARNESS_LAMBADA = "lm-evaluation-harness, lambada_openai"
_PAPER = "Radford et al. 2019, table 3"
_STRIDE = "Hugging Face's script for perplexity"

# Evaluations of the released models: (task, convention, metric) as eval.run writes them. Accuracies are fractions.
EVALUATIONS: dict[tuple[str, str, str], Table] = {
    ("hellaswag", "completion", "acc"): Table(_sizes(0.2859, None, None, 0.3842), _BUILD_NANOGPT),
    ("hellaswag", "completion", "acc_norm"): Table(_sizes(0.2955, 0.3752, 0.4320, 0.4893), _BUILD_NANOGPT),
    ("hellaswag", "harness", "acc"): Table(_sizes(0.2892, None, None, 0.4004), _HARNESS),
    ("hellaswag", "harness", "acc_norm"): Table(_sizes(0.3114, None, None, 0.5089), _HARNESS),
    ("lambada_openai", "harness", "acc"): Table(_sizes(0.3256, None, None, None), _HARNESS_LAMBADA),
    ("lambada_openai", "harness", "perplexity"): Table(_sizes(40.06, None, None, 10.63), _HARNESS_LAMBADA),
    ("lambada_openai", "paper", "acc"): Table(_sizes(0.4599, 0.5548, 0.6012, 0.6324), _PAPER),
    ("lambada_openai", "paper", "perplexity"): Table(_sizes(35.13, 15.60, 10.87, 8.63), _PAPER),
    ("cbt-cn", "paper", "acc"): Table(_sizes(0.8765, 0.9235, 0.9345, 0.9330), _PAPER),
    ("cbt-ne", "paper", "acc"): Table(_sizes(0.834, 0.871, 0.880, 0.8905), _PAPER),
    ("wikitext-2", "paper", "word_perplexity"): Table(_sizes(29.41, 22.76, 19.93, 18.34), _PAPER),
    ("ptb", "paper", "word_perplexity"): Table(_sizes(65.85, 47.33, 40.31, 35.76), _PAPER),
    ("enwik8", "paper", "bits_per_byte"): Table(_sizes(1.16, 1.01, 0.97, 0.93), _PAPER),
    ("text8", "paper", "bits_per_byte"): Table(_sizes(1.17, 1.06, 1.02, 0.98), _PAPER),
    ("wikitext-103", "paper", "word_perplexity"): Table(_sizes(37.50, 26.37, 22.05, 17.48), _PAPER),
    ("1bw", "paper", "word_perplexity"): Table(_sizes(75.20, 55.72, 44.575, 42.16), _PAPER),
    ("wikitext-2-raw", "stride 1024", "perplexity"): Table(_sizes(29.94, None, 19.44, None), _STRIDE),
    ("wikitext-2-raw", "stride 512", "perplexity"): Table(_sizes(None, None, 16.44, None), _STRIDE),
}


def published(task: str, convention: str, metric: str) -> dict[str, float]:
    """The published figures of the four released sizes, by model; empty where none are known."""
    # the paper tells neither its stride nor where it cut a text into context and ending
    family = "paper" if convention.startswith("paper, ") else convention
    table = EVALUATIONS.get((task, family, metric))
    return dict(table.figures) if table else {}


# ---------------------------------------------------------------------------------------------------------------------
# Figures measured on one's own data

REFERENCE_FILE = "reference.json"


def save_reference(directory: str | Path, model: str, figures: dict[str, Any]) -> Path:
    """Keep a model's figures on a data set's validation split beside it, in `reference.json`, by the model's name.

    figures: "loss" in nats a token, "bits_per_byte", "tokens", and "tokenizer", whose tokens they are. Others stay.
    """
    path = Path(directory) / REFERENCE_FILE
    write_json(path, read_references(directory) | {model: figures})
    return path


def read_references(directory: str | Path) -> dict[str, dict[str, Any]]:
    """What `save_reference` kept, by model; empty where nothing was. Raises ValueError when the file is damaged."""
    path = Path(directory) / REFERENCE_FILE
    if not path.exists():
        return {}
    try:
        references = dict(json.loads(path.read_text(encoding="utf-8")))
        if not all({"loss", "tokenizer"} <= set(figures) for figures in references.values()):
            raise ValueError("a model without a loss or a tokenizer")
        return references
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, and save the reference again") from None


def published_losses(source: str) -> dict[str, float]:
    """The released models' validation losses on a data set, in nats a token, by model; empty where none are known."""
    tables = (table for name, table in VALIDATION_LOSS.items() if re.search(rf"(^|[ /]){name}($|[,: ])", source))
    return next((table.figures for table in tables), {})


def losses_to_beat(directory: str | Path, source: str, tokenizer: str) -> list[tuple[str, float]]:
    """(whose, nats a token) of the lines to draw beside a run on a data set: the figures kept beside it for the same
    `tokenizer`, and for the released 124M, where it was not measured here, the published one for the source."""
    kept = read_references(directory)
    lines = [(name, float(figures["loss"])) for name, figures in kept.items() if figures["tokenizer"] == tokenizer]
    released = published_losses(source)
    if "gpt2" not in kept and tokenizer == "gpt2" and "gpt2" in released:
        lines.append(("gpt2, published", released["gpt2"]))
    return lines
