"""Optimizers and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim import AdamW, Optimizer

from training.config import Optim


class Muon(Optimizer):
    """Momentum, orthogonalized: a matrix moves as far in every direction that its gradients agree on (Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon/).

    It is torch.optim.Muon but for two things. Queries, keys and values, which c_attn computes in one product, are three
    matrices here. And processes with the same gradients (DDP) share the work: each orthogonalizes some of the matrices
    for all, where torch's would do every matrix on every process.
    """

    def __init__(
        self,
        stacked: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`stacked` are square matrices one above the other, (2C or 3C, C); `others` single ones of any shape.

        `dtype` is the precision of the Newton-Schulz iteration; momentum and weights stay in that of the parameters.
        """
        groups = [{"params": list(stacked), "stacked": True}, {"params": list(others), "stacked": False}]
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Update each matrix (rows, columns) that has a gradient."""
        for group in self.param_groups:
            # the large ones first, in turn over the processes, so that all have about as much to do
            parameters = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: -p.numel())
            updates = [self._nesterov(p, group["momentum"]) for p in parameters]
            updates = [u.view(-1, u.size(1), u.size(1)) if group["stacked"] else u for u in updates]
            share_out(updates, self.dtype)
            for parameter, update in zip(parameters, updates, strict=True):
                rows, columns = update.shape[-2:]
                update = update.reshape(parameter.shape)
                if hasattr(parameter, "full_tensor"):  # FSDP: all have computed the whole, each keeps its part
                    from torch.distributed.tensor import DTensor, Replicate  # here: it takes a second to import

                    update = DTensor.from_local(update, parameter.device_mesh, [Replicate()]).redistribute(
                        placements=parameter.placements
                    )
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        """The parameter's averaged gradient with one step of look-ahead, whole also where it is sharded."""
        gradient = parameter.grad
        assert gradient is not None
        average = self.state[parameter]["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum)
        return update.full_tensor() if hasattr(update, "full_tensor") else update


def share_out(updates: list[Tensor], dtype: torch.dtype) -> None:
    """Orthogonalize each of the updates, in place in the list: process r of n those at r, r + n, r + 2n ..."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    messages = []
    for i, update in enumerate(updates):
        owner = i % world_size
        mine = owner == rank
        updates[i] = newton_schulz(update, dtype) if mine else torch.empty_like(update, dtype=dtype)
        if world_size > 1:
            messages.append(dist.broadcast(updates[i], src=owner, async_op=True))
    for message in messages:
        message.wait()


def newton_schulz(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices ([N,] rows, columns) with all singular values moved to about 1 (0.7 to 1.2), in `dtype`.

    Five steps of a Newton-Schulz iteration, which needs matrix products only; the coefficients of the quintic are those
    of Jordan et al., chosen to raise small singular values fast rather than to reach 1 exactly.
    """
    # The elements of a gradient may be smaller than float16's smallest number: normalize before that conversion.
    wide_range = torch.finfo(dtype).tiny < 1e-30
    x = matrices.to(dtype) if wide_range else matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(5):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).contiguous()


def make_optimizers(model: nn.Module, config: Optim, dtype: torch.dtype = torch.float32) -> list[Optimizer]:
    """The optimizers of a model's trainable parameters, each group with its `peak_lr`.

    `dtype` is the precision of Muon's matrix products, which the device should compute natively (`fast_dtype`).
    Weight decay goes to tensors of two dimensions and more: embeddings and matrices, not biases and LayerNorms.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers: list[Optimizer] = []
    if config.name == "muon":
        matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and name.startswith("transformer.h.")}
        parameters = {name: p for name, p in parameters.items() if name not in matrices}
        stacked = [p for name, p in matrices.items() if name.endswith(".c_attn.weight")]
        single = [p for name, p in matrices.items() if not name.endswith(".c_attn.weight")]
        if matrices:  # not all blocks are frozen
            optimizers.append(Muon(stacked, single, config.muon_lr, config.weight_decay, config.muon_momentum, dtype))
    decayed = [p for p in parameters.values() if p.dim() >= 2]
    undecayed = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    adamw = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for p in parameters.values():  # now, not in the first step, in whose memory a CPU's heap would scatter it
        step = torch.zeros((), device=p.device)
        adamw.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    optimizers.append(adamw)
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
