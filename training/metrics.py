"""What a run reports: metrics.jsonl, the progress line, Weights & Biases, provenance, and how busy the hardware is."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm import tqdm

from data.shards import write_json
from device import cpu_instruction_set

if TYPE_CHECKING:  # their imports take a second that reading metrics does without
    from training.config import Config
    from training.parallel import Processes


class MetricsLog:
    """metrics.jsonl: one object a line, appended and flushed; the same to Weights & Biases when on.

    Opening it drops what was written after step `last_step`, the one training goes on from, and of validations what was
    written after `last_validation` (by default the same); and a line torn by a crash. So no step stands twice. Where
    the disk is full and checkpoint.on_error is "continue", lines wait until there is room.

    Raises ValueError where Weights & Biases does not start.
    """

    def __init__(self, path: Path, last_step: int, config: Config, *, last_validation: int | None = None) -> None:
        last_validation = last_step if last_validation is None else last_validation
        self._patient, self._waiting = config.checkpoint.on_error == "continue", b""
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            for line in iterate_metrics(path):
                if line["step"] <= (last_step if line["split"] == "train" else last_validation):
                    file.write(json.dumps(line) + "\n")
        os.replace(partial, path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._wandb = None
        if config.log.wandb != "disabled":
            import wandb

            # one id a run directory: a resumed run goes on in the same curves, another of its name does not
            id_file = path.with_name("wandb_id.txt")
            if not id_file.exists():
                id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
            try:
                self._wandb = wandb.init(
                    project="gpt2",
                    name=config.run.name,
                    id=id_file.read_text(encoding="utf-8").strip(),
                    resume="allow",
                    mode=config.log.wandb,
                    dir=path.parent,
                    config=config.to_dict(),
                )
            except wandb.Error as error:
                raise ValueError(
                    f"log.wandb is {config.log.wandb}, but Weights & Biases did not start ({error}): run "
                    f"`wandb login`, see to the network, or set log.wandb to offline or disabled"
                ) from error

    def write(self, split: str, step: int, **values: Any) -> None:
        """Append one record. Numbers that are not finite become null, as JSON has none."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._waiting += json.dumps({"split": split, "step": step, **clean}).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._patient:
                raise OSError(
                    f"cannot write {self._file.name} ({error.strerror}): make room, and the same command goes on from "
                    f"the last checkpoint"
                ) from error
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Close the file, and finish with Weights & Biases."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, one at a time; none where there is no file. A line torn by a crash is not one."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if line.endswith("\n"):  # the torn one is the last and has no end
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl."""
    return list(iterate_metrics(path))


class Progress:
    """A progress bar on a terminal, elsewhere a line every `every` steps: loss, rate, MFU where known, time left."""

    def __init__(self, first_step: int, steps: int, every: int, enabled: bool) -> None:
        self.steps, self.every, self.enabled = steps, every, enabled
        self._began, self._first = time.perf_counter(), first_step
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, rate: str) -> None:
        """Step `step` (from 1) is done."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate}")
        elif step % self.every == 0 or step == self.steps:
            left = (time.perf_counter() - self._began) / (step - self._first) * (self.steps - step)
            print(f"step {step:>6}/{self.steps}  loss {loss:.4f}  {rate}  {duration(left)} left", flush=True)

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(message)
        elif self.enabled:
            print(message, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class Stopwatch:
    """Seconds of a step by part, `<part>_seconds`, on the host's clock: the device is not waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap as `part`."""
        now = time.perf_counter()
        self.seconds[f"{part}_seconds"], self._last = now - self._last, now

    @property
    def total(self) -> float:
        """All laps."""
        return self._last - self._began


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held at a time: of tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start_profiler(path: Path) -> torch.profiler.profile:
    """Trace steps 3 to 5 from here (after compiling) into `path`, for chrome://tracing; `step()` after each step."""
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    )
    profiler.start()
    return profiler


def duration(seconds: float) -> str:
    """3.2 s, 4 min 10 s, 2 h 05 min, 3 d 04 h: two units at most."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours, days = int(seconds / 60), int(seconds / 3600), int(seconds / 86400)
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60:02} s"
    return f"{hours} h {minutes % 60:02} min" if hours < 24 else f"{days} d {hours % 24:02} h"


def record_provenance(path: Path, config: Config, processes: Processes, resumed_at: int | None) -> None:
    """Add this start of the run to provenance.json: what was called, of which code, with which versions, on what."""
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    packages = ("torch", "numpy", "safetensors", "tiktoken", "tokenizers")
    start = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_at_step": resumed_at,
        "command": [sys.executable, *sys.argv],
        "allow_changes": config.run.allow_changes,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "hardware": hardware(),
        "processes": processes.world_size,
        "device": str(processes.device),
        "dtype": str(processes.dtype),
    }
    write_json(path, [*starts, start])


def hardware() -> dict[str, Any]:
    """What this machine is."""
    return {
        "platform": platform.platform(),
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor()),
        "instructions": cpu_instruction_set(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or the code was copied without its history
        return None
    return result.stdout.strip()
