"""What a run measures and shows while it trains: progress, time, memory, provenance and the hardware."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from device import cpu_instruction_set
from processes import Processes
from training.config import Config

SAMPLE_CHARACTERS = 66  # maximum length of a printed sample; with its indentation, it fits on 80 columns


class Progress:
    """Shows progress as a bar on a terminal. If the output is not a terminal, prints a line every `every` steps.

    If `bytes_per_token` (the mean of the training text) is known, the loss is also shown in bits per byte, which can be
    compared between tokenizers.
    """

    def __init__(
        self, first_step: int, steps: int, every: int, enabled: bool, bytes_per_token: float | None = None
    ) -> None:
        self.steps, self.every, self.enabled, self.bytes_per_token = steps, every, enabled, bytes_per_token
        self._started, self._first = time.perf_counter(), first_step
        self._bar: tqdm | None = None

    def update(self, step: int, loss: float, rate: str) -> None:
        """Show that step `step` (from 1) is done, its loss in nats, and `rate`, a text such as "21,000 tokens/s"."""
        if not self.enabled:
            return
        left = (time.perf_counter() - self._started) / (step - self._first) * (self.steps - step)
        bits = f"  {loss / math.log(2) / self.bytes_per_token:.2f} bits/byte" if self.bytes_per_token else ""
        described = f"loss {loss:.4f}{bits}  {rate}  {duration(left)} left"
        if sys.stderr.isatty():
            if self._bar is None:  # created at the first step, so that earlier messages stay above it
                bar = "\x1b[32m{bar}\x1b[0m" if use_colors() else "{bar}"  # green
                self._bar = tqdm(
                    total=self.steps,
                    initial=self._first,
                    bar_format=f"step {{n_fmt}}/{{total_fmt}} {bar} {{desc}}",
                    dynamic_ncols=True,
                )
            self._bar.set_description_str(described, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self.every == 0 or step == self.steps:
            print(f"step {step:>6}/{self.steps}  {described}", flush=True)

    def show_sample(self, texts: Sequence[str]) -> None:
        """Print the beginning of the first of the sampled texts, if there is one, in one line."""
        if texts:
            line = " / ".join(filter(None, (line.strip() for line in texts[0].splitlines())))
            line = "".join(character if character.isprintable() else "?" for character in line)
            self.say(f"             {line[:SAMPLE_CHARACTERS]}")

    def say(self, message: str) -> None:
        """Print a message, above the bar if there is one."""
        message = wrapped(message)
        if self._bar is not None:
            self._bar.write(message)
        elif self.enabled:
            print(message, flush=True)

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()


def wrapped(message: str) -> str:
    """Wrap the lines of a message to the width of the terminal; without a terminal, return it unchanged."""
    if not sys.stdout.isatty():
        return message
    width = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    return "\n".join(wrapper.fill(line) for line in message.split("\n"))


def use_colors() -> bool:
    """Return whether to print colors on a terminal: not if NO_COLOR is set (https://no-color.org) or TERM is dumb."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Stopwatch:
    """Measures the seconds of each part of a step on the host's clock, without waiting for the device."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # "<part>_seconds" -> duration of the part
        self._started = self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Record the time since the last lap as the time of `part`."""
        now = time.perf_counter()
        self.seconds[f"{part}_seconds"], self._last = now - self._last, now

    @property
    def total(self) -> float:
        """The sum of all laps."""
        return self._last - self._started


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of its tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start_profiler(path: Path) -> torch.profiler.profile:
    """Trace the third, fourth and fifth step from now, and write the trace to `path`.

    The first two steps include compilation. The caller must call the profiler's `step` after each training step.
    """
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    )
    profiler.start()
    return profiler


def duration(seconds: float) -> str:
    """Format a duration with at most two units: 3.2 s, 4 min 10 s, 2 h 05 min, 3 d 04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours, days = int(seconds / 60), int(seconds / 3600), int(seconds / 86400)
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60:02} s"
    return f"{hours} h {minutes % 60:02} min" if hours < 24 else f"{days} d {hours % 24:02} h"


def provenance(
    config: Config, processes: Processes, resumed_at: int | None, branched_from: Path | None
) -> dict[str, Any]:
    """Return the entry in provenance.json for this start of the run: command, versions of code and libraries, hardware.

    resumed_at is the step from which the run resumes, None for a new run. branched_from is the checkpoint of another
    run from which a new run starts, or None.
    """
    packages = ("torch", "numpy", "safetensors", "tiktoken", "tokenizers")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_at_step": resumed_at,
        "branched_from": str(branched_from.resolve()) if branched_from else None,
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


def hardware() -> dict[str, Any]:
    """Return the platform, the processor, the memory and the GPUs of this machine, for provenance.json."""
    return {
        "platform": platform.platform(),
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor()),
        "instructions": cpu_instruction_set(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _git(*arguments: str) -> str | None:
    """Return the output of git in this repository, None if there is no git or no repository."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
