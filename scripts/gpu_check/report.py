"""The settings of the GPU check, and the record of what one of its parts measured and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from device import find_card, native_dtypes
from model import GPTConfig
from processes import Processes
from training.config import Config, Data, Optim, System


@dataclass(frozen=True)
class Settings:
    """The device, the shapes and the peers, which are other programs to compare with. `tiny` selects small shapes."""

    device: Literal["cpu", "cuda"]
    tiny: bool = False
    peers: dict[str, str] = field(default_factory=dict)  # name -> directory, or "" for an installed package

    @property
    def shape(self) -> GPTConfig:
        """The configuration of the model: GPT-2 124M, or a small model if `tiny`."""
        small = GPTConfig(vocab_size=211, block_size=64, n_layer=2, n_head=2, n_embd=32)
        return small if self.tiny else GPTConfig.preset("gpt2")

    @property
    def small_shape(self) -> GPTConfig:
        """The configuration of a model that is small enough to be trained on a CPU too."""
        return GPTConfig(vocab_size=211, block_size=64, n_layer=2, n_head=2, n_embd=32 if self.tiny else 256)

    @property
    def compiles(self) -> bool:
        """True if models are compiled. Tiny models on a CPU are not: compiling would take longer than the rest."""
        return self.device == "cuda" or not self.tiny

    @property
    def is_timed(self) -> bool:
        """True if speed and memory are checked against limits. The limits apply only to a GPU and to full shapes."""
        return self.device == "cuda" and not self.tiny

    @property
    def tokens(self) -> int:
        """The number of tokens in a sequence."""
        return self.shape.block_size

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the setting system.dtype selects on the device if its value is `auto`."""
        return native_dtypes(torch.device(self.device))[0]

    @property
    def card(self) -> str:
        """The name of the GPU, or "cpu"."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    def is_card(self, name: str) -> bool:
        """Return whether the GPU is the one that `device.CARDS` calls `name`."""
        return find_card(self.card) == find_card(name)

    def processes(self, dtype: torch.dtype, world_size: int = 1) -> Processes:
        """Return a description of this process as rank 0 of `world_size` processes, with `dtype` as the precision."""
        return Processes(0, world_size, torch.device(self.device), dtype)

    def config(self, rows: int, shape: GPTConfig, *, compiled: bool = True, optim: Optim | None = None) -> Config:
        """Return the configuration of a run in which each batch is a single micro-batch of `rows` sequences."""
        tokens = shape.block_size
        return Config(
            data=Data(batch_tokens=rows * tokens, sequence_length=tokens, micro_batch=rows),
            optim=optim or Optim(),
            system=System(device=self.device, compile=compiled and self.compiles),
        )


class Report:
    """The results of a part: checks, which pass or fail, and tables. Each result is also printed when it is added."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []
        self.tables: list[dict[str, Any]] = []

    def say(self, message: str) -> None:
        """Print what the part does now."""
        print(f"  {message}", flush=True)

    def check(self, name: str, passed: bool, found: object) -> None:
        """Record and print the result of a check."""
        self.checks.append({"name": name, "passed": bool(passed), "found": str(found)})
        print(f"  {'PASS' if passed else 'FAIL'}  {name}: {found}", flush=True)

    def at_most(self, name: str, found: float, limit: float) -> None:
        """Check that a number is at most `limit`. NaN fails the check."""
        self.check(name, found <= limit, f"{found:.3g}, at most {limit:g}")

    def table(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Record and print a table whose rows have the same columns."""
        self.tables.append({"title": title, "rows": list(rows)})
        columns = list(rows[0]) if rows else []
        texts = [[format_cell(row[column]) for column in columns] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
        print(f"  {title}")
        for line in ([*columns], *texts):
            print("    " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)), flush=True)


Part = Callable[[Settings, Report], None]


def format_cell(value: object) -> str:
    """Return the text of a table cell. Floats are rounded, and None becomes "-"."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def relative_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the norm of the difference of two lists of tensors, divided by the norm of the expected ones."""
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in zip(found, expected, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
