"""Checkpoints: directories that other tools can load as a GPT-2, and that also hold the training state.

    checkpoints/step-000500/   config.json model.safetensors tokenizer.json tokenizer_config.json
                               trainer/optimizer.safetensors trainer/state.json   manifest.json

A checkpoint is written under a temporary name, flushed to the disk and renamed, so that it exists completely or not at
all. `checkpoints.py` finds and verifies checkpoints.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from checkpoints import MANIFEST, OPTIMIZER, STATE, find_best, list_checkpoints
from data.tokenizer import Tokenizer
from files import PARTIAL_SUFFIX, apply_umask, discard, file_sha256, sync_directory
from model import GPT
from weights import save_weights


def copy_to_host(model: GPT, optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copy the weights and the optimizer state to host memory. Return both as dictionaries of tensors.

    The keys of the weights are parameter names, and those of the optimizer state are "<parameter name>/<key>". Sharded
    tensors are gathered, so every process must call this function. Only the main process gets the tensors.
    """
    from torch.distributed.checkpoint import state_dict as dcp  # imported here: the import takes a second

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = dcp.get_optimizer_state_dict(model, optimizers, options=options).get("state", {})  # {} if rank > 0
    optimizer_state = {f"{name}/{key}": value for name, values in state.items() for key, value in values.items()}
    weights: dict[str, Any] = dcp.get_model_state_dict(model, options=options)
    if model.transformer.wte.weight.device.type != "cpu":
        return weights, optimizer_state
    # On a CPU, these are the model's and the optimizers' own tensors. Clone them, because the next step changes them.
    return {k: v.clone() for k, v in weights.items()}, {k: v.clone() for k, v in optimizer_state.items()}


def load_optimizers(model: GPT, optimizers: list[Optimizer], directory: Path) -> None:
    """Load the optimizer state of a checkpoint. Learning rates and other hyperparameters stay as configured.

    Raises ValueError if the file of the state is not a safetensors file.
    """
    from torch.distributed.checkpoint import state_dict as dcp  # imported here: the import takes a second

    state: dict[str, Any] = {}
    try:
        tensors = load_file(directory / OPTIMIZER)
    except SafetensorError as error:
        raise ValueError(
            f"{directory / OPTIMIZER} is not a safetensors file ({error}): delete {directory}, and resume without it"
        ) from None
    for flat, tensor in tensors.items():
        name, _, key = flat.rpartition("/")
        state.setdefault(name, {})[key] = tensor
    # Do not set full_state_dict here: each process would gather the whole optimizer state, which could fill a GPU.
    groups = dcp.get_optimizer_state_dict(model, optimizers)["param_groups"]
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_optimizer_state_dict(model, optimizers, {"state": state, "param_groups": groups}, options=options)


def check_finite(tensors: dict[str, Tensor], step: int) -> None:
    """Raise FloatingPointError if a tensor has NaN or infinity. The message names the first such tensor and `step`."""
    for name, tensor in tensors.items():
        # Check only the smallest and the largest value: both are NaN if any value is NaN. Unlike isfinite, aminmax
        # allocates no tensor as large as `tensor`.
        if tensor.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist())):
            raise FloatingPointError(f"{name} has values that are NaN or infinite after step {step}")


