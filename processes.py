"""The processes that torchrun starts: how they find each other, what they compute on, and how they end.

With a single process, every operation here works without a process group.
"""

from __future__ import annotations

import openmp  # noqa: F401 (before torch, which loads OpenMP: openmp.py sets a variable that OpenMP reads)

# isort: split
import os
import time
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# Import this module before a process group exists. Otherwise the default arguments of its functions store the group,
# whose threads then live until Python exits. A gloo thread that releases a tensor during exit aborts the process.
import torch.distributed.nn.functional
from torch import Tensor

from device import autocast, find_device, find_dtype, keep_freed_memory, make_deterministic

Value = TypeVar("Value")

# How long processes wait for each other at the start. Each one first loads libraries, perhaps from a slow file system.
JOIN_TIMEOUT = timedelta(minutes=10)
# How long a collective operation waits for a process. NCCL's default of 10 minutes can be too short for process 0,
# which must finish writing the checkpoint of a large model before it saves the next one.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# How long `name_lost_processes` waits for answers: less than the 30 seconds after which torchrun kills the processes.
ANSWER_TIMEOUT = timedelta(seconds=3)


@dataclass(frozen=True)
class Processes:
    """The place of this process among all processes, and the device and precision that it computes with."""

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

    def broadcast(self, value: Value) -> Value:
        """Return, on every process, the value that the main process passed: a number, a text, a path, or a tuple."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def autocast(self) -> AbstractContextManager:
        """Return a context in which matrix products run in this process's `dtype`."""
        return autocast(self.device, self.dtype)


def start_processes(device_name: str, dtype_name: str, *, deterministic: bool = False) -> Processes:
    """Find the device, and join the other processes if torchrun started several.

    Args:
        device_name, dtype_name, deterministic: system.device, system.dtype and system.deterministic of the
            configuration.

    Raises:
        ValueError: this machine does not have the device, several processes cannot use it, or the environment variables
            of torchrun are incomplete.
        TimeoutError: another process did not connect within JOIN_TIMEOUT.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ():
        if name not in os.environ:
            raise ValueError(
                f"WORLD_SIZE is {world_size}, but {name} is not set: start several processes with torchrun"
            )
    if deterministic:
        make_deterministic()
    device = find_device(device_name, "system.device")
    if world_size > 1 and device.type not in ("cuda", "cpu"):
        raise ValueError(f"{world_size} processes cannot exchange tensors on {device.type}: start one, or use the cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for the matrix products that autocast leaves in float32
    elif device.type == "cpu":
        keep_freed_memory()
    if world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=rendezvous(rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,  # otherwise NCCL guesses the device from the rank
        )
    return Processes(rank, world_size, device, find_dtype(dtype_name, device))


def rendezvous(rank: int, world_size: int) -> dist.Store:
    """Return the key-value store through which the processes find each other, without the keys of earlier attempts.

    torchrun (PyTorch 2.13) keeps the same store when it restarts the processes. In this store, a restarted process may
    find the address of a dead process, and would wait for that process. Therefore the main process chooses a random
    name for each attempt, that is, each start of all processes. All keys in the returned store begin with this name.
    Every process except the main one draws a random key at its start, and announces the key in the store. The main
    process then stores the name under this key. So no process can read the name of an earlier attempt.

    Raises TimeoutError if a process does not connect within JOIN_TIMEOUT.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # Process 0 starts the store, unless torchrun has already started one.
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # `dist.rendezvous` would wait here for the other processes, and could not name those that are missing.
            store: dist.Store = dist.TCPStore(host, port, is_master=True, timeout=JOIN_TIMEOUT, wait_for_workers=False)
        else:
            store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store.set_timeout(JOIN_TIMEOUT)
        if rank > 0:
            own_key = uuid.uuid4().hex
            store.set(f"here-{rank}", own_key)
            attempt = store.get(f"attempt-for-{own_key}").decode()  # waits until the key exists
            store.set(f"{attempt}-known-to-{rank}", "")
            return dist.PrefixStore(attempt, store)
    except dist.DistError as error:
        raise TimeoutError(
            f"process 0 at {host}:{port} did not answer within {JOIN_TIMEOUT.total_seconds():g} seconds: check "
            f"whether it was started, and whether this machine can reach that address ({str(error).splitlines()[0]})"
        ) from None
    attempt, missing = uuid.uuid4().hex, set(range(1, world_size))
    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while missing:
        for other in missing:
            # The announced key may come from an earlier attempt. So it is read again until the process has answered.
            if store.check([f"here-{other}"]):
                store.set(f"attempt-for-{store.get(f'here-{other}').decode()}", attempt)
        missing = {other for other in missing if not store.check([f"{attempt}-known-to-{other}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"processes {sorted(missing)} of {world_size} did not connect to {host}:{port} within "
                f"{JOIN_TIMEOUT.total_seconds():g} seconds: check whether they were started"
            )
        time.sleep(0.01)
    return dist.PrefixStore(attempt, store)


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # FSDP's threads also use the group and need time to release their last tensors


def lost_process(error: RuntimeError) -> bool:
    """Return whether an error comes from the communication between processes, usually because a process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def name_lost_processes() -> str:
    """Return which processes do not answer after a failed collective operation: "process 3" or "processes [3, 5]".

    The collective operation fails in every process. Each process that is alive calls this function, which announces the
    process in the store. A process that is not announced after ANSWER_TIMEOUT has ended or hangs. If the store does not
    answer, the process that held it has ended, and the result is "process 0".
    """
    try:
        store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        store.set(f"alive-{rank}", "")
        missing, deadline = set(range(world_size)) - {rank}, time.monotonic() + ANSWER_TIMEOUT.total_seconds()
        while missing and time.monotonic() < deadline:
            missing = {other for other in missing if not store.check([f"alive-{other}"])}
            time.sleep(0.05)
    except dist.DistError:
        return "process 0"
    except ValueError:  # the failure happened before there was a process group
        return "another process"
    if not missing:
        return "the connection to another process"
    return f"process {missing.pop()}" if len(missing) == 1 else f"processes {sorted(missing)}"
