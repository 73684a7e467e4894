"""Checks of what the model is given: the fields of its configuration, the shapes of tensors and the range of ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST_FIELD = 2**24  # a larger number in a configuration is an error, and could take all memory before it is noticed


def check_config(config: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, if a field of GPTConfig has an impossible value."""
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner"):
        value = config[name]
        if value is None and name == "n_inner":
            continue
        check_positive(name, value)
    if not isinstance(config["dropout"], (int, float)) or not 0.0 <= config["dropout"] < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {config['dropout']!r}")
    check_shared_fields(config)


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless the field `name` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_shared_fields(config: dict[str, Any]) -> None:
    """Check the fields that have the same name in GPTConfig and in transformers' config.json.

    The sizes must be positive integers already. Raises ValueError, naming the field.
    """
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"n_embd ({config['n_embd']}) must be divisible by n_head ({config['n_head']})")
    epsilon = config["layer_norm_epsilon"]
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ValueError(f"layer_norm_epsilon must be in (0, 1), got {epsilon!r}")
    check_attention(config)


def check_attention(config: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, if the fields of GPTConfig ask for an attention that does not exist.

    Fields may be missing: a config.json has the attention fields only if attention is not full.
    """
    attention = config.get("attention", "full")
    if attention not in ("full", "window", "lsh"):
        raise ValueError(f"attention must be full, window or lsh, got {attention!r}")
    for name in ("window_size", "lsh_buckets", "lsh_rounds"):
        value = config.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_FIELD:
            raise ValueError(f"{name} must be an integer from 1 to {LARGEST_FIELD:,}, got {value!r}")
    if config.get("lsh_buckets", 1) > 1 and config["lsh_buckets"] % 2:
        raise ValueError(f"lsh_buckets must be 1 or even, got {config['lsh_buckets']}")
    if attention != "full" and not config["causal"]:
        raise ValueError(f"attention {attention} needs causal=True: use attention full")
    if attention == "lsh" and config["dropout"]:
        raise ValueError(f"dropout must be 0 with attention lsh, which does not implement it, got {config['dropout']}")


def check_shape(what: str, tensor: Tensor, *expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless the tensor has one of the expected shapes. A letter in a shape matches any size."""
    for shape in expected:
        if len(shape) == tensor.dim() and all(
            isinstance(n, str) or n == m for n, m in zip(shape, tensor.shape, strict=True)
        ):
            return
    shapes = " or ".join(str(shape).replace("'", "") for shape in expected)
    raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected {shapes}")


def check_ids(what: str, ids: Tensor, limit: int, limit_name: str) -> None:
    """Raise ValueError unless all ids are in 0..limit-1.

    Inside torch.compile and on a GPU, the check is skipped: it would make the host wait for the device.
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    low, high = (int(value) for value in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high >= limit:
        raise ValueError(f"{what} hold {low if low < 0 else high}, outside 0..{limit - 1} ({limit_name} {limit})")
