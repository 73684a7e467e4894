"""Everything between a configuration and the first step: `setup` returns what the training loop needs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from data.loader import Loader, MicroBatch
from device import fast_dtype, gradient_scaler
from kernels.attention import use_newer_flash_attention
from model import GPT
from processes import Processes
from training.checkpoint import Checkpoints, load_optimizers
from training.config import Config
from training.distributed import distribute
from training.dry_run import dry_run as dry_run  # for train.py, which imports only this module to prepare a run
from training.estimate import Hardware, Workload
from training.inputs import Inputs, describe_epochs, open_inputs, warnings
from training.metrics import Progress, Stopwatch, provenance
from training.optim import make_optimizers
from training.plan import Plan, explain_out_of_memory, is_out_of_memory, make_plan
from training.run_directory import RunDirectory
from training.start import describe_start, find_start, make_model, read_saved_state, run_identity, source_paths
from training.step_time import warn_of_slow_cpu
from training.trackers import check_packages


@dataclass
class TrainingState:
    """How far a run has come. Each checkpoint stores all of it except `save_seconds`."""

    step: int = 0  # optimizer steps so far, including skipped ones
    seconds: float = 0.0  # duration of these steps, in seconds
    skipped_steps: int = 0  # steps whose loss or gradient was not finite; overflow_steps are counted separately
    overflow_steps: int = 0  # steps whose gradient overflowed float16
    val_loss: float | None = None  # validation loss after step `step`; None if it was not measured
    best: tuple[float, int] | None = None  # lowest validation loss so far, and the step after which it was measured
    validations_since_best: int = 0  # number of validations after the one of `best`, for eval.patience
    val_tokens: int = 0  # number of targets over which val_loss and best are means; 0: no validation split so far
    final_tokens: int = 0  # number of targets that the last pass over eval.final_tokens scored; 0: no such pass so far
    save_seconds: float = 0.0  # seconds that training paused for the last checkpoint; logged with the next step


@dataclass
class TrainingRun:
    """What the training loop needs, on every process. Use it in a `with` statement, which closes it."""

    config: Config
    processes: Processes
    plan: Plan
    inputs: Inputs
    model: GPT
    loss_function: nn.Module  # (inputs, targets, documents or None) -> mean loss; the result of `distribute`
    optimizers: list[Optimizer]
    scaler: torch.amp.GradScaler  # disabled unless the precision is float16
    loader: Iterator[list[MicroBatch]]  # this process's part of each global batch
    checkpoints: Checkpoints
    directory: RunDirectory
    progress: Progress
    state: TrainingState = field(default_factory=TrainingState)
    identity: dict[str, Any] = field(default_factory=dict)  # must not change when a run resumes: see `run_identity`
    clock: Stopwatch = field(default_factory=Stopwatch)  # times the parts of the current step

    @property
    def lacks_validation(self) -> bool:
        """True if a validation is due after step `state.step` and has no result yet.

        The last validation of a finished run also lacks a result if eval.final_tokens has changed since.
        """
        step, every = self.state.step, self.config.eval.every
        is_last = every > 0 and step == self.config.optim.steps
        if is_last and self.inputs.final_tokens not in (0, self.state.final_tokens):
            return True
        return self.state.val_loss is None and (is_last or is_due(step, every))

    def checkpoint_state(self) -> dict[str, Any]:
        """Return the content of a checkpoint's trainer/state.json."""
        progress = dataclasses.asdict(self.state)
        del progress["save_seconds"]
        return {
            **progress,
            "scaler": self.scaler.state_dict(),
            "micro_batch": self.plan.micro_batch,
            **self.plan.planned_for,
            **source_paths(self.config),
            "identity": self.identity,
        }

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """Stop the loader and close the directory. After an exception in the block, write "failed" to status.json.

        An out-of-memory error is replaced by a ValueError, whose message says how to save memory.
        """
        if kind is not None:
            with contextlib.suppress(OSError):  # a failed write must not hide the error that ended the run
                self.directory.write_status("failed", self.state.step)
        if isinstance(self.loader, Loader):
            self.loader.close()
        self.directory.close(failed=kind is not None)
        if is_out_of_memory(error):
            raise ValueError(explain_out_of_memory(self.plan, self.processes.device)) from None


def is_due(step: int, every: int) -> bool:
    """Return whether an event with a period of `every` steps (0: never) is due after this step."""
    return every > 0 and step % every == 0


