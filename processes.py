"""The processes that torchrun starts: how they find each other, what they compute on, and how they end.

Training and evaluation use the same few operations: each process knows its rank, and some numbers are reduced over all
processes. With one process every operation here works without a process group.
"""

from __future__ import annotations

import openmp  # noqa: F401 (before torch, which reads the setting when it is imported)

# isort: split
import os
import time
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Import torch.distributed.nn.functional before a process group exists. Otherwise its default arguments store the group
# and keep its threads alive until Python exits. A gloo thread that releases a tensor during exit aborts the process.
import torch.distributed.nn.functional
from torch import Tensor

from device import autocast, find_device, find_dtype, keep_freed_memory


@dataclass(frozen=True)
class Processes:
    """This process among all processes, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # precision of matrix products; weights are float32

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes files."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_min(self, number: int) -> int:
        """Return the minimum of an integer over all processes, for decisions that must be equal on every process."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def broadcast(self, number: int) -> int:
        """Return the main process's value of an integer on every process."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.broadcast(tensor, src=0)
        return int(tensor)

    def autocast(self) -> AbstractContextManager:
        """Run matrix products in this process's `dtype`."""
        return autocast(self.device, self.dtype)


def start_processes(device_name: str, dtype_name: str) -> Processes:
    """Find the device, and join the other processes if torchrun started several.

    Args:
        device_name: `system.device` of the configuration, see `device.find_device`.
        dtype_name: `system.dtype` of the configuration, see `device.find_dtype`.

    Raises:
        ValueError: this machine does not have the device, or the environment variables of torchrun are incomplete.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and "RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {world_size}, but RANK is not set: start several processes with torchrun")
    device = find_device(device_name, "system.device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for the matrix products that autocast leaves in float32
    elif device.type == "cpu":
        keep_freed_memory()
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=rendezvous(rank, world_size), rank=rank, world_size=world_size)
    return Processes(rank, world_size, device, find_dtype(dtype_name, device))


def rendezvous(rank: int, world_size: int) -> dist.Store:
    """Return the store through which the processes find each other, without keys from an earlier attempt.

    torchrun (PyTorch 2.13) keeps one store when it restarts the processes. A restarted process may find the address of
    a dead process there, and would wait for it until a timeout of half an hour. Therefore the main process chooses a
    random name for the attempt, and all keys of the attempt begin with it. Each other process chooses a random key and
    announces it, and the main process stores the name under this key.

    Raises TimeoutError if a process does not connect.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if rank > 0:
        own_key = uuid.uuid4().hex
        store.set(f"here-{rank}", own_key)
        attempt = store.get(f"attempt-for-{own_key}").decode()  # waits until the key exists
        store.set(f"{attempt}-known-to-{rank}", "")
        return dist.PrefixStore(attempt, store)
    attempt, missing = uuid.uuid4().hex, set(range(1, world_size))
    deadline = time.monotonic() + store.timeout.total_seconds()
    while missing:
        for other in missing:
            # The announced key may come from an earlier attempt. So it is read again until the process has answered.
            if store.check([f"here-{other}"]):
                store.set(f"attempt-for-{store.get(f'here-{other}').decode()}", attempt)
        missing = {other for other in missing if not store.check([f"{attempt}-known-to-{other}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(missing)} did not connect: check whether they were started")
        time.sleep(0.01)
    return dist.PrefixStore(attempt, store)


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # FSDP's threads also use the group and need time to release their last tensors


def lost_process(error: RuntimeError) -> bool:
    """Return whether an error means that another process has ended. NCCL and gloo report a broken connection."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
