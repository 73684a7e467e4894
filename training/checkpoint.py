"""Checkpoints: directories that are a GPT-2 to every other tool, with what training needs to go on beside it.

    checkpoints/step-000500/   config.json model.safetensors tokenizer.json tokenizer_config.json
                               trainer/optimizer.safetensors trainer/state.json   manifest.json

A checkpoint is written under a temporary name, flushed to the disk and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from data.tokenizer import Tokenizer
from files import file_sha256, sync_directory
from model import GPT, GPTConfig
from pretrained import MANIFEST, OPTIMIZER, STATE, find_newest, list_checkpoints
from weights import save_weights

PARTIAL = ".partial"


class Snapshot(NamedTuple):
    """What a checkpoint is written from: nothing of it changes while training goes on."""

    weights: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    shape: GPTConfig
    tokenizer: Tokenizer
    state: dict[str, Any]  # trainer/state.json; its "step" names the directory


def host_copy(model: GPT, optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name, and optimizer state by `parameter name/key`, whole, in host memory of their own.

    Every process must call it; only the main one gets the tensors.
    """
    from torch.distributed.checkpoint import state_dict as dcp  # imported here: it takes a second

    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = dcp.get_optimizer_state_dict(model, optimizers, options=whole).get("state", {})  # none on other ranks
    optimizer_state = {f"{name}/{key}": value for name, values in state.items() for key, value in values.items()}
    weights: dict[str, Any] = dcp.get_model_state_dict(model, options=whole)
    # what was on the CPU already is still the model's own, which trains on
    return {k: v.clone() for k, v in weights.items()}, {k: v.clone() for k, v in optimizer_state.items()}


def load_optimizers(model: GPT, optimizers: list[Optimizer], directory: Path) -> None:
    """Give the optimizers the state in a checkpoint. Learning rates and the like stay as the configuration has them."""
    from torch.distributed.checkpoint import state_dict as dcp

    state: dict[str, Any] = {}
    try:
        tensors = load_file(directory / OPTIMIZER)
    except SafetensorError as error:
        raise ValueError(
            f"{directory / OPTIMIZER} is not a safetensors file ({error}): delete {directory}, and go on without it"
        ) from None
    for flat, tensor in tensors.items():
        name, _, key = flat.rpartition("/")
        state.setdefault(name, {})[key] = tensor
    options = dcp.StateDictOptions(full_state_dict=True)
    groups = dcp.get_optimizer_state_dict(model, optimizers, options=options)["param_groups"]
    dcp.set_optimizer_state_dict(model, optimizers, {"state": state, "param_groups": groups}, options=options)


class Checkpoints:
    """The checkpoints of one run. Only the main process writes; `save` waits for the one before and writes on a thread.

    Args:
        directory: runs/<name>/checkpoints.
        keep: the newest that stay, beside the best by validation loss.
        on_error: "stop" raises a failed save at the next call of any method that can; "continue" says so on stderr and
            goes on.
    """

    def __init__(self, directory: Path, *, keep: int, on_error: str) -> None:
        self.directory, self.keep, self.on_error = directory, keep, on_error
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._damaged: set[Path] = set()

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps is, or would be."""
        return self.directory / f"step-{step:06d}"

    def list(self) -> list[Path]:
        """Those there are, by step, unverified."""
        return list_checkpoints(self.directory)

    def newest(self) -> Path | None:
        """The newest checkpoint whose manifest holds; damaged ones are named on stderr, passed over and left alone.

        Raises ValueError where there are checkpoints and every one is damaged.
        """
        newest, damaged = find_newest(self.directory)
        self._damaged.update(damaged)
        return newest

    def best(self) -> tuple[float, Path] | None:
        """The lowest validation loss known of them, and whose it is; what cannot be read is passed over.

        A checkpoint has its own loss, and the best before it: one saved at a stop was validated only afterwards.
        """
        own: dict[Path, float] = {}
        told: dict[Path, float] = {}
        for path in self.list():
            if path in self._damaged:
                continue
            try:
                state = read_state(path)
                loss, best = state["val_loss"], state.get("best")
            except (OSError, ValueError, KeyError, TypeError) as error:  # one without its trainer/ is still a GPT-2
                print(f"leaving alone {path}, whose {STATE} cannot be read: {error!r}", file=sys.stderr)
                self._damaged.add(path)
                continue
            if loss is not None:
                own[path] = loss
            if best is not None:
                told[self.path(best[1])] = best[0]
        there = set(self.list()) - self._damaged
        return min(((loss, path) for path, loss in (told | own).items() if path in there), default=None)

    def remove_partial(self) -> None:
        """Delete what a killed process left half written or half deleted."""
        for path in self.directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(path)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint on a thread, after the one before is done."""
        self.wait()

        def write() -> None:
            try:
                self._write(snapshot)
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def raise_failure(self) -> None:
        """As `wait`, but without waiting: tells of the last `save` as soon as it has failed."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the last `save` is on disk. Raises OSError if it failed, unless `on_error` is "continue"."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        message = f"a checkpoint could not be written to {self.directory} ({error}); earlier ones are whole"
        if self.on_error == "stop":
            raise OSError(f"{message}. Make room, and run the same command to go on from the newest") from error
        print(message, file=sys.stderr)

    def _write(self, snapshot: Snapshot) -> None:
        final = self.path(snapshot.state["step"])
        partial = final.with_name(final.name + PARTIAL)
        try:
            (partial / "trainer").mkdir(parents=True)
            save_weights(snapshot.weights, asdict(snapshot.shape), partial, eos_token_id=snapshot.tokenizer.eot)
            snapshot.tokenizer.save(partial)
            save_file(snapshot.optimizer_state, partial / OPTIMIZER)
            (partial / STATE).write_text(json.dumps(snapshot.state, indent=1) + "\n", encoding="utf-8")
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            manifest = {
                path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in files
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            for path in (*files, partial / MANIFEST):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            sync_directory(partial / "trainer")
            sync_directory(partial)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)  # room for the next attempt
            raise
        if final.exists():  # a damaged one that was passed over
            names = (final.with_name(f"{final.name}.damaged{n or ''}") for n in itertools.count())
            final.rename(next(name for name in names if not name.exists()))
            self._damaged.discard(final)
        partial.rename(final)
        sync_directory(self.directory)
        self._prune()

    def _prune(self) -> None:
        """Delete all but the newest `keep`, the best by validation loss, and what is damaged."""
        best = self.best()  # which finds what cannot be read
        paths = [path for path in self.list() if path not in self._damaged]
        for path in paths[: -self.keep]:
            if best is None or path != best[1]:
                # renamed first, so that a kill in the middle leaves no checkpoint that looks whole or damaged
                shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))


def lock_run(directory: Path) -> FileLock:
    """Hold a run's directory for this process; the system lets go of it however the process ends."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{directory} is in use by a run that is still going: wait, or choose another run.name"
        ) from None
    return lock


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What trainer/state.json holds."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
