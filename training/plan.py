"""The plan of a run: precision, sharding, micro-batch and compilation, each decided once and with its reason."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from processes import Processes
from training.config import Config
from training.estimate import Workload

GPU_SHARE = 0.8  # largest fraction of a GPU's free memory that a run may need, according to the estimate
SAVE_MEMORY = (
    "use a shorter data.sequence_length, a smaller model, system.activation_checkpointing true, or system.parallel "
    "fsdp on more processes"
)
# Number of parameters below which compiling for a CPU takes longer than the time that a run gains from it.
SMALL_MODEL = 10_000_000


@dataclass(frozen=True)
class Plan:
    """How a run computes. `sharded` and `micro_batch` are the same on every process."""

    workload: Workload  # the input of the estimates; Workload.hardware may differ between processes
    dtype: torch.dtype  # precision of matrix products
    sharded: bool  # FSDP instead of DDP
    micro_batch: int  # maximum number of windows per forward pass
    compiled: bool
    planned_for: dict[str, Any]  # settings and hardware that determine the micro-batch; checkpoints store them
    reasons: dict[str, str]  # field of this class -> why it has its value

    def describe(self, processes: Processes, sequence_length: int) -> str:
        """Return the plan and its reasons as one line, to print at the start of a run."""
        parts = [
            f"{processes.world_size} x {processes.device.type}",
            f"{str(self.dtype).removeprefix('torch.')} ({self.reasons['dtype']})",
            f"micro-batches of {self.micro_batch} x {sequence_length} ({self.reasons['micro_batch']})",
            f"{'compiled' if self.compiled else 'not compiled'} ({self.reasons['compiled']})",
        ]
        if processes.world_size > 1:
            parts.insert(1, f"{'FSDP' if self.sharded else 'DDP'} ({self.reasons['sharded']})")
        return ", ".join(parts)


def make_plan(config: Config, workload: Workload, processes: Processes, resumed_state: dict[str, Any]) -> Plan:
    """Decide how a run computes.

    All processes must agree on the micro-batch and on DDP or FSDP, although their free memory differs. A run that
    resumes with the same settings and hardware keeps its micro-batch, because another one changes the results slightly.

    Args:
        resumed_state: trainer/state.json of the checkpoint from which the run resumes or branches; otherwise {}.

    Raises ValueError if data.micro_batch is auto and not even one window fits into the memory.
    """
    device = processes.device
    here, why_sharded = should_shard(config, workload, processes)
    sharded = bool(processes.all_reduce_min(here))
    if sharded != here:
        why_sharded = "another process has enough memory"
    found, why_micro_batch = fit_micro_batch(config, workload, processes, sharded=sharded)
    micro_batch = processes.all_reduce_min(found)
    if micro_batch != found:
        why_micro_batch = "limited by the memory of another process"
    planned_for = {
        "processes": processes.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(processes.dtype),
        "sharded": sharded,
        "activation_checkpointing": config.system.activation_checkpointing,
        "micro_batch_asked": config.data.micro_batch,
    }
    if config.data.micro_batch == "auto" and resumed_state:
        same = all(resumed_state.get(name, value) == value for name, value in planned_for.items())
        # `resumed_state` describes the device of the main process only, so the other processes pass True.
        if processes.all_reduce_min(same or not processes.is_main):
            micro_batch, why_micro_batch = resumed_state["micro_batch"], "as before the run was stopped"
    compiled, why_compiled = should_compile(config, workload.n_parameters, device)
    reasons = {
        "dtype": "as configured" if config.system.dtype != "auto" else f"fastest on this {device.type}",
        "sharded": why_sharded,
        "micro_batch": why_micro_batch,
        "compiled": why_compiled,
    }
    return Plan(workload, processes.dtype, sharded, micro_batch, compiled, planned_for, reasons)


def should_shard(config: Config, workload: Workload, processes: Processes) -> tuple[bool, str]:
    """Return whether to use FSDP, and the reason.

    With system.parallel auto, several GPUs use FSDP if DDP with the smallest micro-batch would fill more than half of a
    GPU's free memory.
    """
    if processes.world_size == 1:
        return False, "one process"
    if config.system.parallel != "auto":
        return config.system.parallel == "fsdp", "as configured"
    if processes.device.type != "cuda":
        return False, f"not needed on {processes.device.type}"
    if sum(workload.memory(1).values()) > 0.5 * torch.cuda.mem_get_info(processes.device)[0]:
        return True, "the model and its optimizer would fill more than half of a GPU"
    return False, "the model and its optimizer fit on each GPU"


def usable_memory(device: torch.device) -> tuple[int, float]:
    """Return the bytes of memory that are free for this process, and the fraction of them that a run may use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), GPU_SHARE
    # On a CPU, the C library keeps freed memory, which fragments: a process used up to 1.45 times the estimate.
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 0.6


def fit_micro_batch(config: Config, workload: Workload, processes: Processes, *, sharded: bool) -> tuple[int, str]:
    """Return the configured micro-batch or, for auto, the largest that is estimated to fit, and the reason.

    Raises ValueError if the micro-batch is auto and not even one window fits.
    """
    if config.data.micro_batch != "auto":
        return config.data.micro_batch, "as configured"
    free, part = usable_memory(processes.device)
    rows = workload.fit_rows(part * free, sharded=sharded)
    if rows is not None:
        return rows, f"estimated to fit in {part:.0%} of the {free / 2**30:.1f} GiB that are free"
    needed = sum(workload.memory(1, sharded=sharded).values())
    raise ValueError(
        f"one window of {workload.sequence_length} tokens needs about {needed / 2**30:.1f} GiB, and "
        f"{free / 2**30:.1f} GiB are free on {processes.device}: {SAVE_MEMORY}"
    )


def explain_out_of_memory(plan: Plan, device: torch.device) -> str:
    """Return a message for an out-of-memory error, with the smaller micro-batch that would fit, if there is one."""
    free, part = usable_memory(device)
    rows = plan.workload.fit_rows(part * free, sharded=plan.sharded, below=plan.micro_batch)
    too_large = f"out of memory on {device} with micro-batches of {plan.micro_batch} windows"
    if rows is None:
        return f"{too_large}, and by the estimate no smaller micro-batch fits either: {SAVE_MEMORY}"
    return f"{too_large}: set data.micro_batch to {rows}, which is estimated to fit"


def is_out_of_memory(error: object) -> bool:
    """Return whether an exception means that memory for a tensor could not be allocated, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def should_compile(config: Config, n_parameters: int, device: torch.device) -> tuple[bool, str]:
    """Return whether to compile the loss of a model with `n_parameters` parameters, and the reason."""
    if config.system.compile != "auto":
        return config.system.compile, "as configured"
    if device.type == "cuda":
        return True, "on CUDA"
    if device.type != "cpu":
        return False, f"not tested on {device.type}"
    if n_parameters < SMALL_MODEL:
        return False, "a small model on a CPU gains less than compiling takes"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return False, "no C++ compiler found"
    return True, "a large model on a CPU"
