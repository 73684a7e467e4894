"""Train a GPT-2, alone or on many processes:

    python train.py --config configs/shakespeare.yaml
    torchrun --standalone --nproc_per_node=8 train.py --config configs/gpt2-124m.yaml

The same command again goes on from the newest checkpoint. README.md says what a run leaves behind.
"""

from __future__ import annotations

import openmp  # noqa: F401 (first, before torch)

# isort: split
import contextlib
import dataclasses
import gc
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import yaml
from filelock import FileLock

from data.loader import Loader
from data.shards import write_json
from device import fast_dtype, gradient_scaler
from eval.hellaswag import hellaswag
from eval.loss import split_loss
from eval.reference import losses_to_beat
from generation import generate
from model import GPTConfig
from report.curves import draw_loss
from training.checkpoint import Checkpoints, Snapshot, host_copy, load_optimizers, lock_run, read_state
from training.config import Config, parse_command_line, refuse_changes
from training.estimate import dry_run, fit_micro_batch, flops_per_token, peak_flops, should_shard
from training.inputs import find_weights, make_model, model_shape, open_inputs, warnings
from training.metrics import (
    MetricsLog,
    Progress,
    Stopwatch,
    duration,
    iterate_metrics,
    peak_memory,
    record_provenance,
    start_profiler,
)
from training.optim import learning_rate_factor, make_optimizers, set_learning_rate
from training.parallel import (
    Processes,
    clip_gradients,
    distribute,
    free_gathered_weights,
    lost_process,
    should_compile,
    start_processes,
    stop_processes,
    synchronise_gradients,
)

MAX_BAD_STEPS = 10  # in a row without a finite loss and gradient: the run has diverged
SAMPLE_TOKENS = 200
POINTS_DRAWN = 1000  # of loss.png's curve


class StepResult(NamedTuple):
    """What the loop needs to know of an optimizer step. All processes have the same."""

    finite: bool  # the loss and the gradient are: otherwise the step was skipped
    diverged: bool  # it was skipped, and not because the scaler of a float16 run is still searching for its scale
    stop: bool  # some process was asked to stop
    save: bool  # some process was asked to save


