"""The benchmark of a training step: a run with random weights and tokens, and `train_step` of the root's train.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.clock import Run
from data.loader import MicroBatch
from model import GPT, GPTConfig
from processes import Processes, start_processes
from train import train_step
from training.config import Config, Data, System
from training.estimate import Hardware, Workload
from training.metrics import Progress
from training.plan import make_plan
from training.run_directory import RunDirectory
from training.setup import TrainingRun, prepare_model


def train(device: Literal["cpu", "cuda"], rows: int, tokens: int) -> Run:
    """Set up a step of the 124M model with the default configuration, on one batch of random tokens."""
    data = Data(batch_tokens=rows * tokens, sequence_length=tokens, micro_batch=rows)
    config = Config(data=data, system=System(device=device))
    run = make_run(config, GPTConfig.preset("gpt2"), start_processes(config.system.device, config.system.dtype))
    return lambda: train_step(run, False, False)


def make_run(config: Config, shape: GPTConfig, processes: Processes, n_batches: int = 1) -> TrainingRun:
    """Return a training run with random weights. It reads the same `n_batches` batches of random tokens repeatedly.

    The run reads no dataset and writes no file.
    """
    torch.manual_seed(0)
    model = GPT(shape)
    workload = Workload.of(config, shape, model.num_parameters(), Hardware.of(processes))
    plan = make_plan(config, workload, processes, {})
    loss_function, optimizers, scaler = prepare_model(model, config, plan, processes)
    tokens, rows = config.data.sequence_length, config.data.batch_tokens // config.data.sequence_length
    ids = torch.randint(shape.vocab_size, (n_batches, rows, tokens + 1))
    # Inputs and targets are contiguous and, for a GPU, in pinned memory, as in the loader's batches. Otherwise the CPU
    # would have to copy them before each step.
    pairs = torch.stack([ids[..., :-1], ids[..., 1:]], dim=1)
    if processes.device.type == "cuda":
        pairs = pairs.pin_memory()
    batches = [
        [MicroBatch(part[0], part[1], weight=part.size(1) / rows) for part in pair.split(plan.micro_batch, dim=1)]
        for pair in pairs
    ]
    unused: Any = None
    return TrainingRun(
        config=config,
        processes=processes,
        plan=plan,
        inputs=unused,
        model=model,
        loss_function=loss_function,
        optimizers=optimizers,
        scaler=scaler,
        loader=itertools.cycle(batches),
        checkpoints=unused,
        directory=RunDirectory(Path("unused")),  # its `open` is never called, so nothing is logged
        progress=Progress(0, config.optim.steps, config.log.every, enabled=False),
    )