def setup(config: Config, processes: Processes, *, verify: bool = False) -> TrainingRun:
    """Prepare a run: a new one, one that branches from another run, or one that resumes from its newest checkpoint.

    With `verify`, every shard of the dataset is compared with its hash first.

    Raises ValueError or OSError if the run cannot work. The settings, the dataset, the checkpoint and the memory are
    checked before the directory of a new run is created.
    """
    if processes.is_main:
        check_packages(config.log)
    directory = RunDirectory(Path(config.run.dir) / config.run.name)
    if processes.is_main and directory.path.is_dir():
        directory.lock()
    start = find_start(config, directory.checkpoints, processes)
    # Every process verifies the dataset. If the other processes waited for the main process to verify it, a collective
    # operation could reach its timeout.
    inputs = open_inputs(config, start.model, verify=verify)
    shape = config.model_config(inputs.tokenizer.vocab_size, start.model)
    identity = run_identity(config, shape, inputs)
    saved = read_saved_state(start, config, identity, inputs.validation_tokens)
    notes = describe_start(start, saved, config.optim, inputs.validation_tokens)
    state = TrainingState(**{f.name: saved[f.name] for f in dataclasses.fields(TrainingState) if f.name in saved})
    state.val_tokens = inputs.validation_tokens or state.val_tokens

    model = make_model(shape, start.model, config.run.seed, config.model.freeze_layers)
    workload = Workload.of(config, shape, model.num_parameters(), Hardware.of(processes))
    plan = make_plan(config, workload, processes, saved)
    try:
        loss_function, optimizers, scaler = prepare_model(model, config, plan, processes)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"out of memory on {processes.device}: the weights and the optimizer do not fit into the free memory. End "
            f"other programs that use this memory, use a smaller model, or system.parallel fsdp on more processes"
        ) from None
    checkpoints = Checkpoints(
        directory.checkpoints,
        keep=config.checkpoint.keep,
        on_error=config.checkpoint.on_error,
        resumed=start.checkpoint if start.resumes else None,
        damaged=start.damaged,
    )
    if start.checkpoint is not None:
        load_optimizers(model, optimizers, start.checkpoint)
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
    loader = Loader(
        inputs.train,
        batch_tokens=config.data.batch_tokens,
        micro_batch=plan.micro_batch,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        start_step=state.step,
        rank=processes.rank,
        world_size=processes.world_size,
        pin_memory=processes.device.type == "cuda",
    )
    run = TrainingRun(
        config=config,
        processes=processes,
        plan=plan,
        inputs=inputs,
        model=model,
        loss_function=loss_function,
        optimizers=optimizers,
        scaler=scaler,
        loader=loader,
        checkpoints=checkpoints,
        directory=directory,
        progress=Progress(state.step, config.optim.steps, config.log.every, processes.is_main, inputs.bytes_per_token),
        state=state,
        identity=identity,
    )
    if processes.is_main:
        resumed_at = state.step if start.resumes else None
        branched_from = start.checkpoint if start.branches else None
        described = provenance(config, processes, resumed_at=resumed_at, branched_from=branched_from)
        directory.open(config, described, resumed_at, repeats_validation=run.lacks_validation, say=run.progress.say)
    run.progress.say(greeting(run, notes))
    return run


def prepare_model(
    model: GPT, config: Config, plan: Plan, processes: Processes
) -> tuple[nn.Module, list[Optimizer], torch.amp.GradScaler]:
    """Move a model to its device, and prepare it for training as planned. Return loss function, optimizers, scaler."""
    device = processes.device
    model.to(device).train()
    use_newer_flash_attention(device, model.config.dropout)
    loss_function = distribute(
        model,
        processes,
        compiled=plan.compiled,
        sharded=plan.sharded,
        sequence_length=config.data.sequence_length,
        activation_checkpointing=config.system.activation_checkpointing,
    )
    # Create the optimizers after `distribute`, where FSDP replaces the parameters by their shards.
    optimizers = make_optimizers(model, config.optim, fast_dtype(plan.dtype, device))
    return loss_function, optimizers, gradient_scaler(device, plan.dtype)


def greeting(run: TrainingRun, notes: list[str]) -> str:
    """Return the text to print before the first step: sizes, plan, warnings, and the checkpoint to start from."""
    config = run.config
    lines = [
        f"{run.plan.workload.n_parameters:,} parameters; {config.optim.steps:,} steps of {config.data.batch_tokens:,} "
        f"tokens, {describe_epochs(config, run.inputs)}",
        run.plan.describe(run.processes, config.data.sequence_length),
    ]
    lines += run.inputs.notes
    slow = warn_of_slow_cpu(run.plan.workload, run.processes.device, config.optim.steps)
    lines += [f"warning: {warning}" for warning in (*warnings(config, run.inputs), *slow)]
    return "\n".join(lines + notes)
