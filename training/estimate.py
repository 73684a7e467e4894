"""Estimates of what a run needs: FLOPs, memory, and windows per forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from data.loader import ceil_div
from device import find_card
from kernels.cuda_loss import padded, rows_at_a_time
from kernels.long_attention import find_pattern
from kernels.loss import MATMUL_ROWS
from model import GPT, GPTConfig
from processes import Processes
from training.config import Config


def flops_per_token(model: GPTConfig, n_parameters: int, sequence_length: int) -> int:
    """Return the FLOPs of one token's forward and backward pass: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B).

    N is the number of parameters, L the number of blocks, C the width and T the sequence length. If `attention` is
    "window" or "lsh", T is the sequence length or the number of tokens that a token can attend to, if this is smaller.
    """
    pattern = find_pattern(asdict(model), layer=0)
    keys = sequence_length if pattern is None else min(sequence_length, pattern.most_keys)
    return 6 * n_parameters + 12 * model.n_layer * model.n_embd * keys


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device in the 16-bit precision that `device.CARDS` lists; None if it is not known."""
    card = find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if card is None else card.peak_flops


@functools.cache
def count_parameters(model: GPTConfig) -> int:
    """Return the number of parameters without allocating them. The embedding that is also the head is counted once."""
    with torch.device("meta"):
        return GPT(model).num_parameters()


@dataclass(frozen=True)
class Hardware:
    """The devices of a run, each with one process."""

    count: int
    dtype: torch.dtype  # precision of matrix products
    gpu_memory: int | None = None  # bytes of each GPU; None on a CPU
    peak_flops: float | None = None  # FLOP/s of each device in the precision of device.CARDS; None if it is not known

    @classmethod
    def of(cls, processes: Processes) -> Hardware:
        """Return the hardware of the processes, whose devices are assumed to be like that of this process."""
        device, memory = processes.device, None
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        return cls(processes.world_size, processes.dtype, memory, peak_flops(device))


