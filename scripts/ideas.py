"""Ideas that were tried and are not in train.py, each as a small change of a Trainer: `scripts.sweep --idea NAME`.

docs/recipes.md has what came of them. A run with an idea is for one process, and starts from step 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data.loader import MicroBatch
from model import GPT
from train import StepResult, Trainer
from training.optim import learning_rate_factor


class UndecayedEmbeddings(Trainer):
    """No weight decay on token and position embeddings (with Muon, all that AdamW decays)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for group in self.optimizers[-1].param_groups:
            group["weight_decay"] = 0.0


class SmallPositions(Trainer):
    """Position embeddings start at N(0, 0.01), as in OpenAI's code, not at N(0, 0.02)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        with torch.no_grad():
            self.model.transformer.wpe.weight.mul_(0.5)


class ZLoss(Trainer):
    """1e-4 times the mean squared logarithm of softmax's denominator beside the loss (Chowdhery et al. 2022, PaLM)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.loss_function = _WithZ(self.model)


class _WithZ(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        output = self.model(inputs, targets=targets, return_logits=True)
        return output.loss + 1e-4 * output.logits.float().logsumexp(-1).square().mean()


class Averaged(Trainer):
    """Validates, after the last step, the mean of the weights after each step in which the learning rate went down."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sums, self.count = [torch.zeros_like(p) for p in self.model.parameters()], 0

    def train_step(self, stop_asked: bool, save_asked: bool) -> StepResult:
        went_down = self.step and learning_rate_factor(self.step, self.config.optim) < learning_rate_factor(
            self.step - 1, self.config.optim
        )
        result = super().train_step(stop_asked, save_asked)
        if went_down:
            self.count += 1
            for total, parameter in zip(self.sums, self.model.parameters(), strict=True):
                total += parameter.detach()
        return result

    def validate(self) -> None:
        if self.done and self.count:
            with torch.no_grad():
                for total, parameter in zip(self.sums, self.model.parameters(), strict=True):
                    parameter.copy_(total / self.count)
        super().validate()


class MomentumWarmUp(Trainer):
    """Muon's momentum grows from 0.85 in the first 300 steps (as in modded-nanogpt), in all where they are fewer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.config.optim.name != "muon":
            self.close()
            raise ValueError(f"momentum-warm-up is for optim.name muon, got {self.config.optim.name}")

    def train_step(self, stop_asked: bool, save_asked: bool) -> StepResult:
        part = min(1.0, self.step / min(300, self.config.optim.steps))
        for group in self.optimizers[0].param_groups:
            group["momentum"] = (1 - part) * 0.85 + part * self.config.optim.muon_momentum
        return super().train_step(stop_asked, save_asked)


class SmallBatchesFirst(Trainer):
    """In the first third, each half of a batch is an optimizer step of its own, at the same learning rate."""

    def train_step(self, stop_asked: bool, save_asked: bool) -> StepResult:
        if self.step >= self.config.optim.steps // 3:
            return super().train_step(stop_asked, save_asked)
        whole = self.loader
        inputs, targets, share = zip(*next(whole), strict=True)
        if len(share) != 1:
            raise ValueError("small-batches-first halves whole batches: raise data.micro_batch until a batch is one")
        halves = zip(inputs[0].chunk(2), targets[0].chunk(2), strict=True)
        batches: Any = iter([[MicroBatch(*half, weight=share[0])] for half in halves])
        self.loader = batches
        super().train_step(stop_asked, save_asked)
        self.step -= 1
        result = super().train_step(stop_asked, save_asked)
        self.loader = whole
        return result


IDEAS: dict[str, type[Trainer]] = {
    "undecayed-embeddings": UndecayedEmbeddings,
    "small-positions": SmallPositions,
    "z-loss": ZLoss,
    "averaged": Averaged,
    "momentum-warm-up": MomentumWarmUp,
    "small-batches-first": SmallBatchesFirst,
}
