"""Processes, devices and precision: torchrun, DDP and FSDP2 are PyTorch's own; here is what the loop needs of them."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Before a process group exists: default arguments in there would keep it and its threads to the end, and a thread of
# gloo's that lets go of a tensor while Python shuts down aborts the process.
import torch.distributed.nn.functional
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from device import autocast, find_device, find_dtype, keep_freed_memory
from model import GPT
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

    def least(self, number: int) -> int:
        """The least of a number over all processes: what each has found out for itself, made the same for all."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def autocast(self) -> AbstractContextManager:
        """Matrix products in this process' `dtype`."""
        return autocast(self.device, self.dtype)


def start_processes(system: System) -> Processes:
    """Find the device, and join the other processes where torchrun started several.

    Raises ValueError for a device or precision that this machine does not have.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {world_size}, but there is no RANK: start several processes with torchrun")
    device = find_device(system.device, "system.device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    elif device.type == "cpu":
        keep_freed_memory()
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=meet(rank, world_size), rank=rank, world_size=world_size)
    return Processes(rank, world_size, device, find_dtype(system.dtype, device))


def meet(rank: int, world_size: int) -> dist.Store:
    """The store by which processes find each other, with nothing in it of an attempt before this one.

    torchrun (of PyTorch 2.13) keeps one store over restarts. A process that is started again may find there the address
    of a peer that is dead, and waits for it until a timeout of half an hour. So the first process names the attempt,
    to each of the others by a name that this one has just made up. Raises TimeoutError where one does not come.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if rank > 0:
        myself = uuid.uuid4().hex
        store.set(f"here-{rank}", myself)
        attempt = store.get(f"attempt-for-{myself}").decode()  # waits for it
        store.set(f"{attempt}-known-to-{rank}", "")
        return dist.PrefixStore(attempt, store)
    attempt, missing = uuid.uuid4().hex, set(range(1, world_size))
    deadline = time.monotonic() + store.timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"here-{other}"]):  # or was, in an attempt before: so it is asked until it has answered
                store.set(f"attempt-for-{store.get(f'here-{other}').decode()}", attempt)
        missing = {other for other in missing if not store.check([f"{attempt}-known-to-{other}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(missing)} did not come: see whether they were started")
        time.sleep(0.01)
    return dist.PrefixStore(attempt, store)


def stop_processes() -> None:
    """Leave the others in order."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # FSDP keeps the group, too: time for its threads to let go of their last tensors


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone, of which NCCL and gloo learn by a broken connection."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


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


class CompiledLoss(nn.Module):
    """A `Loss` that is compiled when it is first called; where that does not work it says so and goes on without."""

    def __init__(self, loss: Loss) -> None:
        from torch._dynamo.exc import TorchDynamoException  # here: it takes a second to import

        super().__init__()
        self.loss, self._cannot_compile = loss, TorchDynamoException
        self._compiled: Callable[[Tensor, Tensor], Tensor] | None = torch.compile(loss.forward, dynamic=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self._compiled is not None:
            try:
                return self._compiled(inputs, targets)
            except self._cannot_compile as error:  # Dynamo, Inductor or its C++ compiler; what the model raises goes on
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"compiling fell back to PyTorch's own operators, which is slower: {reason}", file=sys.stderr)
                self._compiled = None
        return self.loss(inputs, targets)


def distribute(model: GPT, config: Config, processes: Processes, *, compiled: bool, sharded: bool) -> nn.Module:
    """The model's `Loss`, compiled and spread over all processes as asked for. The GPT's own parameter names stay."""
    if config.system.activation_checkpointing:
        for block in model.transformer.h:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: it takes a second

        # What autocast would cast, the matrices of the blocks, travels in that dtype. The rest, and so the residual
        # stream, is float32: the numbers are those of DDP.
        reduced = processes.dtype if processes.dtype != torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            for norm in (module for module in block.children() if isinstance(module, nn.LayerNorm)):
                fully_shard(norm)
            fully_shard(block, mp_policy=policy)
        fully_shard(model)
    loss: nn.Module = CompiledLoss(Loss(model)) if compiled else Loss(model)
    if processes.world_size > 1 and not sharded:
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
        # DDP adds the processes' gradients in one order in its first backward pass, and in another from then on. One is
        # thrown away here, so that a resumed process adds in the same order as one that never stopped.
        ids = torch.zeros(1, config.data.sequence_length, dtype=torch.long, device=processes.device)
        with processes.autocast(), torch.compiler.set_stance("force_eager"):
            loss(ids, ids).backward()
        model.zero_grad()
    return loss


def synchronise_gradients(loss: nn.Module, model: Any, on: bool) -> None:
    """Whether the next backward pass averages gradients over the processes: only the last micro-batch has to."""
    if isinstance(loss, DistributedDataParallel):
        loss.require_backward_grad_sync = on
    elif hasattr(model, "set_requires_gradient_sync"):  # FSDP's
        model.set_requires_gradient_sync(on)


def free_gathered_weights(model: GPT) -> None:
    """After forward passes without a backward: FSDP keeps what it gathered for one, and would show it as parameters."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDP's
            module.reshard()


def clip_gradients(model: GPT, max_norm: float) -> Tensor:
    """Scale the gradient to at most `max_norm` (0: leave it); returns its norm () before that, on the device."""
    norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's is in parts


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
