"""What a run will take before it is started: FLOPs, memory and time; what `micro_batch: auto` and --dry-run go by."""

from __future__ import annotations

import os
import re

import psutil
import torch

from data.loader import ceil_div
from kernels.loss import MATMUL_ROWS
from model import GPT, GPTConfig
from training.config import Config, Flags
from training.inputs import find_weights, model_shape, open_inputs, warnings
from training.parallel import Processes

# Dense bf16 peaks in FLOP/s by words in the device's name, the more particular first (vendors' data sheets).
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
OTHER_MODEL = r"(?! (Ti|D|NVL|Laptop)\b)(?!.*\bMIG\b)"  # another card, or a part of one: the peak is not known


def flops_per_token(shape: GPTConfig, n_parameters: int, sequence_length: int) -> int:
    """FLOPs of one token's forward and backward pass: 6 N + 12 L C T (PaLM, Chowdhery et al. 2022, appendix B)."""
    return 6 * n_parameters + 12 * shape.n_layer * shape.n_embd * sequence_length


def peak_flops(device: torch.device | str) -> float | None:
    """The dense bf16 peak in FLOP/s of a device, or of a GPU by its name; None where it is not known."""
    if isinstance(device, torch.device):
        device = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b{OTHER_MODEL}", device)), None)


def count_parameters(shape: GPTConfig) -> int:
    """The number of parameters, the tied head counted once, without making any."""
    with torch.device("meta"):
        return GPT(shape).num_parameters()


def estimate_memory(
    shape: GPTConfig, rows: int, sequence_length: int, *, dtype: torch.dtype, shards: int = 1, recompute: bool = False
) -> dict[str, int]:
    """Bytes of tensors on one process at its fullest, by part, for micro-batches of `rows` windows: the second
    of a step and later ones, when gradients exist.

    Under FSDP `shards` processes share weights and optimizer state; with `recompute` (activation checkpointing) a block
    keeps its input alone. What an allocator holds besides is not counted.
    """
    n_parameters, width = count_parameters(shape), shape.n_embd
    size = torch.finfo(dtype).bits // 8
    tokens = rows * sequence_length
    # What autograd keeps of a block, per token and channel: the residual stream twice, in float32; in `dtype` both
    # LayerNorms' outputs, queries, keys, values and their mix (once more as c_proj's input), and c_fc's 4, not GELU's.
    of_a_block = 2 * 4 + (2 + 3 + 2 + 4) * size
    kept = shape.n_layer * (4 if recompute else of_a_block) + 2 * 4  # and both sides of ln_f
    # At a time, either one block goes backward (the gradient of GELU's output beside that output, or the gradient
    # of its input, each 4 wide; two gradients of the stream), or the loss is computed, with a chunk of logits, and on
    # CPU 64 rows of them in float32.
    backward = tokens * width * (2 * 4 * size + 2 * 4 + (of_a_block if recompute else 0))
    chunk = min(ceil_div(tokens, 2), MATMUL_ROWS) * shape.vocab_size
    loss = chunk * size + 64 * shape.vocab_size * 4
    head = 4 * shape.vocab_size * width  # its gradient waits for the embedding's, which comes last
    # Products in less than float32 have copies of the weights. FSDP gathers a block at a time, the next one ahead, in
    # `dtype`, and in float32 what is in no block, embeddings and head; gradients stay whole until the last micro-batch.
    embeddings = (shape.vocab_size + shape.block_size) * width
    copied, gathered = n_parameters, 0
    if shards > 1:
        copied, gathered = embeddings, 4 * embeddings + size * 2 * (n_parameters - embeddings) // shape.n_layer
    copies = size * copied if dtype != torch.float32 else 0
    return {
        "weights": 4 * n_parameters // shards + gathered + copies,
        "gradients": 4 * n_parameters,
        "optimizer": 8 * n_parameters // shards,
        "activations": tokens * width * kept + max(0, backward - loss),
        "logits": loss + head,
    }


def fit_micro_batch(config: Config, shape: GPTConfig, processes: Processes, *, sharded: bool) -> int:
    """The most windows that the memory estimate allows at a time, in a part of what is free; ValueError if none."""
    if config.data.micro_batch != "auto":
        return config.data.micro_batch
    if processes.device.type == "cuda":
        free, part = torch.cuda.mem_get_info(processes.device)[0], 0.8
    else:  # the C library's heap, which is kept, fragments: up to 1.45 times the estimate was measured
        free, part = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 0.6
    share = largest_share(config, processes.world_size)
    for rows in sorted({ceil_div(share, n) for n in range(1, share + 1)}, reverse=True):
        needed = needed_memory(config, shape, rows, processes.dtype, processes.world_size if sharded else 1)
        if sum(needed.values()) <= part * free:
            return rows
    raise ValueError(
        f"one window of {config.data.sequence_length} tokens needs about {sum(needed.values()) / 2**30:.1f} GiB, and "
        f"{free / 2**30:.1f} GiB are free on {processes.device}: shorten data.sequence_length, take a smaller model, "
        f"system.activation_checkpointing true, or system.parallel fsdp on more processes"
    )


