"""Published results of the released GPT-2 models, to compare with our results.

The models have the same names as on the hub: gpt2 (124M), gpt2-medium (355M), gpt2-large (774M), gpt2-xl (1558M).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from files import write_json


class Published(NamedTuple):
    """The published value of a metric for each model, by the model's name, and the source of these values."""

    values: dict[str, float]
    source: str


def _by_size(*values: float | None) -> dict[str, float]:
    names = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


# Validation losses of the released models in nats per token. Each key is a regular expression that must match a whole
# word of a dataset's `source` (see DatasetMeta in data/shards.py), because FineWeb, FineWeb-Edu and FineWeb 2 are
# different datasets.
VALIDATION_LOSS: dict[str, Published] = {
    "openwebtext": Published(_by_size(3.12, 2.84, 2.67, 2.54), "nanoGPT, README"),
    "fineweb(-10b|10B(-gpt2)?)?": Published(_by_size(3.424958, 3.083089, 3.000580, 2.831273), "llm.c"),
    "fineweb-edu(-10b)?": Published(_by_size(3.2924, None, None, None), "build-nanogpt"),
}

_BUILD_NANOGPT = "124M and 1558M: build-nanogpt, hellaswag.py; the others: published in the same convention"
_HARNESS = "lm-evaluation-harness, as quoted in build-nanogpt, hellaswag.py"
_HARNESS_LAMBADA = "lm-evaluation-harness, lambada_openai"
_PAPER = "Radford et al. 2019, table 3"
_STRIDE = "Hugging Face's perplexity script"

# Results of the released models. A key is (task, convention, metric), in the names that the results of eval.run have.
# The convention says how the task is scored. Accuracies are fractions.
EVALUATIONS: dict[tuple[str, str, str], Published] = {
    ("hellaswag", "completion", "acc"): Published(_by_size(0.2859, None, None, 0.3842), _BUILD_NANOGPT),
    ("hellaswag", "completion", "acc_norm"): Published(_by_size(0.2955, 0.3752, 0.4320, 0.4893), _BUILD_NANOGPT),
    ("hellaswag", "harness", "acc"): Published(_by_size(0.2892, None, None, 0.4004), _HARNESS),
    ("hellaswag", "harness", "acc_norm"): Published(_by_size(0.3114, None, None, 0.5089), _HARNESS),
    ("lambada_openai", "harness", "acc"): Published(_by_size(0.3256, None, None, None), _HARNESS_LAMBADA),
    ("lambada_openai", "harness", "perplexity"): Published(_by_size(40.06, None, None, 10.63), _HARNESS_LAMBADA),
    ("lambada_openai", "paper", "acc"): Published(_by_size(0.4599, 0.5548, 0.6012, 0.6324), _PAPER),
    ("lambada_openai", "paper", "perplexity"): Published(_by_size(35.13, 15.60, 10.87, 8.63), _PAPER),
    ("cbt-cn", "paper", "acc"): Published(_by_size(0.8765, 0.9235, 0.9345, 0.9330), _PAPER),
    ("cbt-ne", "paper", "acc"): Published(_by_size(0.834, 0.871, 0.880, 0.8905), _PAPER),
    ("wikitext-2", "paper", "word_perplexity"): Published(_by_size(29.41, 22.76, 19.93, 18.34), _PAPER),
    ("ptb", "paper", "word_perplexity"): Published(_by_size(65.85, 47.33, 40.31, 35.76), _PAPER),
    ("enwik8", "paper", "bits_per_byte"): Published(_by_size(1.16, 1.01, 0.97, 0.93), _PAPER),
    ("text8", "paper", "bits_per_byte"): Published(_by_size(1.17, 1.06, 1.02, 0.98), _PAPER),
    ("wikitext-103", "paper", "word_perplexity"): Published(_by_size(37.50, 26.37, 22.05, 17.48), _PAPER),
    ("1bw", "paper", "word_perplexity"): Published(_by_size(75.20, 55.72, 44.575, 42.16), _PAPER),
    ("wikitext-2-raw", "stride 1024", "perplexity"): Published(_by_size(29.94, None, 19.44, None), _STRIDE),
    ("wikitext-2-raw", "stride 512", "perplexity"): Published(_by_size(None, None, 16.44, None), _STRIDE),
}


def published(task: str, convention: str, metric: str) -> dict[str, float]:
    """Return the published value of a metric for each model, by the model's name; empty if no value is known."""
    # The paper states neither its stride nor how it split a text into context and continuation. So its results have the
    # convention "paper", and are shown for every convention that begins with "paper, ".
    family = "paper" if convention.startswith("paper, ") else convention
    found = EVALUATIONS.get((task, family, metric))
    return dict(found.values) if found else {}


# ---------------------------------------------------------------------------------------------------------------------
# Results measured on a user's own data

REFERENCE_FILE = "reference.json"


def save_reference(directory: str | Path, model: str, results: dict[str, Any]) -> Path:
    """Store a model's results on the validation split of a dataset in the dataset's `reference.json`.

    The entries of other models do not change. Returns the path of the file.

    Args:
        results: "loss" in nats per token, "bits_per_byte", "tokens" (the number of scored tokens), and "tokenizer" (the
            kind of the tokenizer).
    """
    path = Path(directory) / REFERENCE_FILE
    write_json(path, read_references(directory) | {model: results})
    return path


def read_references(directory: str | Path) -> dict[str, dict[str, Any]]:
    """Return the results that `save_reference` stored, by the model's name. The result is empty if there are none.

    Raises ValueError if the file is damaged.
    """
    path = Path(directory) / REFERENCE_FILE
    if not path.exists():
        return {}
    try:
        references = dict(json.loads(path.read_text(encoding="utf-8")))
        if not all({"loss", "tokenizer"} <= set(results) for results in references.values()):
            raise ValueError("a model has no loss or no tokenizer")
        return references
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete the file and save the references again") from None


def published_losses(source: str) -> dict[str, float]:
    """Return the released models' validation losses on the dataset with this `source`, by the model's name.

    The losses are in nats per token. The result is empty if no loss is known.
    """
    found = (losses for name, losses in VALIDATION_LOSS.items() if re.search(rf"(^|[ /]){name}($|[,: ])", source))
    return next((losses.values for losses in found), {})


def losses_to_beat(directory: str | Path, source: str, tokenizer: str) -> list[tuple[str, float]]:
    """Return the losses with which a run on this dataset can be compared, as pairs (model, nats per token).

    These are the losses in the dataset's `reference.json` that were measured with the same tokenizer. If the tokenizer
    is GPT-2's, a known published loss of the released 124M model is added, unless the file has a loss of this model.
    """
    measured = read_references(directory)
    lines = [(name, float(results["loss"])) for name, results in measured.items() if results["tokenizer"] == tokenizer]
    released = published_losses(source)
    if "gpt2" not in measured and tokenizer == "gpt2" and "gpt2" in released:
        lines.append(("gpt2, published", released["gpt2"]))
    return lines
