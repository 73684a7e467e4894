"""Where a run starts: with new weights, with a given model, or from a checkpoint of its own or of another run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import choose_checkpoint, is_run, read_state
from model import GPTConfig
from processes import Processes
from training.checkpoint import Checkpoints
from training.config import Config, Optim, refuse_changes
from training.inputs import InitialModel, Inputs, find_initial_model
from training.optim import learning_rate_factor


class Start(NamedTuple):
    """Where a run starts."""

    checkpoint: Path | None  # its training state is loaded; None for a new run
    branches: bool  # True if the checkpoint belongs to another run
    model: InitialModel | None  # the model of the checkpoint or of model.init_from; None for new weights

    @property
    def resumes(self) -> bool:
        """True if the run continues where it was stopped."""
        return self.checkpoint is not None and not self.branches


def find_start(config: Config, processes: Processes, checkpoints: Checkpoints) -> Start:
    """Return where a run starts according to run.resume, run.branch_from and model.init_from.

    Raises ValueError or OSError if these fields contradict each other or the files that exist.
    """
    checkpoint, branches = find_checkpoint(config, processes, checkpoints), False
    if checkpoint is None and config.run.branch_from is not None:
        checkpoint, branches = find_branch_point(config.run.branch_from, processes), True
    return Start(checkpoint, branches, find_initial_model(config, checkpoint))


def find_checkpoint(config: Config, processes: Processes, checkpoints: Checkpoints) -> Path | None:
    """Return the checkpoint to resume from according to run.resume, or None to start a new run.

    The main process chooses it, because the other nodes may lack access to the checkpoints. All processes return it.

    Raises ValueError or FileNotFoundError if run.resume contradicts the checkpoints that exist.
    """
    resume, step = config.run.resume, -1
    if processes.is_main:
        newest = None if resume == "never" else checkpoints.newest()
        if resume == "must" and newest is None:
            raise FileNotFoundError(
                f"run.resume is must, but there is no checkpoint in {checkpoints.directory}: correct run.name and "
                f"run.dir, or set run.resume to auto to start a new run"
            )
        if resume == "never" and checkpoints.existing():
            raise ValueError(
                f"run.resume is never, but {checkpoints.directory.parent} has checkpoints: choose another run.name, or "
                f"set run.resume to auto"
            )
        step = -1 if newest is None else read_state(newest)["step"]
    step = processes.broadcast(step)
    return None if step < 0 else checkpoints.path(step)


def find_branch_point(name: str, processes: Processes) -> Path:
    """Return the checkpoint that run.branch_from names. The main process chooses and verifies it.

    Raises ValueError or FileNotFoundError if there is no such run or no such step.
    """
    directory, step = parse_branch_point(name)
    if not is_run(directory):
        raise FileNotFoundError(
            f"run.branch_from {name}: {directory} is not the directory of a run with checkpoints, such as runs/stable"
        )
    found = read_state(choose_checkpoint(directory, step))["step"] if processes.is_main else -1
    return directory / "checkpoints" / f"step-{processes.broadcast(found):06d}"


def parse_branch_point(name: str) -> tuple[Path, str]:
    """Return the directory and the step, or "newest", of a value of run.branch_from. Raises ValueError for others."""
    run, at, step = name.rpartition("@") if "@" in name else (name, "", "newest")
    if at and not step.isdecimal():
        raise ValueError(f"run.branch_from {name}: expected RUN or RUN@STEP, such as runs/stable@1000")
    return Path(run), str(int(step)) if at else step


def same_branch_point(before: str | None, now: str | None) -> bool:
    """Return whether two values of run.branch_from name the same step of the same directory."""
    if before is None or now is None:
        return before == now
    (old, old_step), (new, new_step) = parse_branch_point(before), parse_branch_point(now)
    return (old.resolve(), old_step) == (new.resolve(), new_step)


def run_identity(config: Config, model: GPTConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what may not change when a run resumes, by section: the training recipe, the model and the dataset."""
    return config.identity() | {
        "model": dataclasses.asdict(model)
        | {"freeze_layers": config.model.freeze_layers, "init_from": config.model.init_from},
        "dataset": {"sha256": inputs.train.fingerprint, "validation_sha256": inputs.validation_fingerprint},
    }


