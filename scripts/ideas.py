"""Ideas that were tried and are not in train.py, each as a small change to the training loop.

    python -m scripts.sweep --config configs/shakespeare-char.yaml --idea averaged

docs/recipes.md has the results. A run with an idea uses one process and starts at step 0, because checkpoints do not
store what an idea keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import train
from data.loader import MicroBatch
from model import GPT
from train import StepResult
from training.launch import StopSignal
from training.optim import learning_rate_factor
from training.setup import TrainingRun


class Idea:
    """Changes a run before its first step, in `__init__`, or replaces functions of train.py."""

    def __init__(self, run: TrainingRun) -> None:
        """Change the run. Raises ValueError if the idea cannot be combined with its configuration."""

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        """Take one optimizer step."""
        return train.train_step(run, stop_requested, save_requested)

    def validate(self, run: TrainingRun, signal: StopSignal) -> bool:
        """Validate the run. Return False if a stop request has interrupted it."""
        return train.validate(run, signal)


class UndecayedEmbeddings(Idea):
    """No weight decay for token and position embeddings. With Muon, AdamW then decays nothing."""

    def __init__(self, run: TrainingRun) -> None:
        for group in run.optimizers[-1].param_groups:
            group["weight_decay"] = 0.0


class SmallPositions(Idea):
    """Position embeddings are initialized with N(0, 0.01) as in OpenAI's code, not with N(0, 0.02)."""

    def __init__(self, run: TrainingRun) -> None:
        with torch.no_grad():
            run.model.transformer.wpe.weight.mul_(0.5)


class ZLoss(Idea):
    """Adds 1e-4 times the mean squared logarithm of softmax's denominator (Chowdhery et al. 2022, PaLM)."""

    def __init__(self, run: TrainingRun) -> None:
        run.loss_function = _LossWithZ(run.model)


class _LossWithZ(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        output = self.model(inputs, targets=targets, document_ids=documents, return_logits=True)
        return output.loss + 1e-4 * output.logits.float().logsumexp(-1).square().mean()


class Averaged(Idea):
    """The last validation uses the mean of the weights after each step in which the learning rate decreased."""

    def __init__(self, run: TrainingRun) -> None:
        self.sums, self.count = [torch.zeros_like(p) for p in run.model.parameters()], 0

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        step, optim = run.state.step, run.config.optim
        decreased = step > 0 and learning_rate_factor(step, optim) < learning_rate_factor(step - 1, optim)
        result = super().train_step(run, stop_requested, save_requested)
        if decreased:
            self.count += 1
            for total, parameter in zip(self.sums, run.model.parameters(), strict=True):
                total += parameter.detach()
        return result

    def validate(self, run: TrainingRun, signal: StopSignal) -> bool:
        if train.is_done(run) and self.count:
            with torch.no_grad():
                for total, parameter in zip(self.sums, run.model.parameters(), strict=True):
                    parameter.copy_(total / self.count)
        return super().validate(run, signal)


class MomentumWarmUp(Idea):
    """Muon's momentum grows from 0.85 during the first 300 steps (as in modded-nanogpt), or all steps if fewer."""

    def __init__(self, run: TrainingRun) -> None:
        if run.config.optim.name != "muon":
            raise ValueError(f"momentum-warm-up needs optim.name muon, got {run.config.optim.name}")

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        optim = run.config.optim
        fraction = min(1.0, run.state.step / min(300, optim.steps))
        for group in run.optimizers[0].param_groups:
            group["momentum"] = (1 - fraction) * 0.85 + fraction * optim.muon_momentum
        return super().train_step(run, stop_requested, save_requested)


class SmallBatchesFirst(Idea):
    """In the first third of the run, each half of a batch is an optimizer step, with the same learning rate."""

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        if run.state.step >= run.config.optim.steps // 3:
            return super().train_step(run, stop_requested, save_requested)
        loader = run.loader
        batch, *others = next(loader)
        if others:
            raise ValueError("small-batches-first needs whole batches: raise data.micro_batch to the whole batch")
        halves = zip(batch.inputs.chunk(2), batch.targets.chunk(2), strict=True)
        run.loader = iter([[MicroBatch(*half, weight=batch.weight)] for half in halves])
        super().train_step(run, stop_requested, save_requested)
        run.state.step -= 1
        result = super().train_step(run, stop_requested, save_requested)
        run.loader = loader
        return result


IDEAS: dict[str, type[Idea]] = {
    "undecayed-embeddings": UndecayedEmbeddings,
    "small-positions": SmallPositions,
    "z-loss": ZLoss,
    "averaged": Averaged,
    "momentum-warm-up": MomentumWarmUp,
    "small-batches-first": SmallBatchesFirst,
}