@dataclass(frozen=True)
class Workload:
    """The work of a step, and the hardware for it. Together they determine FLOPs, memory and micro-batches."""

    model: GPTConfig
    n_parameters: int
    hardware: Hardware
    batch_tokens: int  # of a step, over all devices
    sequence_length: int
    recompute: bool = False  # activation checkpointing: a block keeps only its input for the backward pass
    muon: bool = False  # the matrices of the blocks are trained with Muon

    @classmethod
    def of(cls, config: Config, model: GPTConfig, n_parameters: int, hardware: Hardware) -> Workload:
        """Return the workload of a run with this configuration and a model of `n_parameters` parameters."""
        return cls(
            model,
            n_parameters,
            hardware,
            config.data.batch_tokens,
            config.data.sequence_length,
            recompute=config.system.activation_checkpointing,
            muon=config.optim.name == "muon",
        )

    @property
    def windows(self) -> int:
        """The largest number of windows of a global batch that one process gets."""
        return max(1, ceil_div(self.batch_tokens // self.sequence_length, self.hardware.count))

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs of a step, over all devices."""
        return self.batch_tokens * flops_per_token(self.model, self.n_parameters, self.sequence_length)

    @property
    def seconds_at_peak(self) -> float | None:
        """Seconds of a step if all devices computed at their peak (100% MFU); None if the peak is not known."""
        peak = self.hardware.peak_flops
        return self.flops / (peak * self.hardware.count) if peak else None

    def memory(self, rows: int, *, sharded: bool = False) -> dict[str, int]:
        """Estimate the peak bytes of tensors on one process, by part, for micro-batches of `rows` windows.

        The memory that an allocator holds in addition is not counted. With `sharded`, the processes divide weights and
        optimizer state between them (FSDP).
        """
        model, hardware, n_parameters, width = self.model, self.hardware, self.n_parameters, self.model.n_embd
        size = hardware.dtype.itemsize
        tokens = rows * self.sequence_length
        # What autograd keeps for the backward pass of a block, in bytes per token and channel: the residual stream
        # twice, in float32; and in the precision of matrix products the outputs of both LayerNorms (2), queries, keys
        # and values (3), the attention output and its copy as the input of c_proj (2), and the output of c_fc (4).
        # GELU's output is not kept.
        block_bytes = 2 * 4 + (2 + 3 + 2 + 4) * size
        kept = model.n_layer * (4 if self.recompute else block_bytes) + 2 * 4  # plus input and output of ln_f
        # The peak is in the backward pass of a block, in the loss, or in Muon's step. In the backward pass of a block,
        # two tensors of 4 * `width` channels exist (around GELU), two float32 gradients of the residual stream and,
        # with `recompute`, the recomputed tensors of the block. In this backward pass and in the loss, the kept tensors
        # and the head's gradient exist too. The part "logits" always counts `loss_memory` and the head's gradient, and
        # the part "activations" counts what the peak needs beyond that.
        matrices = 12 * width**2 * model.n_layer if self.muon else 0
        muon_bytes = muon_memory(model, hardware, sharded=sharded) if self.muon else 0
        backward = tokens * width * (2 * 4 * size + 2 * 4 + (block_bytes if self.recompute else 0))
        loss = loss_memory(model, tokens, hardware)
        head = 4 * model.vocab_size * width  # the head's gradient, kept until that of the tied embedding is added
        activations = max(tokens * width * kept + max(0, backward - loss), muon_bytes - loss - head)
        # With several micro-batches in a step, DDP stores gradients that were not averaged yet outside of its buffers,
        # so gradients take twice the memory. FSDP shards the gradients only after the last micro-batch.
        buckets = hardware.count > 1 and not sharded and rows < self.windows
        return {
            "weights": self._weights(sharded=sharded),
            "gradients": 4 * n_parameters * (2 if buckets else 1),
            "optimizer": (8 * n_parameters - 4 * matrices) // (hardware.count if sharded else 1),
            "activations": activations,
            "logits": loss + head,
        }

    def _weights(self, *, sharded: bool) -> int:
        """Return the bytes of the weights on one process: its own, those that FSDP gathers, and 16-bit copies."""
        model, dtype, shards = self.model, self.hardware.dtype, self.hardware.count if sharded else 1
        # Matrix products in 16 bits use 16-bit copies of the weights. FSDP gathers the weights of two blocks (the next
        # one in advance) in the precision of matrix products, and the embeddings in float32.
        embeddings = (model.vocab_size + model.block_size) * model.n_embd
        copied, gathered = self.n_parameters, 0
        if shards > 1:
            two_blocks = dtype.itemsize * 2 * (self.n_parameters - embeddings) // model.n_layer
            copied, gathered = embeddings, 4 * embeddings + two_blocks
        copies = dtype.itemsize * copied if dtype != torch.float32 else 0
        return 4 * self.n_parameters // shards + gathered + copies

    def fit_rows(self, budget: float, *, sharded: bool, below: int | None = None) -> int | None:
        """Return the rows (windows) of the micro-batch that the function `largest_micro_batch` chooses.

        A micro-batch fits if it is estimated to need at most `budget` bytes on each device and, with `below`, has fewer
        rows than `below`. The result is None if no row fits.
        """

        def fits(rows: int) -> bool:
            return (below is None or rows < below) and sum(self.memory(rows, sharded=sharded).values()) <= budget

        return largest_micro_batch(self.windows, fits)


def loss_memory(model: GPTConfig, tokens: int, hardware: Hardware) -> int:
    """Return the bytes that the loss operator needs besides the head's gradient (see kernels/loss.py, cuda_loss.py)."""
    size = hardware.dtype.itemsize
    if hardware.gpu_memory is None:  # on a CPU: a chunk of logits, and 64 rows of it in float32
        return min(ceil_div(tokens, 2), MATMUL_ROWS) * model.vocab_size * size + 64 * model.vocab_size * 4
    # On a GPU: a chunk of logits, the product that is added to the head's gradient (not always a separate tensor), and
    # the gradient of the hidden states.
    chunk = min(tokens, rows_at_a_time(hardware.gpu_memory, model.vocab_size, size)) * padded(model.vocab_size) * size
    return chunk + 4 * padded(model.vocab_size) * model.n_embd + 4 * tokens * model.n_embd


def muon_memory(model: GPTConfig, hardware: Hardware, *, sharded: bool) -> int:
    """Return the bytes that a step of Muon needs besides momentum, weights and gradients. No activations exist then."""
    width, size = model.n_embd, hardware.dtype.itemsize
    if hardware.gpu_memory is None:
        # On a CPU: all updates in float32, and the result of the Newton-Schulz iteration for each of them, in the
        # precision of matrix products.
        return (4 + size) * 12 * width**2 * model.n_layer
    # On a GPU, Muon processes all matrices of one shape together, as a group. The largest groups have one matrix from
    # the MLP of each block. Each process orthogonalizes a part of the group. This takes three tensors in float32 and
    # four in the precision of matrix products, each as large as the part. The results of two successive groups exist at
    # the same time.
    group = 4 * width**2 * model.n_layer
    part = group * ceil_div(model.n_layer, hardware.count) // model.n_layer
    return part * (3 * 4 + 4 * size) + 2 * size * (part if sharded else group)


def largest_micro_batch(windows: int, fits: Callable[[int], bool]) -> int | None:
    """Return the rows (windows) per micro-batch for a process with `windows` windows per step; None if no row fits.

    `fits` returns whether a number of rows fits into memory. Only sizes that divide the windows into nearly equal
    micro-batches are tried. A divisor of `windows` is preferred if it is at least half of the largest size that fits:
    then all micro-batches have the same shape, and the loss is compiled only once.
    """
    sizes = sorted({ceil_div(windows, n) for n in range(1, windows + 1)}, reverse=True)
    largest = next((rows for rows in sizes if fits(rows)), None)
    if largest is None:
        return None
    divisor = max(rows for rows in range(1, largest + 1) if windows % rows == 0)
    return divisor if 2 * divisor >= largest else largest
