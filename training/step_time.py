"""The expected duration of a training step, from counted FLOPs, bytes and collective operations.

The constants of this module say which fraction of its peak FLOP/s and bandwidth a card reaches. They were chosen so
that the estimates for GPT-2 124M differ by at most 7% from the rates that other projects have published (PUBLISHED). On
one H200, the estimates were 2% (AdamW) and 5% (Muon) too short. No other card or group of cards was measured.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from data.loader import ceil_div
from device import Card
from kernels.cuda_loss import padded, rows_at_a_time
from model import GPTConfig
from training.config import Config
from training.estimate import Workload
from training.metrics import duration

# Tokens per second of one card for GPT-2 124M with 1,024 tokens per sequence: (card, project, tokens/s)
PUBLISHED = [("H100", "llm.c", 468_000), ("A100", "llm.c", 218_000), ("RTX 4090", "nanoGPT", 106_000)]
# Fractions of the peak FLOP/s that large matrix products and causal attention reach. The fastest cards reach less,
# because their power limit lowers the clock rate.
PRODUCTS, ATTENTION = 0.77, 0.40
PRODUCTS_OF_FAST_CARDS, ATTENTION_OF_FAST_CARDS = 0.60, 0.28
FAST_CARD = 700e12  # peak FLOP/s; a card with a higher peak counts as a fast card
BANDWIDTH, LINK = 0.9, 0.8  # fractions of the bandwidths of memory, and of the link between GPUs, that are reached
NODE_SIZE, NETWORK = 8, 8 * 50e9  # GPUs of a machine, and its bytes/s to other machines: eight adapters of 400 Gbit/s
# Seconds of a collective operation in addition to the transfer: a constant, and the seconds for each GPU.
LATENCY, LATENCY_PER_GPU = 20e-6, 2e-6
# Bytes of memory traffic for each token and channel of a block, outside of matrix products, with 2 bytes per number: 40
# in the forward pass (LayerNorm, residual stream, GELU), and 110 in the backward pass.
ELEMENTWISE = 150
# Tokens of all texts in HellaSwag, including padding. These texts are short, so the forward pass of a token takes
# HELLASWAG_SLOWDOWN times as long as in training.
HELLASWAG_TOKENS, HELLASWAG_SLOWDOWN = 1.7e6, 3.0
# Tokens of each sampled text, and the seconds of a pass that adds one token to every text, measured on an H200. These
# seconds hardly depend on the number of texts.
TOKENS_OF_SAMPLES, SECONDS_OF_A_TOKEN = 200, 0.8e-3
SLOW_STEP = 60.0  # seconds; a slower step gives a warning
SLOWEST_CPU = 1e10  # FLOP/s that every CPU reaches; if a step is not slow at this rate, the CPU is not measured
CPU_SHARE = 0.75  # fraction of a CPU's rate of matrix products that a step reaches; measured for 124M: 0.78 to 0.81


class StepTime(NamedTuple):
    """The seconds that a card needs for each part of an optimizer step. They are equal on all cards of the run."""

    compute: float  # blocks, forward and backward
    loss: float  # head and cross-entropy, forward and backward
    communication: float  # only the seconds that do not overlap with computation
    optimizer: float
    evaluation: float  # validation, HellaSwag and samples, divided by the number of steps between them

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self)


def estimate_step(config: Config, workload: Workload, card: Card, rows: int, *, sharded: bool) -> StepTime | None:
    """Estimate a step with micro-batches of `rows` windows. Return None if the card's peak for the dtype is not known.

    Args:
        card: the type of GPU, the same for all processes.
        sharded: FSDP instead of DDP.
    """
    model, count, dtype = workload.model, workload.hardware.count, workload.hardware.dtype
    peak = card.peak_in(dtype)
    if peak is None:
        return None
    windows, T = workload.windows, workload.sequence_length
    passes, tokens = ceil_div(windows, rows), windows * T
    compute = tokens * seconds_of_a_token(model, card, peak, T) * (4 / 3 if workload.recompute else 1)
    loss = tokens * seconds_of_loss(model, card, peak, dtype)
    last_backward = (compute + loss) / passes * 2 / 3
    communication = seconds_of_communication(workload, card, passes, last_backward, sharded=sharded)
    forward = (compute + loss) / tokens / 3
    evaluation = 0.0
    if config.eval.every:
        validation = config.eval.tokens / count * forward
        if config.eval.samples:
            validation += TOKENS_OF_SAMPLES * SECONDS_OF_A_TOKEN
        evaluation += validation / config.eval.every
        evaluation += (config.eval.final_tokens or 0) / count * forward / config.optim.steps
        if config.eval.hellaswag:
            hellaswag = HELLASWAG_TOKENS / count * forward * HELLASWAG_SLOWDOWN
            evaluation += hellaswag / max(config.eval.every, config.eval.hellaswag_every)
    optimizer = seconds_of_optimizer(workload, card, peak, sharded=sharded)
    return StepTime(compute, loss, communication, optimizer, evaluation)


def fractions(card: Card) -> tuple[float, float]:
    """Return the fractions of its peak that a card reaches in products and in attention."""
    if card.peak_flops > FAST_CARD:
        return PRODUCTS_OF_FAST_CARDS, ATTENTION_OF_FAST_CARDS
    return PRODUCTS, ATTENTION


def seconds_of_a_token(model: GPTConfig, card: Card, peak: float, sequence_length: int) -> float:
    """Return the seconds of one token's forward and backward pass through the blocks."""
    products, attention = fractions(card)
    width, layers = model.n_embd, model.n_layer
    # 6 FLOPs for each weight. In each block, causal attention has half of 4 T C FLOPs in the forward pass, and 2.5
    # times as many in the backward pass: 7 T C together.
    return (
        6 * 12 * width**2 * layers / (products * peak)
        + 7 * sequence_length * width * layers / (attention * peak)
        + ELEMENTWISE * width * layers / (BANDWIDTH * card.bandwidth)
    )