def should_shard(config: Config, shape: GPTConfig, processes: Processes) -> bool:
    """FSDP where it is asked for, or where weights, gradients and optimizer state would fill over half of a GPU."""
    if processes.world_size == 1:
        return False
    if config.system.parallel != "auto" or processes.device.type != "cuda":
        return config.system.parallel == "fsdp"
    needed = needed_memory(config, shape, 1, processes.dtype, 1)
    return sum(needed.values()) > 0.5 * torch.cuda.mem_get_info(processes.device)[0]


def needed_memory(config: Config, shape: GPTConfig, rows: int, dtype: torch.dtype, shards: int) -> dict[str, int]:
    """`estimate_memory` as a run is configured."""
    recompute = config.system.activation_checkpointing
    return estimate_memory(shape, rows, config.data.sequence_length, dtype=dtype, shards=shards, recompute=recompute)


def largest_share(config: Config, world_size: int) -> int:
    """Windows of a global batch that fall to the process with most of them."""
    return max(1, ceil_div(config.data.batch_tokens // config.data.sequence_length, world_size))


def dry_run(config: Config, processes: Processes, flags: Flags) -> str:
    """What `train.py --dry-run` prints: size, tokens, FLOPs, memory of a process by micro-batch, and days.

    `flags.dry_run` is what it would run on, as 8xH100, or empty for what it is started on. Raises ValueError or
    OSError for what is wrong with the dataset, the model or that name.
    """
    inputs = open_inputs(config, verify=flags.verify)
    shape = model_shape(config, inputs.tokenizer, find_weights(config, None))
    count, device, dtype = processes.world_size, processes.device.type, processes.dtype
    peak = peak_flops(processes.device)
    if flags.dry_run:
        number, _, device = flags.dry_run.partition("x")
        count, dtype, peak = int(number) if number.isdecimal() else 0, torch.bfloat16, peak_flops(device)
        if count < 1 or peak is None:
            raise ValueError(f"--dry-run {flags.dry_run}: expected as 8xH100, a number of {', '.join(PEAK_FLOPS)}")
    n_parameters = count_parameters(shape)
    tokens = config.optim.steps * config.data.batch_tokens
    flops = flops_per_token(shape, n_parameters, config.data.sequence_length)
    strategies = {"ddp": 1, "fsdp": count} if count > 1 else {"one process": 1}
    if config.system.parallel != "auto" and count > 1:
        strategies = {config.system.parallel: strategies[config.system.parallel]}
    share = largest_share(config, count)
    wanted = config.data.micro_batch
    sizes = [min(wanted, share)] if wanted != "auto" else [2**i for i in range(share.bit_length()) if 2**i <= 64]

    lines = [
        f"model       {n_parameters:,} parameters: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
        f"vocabulary {shape.vocab_size:,}",
        f"data        {tokens:,} tokens, {config.optim.steps:,} steps of {config.data.batch_tokens:,}: "
        f"{tokens / inputs.epoch_tokens:.2f} epochs of {config.data.dir}, which is whole",
        f"compute     {flops / 1e6:,.1f} MFLOPs a token, {flops * tokens:.3g} FLOPs in all",
        f"memory      estimated MiB of each of {count} x {device}, {str(dtype).removeprefix('torch.')}",
    ]
    header = ("strategy", "micro-batch", "weights", "gradients", "optimizer", "activations", "logits", "total")
    lines.append("".join(f"{name:>12}" for name in header))
    for name, shards in strategies.items():
        for rows in sizes:
            needed = list(needed_memory(config, shape, rows, dtype, shards).values())
            lines.append(f"{name:>12}{rows:>12}" + "".join(f"{n / 2**20:>12,.0f}" for n in (*needed, sum(needed))))
    if peak is None:
        lines.append(
            f"time        not estimated: the peak of {device} is not known; name a device, as --dry-run 8xH100"
        )
    else:
        days = flops * tokens / (flags.mfu * peak * count) / 86400
        lines.append(
            f"time        {days:,.2f} days, assuming {flags.mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s on each (--mfu)"
        )
    lines += [f"warning: {warning}" for warning in warnings(config, inputs)]
    return "\n".join(lines)
