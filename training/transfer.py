"""Compute learning rates and weight decay for a model from those of a smaller model, by the rule of docs/transfer.md.

The rule changes the learning rates and the weight decay only. The initialization is GPT-2's, and the forward pass has
no multipliers, so checkpoints of every size are standard GPT-2 models. `scripts/transfer.py` measured the rule.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from model import GPTConfig
from training.config import Optim


class Size(NamedTuple):
    """The sizes that the rates depend on: the width of the residual stream in channels, and the number of blocks."""

    width: int
    layers: int


class Powers(NamedTuple):
    """The exponents p and q in the rule that a learning rate is proportional to width^p * layers^q."""

    width: float
    layers: float


class Recipe(NamedTuple):
    """Settings that were tuned for a small model, and its size."""

    size: Size
    optim: Optim


RULE = {  # (optim.name, field of optim) -> powers of the size
    ("muon", "muon_lr"): Powers(-0.25, 0.0),
    ("muon", "lr"): Powers(-0.5, 0.0),
    ("adamw", "lr"): Powers(-0.5, 0.0),
}
# optim.name -> settings for a small model. The learning rates were the best in the longest runs of docs/recipes.md that
# compared several rates. For Muon, 0.02 and 0.03 gave nearly equal losses there, so the rate here is between them.
TUNED = {
    "muon": Recipe(Size(128, 3), Optim(name="muon", muon_lr=0.025, lr=1e-2, weight_decay=0.1)),
    "adamw": Recipe(Size(128, 3), Optim(name="adamw", lr=2e-3, weight_decay=0.1)),
}


def scale(optimizer: str, field: str, old: Size, new: Size) -> float:
    """Return the factor by which the best value of a field changes from a model of size `old` to one of size `new`.

    Learning rate times weight decay is the fraction of a weight that decays in a step. For the matrices in the blocks,
    this product stays constant (Wang and Aitchison 2024, https://arxiv.org/abs/2405.13698). So the factor of the weight
    decay is the inverse of the factor of their learning rate.

    Args:
        optimizer: adamw or muon, as in `optim.name`.
        field: muon_lr (with muon only), lr or weight_decay.

    Raises KeyError for another optimizer or field.
    """
    if field == "weight_decay":
        return 1 / scale(optimizer, "muon_lr" if optimizer == "muon" else "lr", old, new)
    powers = RULE[optimizer, field]
    return (new.width / old.width) ** powers.width * (new.layers / old.layers) ** powers.layers


def transfer(optim: Optim, old: Size, new: Size) -> Optim:
    """Return settings for a model of size `new` from those that were tuned for a model of size `old`.

    Learning rates and weight decay change. All other fields stay the same.
    """
    fields = [*(field for name, field in RULE if name == optim.name), "weight_decay"]
    values = {field: getattr(optim, field) * scale(optim.name, field, old, new) for field in fields}
    return dataclasses.replace(optim, **values)


def describe_rates(optim: Optim, model: GPTConfig) -> str:
    """Return a line with the learning rates and weight decay that the rule gives, and those of the configuration."""
    tuned = TUNED[optim.name]
    predicted = transfer(tuned.optim, tuned.size, Size(model.n_embd, model.n_layer))
    fields = [*(field for name, field in RULE if name == optim.name), "weight_decay"]
    values = ", ".join(f"optim.{field} {getattr(predicted, field):.2g}" for field in fields)
    present = ", ".join(f"{getattr(optim, field):g}" for field in fields)
    return (
        f"from the rates tuned at width {tuned.size.width}, {tuned.size.layers} layers follow (docs/transfer.md): "
        f"{values}; the configuration has {present}"
    )
