"""Train a GPT-2 in one process or in several:

    python train.py --config configs/shakespeare.yaml
    torchrun --standalone --nproc_per_node=8 train.py --config configs/gpt2-124m.yaml

The same command again resumes from the newest checkpoint. README.md describes the files of a run.

`train` is the loop, `train_step` one optimizer step. `training.setup.setup` prepares what both of them need.
"""

from __future__ import annotations

# Import training.launch before torch: it sets an environment variable that OpenMP reads when torch loads OpenMP.
from training.launch import StopSignal, training_process

# isort: split
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from report.curves import draw_loss
from training.distributed import clip_gradients, synchronize_gradients
from training.metrics import Stopwatch, duration, peak_memory, start_profiler
from training.optim import learning_rate_factor, set_learning_rate
from training.setup import TrainingRun, dry_run, is_due, setup
from training.validation import measure

# Training stops after this number of bad steps without a good step between them. A step is good if its loss and its
# gradient are finite. Any other step is bad, unless its gradient overflowed float16.
MAX_BAD_STEPS = 10


class StepResult(NamedTuple):
    """The result of an optimizer step, for the training loop. All processes have the same values."""

    finite: bool  # loss and gradient are finite; otherwise the step was skipped
    diverged: bool  # the step was skipped for a reason other than a float16 overflow
    stop: bool  # at least one process was asked to stop
    save: bool  # at least one process requests a checkpoint, because checkpoint.every_minutes have passed


def accumulate_gradients(run: TrainingRun) -> Tensor:
    """Compute the gradient of the next global batch in micro-batches. Return this process's part of the loss, ().

    The parts of all processes add up to the mean loss of the global batch, in nats. The batch is divided into
    micro-batches, because the activations of a whole global batch usually need too much memory. Each backward pass adds
    the gradient of its micro-batch to `.grad`, and the sum over the micro-batches of all processes is the gradient of
    the global batch.
    """
    processes, device = run.processes, run.processes.device
    micro_batches = next(run.loader)
    run.clock.lap("data")
    loss_sum = torch.zeros((), device=device)
    for i, (inputs, targets, weight, documents) in enumerate(micro_batches, 1):
        # Only the last backward pass averages the gradients over the processes. By then, `.grad` is the sum over this
        # process's micro-batches, so one average is enough.
        synchronize_gradients(run.loss_function, run.model, i == len(micro_batches))
        # With non_blocking, a copy from pinned memory to a GPU runs while the host queues the next operations.
        inputs = inputs.to(device, non_blocking=True)  # (b, T), b sequences in the micro-batch
        targets = targets.to(device, non_blocking=True)  # (b, T)
        if documents is not None:  # (b, T): with data.document_mask, tokens attend to their own document only
            documents = documents.to(device, non_blocking=True)
        with processes.autocast():
            loss = run.loss_function(inputs, targets, documents)  # (), the mean over this micro-batch's targets
        # weight is this micro-batch's fraction of the global batch's targets, so every target has the same influence on
        # the gradient. DDP and FSDP average gradients over the processes; multiplying by world_size turns the average
        # into the sum. The scaler keeps float16 gradients from becoming zero, and does nothing in other precisions.
        run.scaler.scale(loss * (weight * processes.world_size)).backward()
        loss_sum += loss.detach() * weight
    return loss_sum


