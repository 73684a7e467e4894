"""Optimizers and the learning rate's course."""

from __future__ import annotations

import math

from torch.optim import AdamW, Muon, Optimizer

from model import GPT
from training.config import Optim


def make_optimizers(model: GPT, config: Optim) -> list[Optimizer]:
    """The optimizers of a model's trainable parameters, each group with its `peak_lr`.

    Weight decay goes to tensors of two dimensions and more: embeddings and matrices, not biases and LayerNorms.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers: list[Optimizer] = []
    if config.name == "muon":
        matrices = [p for name, p in parameters.items() if p.dim() == 2 and name.startswith("transformer.h.")]
        parameters = {
            name: p for name, p in parameters.items() if p.dim() != 2 or not name.startswith("transformer.h.")
        }
        muon = Muon(
            matrices, lr=config.muon_lr, weight_decay=config.weight_decay, momentum=config.muon_momentum, nesterov=True
        )
        optimizers.append(muon)
    decayed = [p for p in parameters.values() if p.dim() >= 2]
    others = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizers.append(AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(step: int, config: Optim) -> float:
    """What the peak learning rate is multiplied by in optimizer step `step` (from 0), in (0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024, MiniCPM)
        left = (config.steps - step) / max(1.0, config.decay_fraction * config.steps)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * min(1.0, left)
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Every group's learning rate becomes `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
