"""Find the checkpoints of a run, verify them, and choose one.

    runs/<name>/checkpoints/step-000500/   config.json model.safetensors tokenizer.json tokenizer_config.json
                                           trainer/optimizer.safetensors trainer/state.json   manifest.json

training/checkpoint.py writes checkpoints. This module does not import torch, so it loads quickly.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from files import file_sha256

MANIFEST = "manifest.json"  # size and sha256 of every other file of the checkpoint
STATE = "trainer/state.json"
OPTIMIZER = "trainer/optimizer.safetensors"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in a run's `checkpoints` directory in the order of their steps, without verifying them."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def check_directory(directory: Path) -> None:
    """Raise NotADirectoryError if a run's `checkpoints` exists and is not a directory.

    Usually it is a link to a disk that is not mounted. Such a run has checkpoints, so it must not start again.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise NotADirectoryError(
            f"{directory} leads to {os.path.realpath(directory)}, which is not a directory: mount its disk, or restore "
            f"the checkpoints. To start from the beginning, delete {directory}"
        )


def verify(checkpoint: Path) -> None:
    """Compare every file that a checkpoint's manifest lists with the size and the hash in the manifest.

    Raises:
        ValueError, OSError: a listed file is missing or differs from the manifest; or the manifest is missing or
            damaged, or does not list a required file. The message names the file.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} is not a manifest ({error})") from None
    for name, (size, sha256) in listed.items():
        path = checkpoint / name
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{checkpoint / MANIFEST} lists {name!r}, expected only files of the checkpoint")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, but its manifest says {size:,}")
        if file_sha256(path) != sha256:
            raise ValueError(f"{path} has another sha256 than its manifest says")
    if missing := {"config.json", STATE, OPTIMIZER} - listed.keys():
        raise ValueError(f"{checkpoint / MANIFEST} does not list {', '.join(sorted(missing))}")


def find_newest(directory: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest undamaged checkpoint of a run, and the damaged checkpoints that are newer.

    `directory` is the run's directory `checkpoints`. Damaged checkpoints are named on stderr and left unchanged. The
    first result is None if there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, but all of them are damaged.
    """
    damaged: list[Path] = []
    for path in reversed(list_checkpoints(directory)):
        try:
            verify(path)
        except (OSError, ValueError) as error:
            print(f"skipping a damaged checkpoint: {error}", file=sys.stderr)
            damaged.append(path)
        else:
            return path, damaged
    if damaged:
        raise ValueError(f"every checkpoint in {directory} is damaged: move them away to start from the beginning")
    return None, []


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's trainer/state.json."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def find_best(directory: Path, unreadable: set[Path]) -> tuple[float, Path] | None:
    """Return the lowest validation loss of the existing checkpoints, and its checkpoint, or None if no loss is known.

    A checkpoint stores two losses, if they are known: its own validation loss, and the lowest validation loss of the
    run so far, with the step of that loss. A checkpoint that was saved before its validation, because the run was asked
    to stop, lacks its own loss, but later checkpoints may store this loss as the lowest one.

    If eval.tokens has changed during the run, losses on another number of tokens than the newest loss are ignored. A
    loss whose number of tokens is unknown (from an older version of this repository) is not ignored.

    `directory` is the run's directory `checkpoints`. Checkpoints in `unreadable` are ignored. A checkpoint whose
    trainer/state.json cannot be read is named on stderr and added to `unreadable`.
    """
    measured: list[tuple[int | None, Path, float]] = []  # tokens (None in older checkpoints), checkpoint, loss
    paths = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(directory)}
    for path in paths.values():
        if path in unreadable:
            continue
        try:
            state = read_state(path)
            tokens, loss, best = state.get("val_tokens"), state["val_loss"], state.get("best")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # Do not raise an error: the weights of this checkpoint, and the other checkpoints, may be intact.
            print(f"ignoring {path}, because its {STATE} cannot be read: {error!r}", file=sys.stderr)
            unreadable.add(path)
            continue
        if best is not None and math.isfinite(best[0]) and best[1] in paths:
            measured.append((tokens, paths[best[1]], best[0]))
        if loss is not None and math.isfinite(loss):  # NaN and infinity cannot be compared
            measured.append((tokens, path, loss))
    last = measured[-1][0] if measured else None
    found = [(loss, path) for tokens, path, loss in measured if last is None or tokens in (None, last)]
    return min((one for one in found if one[1] not in unreadable), default=None)


def is_run(directory: Path) -> bool:
    """Return whether a directory is a run of train.py: it has a directory `checkpoints`."""
    return (directory / "checkpoints").is_dir()


def choose_checkpoint(run: Path, which: str | None = None) -> Path:
    """Return an undamaged checkpoint of a run, and name it on stderr.

    Args:
        which: "newest"; "best", the checkpoint with the lowest validation loss; or a step, such as "500". None means
            "best" if eval.patience ended the run, otherwise "newest".

    Raises:
        FileNotFoundError: the run has no checkpoint, no checkpoint of this step or, for "best", no validation loss.
        ValueError: the chosen checkpoint (for "newest": every checkpoint) is damaged, or `which` has another value.
    """
    directory = run / "checkpoints"
    existing = list_checkpoints(directory)
    if not existing:
        raise FileNotFoundError(f"{run} has no checkpoint yet")
    if which is None:
        which = "best" if _ended_by_patience(existing[-1]) else "newest"
    if which == "newest":
        chosen, description = find_newest(directory)[0], "the newest checkpoint"
    elif which == "best":
        best = find_best(directory, set())
        if best is None:
            raise FileNotFoundError(f"no checkpoint of {run} has a validation loss: use --checkpoint newest")
        chosen, description = best[1], f"the checkpoint with the lowest validation loss, {best[0]:.4f}"
    elif which.isdecimal():
        steps = {int(path.name.removeprefix("step-")): path for path in existing}
        if int(which) not in steps:
            raise FileNotFoundError(f"{run} has no checkpoint of step {which}, only of {', '.join(map(str, steps))}")
        chosen, description = steps[int(which)], "the chosen checkpoint"
    else:
        raise ValueError(f"--checkpoint {which}: expected best, newest or a step, such as 500")
    assert chosen is not None  # find_newest returns None only if there is no checkpoint
    if which != "newest":
        try:
            verify(chosen)
        except (OSError, ValueError) as error:
            raise ValueError(f"{chosen} is damaged ({error}): choose another checkpoint") from None
    if os.environ.get("RANK", "0") == "0":  # print once, not once per process
        print(f"loaded {chosen}, {description}", file=sys.stderr)
    return chosen


def _ended_by_patience(newest: Path) -> bool:
    """Return whether eval.patience ended a run before its last step. `newest` is the newest checkpoint of the run.

    The result is also False if the state of the checkpoint cannot be read, or lacks the field "finished".
    """
    try:
        state = read_state(newest)
        return state.get("finished", False) and state["step"] < state["identity"]["optim"]["steps"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # for example, an incomplete copy
        return False
