"""Processes, devices and precision: torchrun, DDP and FSDP2 are PyTorch's own; here is what the loop needs of them."""

from __future__ import annotations

import functools
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model import GPT, MATMUL_ROWS, GPTConfig
from training.config import Config, System

SMALL_MODEL = 10_000_000  # parameters: below, compiling for a CPU costs more than a run gains


@dataclass(frozen=True)
class Processes:
    """This process among all, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights are float32

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def autocast(self) -> AbstractContextManager:
        """Matrix products in `dtype`, what needs the range or the precision in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def start_processes(system: System) -> Processes:
    """Find the device, and join the other processes where torchrun started several.

    Raises ValueError for a device or precision that this machine does not have.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(system.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, world_size, device, find_dtype(system.dtype, device))


def stop_processes() -> None:
    """Leave the others in order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `auto`, `cuda`, `mps` or `cpu` stands for here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("system.device is cuda, but PyTorch finds no such device: use cpu, or a CUDA build")
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this node has no GPU of its own: {torch.cuda.device_count()} found"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("system.device is mps, but PyTorch finds no Apple GPU: use cpu")
    return torch.device(name)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that `auto`, `bfloat16` or `float32` stands for on a device: bfloat16 where it is fast."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


class Loss(nn.Module):
    """(inputs, targets) -> mean loss: the one function of a model that is compiled and distributed.

    Evaluation and sampling call the GPT itself, with the same weights, and so neither recompile nor synchronise.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.model(inputs, targets=targets).loss
        assert loss is not None
        return loss


def distribute(model: GPT, config: Config, processes: Processes, *, compiled: bool, sharded: bool) -> nn.Module:
    """The model's `Loss`, compiled and spread over all processes as asked for. The GPT's own parameter names stay."""
    if config.system.activation_checkpointing:
        for block in model.transformer.h:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        reduced = processes.dtype if processes.dtype != torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    loss: Any = Loss(model)
    if compiled:
        loss = torch.compile(loss, dynamic=False)
    if processes.world_size > 1 and not sharded:
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    return loss


def synchronise_gradients(loss: nn.Module, model: GPT, on: bool) -> None:
    """Whether the next backward pass averages gradients over the processes: only the last micro-batch has to."""
    if isinstance(loss, DistributedDataParallel):
        loss.require_backward_grad_sync = on
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def free_gathered_weights(model: GPT) -> None:
    """After forward passes without a backward: FSDP keeps what it gathered for one, and would show it as parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(model: GPT, max_norm: float) -> Tensor:
    """Scale the gradient to at most `max_norm` (0: leave it); returns its norm () before that, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def should_compile(config: Config, model: GPT, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and the reason in words."""
    if config.system.compile != "auto":
        return config.system.compile, "as configured"
    if device.type == "cuda":
        return True, "on CUDA"
    if device.type != "cpu":
        return False, f"not tried on {device.type}"
    if model.num_parameters() < SMALL_MODEL:
        return False, "a small model on CPU gains less than compiling takes"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return False, "no C++ compiler found"
    return True, "a large model on CPU"


def estimate_memory(
    shape: GPTConfig, rows: int, sequence_length: int, *, dtype: torch.dtype, shards: int = 1, recompute: bool = False
) -> dict[str, int]:
    """Bytes that training takes on one process, by part, for micro-batches of `rows` windows.

    `shards` processes share weights, gradients and optimizer state under FSDP; with `recompute` (activation
    checkpointing) a block keeps its input alone.
    """
    with torch.device("meta"):
        n_parameters = GPT(shape).num_parameters()
    size = torch.finfo(dtype).bits // 8
    # What autograd keeps of a block, per token and channel: the residual stream twice, in float32; in `dtype` both
    # LayerNorms' outputs, queries, keys, values and their mix (once more as c_proj's input), and c_fc's 4, not GELU's.
    kept = 4 if recompute else 2 * 4 + (2 + 3 + 2 + 4) * size
    one_block = 2 * 4 + 15 * size if recompute else 0
    tokens = rows * sequence_length
    head = shape.vocab_size * shape.n_embd * 4
    return {
        "weights": 4 * n_parameters // shards + (size * n_parameters if dtype != torch.float32 else 0),
        "gradients": 4 * n_parameters // shards,
        "optimizer": 8 * n_parameters // shards,
        "activations": tokens * shape.n_embd * (kept * shape.n_layer + one_block + 12),
        "logits": min(tokens, MATMUL_ROWS) * shape.vocab_size * size + head,
    }


def fit_micro_batch(config: Config, shape: GPTConfig, processes: Processes, *, sharded: bool) -> int:
    """The most windows that the memory estimate allows at a time, in 80% of what is free; ValueError if none."""
    if config.data.micro_batch != "auto":
        return config.data.micro_batch
    if processes.device.type == "cuda":
        free = torch.cuda.mem_get_info(processes.device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    windows = config.data.batch_tokens // config.data.sequence_length
    share = max(1, -(-windows // processes.world_size))
    for rows in sorted({-(-share // parts) for parts in range(1, share + 1)}, reverse=True):
        estimate = estimate_memory(
            shape,
            rows,
            config.data.sequence_length,
            dtype=processes.dtype,
            shards=processes.world_size if sharded else 1,
            recompute=config.system.activation_checkpointing,
        )
        if sum(estimate.values()) <= 0.8 * free:
            return rows
    raise ValueError(
        f"one window of {config.data.sequence_length} tokens needs about {sum(estimate.values()) / 2**30:.1f} GiB, and "
        f"{free / 2**30:.1f} GiB are free on {processes.device}: shorten data.sequence_length, take a smaller model, "
        f"system.activation_checkpointing true, or system.parallel fsdp on more processes"
    )


def should_shard(config: Config, shape: GPTConfig, processes: Processes) -> bool:
    """FSDP where it is asked for, or where weights, gradients and optimizer state would fill over half of a GPU."""
    if processes.world_size == 1:
        return False
    if config.system.parallel != "auto" or processes.device.type != "cuda":
        return config.system.parallel == "fsdp"
    estimate = estimate_memory(shape, 1, config.data.sequence_length, dtype=processes.dtype)
    return sum(estimate.values()) > 0.5 * torch.cuda.mem_get_info(processes.device)[0]
