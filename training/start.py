"""Where a run starts: with new weights, with a given model, or from a checkpoint of this or of another run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints import check_directory, choose_checkpoint, find_newest, is_run, list_checkpoints, read_state
from model import GPT, GPTConfig
from pretrained import ModelFiles, extend_positions, find_model, resolve_model
from processes import Processes
from training.config import Config, Optim
from training.inputs import Inputs
from training.optim import learning_rate_factor
from weights import load_weights


class Start(NamedTuple):
    """Where a run starts."""

    checkpoint: Path | None  # its training state is loaded; None: the run starts at step 0
    branches: bool  # True if the checkpoint belongs to another run
    damaged: list[Path]  # damaged checkpoints of this run, newer than `checkpoint`; known to the main process only
    model: ModelFiles | None  # the model in the checkpoint, or that of model.init_from; None for new weights

    @property
    def resumes(self) -> bool:
        """True if the run continues where it was stopped."""
        return self.checkpoint is not None and not self.branches


def find_start(config: Config, directory: Path, processes: Processes) -> Start:
    """Return where a run starts according to run.resume, run.branch_from and model.init_from.

    Only the main process chooses the checkpoint or the model, so that all processes start from the same one: another
    run may add or delete checkpoints meanwhile.

    Args:
        directory: the directory `checkpoints` of the run.

    Raises ValueError or OSError if run.resume contradicts the checkpoints, or if a file is missing or damaged.
    """
    checkpoint, branches, damaged, model = None, False, list[Path](), None
    if processes.is_main:
        checkpoint, damaged = find_checkpoint(config.run.resume, directory)
        if checkpoint is None and config.run.branch_from is not None:
            checkpoint, branches = find_branch_point(config.run.branch_from), True
        model = choose_model(config, checkpoint)
    checkpoint, branches, model = processes.broadcast((checkpoint, branches, model))
    return Start(checkpoint, branches, damaged, find_model(model) if model else None)


def find_checkpoint(resume: str, directory: Path) -> tuple[Path | None, list[Path]]:
    """Return the checkpoint that run.resume selects, or None for a new run, and the newer checkpoints that are damaged.

    Raises ValueError or OSError if run.resume contradicts the existing checkpoints, or if they cannot be read.
    """
    check_directory(directory)
    if resume == "never":
        if list_checkpoints(directory):
            raise ValueError(
                f"run.resume is never, but {directory.parent} has checkpoints: choose another run.name, or set "
                f"run.resume to auto"
            )
        return None, []
    newest, damaged = find_newest(directory)
    if resume == "must" and newest is None:
        raise FileNotFoundError(
            f"run.resume is must, but there is no checkpoint in {directory}: correct run.name and run.dir, or set "
            f"run.resume to auto to start a new run"
        )
    return newest, damaged


def parse_branch_point(name: str) -> tuple[Path, str]:
    """Split run.branch_from into the directory of a run and the step. Without @STEP, the step is "newest".

    Raises ValueError if the form is not RUN or RUN@STEP.
    """
    run, at, step = name.rpartition("@") if "@" in name else (name, "", "newest")
    if at and not step.isdecimal():
        raise ValueError(f"run.branch_from {name}: expected RUN or RUN@STEP, such as runs/stable@1000")
    return Path(run), str(int(step)) if at else step


def find_branch_point(name: str) -> Path:
    """Return the checkpoint that run.branch_from names, after verifying its files.

    Raises FileNotFoundError if there is no such run or step, ValueError for a malformed `name` or a damaged checkpoint.
    """
    directory, step = parse_branch_point(name)
    if not is_run(directory):
        raise FileNotFoundError(
            f"run.branch_from {name}: {directory} is not the directory of a run with checkpoints, such as runs/stable"
        )
    return choose_checkpoint(directory, step)


def choose_model(config: Config, checkpoint: Path | None) -> str | None:
    """Return the directory or hub name of the model to start from, or None for new weights.

    This is `checkpoint` if it is given, otherwise model.init_from. If model.init_from is the directory of a run, the
    result is a checkpoint of that run.
    """
    if checkpoint is None and config.model.init_from == "scratch":
        return None
    return resolve_model(str(checkpoint or config.model.init_from))


def fixed_settings(config: Config) -> dict[str, Any]:
    """Return, by section, settings that must not change when a run resumes; `run_identity` adds model and dataset."""
    fields = config.to_dict()
    names = ("format", "batch_tokens", "sequence_length", "shuffle", "windows", "shift", "document_mask")
    data = {name: fields["data"][name] for name in names}
    # The directories of a mixture may move, so only the weights are compared. The hash of the dataset covers the text.
    data["mixture"] = [part.weight for part in config.data.mixture]
    run = {name: fields["run"][name] for name in ("seed", "branch_from")}
    return {"run": run, "data": data, "optim": fields["optim"]}


def run_identity(config: Config, model: GPTConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what must not change when a run resumes, by section: the training recipe, the model and the dataset."""
    return fixed_settings(config) | {
        "model": dataclasses.asdict(model)
        | {"freeze_layers": config.model.freeze_layers, "init_from": config.model.init_from},
        "dataset": {"sha256": inputs.train.fingerprint, "validation_sha256": inputs.validation_fingerprint},
    }