class Trainer:
    """One life of a run: set up, from scratch or from a checkpoint, then `run` to the end or to a signal."""

    def __init__(self, config: Config, processes: Processes, *, verify: bool = False) -> None:
        self.config, self.processes = config, processes
        self.directory = Path(config.run.dir) / config.run.name
        self.lock: FileLock | None = None
        self.metrics: MetricsLog | None = None
        self.step, self.seconds, self.save_seconds = 0, 0.0, 0.0
        self.skipped_steps, self.overflow_steps = 0, 0  # steps that diverged; steps whose gradient overflowed float16
        self.val_loss: float | None = None  # of this step; None where it was not measured
        self.best: tuple[float, int] | None = None  # lowest validation loss, and the step it was measured after

        # What can be refused is refused before anything is created.
        if processes.is_main and self.directory.is_dir():
            self.lock = lock_run(self.directory)
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints", keep=config.checkpoint.keep, on_error=config.checkpoint.on_error
        )
        checkpoint = self._checkpoint_to_resume()
        # Every process verifies: one that only waited for another's hashing would run into its backend's timeout. They
        # read side by side, and on one machine the page cache serves all but the first.
        self.inputs = inputs = open_inputs(config, verify=verify, checkpoint=checkpoint)
        source = find_weights(config, checkpoint)
        shape = model_shape(config, inputs.tokenizer, source)
        self.identity = config.identity() | {
            "model": dataclasses.asdict(shape)
            | {"freeze_layers": config.model.freeze_layers, "init_from": config.model.init_from},
            "dataset": {
                "sha256": inputs.train.fingerprint,
                "validation_sha256": inputs.val.fingerprint if inputs.val else None,
            },
        }
        state = self._resume(checkpoint) if checkpoint is not None else {}
        self.model = make_model(shape, source, config.run.seed)

        device = processes.device
        self.sharded, self.micro_batch, self.fitted_to = self._fit(shape, state)
        compiled, reason = should_compile(config, self.model, device)
        n_parameters = self.model.num_parameters()
        self.model.to(device).train()
        if config.model.freeze_layers:
            self.model.freeze(config.model.freeze_layers)
        self.loss_function = distribute(self.model, config, processes, compiled=compiled, sharded=self.sharded)
        self.optimizers = make_optimizers(self.model, config.optim, fast_dtype(processes.dtype, device))
        self.scaler = gradient_scaler(device, processes.dtype)
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if checkpoint is not None:
            load_optimizers(self.model, self.optimizers, checkpoint)
        self.loader = Loader(
            inputs.train,
            batch_tokens=config.data.batch_tokens,
            micro_batch=self.micro_batch,
            seed=config.run.seed,
            shuffle=config.data.shuffle,
            start_step=self.step,
            rank=processes.rank,
            world_size=processes.world_size,
            pin_memory=device.type == "cuda",
        )
        step_flops = config.data.batch_tokens * flops_per_token(shape, n_parameters, config.data.sequence_length)
        peak = peak_flops(device)
        self.seconds_at_peak = step_flops / (peak * processes.world_size) if peak else None  # of a step at 100% MFU
        if processes.is_main:
            self._open_directory(resumed=checkpoint is not None)
        self.progress = Progress(self.step, config.optim.steps, config.log.every, processes.is_main)
        self._greet(n_parameters, f"{'compiled' if compiled else 'not compiled'} ({reason})", checkpoint)

    def run(self, profile: bool = False) -> str:
        """Train to the last step or to a signal. Returns "finished" or "preempted", which status.json says too."""
        config = self.config
        stop = StopSignal()
        stopping, bad_steps, last_save = False, 0, time.monotonic()
        if config.eval.every and (config.eval.at_start if self.step == 0 else self._left_unvalidated()):
            self.validate()
        profiler = start_profiler(self.directory / "trace.json") if profile and self.processes.is_main else None
        while not self.done and not stopping:
            minutes = (time.monotonic() - last_save) / 60
            save_asked = 0 < config.checkpoint.every_minutes <= minutes
            finite, diverged, stopping, save_asked = self.train_step(stop.asked, save_asked)
            self.checkpoints.raise_failure()
            bad_steps = bad_steps + 1 if diverged else 0 if finite else bad_steps
            if bad_steps == MAX_BAD_STEPS:
                self._give_up()
            # who asks for a stop may not wait: the next life validates first
            if config.eval.every and (self.done or (due(self.step, config.eval.every) and not stopping)):
                self.validate()
            if self.done or stopping or (finite and (save_asked or due(self.step, config.checkpoint.every))):
                self.save()
                last_save = time.monotonic()
            if profiler is not None:
                profiler.step()
        if profiler is not None:
            profiler.stop()
        status = "finished" if self.done else "preempted"
        self._conclude(status)
        return status

    @property
    def done(self) -> bool:
        """Whether the last step is taken, or eval.patience validations in a row found no lower loss."""
        patience = self.config.eval.patience * self.config.eval.every
        impatient = patience > 0 and self.best is not None and self.step - self.best[1] >= patience
        return impatient or self.step == self.config.optim.steps

    def train_step(self, stop_asked: bool, save_asked: bool) -> StepResult:
        """One optimizer step over a global batch. A step with a loss or gradient that is not finite is skipped."""
        config, processes, model = self.config, self.processes, self.model
        clock, self.val_loss = Stopwatch(), None
        if model.config.dropout:  # drawn from the step alone, so that going on needs no generator's state
            seeds = np.random.SeedSequence([config.run.seed, self.step, processes.rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))
        factor = learning_rate_factor(self.step, config.optim)
        set_learning_rate(self.optimizers, factor)

        micro_batches = next(self.loader)
        clock.lap("data")
        loss_sum = torch.zeros((), device=processes.device)
        for i, (inputs, targets, share) in enumerate(micro_batches, 1):
            synchronise_gradients(self.loss_function, model, i == len(micro_batches))
            inputs = inputs.to(processes.device, non_blocking=True)
            targets = targets.to(processes.device, non_blocking=True)
            with processes.autocast():
                loss = self.loss_function(inputs, targets)
            # Every target weighs the same: gradients add up over micro-batches, and are averaged over processes.
            self.scaler.scale(loss * (share * processes.world_size)).backward()
            loss_sum += loss.detach() * share
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = clip_gradients(model, config.optim.grad_clip)
        one = torch.ones((), device=processes.device)
        scale = self.scaler.scale(one)
        self.scaler.update()  # halves the scale if a gradient was not finite
        next_scale = self.scaler.scale(one)

        # The one time in a step that the host waits for the device. All processes learn the same and decide the same.
        asked = torch.tensor([float(stop_asked), float(save_asked)]).to(processes.device)
        told = processes.sum(torch.cat([loss_sum[None], asked]))
        on_device = torch.cat([told, torch.stack([norm, scale, next_scale])])
        loss_value, stops, saves, grad_norm, loss_scale, next_loss_scale = on_device.tolist()
        clock.lap("forward_backward")
        finite = math.isfinite(loss_value) and math.isfinite(grad_norm)
        # The loss is finite, but the scaled gradient exceeded float16: the scaler is still searching for its scale.
        overflowed = math.isfinite(loss_value) and loss_scale > 1 and next_loss_scale < loss_scale
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer")
        self.step += 1
        diverged = not finite and not overflowed
        self.skipped_steps += diverged
        self.overflow_steps += overflowed
        if diverged:
            self.progress.say(f"step {self.step}: loss {loss_value}, gradient norm {grad_norm}: this step was skipped")
        elif overflowed:
            self.progress.say(
                f"step {self.step}: the gradient overflowed float16 at loss scale {loss_scale:g}: this step was "
                f"skipped, and the scale was halved"
            )
        self._log_step(loss_value, grad_norm, config.optim.lr * factor, loss_scale, clock)
        return StepResult(finite, diverged, stops > 0, saves > 0)

    def validate(self) -> None:
        """Score the validation split, sample, and draw the curves so far."""
        config, processes, model = self.config, self.processes, self.model
        assert self.inputs.val is not None  # else open_inputs refuses eval.every
        model.eval()
        result = split_loss(
            model,
            self.inputs.val,
            self.inputs.tokenizer.token_bytes(),
            micro_batch=self.micro_batch,
            rank=processes.rank,
            world_size=processes.world_size,
            reduce=processes.sum,
            autocast=processes.autocast,
        )
        answers = None
        if config.eval.hellaswag:
            with processes.autocast():
                answers = hellaswag(
                    model,
                    self.inputs.tokenizer,
                    rank=processes.rank,
                    world_size=processes.world_size,
                    reduce=processes.sum,
                )
        # under FSDP a forward pass takes all processes, also where only one writes down what comes of it
        sane = math.isfinite(result.loss)  # else there is nothing to draw from, and train_step tells
        texts = self._sample() if sane and (processes.is_main or self.sharded) else []
        free_gathered_weights(model)
        model.train()
        self.val_loss = result.loss
        if self.best is None or result.loss < self.best[0]:
            self.best = result.loss, self.step
        if self.metrics is None:
            return
        tokens = self.step * config.data.batch_tokens
        self.metrics.write("val", self.step, tokens=tokens, loss=result.loss, bits_per_byte=result.bits_per_byte)
        self.progress.say(
            f"step {self.step:>6}  validation loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte"
        )
        if answers is not None:
            self.metrics.write("hellaswag", self.step, tokens=tokens, **answers)
            self.progress.say(
                f"step {self.step:>6}  HellaSwag ({answers['convention']}) acc {answers['acc']:.4f}, "
                f"acc_norm {answers['acc_norm']:.4f} on {answers['count']:,}"
            )
        with self._room_for("samples.txt"), open(self.directory / "samples.txt", "a", encoding="utf-8") as file:
            file.writelines(f"==== step {self.step}, sample {i}\n{text}\n\n" for i, text in enumerate(texts, 1))
        self._draw()

    def save(self) -> None:
        """Copy weights and optimizer state to the host and hand them to the writing thread."""
        began = time.perf_counter()
        weights, optimizer_state = host_copy(self.model, self.optimizers)
        if self.processes.is_main:
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "skipped_steps": self.skipped_steps,
                "overflow_steps": self.overflow_steps,
                "scaler": self.scaler.state_dict(),
                "val_loss": self.val_loss,
                "best": self.best,
                "micro_batch": self.micro_batch,
                **self.fitted_to,
                "identity": self.identity,
            }
            self.checkpoints.save(Snapshot(weights, optimizer_state, self.model.config, self.inputs.tokenizer, state))
        self.save_seconds = time.perf_counter() - began

    def fail(self) -> None:
        """Leave word of a failure in status.json."""
        if self.metrics is not None:
            with contextlib.suppress(OSError):  # the failure itself is told, not what came of it
                write_json(self.directory / "status.json", {"status": "failed", "step": self.step})

    def close(self) -> None:
        """End the loader's thread and let go of the run's directory."""
        self.loader.close()
        if self.lock is not None:
            self.lock.release()

    def _checkpoint_to_resume(self) -> Path | None:
        """The checkpoint that run.resume asks for: chosen by the main process, the same for all."""
        resume, step = self.config.run.resume, -1
        if self.processes.is_main:
            newest = None if resume == "never" else self.checkpoints.newest()
            if resume == "must" and newest is None:
                raise FileNotFoundError(
                    f"run.resume is must, but there is no checkpoint in {self.checkpoints.directory}"
                )
            if resume == "never" and self.checkpoints.list():
                raise ValueError(
                    f"run.resume is never, but {self.directory} has checkpoints: choose another run.name, or auto"
                )
            step = -1 if newest is None else read_state(newest)["step"]
        chosen = torch.tensor(step, device=self.processes.device)
        if self.processes.world_size > 1:
            dist.broadcast(chosen, src=0)
        return None if chosen < 0 else self.checkpoints.path(int(chosen))

    def _resume(self, checkpoint: Path) -> dict[str, Any]:
        """Take up the counts of a checkpoint, if it is of this run; returns all that its state.json says."""
        state, steps = read_state(checkpoint), self.config.optim.steps
        before, now = state["identity"]["dataset"], self.identity["dataset"]
        if None in (before.get("validation_sha256"), now["validation_sha256"]):  # one of the two had no validation
            before["validation_sha256"] = now["validation_sha256"]
        state["identity"]["model"].setdefault("init_from", self.config.model.init_from)  # older checkpoints do not tell
        refuse_changes(state["identity"], self.identity, allow=self.config.run.allow_changes)
        self.step, self.seconds, self.skipped_steps = state["step"], state["seconds"], state["skipped_steps"]
        self.overflow_steps = state.get("overflow_steps", 0)
        self.val_loss, self.best = state["val_loss"], state.get("best")
        if self.step > steps:
            raise ValueError(
                f"{checkpoint} is after step {self.step:,}, past optim.steps {steps:,}: raise optim.steps, or move the "
                f"later checkpoints away to go on from an earlier one"
            )
        return state

    def _fit(self, shape: GPTConfig, state: dict[str, Any]) -> tuple[bool, int, dict[str, Any]]:
        """Whether the model is sharded, the micro-batch, and what that was fitted to.

        `state` is that of the checkpoint gone on from, or empty. Free memory differs between processes and moments:
        all, and a run gone on with in the same way, must decide the same.
        """
        config, processes = self.config, self.processes
        sharded = bool(processes.least(should_shard(config, shape, processes)))
        micro_batch = processes.least(fit_micro_batch(config, shape, processes, sharded=sharded))
        device = processes.device
        fitted_to = {
            "processes": processes.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(processes.dtype),
            "sharded": sharded,
            "activation_checkpointing": config.system.activation_checkpointing,
            "micro_batch_asked": config.data.micro_batch,
        }
        if config.data.micro_batch == "auto" and state:
            same = all(state.get(name, value) == value for name, value in fitted_to.items())
            if processes.least(same or not processes.is_main):  # state.json tells of the main process' device
                micro_batch = state["micro_batch"]
        return sharded, micro_batch, fitted_to

    def _greet(self, n_parameters: int, compiling: str, checkpoint: Path | None) -> None:
        """Say what is trained, for how long, on what, and what of it is seldom meant."""
        config, processes = self.config, self.processes
        tokens = config.optim.steps * config.data.batch_tokens
        self.progress.say(
            f"{n_parameters:,} parameters; {config.optim.steps:,} steps of {config.data.batch_tokens:,} tokens, "
            f"{tokens / self.inputs.epoch_tokens:.2f} epochs of {config.data.dir}\n"
            f"{processes.world_size} x {processes.device.type}, {str(processes.dtype).removeprefix('torch.')}, "
            f"micro-batches of {self.micro_batch} x {config.data.sequence_length}, {compiling}"
            + "".join(f"\nwarning: {warning}" for warning in warnings(config, self.inputs))
            + (f"\ngoing on from {checkpoint}" if checkpoint is not None else "")
        )

    def _open_directory(self, resumed: bool) -> None:
        """Create the run's directory, or clear up what a killed process left in it; open its metrics."""
        config, directory = self.config, self.directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.lock = self.lock or lock_run(directory)
            self.checkpoints.remove_partial()
            (directory / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
            record_provenance(
                directory / "provenance.json", config, self.processes, resumed_at=self.step if resumed else None
            )
            last_step = self.step if resumed else -1
            validated = last_step - 1 if resumed and self._left_unvalidated() else last_step
            self.metrics = MetricsLog(directory / "metrics.jsonl", last_step, config, last_validation=validated)
            keep_samples(directory / "samples.txt", validated)
            write_json(directory / "status.json", {"status": "running", "step": self.step})
        except OSError as error:
            raise OSError(f"cannot write to {directory} ({error.strerror or error}): choose another run.dir") from error

    def _log_step(self, loss: float, grad_norm: float, lr: float, loss_scale: float, clock: Stopwatch) -> None:
        seconds = clock.total
        self.seconds += seconds
        if self.metrics is None:
            return
        batch_tokens = self.config.data.batch_tokens
        mfu = self.seconds_at_peak / seconds if self.seconds_at_peak else None
        self.metrics.write(
            "train",
            self.step,
            tokens=self.step * batch_tokens,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=batch_tokens / seconds,
            mfu=mfu,
            seconds=self.seconds,
            **({"loss_scale": loss_scale} if self.scaler.is_enabled() else {}),
            **clock.seconds,
            checkpoint_seconds=self.save_seconds,  # of the checkpoint before this step, if there was one
            peak_memory=peak_memory(self.processes.device),
        )
        self.save_seconds = 0.0
        rate = f"{batch_tokens / seconds:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")
        self.progress.update(self.step, loss, rate)

    def _sample(self) -> list[str]:
        """Texts from end-of-text or from given prompts on, with the same seed each time: one sees the model change."""
        n, block_size = self.config.eval.samples, self.model.config.block_size
        if n == 0:
            return []
        eot = self.inputs.tokenizer.eot
        prompts = [prompt[-(block_size // 2) :] for prompt in islice(cycle(self.inputs.prompts), n)]
        new = min(SAMPLE_TOKENS, block_size - max(map(len, prompts)))
        generator = torch.Generator(self.processes.device).manual_seed(self.config.run.seed)
        with self.processes.autocast():
            ids = generate(
                self.model,
                prompts,
                max_new_tokens=new,
                do_sample=True,
                top_k=min(50, self.model.config.vocab_size),
                eos_token_id=eot,
                generator=generator,
            )
        assert isinstance(ids, torch.Tensor)
        return [self.inputs.tokenizer.decode([i for i in row if i != eot]) for row in ids.tolist()]

    def _left_unvalidated(self) -> bool:
        """Whether a stop came before the validation that was due after this step."""
        return self.val_loss is None and due(self.step, self.config.eval.every)

    @contextlib.contextmanager
    def _room_for(self, name: str) -> Iterator[None]:
        """Where a full disk shall not stop the run (checkpoint.on_error), do without what is written in here."""
        try:
            yield
        except OSError as error:
            if self.config.checkpoint.on_error == "stop":
                raise
            self.progress.say(f"{self.directory / name} could not be written ({error}); the run goes on")

    def _draw(self) -> None:
        every = max(1, self.step // POINTS_DRAWN)  # of a long run a part, so that memory does not grow with it
        metrics = iterate_metrics(self.directory / "metrics.jsonl")
        records = [record for record in metrics if record["split"] != "train" or record["step"] % every == 0]
        lines = losses_to_beat(self.config.data.dir, self.inputs.train.source, self.inputs.tokenizer.kind)
        with self._room_for("loss.png"):
            draw_loss(records, self.directory / "loss.png", self.config.run.name, lines)
        gc.collect()  # figures refer to themselves: left to Python, dozens of megabytes of them pile up

    def _give_up(self) -> None:
        self.checkpoints.wait()
        good = self.checkpoints.list()
        raise FloatingPointError(
            f"{MAX_BAD_STEPS} steps in a row had a loss or gradient that is not finite, at step {self.step}. "
            f"Last good checkpoint: {good[-1] if good else 'none'}. Go on from it with a lower optim.lr"
        )

    def _conclude(self, status: str) -> None:
        """End in order: the last checkpoint on disk, the curves drawn, the status written."""
        self.progress.close()
        self.checkpoints.wait()
        if self.metrics is None:
            return
        self.metrics.close()
        self._draw()
        write_json(self.directory / "status.json", {"status": status, "step": self.step})
        print(f"{status} after step {self.step}, {duration(self.seconds)} of training: {self.directory}")
        if best := self.checkpoints.best():
            print(f"of its checkpoints the lowest validation loss, {best[0]:.4f}: {best[1]}")


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and the first Ctrl-C into a wish to stop after the step; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def keep_samples(path: Path, last_step: int) -> None:
    """Of a run's samples.txt keep those of steps up to `last_step`: what comes after is sampled anew."""
    if path.exists():
        # in bytes: a full disk or a kill may have cut a character in two
        blocks = re.split(rb"^(?===== step (\d+), sample )", path.read_bytes(), flags=re.MULTILINE)[1:]
        kept = [block for step, block in zip(blocks[::2], blocks[1::2], strict=True) if int(step) <= last_step]
        partial = path.with_suffix(".partial")  # a kill now must not cost the samples of earlier lives
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def run(config: Config, flags: Any) -> None:
    """Train, or with --dry-run say what that would take."""
    processes = start_processes(config.system)
    if flags.dry_run is not None:
        report = dry_run(config, processes, flags)
        if processes.is_main:
            print(report)
        return
    trainer = Trainer(config, processes, verify=flags.verify)
    try:
        trainer.run(profile=flags.profile)
    except BaseException:
        trainer.fail()
        raise
    finally:
        trainer.close()


def main() -> None:
    config, flags = parse_command_line()
    who = f"process {os.environ.get('RANK', '?')}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        run(config, flags)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: {who}{error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not lost_process(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"train.py: {who}lost another process, whose own message says why ({reason})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    stop_processes()


if __name__ == "__main__":
    main()
