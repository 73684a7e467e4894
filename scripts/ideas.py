"""Changes to training that were tried but not adopted, each as a subclass of Trainer: `scripts.sweep --idea NAME`.

docs/recipes.md lists their results. A run with such a change uses one process and cannot be resumed.
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
    """Use no weight decay for token and position embeddings. With Muon, AdamW decays no other parameters."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for group in self.optimizers[-1].param_groups:
            group["weight_decay"] = 0.0


class SmallPositions(Trainer):
    """Initialize position embeddings with N(0, 0.01), as OpenAI's code does, instead of N(0, 0.02)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        with torch.no_grad():
            self.model.transformer.wpe.weight.mul_(0.5)


class ZLoss(Trainer):
    """Add 1e-4 times the mean of log² of the softmax denominator to the loss (Chowdhery et al. 2022, PaLM)."""

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
    """After the last step, validate the mean of the weights of all steps at which the learning rate decreased."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sums, self.count = [torch.zeros_like(p) for p in self.model.parameters()], 0

    def train_step(self, stop_asked: bool, save_asked: bool) -> StepResult:
        decreased = self.step and learning_rate_factor(self.step, self.config.optim) < learning_rate_factor(
            self.step - 1, self.config.optim
        )
        result = super().train_step(stop_asked, save_asked)
        if decreased:
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
    """Increase Muon's momentum from 0.85 in the first 300 steps, or in all steps of a shorter run (modded-nanogpt)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.config.optim.name != "muon":
            self.close()
            raise ValueError(f"momentum-warm-up needs optim.name muon, got {self.config.optim.name}")

    def train_step(self, stop_asked: bool, save_asked: bool) -> StepResult:
        part = min(1.0, self.step / min(300, self.config.optim.steps))
        for group in self.optimizers[0].param_groups:
            group["momentum"] = (1 - part) * 0.85 + part * self.config.optim.muon_momentum
        return super().train_step(stop_asked, save_asked)


class SmallBatchesFirst(Trainer):
    """In the first third of training, make two optimizer steps per batch, one for each half, at its learning rate."""

    def train_step(self, stop_asked: bool, save_asked: bool) -> StepResult:
        if self.step >= self.config.optim.steps // 3:
            return super().train_step(stop_asked, save_asked)
        whole = self.loader
        inputs, targets, share = zip(*next(whole), strict=True)
        if len(share) != 1:
            raise ValueError(
                f"small-batches-first needs one micro-batch per step, got {len(share)}: raise data.micro_batch"
            )
        halves = zip(inputs[0].chunk(2), targets[0].chunk(2), strict=True)
        batches: Any = iter([[MicroBatch(*half, share=share[0])] for half in halves])
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
