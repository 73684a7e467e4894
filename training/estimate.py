"""Estimates of what a run needs: FLOPs, memory, and windows per forward pass."""

from __future__ import annotations

import torch

from data.loader import ceil_div
from device import find_card
from kernels.loss import MATMUL_ROWS
from model import GPT, GPTConfig
from training.config import Config


def flops_per_token(model: GPTConfig, n_parameters: int, sequence_length: int) -> int:
    """Return the FLOPs of one token's forward and backward pass: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B)."""
    return 6 * n_parameters + 12 * model.n_layer * model.n_embd * sequence_length


def peak_flops(device: torch.device | str) -> float | None:
    """Return the peak rate of matrix products in FLOP/s of a device or of a GPU name; None if it is not known.

    The rate is that of the card's 16-bit precision in `device.CARDS`.
    """
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    card = find_card(device)
    return None if card is None else card.peak_flops


def count_parameters(model: GPTConfig) -> int:
    """Return the number of parameters without allocating them; the tied head counts once."""
    with torch.device("meta"):
        return GPT(model).num_parameters()


def estimate_memory(
    model: GPTConfig, rows: int, sequence_length: int, *, dtype: torch.dtype, shards: int = 1, recompute: bool = False
) -> dict[str, int]:
    """Estimate the peak bytes of tensors on one process, by part, for micro-batches of `rows` windows.

    The peak is that of the second micro-batch of a step and of later ones, when gradients exist. The memory that an
    allocator holds in addition is not counted.

    Args:
        shards: number of processes that divide weights and optimizer state between them (FSDP).
        recompute: activation checkpointing, with which a block keeps only its input.
    """
    n_parameters, width = count_parameters(model), model.n_embd
    size = torch.finfo(dtype).bits // 8
    tokens = rows * sequence_length
    # What autograd keeps of a block, in bytes per token and channel: the residual stream twice, in float32; and in
    # `dtype` the outputs of both LayerNorms (2), queries, keys and values (3), the attention output and its copy as the
    # input of c_proj (2), and the output of c_fc (4). GELU's output is not kept.
    of_a_block = 2 * 4 + (2 + 3 + 2 + 4) * size
    kept = model.n_layer * (4 if recompute else of_a_block) + 2 * 4  # plus input and output of ln_f
    # The peak is in one of two places. In the backward pass of a block, two tensors of width 4 C exist (the output of
    # GELU and its gradient, then the gradients of GELU's output and input), and two float32 gradients of the residual
    # stream. In the loss, a chunk of logits exists, and on a CPU also 64 rows of it in float32.
    backward = tokens * width * (2 * 4 * size + 2 * 4 + (of_a_block if recompute else 0))
    chunk = min(ceil_div(tokens, 2), MATMUL_ROWS) * model.vocab_size
    loss = chunk * size + 64 * model.vocab_size * 4
    head = 4 * model.vocab_size * width  # the head's gradient is kept until the embedding's gradient is added
    # Matrix products in less than float32 use copies of the weights. FSDP gathers a block and prefetches the next one
    # in `dtype`; it gathers embeddings and head in float32. It shards the gradients only after the last micro-batch.
    embeddings = (model.vocab_size + model.block_size) * width
    copied, gathered = n_parameters, 0
    if shards > 1:
        copied, gathered = embeddings, 4 * embeddings + size * 2 * (n_parameters - embeddings) // model.n_layer
    copies = size * copied if dtype != torch.float32 else 0
    return {
        "weights": 4 * n_parameters // shards + gathered + copies,
        "gradients": 4 * n_parameters,
        "optimizer": 8 * n_parameters // shards,
        "activations": tokens * width * kept + max(0, backward - loss),
        "logits": loss + head,
    }


def needed_memory(config: Config, model: GPTConfig, rows: int, dtype: torch.dtype, shards: int) -> dict[str, int]:
    """Return `estimate_memory` for a run's configuration."""
    recompute = config.system.activation_checkpointing
    return estimate_memory(model, rows, config.data.sequence_length, dtype=dtype, shards=shards, recompute=recompute)


def most_windows(config: Config, world_size: int) -> int:
    """Return the largest number of windows of a global batch that one process gets."""
    return max(1, ceil_div(config.data.batch_tokens // config.data.sequence_length, world_size))