def seconds_of_loss(model: GPTConfig, card: Card, peak: float, dtype: torch.dtype) -> float:
    """Return the seconds of one token's loss: three matrix products, and the logits read twice and written once."""
    columns = padded(model.vocab_size)
    rows = rows_at_a_time(card.memory * 2**30, model.vocab_size, dtype.itemsize)
    # The loss handles `rows` rows of logits at a time. For each such chunk, the head's float32 gradient is read and
    # written: 4 + 4 bytes for each weight of the head.
    traffic = 3 * columns * dtype.itemsize + 8 * columns * model.n_embd / rows
    return 6 * columns * model.n_embd / (fractions(card)[0] * peak) + traffic / (BANDWIDTH * card.bandwidth)


def seconds_of_communication(
    workload: Workload, card: Card, passes: int, last_backward: float, *, sharded: bool
) -> float:
    """Return the seconds of a step in which the GPUs wait for collective operations.

    `passes` is the number of micro-batches of a step, and `last_backward` the seconds of one backward pass.
    """
    model, count, dtype = workload.model, workload.hardware.count, workload.hardware.dtype
    if count == 1:
        return 0.0
    rate = LINK * (card.link if count <= NODE_SIZE else min(card.link, NETWORK))
    latency = LATENCY + LATENCY_PER_GPU * count

    def seconds(n_bytes: float, operations: int) -> float:
        """Return the seconds of `operations` all-gathers or reduce-scatters of tensors with `n_bytes` in total."""
        return n_bytes * (count - 1) / count / rate + operations * latency

    parameters, embeddings = workload.n_parameters, (model.vocab_size + model.block_size) * model.n_embd
    blocks = parameters - embeddings
    if not sharded:
        # An all-reduce is a reduce-scatter and an all-gather. The embeddings' gradient is complete only at the end of
        # the backward pass, so at least the all-reduce of this gradient cannot overlap with the pass.
        reduce = 2 * seconds(4 * parameters, 1 + model.n_layer)
        return max(2 * seconds(4 * embeddings, 1), reduce - last_backward)
    gather = seconds(2 * dtype.itemsize * blocks, 2 * model.n_layer)  # once for forward, once for backward
    reduce = seconds(4 * blocks, model.n_layer)
    around = seconds(4 * embeddings, 1)  # for embeddings and head, where no computation can overlap
    # A forward and a backward pass together take 1.5 times as long as the backward pass.
    return (passes + 1) * around + max(0.0, passes * (gather - 1.5 * last_backward)) + max(0.0, reduce - last_backward)


def seconds_of_optimizer(workload: Workload, card: Card, peak: float, *, sharded: bool) -> float:
    """Return the seconds of clipping and the optimizer: memory traffic, and Muon's products."""
    model, count = workload.model, workload.hardware.count
    traffic = 40 * workload.n_parameters / (count if sharded else 1)  # bytes per parameter: AdamW 28, clipping 12
    seconds = traffic / (BANDWIDTH * card.bandwidth)
    if workload.muon:
        # Muon makes five iterations, each with matrix products of 2 r² c, 2 r³ and 2 r² c FLOPs for r rows and c
        # columns. Each block has four square matrices and two with 4 C columns. The processes divide the matrices of
        # each shape between them. These products are assumed to reach 0.6 times the rate of other products.
        of_a_block = 5 * model.n_embd**3 * (4 * 6 + 2 * (2 * 8 + 2))
        seconds += of_a_block * ceil_div(model.n_layer, count) / (0.6 * fractions(card)[0] * peak)
    return seconds


def measure_matmul_rate(dtype: torch.dtype, width: int = 768) -> float:
    """Measure, in a fraction of a second, the FLOP/s of this CPU in a matrix product of a model with this width."""
    a, b = torch.ones(1024, width, dtype=dtype), torch.ones(width, 4 * width, dtype=dtype)
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        durations.append(time.perf_counter() - start)
    return 2 * a.numel() * b.size(1) / min(durations)


def seconds_on_cpu(workload: Workload) -> float:
    """Estimate the seconds of a step on this CPU. Its rate is measured now, so all cores compute for a moment."""
    hardware = workload.hardware
    return workload.flops / (CPU_SHARE * measure_matmul_rate(hardware.dtype)) / hardware.count


def warn_of_slow_cpu(workload: Workload, device: torch.device, steps: int) -> list[str]:
    """Return a warning if the device is a CPU on which a step takes more than SLOW_STEP seconds."""
    if device.type != "cpu" or workload.flops / workload.hardware.count < SLOW_STEP * SLOWEST_CPU:
        return []
    seconds = seconds_on_cpu(workload)
    if seconds < SLOW_STEP:
        return []
    return [
        f"on this CPU, a step is estimated to take {duration(seconds)}, and the run "
        f"{duration(seconds * steps)}: this configuration is for a GPU. For a CPU, there is "
        f"configs/shakespeare.yaml; or lower data.batch_tokens"
    ]