def same_model(init_from: str, *others: str | None) -> bool:
    """Return whether model.init_from is the same name, or the same directory, as one of `others`."""
    return any(other is not None and Path(other).resolve() == Path(init_from).resolve() for other in others)


def scores_other_tokens(state: dict[str, Any], val_tokens: int) -> bool:
    """Return whether the losses in a trainer/state.json were measured on another number of validation tokens.

    Both numbers are known only if the run has a validation split, and if its checkpoint is not older than the field.
    """
    return bool(state.get("val_tokens") and val_tokens) and state["val_tokens"] != val_tokens


def read_saved_state(start: Start, config: Config, identity: dict[str, Any], val_tokens: int) -> dict[str, Any]:
    """Return the trainer/state.json of the checkpoint that a run starts from, or {} if there is none.

    It has no validation losses if they cannot be compared with those of this run: those of a parent, and those on
    another number of tokens than `val_tokens` (eval.tokens).

    Raises ValueError if this run cannot resume from the checkpoint or, for a branch, cannot branch from it.
    """
    checkpoint, is_parent, steps = start.checkpoint, start.branches, config.optim.steps
    if checkpoint is None:
        return {}
    state = read_state(checkpoint)
    before, now = state["identity"]["dataset"], identity["dataset"]
    if None in (before.get("validation_sha256"), now["validation_sha256"]):  # trained without validation, now or before
        before["validation_sha256"] = now["validation_sha256"]
    # Older checkpoints do not store the newer fields of GPTConfig. They were trained with the defaults.
    model = state["identity"]["model"] = dataclasses.asdict(GPTConfig()) | state["identity"]["model"]
    places = state.get("init_from_path"), model.get("init_from", config.model.init_from)  # older ones store neither
    if same_model(config.model.init_from, *places):
        model["init_from"] = config.model.init_from
    # A parent may itself be a branch. A run that resumes may spell the same branch point in another way.
    run = state["identity"]["run"]
    if is_parent or same_branch_point(run.get("branch_from"), config.run.branch_from):
        run["branch_from"] = config.run.branch_from
    if is_parent or scores_other_tokens(state, val_tokens):
        # Measured again. For a branch, the validation curve begins here. eval.patience counts from here.
        state["val_loss"] = state["best"] = None
    refuse_changes(state["identity"], identity, allow=is_parent or config.run.allow_changes, is_parent=is_parent)
    if is_parent and state["step"] >= steps:
        raise ValueError(
            f"run.branch_from: {checkpoint} is after step {state['step']:,}, and optim.steps {steps:,} includes these "
            f"steps: raise optim.steps, or branch from an earlier step"
        )
    if state["step"] > steps:
        raise ValueError(
            f"{checkpoint} is after step {state['step']:,}, past optim.steps {steps:,}: raise optim.steps, or move the "
            f"later checkpoints away to resume from an earlier one"
        )
    return state


def describe_start(start: Start, optim: Optim, val_tokens: int) -> list[str]:
    """Return lines that name the checkpoint, and say if another number of validation tokens is scored from now on.

    They warn if a branch starts with another learning rate.
    """
    if start.checkpoint is None:
        return []
    parent = start.checkpoint
    state = read_state(parent)
    if start.resumes:
        lines = [f"resuming from {parent}"]
        if scores_other_tokens(state, val_tokens):
            lines.append(
                f"eval.tokens has changed: validations score {val_tokens:,} tokens, and scored "
                f"{state['val_tokens']:,} before. Their losses cannot be compared, so the search for the lowest one, "
                f"and eval.patience, begin again"
            )
        return lines
    before = dataclasses.replace(optim, **state["identity"]["optim"])
    old, new = (o.lr * learning_rate_factor(state["step"] - 1, o) for o in (before, optim))
    lines = [f"branching from {parent}"]
    if not math.isclose(old, new):
        lines.append(
            f"warning: {parent} was trained with a learning rate of {old:.3g} in its last step, where the schedule of "
            f"this run has {new:.3g}: branch from an earlier step, or change optim.steps or the schedule"
        )
    return lines
