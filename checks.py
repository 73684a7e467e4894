"""Checks of a model's arguments: the fields of its configuration, the shapes of tensors and the range of ids."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

# The largest size that a config.json may contain. A larger number is a mistake, and a model of that size could fill the
# memory.
LARGEST_FIELD = 2**24


def check_config(config: dict[str, Any], activations: Collection[str]) -> None:
    """Raise ValueError, naming the field, if a field of GPTConfig has an impossible value.

    activations contains the possible values of the field `activation`.
    """
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_inner"):
        value = config[name]
        if value is None and name == "n_inner":
            continue
        check_positive(name, value)
    if not isinstance(config["dropout"], (int, float)) or not 0.0 <= config["dropout"] < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {config['dropout']!r}")
    check_shared_fields(config)
    if config["activation"] not in activations:
        raise ValueError(f"activation is {config['activation']!r}, expected one of {', '.join(activations)}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless the field `name` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_shared_fields(config: dict[str, Any]) -> None:
    """Check fields that have the same names in GPTConfig and config.json. Raises ValueError, naming the field.

    n_embd and n_head must already be known to be positive integers.
    """
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"n_embd ({config['n_embd']}) must be divisible by n_head ({config['n_head']})")
    epsilon = config["layer_norm_epsilon"]
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ValueError(f"layer_norm_epsilon must be in (0, 1), got {epsilon!r}")
    check_attention(config)


def check_attention(config: dict[str, Any]) -> None:
    """Raise ValueError, naming the field, if `config` selects an attention that is not implemented.

    The fields attention, window_size, lsh_buckets and lsh_rounds may be missing if the attention is full.
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


def check_ids(what: str, ids: Tensor, limit: int, limit_name: str, ignored: int | None = None) -> None:
    """Raise ValueError, naming `what` and `limit_name`, unless every id is in 0..limit-1 or equal to `ignored`.

    The check is skipped on a GPU, where it would make the host wait for the device, and inside torch.compile, where
    reading a value would break the graph.
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    if ignored is not None:
        ids = ids.masked_fill(ids == ignored, 0)
    low, high = (int(value) for value in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high >= limit:
        raise ValueError(f"{what} hold {low if low < 0 else high}, outside 0..{limit - 1} ({limit_name} {limit})")


def check_tokens(
    config: Any,
    past: int,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    targets: Tensor | None,
    labels: Tensor | None,
    ignored: int,
) -> tuple[int, int]:
    """Check the tokens and targets of `GPT.forward`. Return the number of sequences, B, and the length of each, T.

    Args:
        config: the model's GPTConfig.
        past: the number of cached tokens.
        ignored: the id that marks a position without a target in `targets` and `labels`.

    Raises ValueError, see `GPT.forward`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"exactly one of input_ids and inputs_embeds is needed, got {given}")
    if input_ids is not None:
        check_shape("input_ids", input_ids, ("B", "T"))
        check_ids("input_ids", input_ids, config.vocab_size, "vocab_size")
        B, T = input_ids.shape
    else:
        assert inputs_embeds is not None
        check_shape("inputs_embeds", inputs_embeds, ("B", "T", config.n_embd))
        B, T, _ = inputs_embeds.shape
    if not 0 < T <= config.block_size - past:
        raise ValueError(f"{past} cached + {T} new tokens, expected 1 to block_size {config.block_size} in all")
    if targets is not None and labels is not None:
        raise ValueError("got both targets (aligned) and labels (shifted here): give one of them")
    for name, ids in (("targets", targets), ("labels", labels)):
        if ids is not None:
            check_shape(name, ids, (B, T))
            scored = ids[:, 1:] if name == "labels" else ids
            check_ids("targets", scored, config.vocab_size, "vocab_size", ignored)
    return B, T


def check_masks(
    config: Any,
    cache: Any,
    B: int,
    T: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    head_mask: Tensor | None,
) -> None:
    """Check the masks and positions of `GPT.forward` for B sequences of T new tokens.

    Args:
        config: the model's GPTConfig.
        cache: the KVCache; None if the call uses no cache.

    Raises ValueError, see `GPT.forward`.
    """
    if attention_mask is not None:
        past = 0 if cache is None else cache.length
        check_shape("attention_mask (batch, past + new tokens)", attention_mask, (B, past + T))
    if position_ids is not None:
        check_shape("position_ids", position_ids, (B, T), (T,))
        check_ids("position_ids", position_ids, config.block_size, "block_size")
    if document_ids is not None:
        check_shape("document_ids", document_ids, (B, T))
        masked = attention_mask is not None or cache is not None
        if masked or not config.causal or config.attention != "full":
            raise ValueError("document_ids need causal=True, attention full, no cache and no attention_mask")
    if head_mask is not None:
        check_shape("head_mask (layers, heads)", head_mask, (config.n_head,), (config.n_layer, config.n_head))


def check_encoder_output(config: Any, B: int, memory: Tensor | None, mask: Tensor | None) -> None:
    """Check `encoder_hidden_states` (memory) and `encoder_attention_mask` (mask) of `GPT.forward` for B sequences.

    Raises ValueError, see `GPT.forward`.
    """
    if memory is not None:
        if not config.cross_attention:
            raise ValueError("encoder_hidden_states needs a model with cross_attention=True")
        check_shape("encoder_hidden_states", memory, (B, "M", config.n_embd))
    if mask is not None:
        if memory is None:
            raise ValueError("encoder_attention_mask needs the encoder_hidden_states that it masks")
        check_shape("encoder_attention_mask", mask, (B, memory.size(1)))
