"""Part 1 of the GPU check: versions, the matrix products of the output head, and the loss."""

from __future__ import annotations

import platform
from functools import partial

import torch
from torch import Tensor

from benchmarks.clock import seconds
from device import autocast
from kernels.loss import add_product, linear_cross_entropy, plain_linear_cross_entropy
from scripts.gpu_check.report import Report, Settings, relative_difference
from training.metrics import hardware


def check_products(settings: Settings, report: Report) -> None:
    """Print the versions, time the products of the head, and compare the loss with PyTorch's compiled cross_entropy."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if settings.device == "cuda":
        versions |= {"cudnn": torch.backends.cudnn.version(), "card": settings.card}
    report.table("versions", [versions | {"machine": str(hardware()["cpu"])}])
    time_products(settings, report)
    check_loss(settings, report)


def best_milliseconds(work: partial) -> float:
    """Return the shortest of five durations in milliseconds, after two warm-up calls."""
    return 1000 * min([seconds(work) for _ in range(7)][2:])


def time_products(settings: Settings, report: Report) -> None:
    """Time the three matrix products of the output head: the logits, and the gradients of its input and of its weights.

    They are timed with the vocabulary as it is and with the vocabulary padded to a multiple of 128.
    """
    report.say("timing the products of the head")
    vocab, width = settings.shape.vocab_size, settings.shape.n_embd
    rows = []
    for size in (vocab, -(-vocab // 128) * 128):
        weight = torch.randn(size, width, device=settings.device, dtype=settings.dtype)
        total = torch.zeros(size, width, device=settings.device)
        for n in (16, 32) if settings.tiny else (512, 2048, 8192):
            x = torch.randn(n, width, device=settings.device, dtype=settings.dtype)
            logits = x @ weight.T
            times = {
                "logits": best_milliseconds(partial(torch.matmul, x, weight.T)),
                "input gradient": best_milliseconds(partial(torch.matmul, logits, weight)),
                "head gradient": best_milliseconds(partial(add_product, total, logits, x)),
            }
            rate = 3 * 2 * n * size * width / sum(times.values()) / 1e9
            milliseconds = {f"{name}, ms": value for name, value in times.items()}
            rows.append({"vocabulary": size, "rows": n, **milliseconds, "TFLOP/s": rate})
    report.table(f"products of the head, {settings.dtype}", rows)


def check_loss(settings: Settings, report: Report) -> None:
    """Compare our loss with PyTorch's compiled cross-entropy: values, gradients, and memory. Time both losses.

    The input has a row for each token of a micro-batch of 64 sequences of 1024 tokens, or 256 rows if `settings.tiny`.
    """
    shape, rows = settings.shape, 256 if settings.tiny else 65536
    torch.manual_seed(0)
    x = torch.randn(rows, shape.n_embd, device=settings.device).requires_grad_()
    weight = torch.randn(shape.vocab_size, shape.n_embd, device=settings.device).mul_(0.02).requires_grad_()
    targets = torch.randint(shape.vocab_size, (rows,), device=settings.device)
    where = torch.device(settings.device)
    compiled = torch.compile(plain_linear_cross_entropy, backend="inductor" if settings.compiles else "eager")
    table, results = [], {}

    def run(loss_function: object, dtype: torch.dtype) -> list[Tensor]:
        with autocast(where, dtype):
            loss = loss_function(x, weight, targets)  # type: ignore[operator]
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    for name, function in {"ours": linear_cross_entropy, "compiled cross_entropy": compiled}.items():
        report.say(f"{rows:,} rows of the loss: {name}")
        try:
            run(function, settings.dtype)
            before = reset_peak(settings)
            results[name] = run(function, settings.dtype)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if settings.device == "cuda" else None
            milliseconds = best_milliseconds(partial(run, function, settings.dtype))
            table.append({"loss": name, "ms": milliseconds, "GiB": peak})
        except torch.OutOfMemoryError:
            report.say(f"{name} does not fit into the memory")
    report.table(f"loss and gradients of {rows:,} rows, {settings.dtype}", table)
    if "compiled cross_entropy" in results:
        ours, plain = results["ours"], results["compiled cross_entropy"]
        limit = 1e-5 if settings.dtype == torch.float32 else 2e-2
        report.at_most("the loss equals PyTorch's, relative", relative_difference(ours[:1], plain[:1]), limit / 10)
        report.at_most("its gradients equal PyTorch's, relative", relative_difference(ours[1:], plain[1:]), limit)
        if settings.is_timed:
            report.at_most("peak memory beside PyTorch's", table[0]["GiB"] / table[1]["GiB"], 0.5)  # type: ignore[operator]


def reset_peak(settings: Settings) -> int:
    """Start a new measurement of the GPU's peak memory. Return the bytes in use now, or 0 on a CPU."""
    if settings.device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
