"""Parts 3, 4 and 9 of the GPU check: speed and memory, where the time goes, Muon, and the choice of the micro-batch."""

from __future__ import annotations

import gc
import importlib
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.clock import Run, seconds, synchronize
from benchmarks.ours.train import make_run
from processes import start_processes
from scripts.gpu_check.products import reset_peak
from scripts.gpu_check.report import Report, Settings
from scripts.gpu_check.runs import run_one_step
from train import accumulate_gradients, train_step
from training.config import Optim
from training.estimate import Hardware, Workload, count_parameters, flops_per_token, peak_flops
from training.setup import TrainingRun

# Lowest allowed MFU (model FLOPs utilization) on an H100 or H200 with micro-batches of 64 sequences. llm.c reaches this
# MFU on an H100.
LOWEST_MFU = 0.41
WORST_ESTIMATE = 0.15  # largest relative error that is allowed for the estimate of the memory
LOSS = "gpt2::linear_cross_entropy_sum"  # the operator of kernels/loss.py, which includes the output head
# Kind of operation -> pattern of the names of its CUDA kernels and CPU operators. The first pattern that matches a name
# counts.
KINDS = {
    "elementwise": r"^triton",  # first, because the name of a kernel of torch.compile lists all operators that it fuses
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|cutlass|nvjet|cublas|xmma|splitk|addmm|\bmm\b|bmm|matmul",
    "optimizer": r"multi_tensor|adam|newton_schulz",
    "copies": r"memcpy|memset|copy_",
}


def check_speed(settings: Settings, report: Report) -> None:
    """Time our training step and that of each peer (another program), and check our memory estimate and MFU."""
    sizes, middle = ((2, 4), 4) if settings.tiny else ((16, 32, 64, 128), 64)
    table = [measure(settings, report, rows, "ours") for rows in sizes]
    table.append(measure(settings, report, middle, "ours, not compiled", compiled=False))
    if settings.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        table.append(measure(settings, report, middle, "ours, no cuDNN attention"))
        torch.backends.cuda.enable_cudnn_sdp(True)
    for name, directory in settings.peers.items():
        table += [measure_peer(settings, report, rows, name, directory) for rows in sizes[:-1]]
    report.table(f"training steps, {settings.dtype}, on {settings.card}", table)
    measured = {row["rows"]: row for row in table if row["what"] == "ours" and row["ms"] is not None}
    report.check("some micro-batch fits into the memory", bool(measured), f"{sorted(measured)} sequences")
    if not settings.is_timed:
        return
    for rows, row in measured.items():
        error = abs(row["estimate, GiB"] / row["peak, GiB"] - 1)
        report.at_most(f"error of the memory estimate at {rows} sequences", error, WORST_ESTIMATE)
    if (settings.is_card("H100") or settings.is_card("H200")) and middle in measured:
        mfu = measured[middle]["MFU"]
        report.check(f"MFU at {middle} sequences", mfu >= LOWEST_MFU, f"{mfu:.1%}, at least {LOWEST_MFU:.0%}")


def measure(settings: Settings, report: Report, rows: int, what: str, *, compiled: bool = True) -> dict[str, Any]:
    """Return a row of the table for our training step on a micro-batch of `rows` sequences. `what` names the row."""
    config = settings.config(rows, settings.shape, compiled=compiled)
    processes = start_processes(settings.device, "auto")

    def prepare() -> Run:
        return partial(train_step, make_run(config, settings.shape, processes), False, False)

    workload = Workload.of(config, settings.shape, count_parameters(settings.shape), Hardware.of(processes))
    estimate = sum(workload.memory(rows).values()) / 2**30
    return time_steps(settings, report, rows, what, prepare) | {"estimate, GiB": estimate}


def measure_peer(settings: Settings, report: Report, rows: int, name: str, directory: str) -> dict[str, Any]:
    """Return a row of the table for a peer, an implementation that bench.py compares with. Its model is the 124M."""
    # Imported here, because the module of a peer needs libraries that the rest of this file does not need.
    module = importlib.import_module(f"benchmarks.peers.{name}")
    arguments = (*([directory] if directory else []), settings.device, rows, settings.tokens)
    return time_steps(settings, report, rows, name, partial(module.train, *arguments)) | {"estimate, GiB": None}


def time_steps(settings: Settings, report: Report, rows: int, what: str, prepare: Callable[[], Run]) -> dict[str, Any]:
    """Time the training step that `prepare()` returns, and measure its peak memory.

    If the step does not fit into the memory, all measured values are None.
    """
    report.say(f"training steps of {rows} x {settings.tokens} tokens: {what}")
    result = {"what": what, "rows": rows} | dict.fromkeys(("ms", "tokens/s", "MFU", "peak, GiB"))
    torch.set_float32_matmul_precision("high")
    torch.compiler.reset()  # otherwise code that was compiled with cuDNN's attention could be reused without it
    step: Run | None = None
    try:
        step = prepare()
        step()
        step()
        reset_peak(settings)
        duration = statistics.median(seconds(step) for _ in range(3 if settings.tiny else 10))
    except torch.OutOfMemoryError:
        report.say(f"{what} does not fit into the memory at {rows} sequences")
        return result
    finally:
        step = None  # releases the model, so that its memory is free for the next one
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated() / 2**30 if settings.device == "cuda" else None
    flops = flops_per_token(settings.shape, count_parameters(settings.shape), settings.tokens)
    rate, best = rows * settings.tokens / duration, peak_flops(torch.device(settings.device))
    return result | {
        "ms": 1000 * duration,
        "tokens/s": rate,
        "MFU": rate * flops / best if best else None,
        "peak, GiB": peak,
    }