def source_paths(config: Config) -> dict[str, str | None]:
    """Return the absolute paths of model.init_from and run.branch_from, for a checkpoint's trainer/state.json.

    `run_identity` has both as given, which may be relative to the directory that train.py started in.
    """
    initial, branch_from = Path(config.model.init_from), config.run.branch_from
    return {
        "init_from_path": str(initial.resolve()) if initial.exists() else None,
        "branch_from_path": None if branch_from is None else str(parse_branch_point(branch_from)[0].resolve()),
    }


def same_place(name: str | Path, *others: str | Path | None) -> bool:
    """Return whether the name of a model, or of a directory, leads to the same directory as one of `others`."""
    return any(other is not None and Path(other).resolve() == Path(name).resolve() for other in others)


def scores_other_tokens(state: dict[str, Any], val_tokens: int) -> bool:
    """Return whether the losses in a trainer/state.json were measured on another number of tokens than `val_tokens`.

    The result is False if one of the two numbers is not known.
    """
    return bool(state.get("val_tokens") and val_tokens) and state["val_tokens"] != val_tokens


def same_branch_point(before: str | None, now: str | None, path: str | None) -> bool:
    """Return whether two values of run.branch_from name the same step of the same directory.

    `path` is the directory that `before` led to. None means that it is not known.
    """
    if before is None or now is None:
        return before == now
    (old, old_step), (new, new_step) = parse_branch_point(before), parse_branch_point(now)
    return old_step == new_step and same_place(new, old, path)


def read_saved_state(start: Start, config: Config, identity: dict[str, Any], val_tokens: int) -> dict[str, Any]:
    """Return the trainer/state.json of the checkpoint that a run starts from, or {} if there is none.

    Validation losses that cannot be compared with those of this run are set to None. These are the losses of a parent
    (the run of run.branch_from), and losses on another number of tokens than this run scores (`val_tokens`).

    Raises ValueError if this run cannot resume from the checkpoint or, for a branch, cannot branch from it.
    """
    checkpoint, is_parent, steps = start.checkpoint, start.branches, config.optim.steps
    if checkpoint is None:
        return {}
    state = read_state(checkpoint)
    before, now = state["identity"]["dataset"], identity["dataset"]
    # A validation split that was missing before, or is missing now, does not count as a change of the dataset.
    if None in (before.get("validation_sha256"), now["validation_sha256"]):
        before["validation_sha256"] = now["validation_sha256"]
    # Older checkpoints do not store the newer fields of GPTConfig. They were trained with the defaults.
    model = state["identity"]["model"] = dataclasses.asdict(GPTConfig()) | state["identity"]["model"]
    places = state.get("init_from_path"), model.get("init_from", config.model.init_from)  # old checkpoints lack both
    if same_place(config.model.init_from, *places):
        model["init_from"] = config.model.init_from
    # It is no change if the parent is itself a branch, or if the same branch point is written in another way.
    run = state["identity"]["run"]
    if is_parent or same_branch_point(run.get("branch_from"), config.run.branch_from, state.get("branch_from_path")):
        run["branch_from"] = config.run.branch_from
    if is_parent or scores_other_tokens(state, val_tokens):
        # The search for the lowest loss starts again, and eval.patience counts from zero.
        state |= {"val_loss": None, "best": None, "validations_since_best": 0}
    if "validations_since_best" not in state and state.get("best") and config.eval.every:  # an older checkpoint
        # A validation of the checkpoint's own step is missing if val_loss is None.
        steps_since_best = state["step"] - state["best"][1] - (state.get("val_loss") is None)
        state["validations_since_best"] = steps_since_best // config.eval.every
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