def train_step(run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
    """Take one optimizer step on a global batch, and log it. Skip the step if its loss or gradient is not finite.

    `stop_requested` and `save_requested` are requests of this process. The result has the requests of all processes.
    """
    config, processes, state = run.config, run.processes, run.state
    run.clock, state.val_loss = Stopwatch(), None
    # Dropout masks depend on the seed, the step and the rank alone. So a resumed run draws the same masks, and a
    # checkpoint does not have to store the state of a random generator.
    if run.model.config.dropout:
        seeds = np.random.SeedSequence([config.run.seed, state.step, processes.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
    factor = learning_rate_factor(state.step, config.optim)
    set_learning_rate(run.optimizers, factor)

    loss_sum = accumulate_gradients(run)
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)  # undo the loss scale, because clipping needs the true norm
    # Clipping limits the damage of an unusual batch. GPT-3 clips to norm 1 (Brown et al. 2020, appendix B).
    norm = clip_gradients(run.model, config.optim.grad_clip)
    one = torch.ones((), device=processes.device)
    scale = run.scaler.scale(one)
    run.scaler.update()  # halves the scale if a gradient was not finite
    next_scale = run.scaler.scale(one)

    # `tolist` is the only host-device synchronization of a step: up to here, the host queued work for the device
    # without waiting for results. The sums over all processes give every process the same numbers, so all of them make
    # the same decisions. `torch.full` writes directly to device memory, without a second synchronization.
    requests = [torch.full((), float(asked), device=processes.device) for asked in (stop_requested, save_requested)]
    reduced = processes.all_reduce_sum(torch.stack([loss_sum, *requests]))
    numbers = torch.cat([reduced, torch.stack([norm, scale, next_scale])]).tolist()
    loss, stops, saves, grad_norm, loss_scale, next_loss_scale = numbers
    run.clock.lap("forward_backward")

    # Skip the step if its loss or gradient is not finite: a NaN in the weights or in the optimizer state would stay.
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    for optimizer in run.optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # None frees the memory until the next backward pass
    run.clock.lap("optimizer")
    # A loss scale that is too large makes the gradient overflow float16 although the loss is finite. At a scale of 1 or
    # less, the scale is not the reason.
    overflowed = math.isfinite(loss) and loss_scale > 1 and next_loss_scale < loss_scale
    diverged = not finite and not overflowed
    state.step += 1
    state.skipped_steps += diverged
    state.overflow_steps += overflowed
    log_step(run, loss, grad_norm, config.optim.lr * factor, loss_scale, diverged=diverged, overflowed=overflowed)
    return StepResult(finite, diverged, stops > 0, saves > 0)


def validate(run: TrainingRun, signal: StopSignal) -> bool:
    """Score the validation split and (if configured) HellaSwag, generate samples, and log and store the results.

    If a stop request interrupted this work, log nothing and return False, otherwise return True. All processes return
    the same value.
    """
    result = measure(run, signal)
    if result is None:
        return False
    state, loss = run.state, result.loss.loss
    # If this step already has a loss, a finished run repeats its last validation, which counts only once.
    state.validations_since_best += state.val_loss is None
    state.val_loss = loss
    # `loss >= NaN` is false, so a new loss replaces a NaN that an older version of this repository stored as the best.
    if math.isfinite(loss) and not (state.best and loss >= state.best[0]):
        state.best, state.validations_since_best = (loss, state.step), 0
    tokens = state.step * run.config.data.batch_tokens
    bits = result.loss.bits_per_byte
    parts = {name: part.loss for name, part in result.parts.items()}  # by dataset; empty if there is only one
    more: dict[str, Any] = {"parts": parts} if parts else {}
    if (final := result.final) is not None:
        state.final_tokens = run.inputs.final_tokens
        more |= {"final_loss": final.loss, "final_bits_per_byte": final.bits_per_byte, "final_tokens": final.tokens}
    run.directory.log("val", state.step, tokens=tokens, loss=loss, bits_per_byte=bits, **more)
    run.progress.say(f"step {state.step:>6}  validation loss {loss:.4f}, {bits:.4f} bits per byte")
    for name, part_loss in parts.items():
        run.progress.say(f"             {name}: {part_loss:.4f}")
    if final is not None and final.tokens > result.loss.tokens:
        run.progress.say(
            f"             on {final.tokens:,} tokens: {final.loss:.4f}, {final.bits_per_byte:.4f} bits per byte"
        )
    run.progress.show_sample(result.texts)
    if (answers := result.hellaswag) is not None:
        run.directory.log("hellaswag", state.step, tokens=tokens, **answers)
        run.progress.say(
            f"step {state.step:>6}  HellaSwag ({answers['convention']}) acc {answers['acc']:.4f}, "
            f"acc_norm {answers['acc_norm']:.4f} on {answers['count']:,}"
        )
    run.directory.append_samples(state.step, result.texts)
    return True


def save(run: TrainingRun) -> None:
    """Copy weights and optimizer state to host memory, and let a thread write them while training continues."""
    start = time.perf_counter()
    # "finished" at a step before the last one means that eval.patience has ended the run.
    state = run.checkpoint_state() | {"finished": is_done(run) and not run.lacks_validation}
    run.checkpoints.save(run.model, run.optimizers, run.inputs.tokenizer, state, write=run.processes.is_main)
    run.state.save_seconds = time.perf_counter() - start


def is_done(run: TrainingRun) -> bool:
    """Return whether the last step is done, or eval.patience validations in a row found no lower loss."""
    state, patience = run.state, run.config.eval.patience
    out_of_patience = state.best is not None and 0 < patience <= state.validations_since_best
    return out_of_patience or state.step == run.config.optim.steps


def train(
    run: TrainingRun,
    *,
    train_step: Callable[[TrainingRun, bool, bool], StepResult] = train_step,
    validate: Callable[[TrainingRun, StopSignal], bool] = validate,
    profile: bool = False,
) -> Literal["finished", "preempted"]:
    """Train to the last step, until eval.patience ends the run, or until a signal asks to stop.

    Return "preempted" if a signal asked to stop, otherwise "finished". scripts/ideas.py passes its own `train_step`
    and `validate`. With `profile`, the main process writes a trace of three steps to the run's directory.

    Raises FloatingPointError after MAX_BAD_STEPS bad steps. An error in writing a checkpoint can also end the run.
    """
    config, state = run.config, run.state
    signal = StopSignal(announce=run.processes.is_main)
    stopping, bad_steps, last_save = False, 0, time.monotonic()
    # Validate before training. At step 0, the loss of an untrained model is about ln(vocab_size): another number means
    # an error in the code. A run that resumes at a later step validates if the validation of this step is missing, for
    # example because a stop request skipped it.
    if config.eval.every and (config.eval.at_start if state.step == 0 else run.lacks_validation):
        stopping = not validate(run, signal)
        if is_done(run) and not stopping:
            save(run)  # the checkpoint from which this run resumed lacks the loss of the last validation
    profiler = start_profiler(run.directory.path / "trace.json") if profile and run.processes.is_main else None

    while not is_done(run) and not stopping:
        # All processes must leave the loop, or save, after the same step. But a stop signal may have reached only one
        # of them, and their clocks differ. So train_step adds up the requests of all processes together with the loss.
        save_requested = 0 < config.checkpoint.every_minutes <= (time.monotonic() - last_save) / 60
        finite, diverged, stopping, save_requested = train_step(run, signal.received, save_requested)
        # Raise an error of the thread that writes checkpoints, such as a full disk, now and not at the next save.
        run.checkpoints.raise_failure()

        # The data can cause a single bad step. Many in a row mean that training cannot recover.
        if diverged:
            bad_steps += 1
        elif finite:
            bad_steps = 0
        if bad_steps == MAX_BAD_STEPS:
            give_up(run)

        # A process that receives SIGTERM has little time left, often 30 seconds. So a stop request skips or interrupts
        # the validation, which may take minutes. The resumed run begins with that validation.
        if run.lacks_validation and not stopping:
            stopping = not validate(run, signal)
        # Validation comes before saving, because the checkpoint stores the validation loss. After a skipped step, a
        # periodic save is omitted: the newest checkpoint must be one from which a run can recover.
        if is_done(run) or stopping or (finite and (save_requested or is_due(state.step, config.checkpoint.every))):
            save(run)
            last_save = time.monotonic()
        # Draw after saving: an error in the drawing must not prevent a checkpoint. `conclude` makes the last drawing.
        if state.val_loss is not None and not (is_done(run) or stopping):
            run.directory.draw_losses(draw_loss, state.step, run.inputs.reference_losses)
        if profiler is not None:
            profiler.step()

    if profiler is not None:
        profiler.stop()
    status: Literal["finished", "preempted"] = "preempted" if stopping or not is_done(run) else "finished"
    conclude(run, status)
    # A request that came after the last step is not lost: a program that trains several runs stops too.
    return "preempted" if signal.received else status


# ---------------------------------------------------------------------------------------------------------------------
# What the loop reports


def log_step(
    run: TrainingRun, loss: float, grad_norm: float, lr: float, loss_scale: float, *, diverged: bool, overflowed: bool
) -> None:
    """Add a step to metrics.jsonl, add its duration to the training time of the run, and show the step."""
    state, seconds, batch_tokens = run.state, run.clock.total, run.config.data.batch_tokens
    if diverged:
        run.progress.say(f"step {state.step}: loss {loss}, gradient norm {grad_norm}: this step was skipped")
    elif overflowed:
        run.progress.say(
            f"step {state.step}: the gradient overflowed float16 at loss scale {loss_scale:g}: this step was skipped, "
            f"and the scale was halved"
        )
    state.seconds += seconds
    # MFU is the model FLOPs utilization: the model's own FLOPs per second, as a fraction of the hardware's peak.
    at_peak = run.plan.workload.seconds_at_peak
    mfu = None if at_peak is None else at_peak / seconds
    run.directory.log(
        "train",
        state.step,
        tokens=state.step * batch_tokens,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens_per_second=batch_tokens / seconds,
        mfu=mfu,
        seconds=state.seconds,
        **({"loss_scale": loss_scale} if run.scaler.is_enabled() else {}),
        **run.clock.seconds,
        checkpoint_seconds=state.save_seconds,  # training pause for a checkpoint before this step; 0 if there was none
        peak_memory=peak_memory(run.processes.device),
    )
    state.save_seconds = 0.0
    run.progress.update(
        state.step, loss, f"{batch_tokens / seconds:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")
    )


def give_up(run: TrainingRun) -> None:
    """Stop after too many bad steps: draw the losses, and raise FloatingPointError, which names the last checkpoint."""
    run.checkpoints.wait()
    run.directory.draw_losses(draw_loss, run.state.step, run.inputs.reference_losses, last=True)
    raise FloatingPointError(
        f"{MAX_BAD_STEPS} steps in a row had a loss or gradient that is not finite, at step {run.state.step}. "
        f"{run.checkpoints.advice()}"
    )


def conclude(run: TrainingRun, status: str) -> None:
    """Wait until the last checkpoint is written, write the status, draw the losses, and say how the run ended."""
    state, directory = run.state, run.directory
    run.progress.close()
    run.checkpoints.wait(last=True)
    directory.write_status(status, state.step)
    directory.draw_losses(draw_loss, state.step, run.inputs.reference_losses, last=True)
    if run.processes.is_main:
        say = run.progress.say
        say(f"{status} after step {state.step}, {duration(state.seconds)} of training: {directory.path}")
        if status == "preempted":
            say("run the same command to resume")
        elif state.best is not None and state.step < run.config.optim.steps:
            loss, step = state.best
            say(f"eval.patience ended the run: the validation loss has not been below {loss:.4f} since step {step}")
        if best := run.checkpoints.best():
            say(f"checkpoint with the lowest validation loss, {best[0]:.4f}: {best[1]}")


def main() -> None:
    """Read the command line, and train or, with --dry-run, print a report.

    The exit status is 2 for an error that the user can correct.
    """
    with training_process() as (config, flags, processes):
        if flags.dry_run is None:
            with setup(config, processes, verify=flags.verify) as run:
                train(run, profile=flags.profile)
        else:
            report, missing = dry_run(config, processes, flags)
            if processes.is_main:
                print(report, flush=True)
            if missing:
                raise FileNotFoundError(missing)


if __name__ == "__main__":
    main()
