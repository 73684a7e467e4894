"""The training step of train.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Run
from benchmarks.workload import ROWS, TOKENS, VOCAB
from data.loader import MicroBatch
from model import GPT, GPTConfig
from processes import start_processes
from train import train_step
from training.config import Config, Data
from training.metrics import Progress
from training.plan import make_plan
from training.run_directory import RunDirectory
from training.setup import TrainingRun, prepare_model


def train() -> Run:
    """Set up a step of the 124M model with the default configuration, on one batch of random tokens."""
    config = Config(data=Data(batch_tokens=ROWS * TOKENS, sequence_length=TOKENS, micro_batch=ROWS))
    processes = start_processes(config.system.device, config.system.dtype)
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2"))
    plan = make_plan(config, model.config, processes, {})
    loss_function, optimizers, scaler = prepare_model(model, config, plan, processes)
    ids = torch.randint(VOCAB, (ROWS, TOKENS + 1))
    unused: Any = None  # a step reads no dataset and writes no checkpoint
    run = TrainingRun(
        config=config,
        processes=processes,
        plan=plan,
        inputs=unused,
        model=model,
        loss_function=loss_function,
        optimizers=optimizers,
        scaler=scaler,
        loader=itertools.repeat([MicroBatch(ids[:, :-1], ids[:, 1:], weight=1.0)]),
        checkpoints=unused,
        directory=RunDirectory(Path("unused")),  # it is not opened, so nothing is logged
        progress=Progress(0, config.optim.steps, config.log.every, enabled=False),
    )
    return lambda: train_step(run, False, False)