def refuse_changes(before: dict[str, Any], now: dict[str, Any], *, allow: bool, is_parent: bool = False) -> None:
    """Raise ValueError if the identity of a run (see `run_identity`) has changed. The message lists the changes.

    `before` is the identity in the checkpoint, `now` that of the present configuration. A setting that `before` lacks
    had its default. With `allow`, the length of the run, learning rates and the schedule may differ. With `is_parent`,
    `before` belongs to the run of run.branch_from.
    """
    defaults = Config().to_dict()

    def earlier(section: str, name: str) -> Any:
        return before.get(section, {}).get(name, defaults.get(section, {}).get(name))

    schedule = {"steps", "lr", "muon_lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_fraction"}
    changed = [
        f"{section}.{name} was {earlier(section, name)!r}, is {value!r}"
        for section, fields in now.items()
        for name, value in fields.items()
        if earlier(section, name) != value and not (allow and section == "optim" and name in schedule)
    ]
    if changed and is_parent:
        raise ValueError(
            f"the run of run.branch_from has another configuration: {'; '.join(changed)}. Restore these values: a "
            f"branch may change only optim.steps, learning rates and the schedule"
        )
    if changed:
        raise ValueError(
            f"this run was started with another configuration: {'; '.join(changed)}. Restore these values, or choose "
            f"another run.name; run.allow_changes true allows other optim.steps, learning rates and schedules"
        )


def describe_start(start: Start, saved: dict[str, Any], optim: Optim, val_tokens: int) -> list[str]:
    """Return lines that name the checkpoint from which the run starts, or [] if there is none.

    For a resumed run, a second line says if validations now score another number of tokens. For a branch, other lines
    warn if the parent's learning rates at the branch point were different. `saved` is the result of `read_saved_state`.
    """
    if start.checkpoint is None:
        return []
    parent = start.checkpoint
    if start.resumes:
        lines = [f"resuming from {parent}"]
        if scores_other_tokens(saved, val_tokens):
            lines.append(
                f"eval.tokens has changed: validations score {val_tokens:,} tokens, and scored "
                f"{saved['val_tokens']:,} before. Their losses cannot be compared, so the search for the lowest one, "
                f"and eval.patience, begin again"
            )
        return lines
    before = dataclasses.replace(optim, **saved["identity"]["optim"])
    lines = [f"branching from {parent}"]
    for name in ("lr", "muon_lr") if optim.name == "muon" else ("lr",):
        old, new = (getattr(o, name) * learning_rate_factor(saved["step"] - 1, o) for o in (before, optim))
        if not math.isclose(old, new):
            lines.append(
                f"warning: {parent} was trained with a learning rate of {old:.3g} in its last step, where this run has "
                f"{new:.3g} (optim.{name}): branch from an earlier step, or change optim.{name}, optim.steps or the "
                f"schedule"
            )
    return lines


def make_model(config: GPTConfig, initial: ModelFiles | None, seed: int, freeze_layers: int) -> GPT:
    """Return a GPT on the CPU in float32, initialized from `seed` or loaded. It is the same on every process."""
    if initial is None:
        torch.manual_seed(seed)
        return GPT(config)
    # The files may have a padded vocabulary and fewer positions than `config`. The sizes are changed after loading.
    found = initial.config
    with torch.device("meta"):
        model = GPT(dataclasses.replace(config, vocab_size=found.vocab_size, block_size=found.block_size))
    load_weights(model, initial.stored, dtype=torch.float32, device="cpu")
    if config.block_size > found.block_size:
        model = extend_positions(model, config.block_size)
    if config.vocab_size < found.vocab_size:
        model.resize_token_embeddings(config.vocab_size)
    if freeze_layers:
        model.freeze(freeze_layers)
    return model
