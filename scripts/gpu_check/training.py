"""Parts 5, 6 and 7 of the GPU check: loss curves, kill and resume, and the gradients of DDP and FSDP."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ours.train import make_run
from model import GPT, GPTConfig
from scripts.gpu_check.report import Report, Settings, relative_difference
from scripts.gpu_check.runs import run_module, write_config, write_dataset
from train import train_step
from training.config import Optim
from training.distributed import distribute
from training.metrics import Progress


class LossRecorder(Progress):
    """A progress display that keeps the loss of each step instead of showing it."""

    def __init__(self) -> None:
        super().__init__(0, 1, 1, enabled=False)
        self.losses: list[float] = []

    def update(self, step: int, loss: float, rate: str) -> None:
        """Append the loss."""
        self.losses.append(loss)


def losses(settings: Settings, shape: GPTConfig, dtype: torch.dtype, *, steps: int, rows: int) -> list[float]:
    """Return the loss of each training step. The steps repeat four batches of random tokens, so the loss can fall."""
    optim = Optim(lr=1e-3, warmup_steps=2, steps=100)
    config = settings.config(rows, shape, compiled=settings.device == "cuda", optim=optim)
    run = make_run(config, shape, settings.processes(dtype), n_batches=4)
    run.progress = recorder = LossRecorder()
    for _ in range(steps):
        train_step(run, False, False)
    return recorder.losses


def check_curves(settings: Settings, report: Report) -> None:
    """Compare the loss of a small model on the device and on a CPU, and of `settings.shape` in two precisions."""
    torch.set_float32_matmul_precision("highest")
    steps, rows = (6, 4) if settings.tiny else (30, 8)
    report.say(f"{steps} steps of a small model in float32, on the CPU and on {settings.device}")
    on_cpu = dataclasses.replace(settings, device="cpu")
    expected = losses(on_cpu, settings.small_shape, torch.float32, steps=steps, rows=rows)
    found = losses(settings, settings.small_shape, torch.float32, steps=steps, rows=rows)
    compare(report, "the loss of a small model in float32 equals the CPU's", found, expected, 1e-3)
    report.check("the loss decreases", expected[-1] < expected[0], f"{expected[0]:.4f} to {expected[-1]:.4f}")
    steps = 3 if settings.tiny else 12
    report.say(f"{steps} steps of the model in {settings.dtype} and in float32")
    found, expected = (
        losses(settings, settings.shape, dtype, steps=steps, rows=rows) for dtype in (settings.dtype, torch.float32)
    )
    compare(report, f"the loss in {settings.dtype} follows that in float32", found, expected, 0.02)


def compare(report: Report, name: str, found: list[float], expected: list[float], limit: float) -> None:
    """Check that two loss curves differ by at most `limit` at any step, and show their first, middle and last step."""
    shown = (0, len(found) // 2, len(found) - 1)
    rows = [{"step": i + 1, "loss": f"{found[i]:.5f}", "expected": f"{expected[i]:.5f}"} for i in shown]
    report.table(name, rows)
    report.at_most(name, max(abs(a - b) for a, b in zip(found, expected, strict=True)), limit)


def check_resume(settings: Settings, report: Report) -> None:
    """Kill a run several times, and compare its results with those of a run without kills.

    With system.deterministic, or on a CPU, the results must be equal. Otherwise a difference is only printed.
    """
    kills = 1 if settings.tiny else 4
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        dataset = write_dataset(directory)
        for deterministic in (False, True):
            name = "deterministic" if deterministic else "default"
            report.say(f"a run that is killed {kills} times: {name}")
            changes: dict[str, Any] = {"optim": {"steps": (16 if settings.tiny else 100) * kills}}
            if deterministic:
                changes["system"] = {"deterministic": True}
            path = write_config(settings, directory, dataset, name, changes)
            arguments = ("--config", str(path), "--dir", str(directory / name), "--kills", str(kills))
            result = run_module("scripts.kill_test", *arguments)
            lines = result.stdout.strip().splitlines()
            if not lines:
                report.check(f"kill and resume, {name}", False, (result.stderr.strip().splitlines() or ["?"])[-1])
                continue
            counts = json.loads(lines[-1])
            found = "equal bit for bit" if not counts["differences"] else "; ".join(counts["differences"])
            # Without system.deterministic, some operators on a GPU add numbers in a different order in every run.
            if deterministic or settings.device == "cpu":
                report.check(f"{counts['kills']} kills, {name}", not counts["differences"], found)
            else:
                report.say(f"{counts['kills']} kills, {name}: {found}")


def check_distributed(settings: Settings, report: Report) -> None:
    """Compare the gradients of compiled DDP and FSDP with those of the plain model, in a group of one process."""
    torch.set_float32_matmul_precision("highest")
    expected = gradients(settings, sharded=None)
    backend = "nccl" if settings.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    for name, sharded in (("DDP", False), ("FSDP", True)):
        report.say(f"{name} with {backend}, compiled")
        difference = relative_difference(gradients(settings, sharded=sharded), expected)
        report.at_most(f"the gradient of compiled {name} equals the plain one, relative", difference, 1e-4)
    dist.destroy_process_group()


def gradients(settings: Settings, *, sharded: bool | None) -> list[Tensor]:
    """Return the gradient of each parameter. sharded: None for the plain model, False for DDP, True for FSDP."""
    # `distribute` uses DDP only if there are several processes. So `processes` says that there are two, although this
    # process is the only one of its group.
    processes = settings.processes(torch.float32, world_size=1 if sharded is None else 2)
    torch.manual_seed(0)
    model = GPT(settings.shape).to(settings.device).train()
    ids = torch.randint(settings.shape.vocab_size, (2, settings.tokens + 1)).to(settings.device)
    loss_function = distribute(
        model, processes, compiled=sharded is not None, sharded=bool(sharded), sequence_length=settings.tokens
    )
    loss_function(ids[:, :-1], ids[:, 1:]).backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in found]