def check_profile(settings: Settings, report: Report) -> None:
    """Sum the time of a training step by kind of operation. Gaps are the time in which the GPU does nothing."""
    rows = 4 if settings.tiny else 64
    config = settings.config(rows, settings.shape)
    run = make_run(config, settings.shape, start_processes(settings.device, "auto"))
    report.say(f"profiling a training step of {rows} x {settings.tokens} tokens")
    for _ in range(3):
        train_step(run, False, False)
    wall = 1000 * statistics.median(seconds(partial(train_step, run, False, False)) for _ in range(3))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if settings.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        train_step(run, False, False)
        synchronize()
    times = sum_by_kind(profiler, settings.device)
    busy = sum(times.values())
    if settings.device == "cuda":
        times["gaps"] = max(0.0, wall - busy)
    report.table("time of a step by kind", [{"kind": kind, "ms": ms, "share": ms / wall} for kind, ms in times.items()])
    report.check("the profile shows products and the loss", min(times["products"], times["loss"]) > 0, f"{busy:.3g} ms")
    if settings.is_timed:
        report.at_most("share of the step in which the GPU does nothing", times["gaps"] / wall, 0.05)


def sum_by_kind(profiler: profile, device: str) -> dict[str, float]:
    """Return the milliseconds of each kind of operation: the time of its kernels on a GPU, of its operators on a CPU.

    Everything inside the operator of the loss counts as the loss. On a GPU, operators record their kernels, but kernels
    do not record their operators. So the time of the loss is first summed for each kernel name, and then subtracted
    from the time of the kernels with this name.
    """
    events = profiler.events() or []
    times: dict[str, float] = dict.fromkeys(
        ("products", "loss", "attention", "optimizer", "copies", "elementwise"), 0.0
    )
    loss_kernels: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name != "CPU":
            continue
        parent, in_loss = event, False
        while parent is not None and not in_loss:
            in_loss, parent = parent.name == LOSS, parent.cpu_parent
        if device == "cpu":
            times["loss" if in_loss else kind_of(event.name)] += event.self_cpu_time_total / 1000
        elif in_loss:
            for kernel in event.kernels:
                loss_kernels[kernel.name] += kernel.duration
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            duration = event.time_range.elapsed_us()
            in_loss_us = min(duration, loss_kernels[event.name])
            loss_kernels[event.name] -= in_loss_us
            times["loss"] += in_loss_us / 1000
            times[kind_of(event.name)] += (duration - in_loss_us) / 1000
    return times


def kind_of(name: str) -> str:
    """Return the kind of a kernel or operator, a key of KINDS. If no pattern matches the name, it is "elementwise"."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "elementwise")


def check_muon_and_micro_batch(settings: Settings, report: Report) -> None:
    """Measure which part of a training step's time AdamW or Muon takes. Then check the choice of the micro-batch."""
    rows = 4 if settings.tiny else 64
    table: list[dict[str, Any]] = []
    names: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
    for name in names:
        report.say(f"timing the optimizer: {name}")
        config = settings.config(rows, settings.shape, optim=Optim(name=name))
        run = make_run(config, settings.shape, start_processes(settings.device, "auto"))
        train_step(run, False, False)
        step = statistics.median(seconds(partial(train_step, run, False, False)) for _ in range(3))
        accumulate_gradients(run)
        optimizer = statistics.median(seconds(partial(step_optimizers, run)) for _ in range(3))
        # A batch of GPT-2's recipe has 512 sequences: 512 / rows micro-batches, but only one step of the optimizer.
        whole = step + (512 / rows - 1) * (step - optimizer)
        table.append({"optimizer": name, "ms": 1000 * optimizer, "part of 512 sequences": optimizer / whole})
    report.table(f"optimizer step, after micro-batches of {rows}", table)
    if settings.is_timed:
        fraction = table[1]["part of 512 sequences"]
        report.at_most("Muon's part of a step of 512 sequences on one GPU", fraction, 0.05)
    check_micro_batch(settings, report)


def step_optimizers(run: TrainingRun) -> None:
    """Update the weights with the gradients of the last `accumulate_gradients`, and keep these gradients."""
    for optimizer in run.optimizers:
        optimizer.step()


def check_micro_batch(settings: Settings, report: Report) -> None:
    """Train one step with `data.micro_batch auto`, and one with micro-batches of 512 sequences.

    If 512 sequences do not fit into the memory, train.py must end with a message and not with a traceback.
    """
    report.say("one step with data.micro_batch auto")
    config = settings.config(16 if settings.tiny else 512, settings.shape, compiled=False)
    config.data.micro_batch = "auto"
    run = make_run(config, settings.shape, start_processes(settings.device, "auto"))
    finite = train_step(run, False, False).finite
    report.check("a step with data.micro_batch auto", finite, f"micro-batches of {run.plan.micro_batch}")
    del run
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()  # train.py runs in another process, which needs this memory
    report.say("train.py with a micro-batch of 512")
    with tempfile.TemporaryDirectory() as directory:
        result = run_one_step(settings, Path(directory), windows=512)
    message = (result.stderr.strip().splitlines() or ["no message"])[-1]
    in_words = "Traceback" not in result.stderr and (result.returncode == 0 or "micro_batch" in result.stderr)
    report.check("a micro-batch of 512 works or ends with a message that names it", in_words, message)