class Checkpoints:
    """The checkpoints of one run. A thread writes them while training continues.

    Args:
        directory: runs/<name>/checkpoints.
        keep: number of newest checkpoints to keep, in addition to the one with the best validation loss.
        on_error: if a checkpoint cannot be written, the next call of `save`, `wait` or `raise_failure` raises the error
            ("stop") or prints it on stderr ("continue").
        resumed: the checkpoint from which the run resumes, see `find_newest`; None for a new run.
        damaged: damaged checkpoints that are newer than `resumed`. They are never deleted.

    A checkpoint is not written if its weights or optimizer state are not finite. The next call of `save`, `wait` or
    `raise_failure` then raises FloatingPointError for either value of `on_error`.
    """

    def __init__(
        self, directory: Path, *, keep: int, on_error: str, resumed: Path | None = None, damaged: Sequence[Path] = ()
    ) -> None:
        self.directory, self.keep, self.on_error = directory, keep, on_error
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._cannot_flush = False
        self._resumed = resumed
        # The damaged checkpoints. `find_best` adds each checkpoint whose trainer/state.json it cannot read.
        self._unreadable = set(damaged)

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps, whether it exists or not."""
        return self.directory / f"step-{step:06d}"

    def best(self) -> tuple[float, Path] | None:
        """Return the lowest validation loss of the existing checkpoints and its checkpoint; None if no loss exists."""
        return find_best(self.directory, self._unreadable)

    def advice(self) -> str:
        """Return the end of an error message: the last good checkpoint, and what to do after training has diverged."""
        good = list_checkpoints(self.directory)
        return f"Last good checkpoint: {good[-1] if good else 'none'}. Resume from it with a lower optim.lr"

    def save(
        self, model: GPT, optimizers: list[Optimizer], tokenizer: Tokenizer, state: dict[str, Any], *, write: bool
    ) -> None:
        """Copy the weights and the optimizer state to host memory, and start a thread that writes them.

        Every process must call this method, because sharded tensors are gathered. Raises the errors of `wait`, which is
        called for the previous checkpoint.

        Args:
            state: the content of trainer/state.json; its "step" names the directory.
            write: True on the process that writes.
        """
        weights, optimizer_state = copy_to_host(model, optimizers)
        if not write:
            return
        self.wait()
        config = asdict(model.config)

        def write_files(partial: Path) -> None:
            check_finite(weights, state["step"])
            check_finite(optimizer_state, state["step"])
            save_weights(weights, config, partial, eos_token_id=tokenizer.eot)
            tokenizer.save(partial, model_max_length=model.config.block_size)
            save_file(optimizer_state, partial / OPTIMIZER)
            apply_umask(partial / OPTIMIZER)
            (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

        def run() -> None:
            try:
                self._write(self.path(state["step"]), write_files)
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def raise_failure(self) -> None:
        """If the thread of the last `save` has ended, raise or print its error as `wait` does. Otherwise do nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self, *, last: bool = False) -> None:
        """Wait until the thread of the last `save` has ended, and raise or print its error.

        Args:
            last: True if no other checkpoint follows.

        Raises FloatingPointError if the weights or the optimizer state of the checkpoint are not finite. Raises OSError
        if the checkpoint could not be written and `on_error` is "stop" or `last` is True.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        if isinstance(error, FloatingPointError):
            raise FloatingPointError(f"{error}. {self.advice()}") from None
        message = f"a checkpoint could not be written to {self.directory} ({error}); earlier ones are complete"
        if self.on_error == "stop" or last:
            raise OSError(f"{message}. Free some space, and run the same command to resume from the newest") from error
        print(message, file=sys.stderr)

    def _write(self, final: Path, write_files: Callable[[Path], None]) -> None:
        """Write one checkpoint to a temporary directory, rename the directory to `final`, and delete old checkpoints.

        If there is already a checkpoint at `final`, the new one takes its place. The existing one is deleted if it is
        undamaged, and renamed if it is damaged.
        """
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        try:
            (partial / "trainer").mkdir(parents=True)
            write_files(partial)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            manifest = {
                path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in files
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            # Everything must be on the disk before the rename: a power failure must not leave an incomplete checkpoint.
            for path in (*files, partial / MANIFEST):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            self._flush(partial / "trainer", partial)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)  # frees the space for the next attempt
            raise
        replaced = None
        if final == self._resumed:  # the run resumed from this checkpoint, and adds a validation loss to it
            replaced = final.rename(f"{final}.replaced{PARTIAL_SUFFIX}")
        elif os.path.lexists(final):  # a damaged checkpoint, from which the run could not resume
            names = (final.with_name(f"{final.name}.damaged{n or ''}") for n in itertools.count())
            final.rename(next(name for name in names if not os.path.lexists(name)))
            self._unreadable.discard(final)
        partial.rename(final)
        if replaced is not None:
            discard(replaced)
        self._flush(self.directory)
        self._prune()

    def _flush(self, *directories: Path) -> None:
        """Flush directories to the disk. If this fails, only warn, and only once: the checkpoint is complete."""
        try:
            for directory in directories:
                sync_directory(directory)
        except OSError as error:
            if not self._cannot_flush:
                print(
                    f"{self.directory} could not be flushed to the disk ({error}): its checkpoints are complete, but a "
                    f"power failure may lose the newest",
                    file=sys.stderr,
                )
            self._cannot_flush = True

    def _prune(self) -> None:
        """Delete old checkpoints, except those in `_unreadable`, the newest `keep` of the others, and the best one."""
        best = self.best()  # adds the checkpoints whose state cannot be read to `_unreadable`
        paths = [path for path in list_checkpoints(self.directory) if path not in self._unreadable]
        for path in paths[: -self.keep]:
            if best is None or path != best[1]:
                discard(path)
