"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim import AdamW, Optimizer

from data.loader import ceil_div
from kernels.compiled import Compiled
from training.config import Optim


class Muon(Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    All singular values of an update are about 1, so a matrix moves equally far in every singular direction.

    Unlike torch.optim.Muon, this class treats the weight of c_attn as three matrices (queries, keys and values), and
    divides the work: each process orthogonalizes some matrices and sends the results to the other processes.
    """

    def __init__(
        self,
        stacked: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
        *,
        cautious: bool = False,
        batched: bool = False,
        orthogonalize: Callable[[Tensor, torch.dtype], Tensor] | None = None,
    ) -> None:
        """Create momentum buffers.

        Args:
            stacked: parameters that are square matrices on top of each other, (2C or 3C, C), such as the weight of
                c_attn.
            others: single matrices of any shape.
            dtype: precision of the Newton-Schulz iteration. Momentum and weights keep the dtype of the parameters.
            cautious: decay only the weights that the update moves toward zero (Chen et al. 2025, "Cautious Weight
                Decay", https://arxiv.org/abs/2510.12402). The decay then never works against the update.
            batched: process all matrices of the same shape together. Use it on a GPU, which one matrix does not fill.
            orthogonalize: a compiled form of `newton_schulz`, used if `batched`; None for `newton_schulz` itself.
        """
        groups = [{"params": list(stacked), "stacked": True}, {"params": list(others), "stacked": False}]
        self.dtype, self.cautious, self.batched = dtype, cautious, batched
        self._orthogonalize = orthogonalize or newton_schulz
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Update each matrix (rows, columns) that has a gradient."""
        if self.batched:
            self._step_in_batches()
            return
        for group in self.param_groups:
            # The processes take the matrices in turn. Sorting by size gives each process about the same amount of work.
            parameters = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: -p.numel())
            updates = [self._nesterov(p, group["momentum"]) for p in parameters]
            updates = [u.view(-1, u.size(1), u.size(1)) if group["stacked"] else u for u in updates]
            distributed_newton_schulz(updates, self.dtype)
            for parameter, update in zip(parameters, updates, strict=True):
                update = update.reshape(parameter.shape)
                if hasattr(parameter, "full_tensor"):  # FSDP: every process has the whole update and keeps its part
                    # imported here: the import takes a second, and few runs use FSDP
                    from torch.distributed.tensor import DTensor, Replicate

                    update = DTensor.from_local(update, parameter.device_mesh, [Replicate()]).redistribute(
                        placements=parameter.placements
                    )
                self._apply(group, parameter, update, parameter.shape)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update a parameter's momentum buffer. Return the Nesterov momentum, gathered if the parameter is sharded."""
        gradient = parameter.grad
        assert gradient is not None
        average = self.state[parameter]["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum)
        return update.full_tensor() if hasattr(update, "full_tensor") else update

    def _apply(self, group: dict[str, Any], parameter: Tensor, update: Tensor, shape: torch.Size) -> None:
        """Apply weight decay and the update to a parameter, or to this process's part of it.

        `shape` is the shape of the whole parameter, on which the size of the update depends.
        """
        rows, columns = shape
        rows = columns if group["stacked"] else rows
        decay = group["lr"] * group["weight_decay"]
        if self.cautious:
            # The update is subtracted, so a weight with the sign of its update moves toward zero: decay only these.
            parameter.addcmul_(parameter, (update * parameter > 0).to(parameter.dtype), value=-decay)
        else:
            parameter.mul_(1 - decay)
        parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _step_in_batches(self) -> None:
        """Process all matrices of the same shape together. While their results are sent, process the next shape."""
        waiting: Callable[[], None] | None = None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                sharded = hasattr(parameters[0], "full_tensor")
                finish = (self._start_sharded if sharded else self._start_replicated)(group, parameters)
                if waiting is not None:
                    waiting()
                waiting = finish
        if waiting is not None:
            waiting()

    def _start_replicated(self, group: dict[str, Any], parameters: list[Tensor]) -> Callable[[], None]:
        """Orthogonalize this process's share of the matrices of one shape. Start to send the results to the others.

        Returns a function that waits for the results of the other processes and updates the parameters.
        """
        rank, world_size = rank_and_world_size()
        part = ceil_div(len(parameters), world_size)  # matrices per process; the last processes may have fewer
        gradients: Any = [p.grad for p in parameters]
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        own = slice(rank * part, (rank + 1) * part)
        updates = torch._foreach_lerp(gradients[own], averages[own], group["momentum"]) if parameters[own] else []
        results = parameters[0].new_empty(part * world_size, *parameters[0].shape, dtype=self.dtype)
        if updates:
            results[own][: len(updates)] = self._orthogonalize_all(group, torch.stack(list(updates)))
        work = None
        if world_size > 1:
            work = dist.all_gather_into_tensor(results, results[own].clone(), async_op=True)

        def finish() -> None:
            if work is not None:
                work.wait()
            for parameter, update in zip(parameters, results, strict=False):
                self._apply(group, parameter, update, parameter.shape)

        return finish

    def _start_sharded(self, group: dict[str, Any], parameters: list[Any]) -> Callable[[], None]:
        """Do the same as `_start_replicated` for parameters whose rows are divided between the processes (FSDP).

        Each process sends its rows of a matrix to the process that orthogonalizes this matrix, and receives its rows of
        the result. So no process ever holds all matrices.
        """
        rank, world_size = rank_and_world_size()
        part = ceil_div(len(parameters), world_size)  # matrices per process, as in `_start_replicated`
        rows, columns = parameters[0].shape
        shard_rows = ceil_div(rows, world_size)  # rows per process; the last processes may have fewer
        local = [p.to_local() for p in parameters]
        gradients = [p.grad.to_local() for p in parameters]
        averages = [self.state[p]["momentum_buffer"].to_local() for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        sent = local[0].new_zeros(world_size * part, shard_rows, columns)
        for row, update in zip(sent, torch._foreach_lerp(gradients, averages, group["momentum"]), strict=False):
            row[: len(update)] = update
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        # Put the rows of each matrix together: (processes, part, shard_rows, columns) -> (part, rows, columns)
        matrices = received.unflatten(0, (world_size, part)).transpose(0, 1).flatten(1, 2)[:, :rows]
        count = max(0, min(part, len(parameters) - rank * part))
        results = matrices.new_zeros(part, world_size * shard_rows, columns, dtype=self.dtype)
        if count:
            results[:count, :rows] = self._orthogonalize_all(group, matrices[:count].contiguous())
        sent = results.unflatten(1, (world_size, shard_rows)).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, async_op=True)

        def finish() -> None:
            work.wait()
            for parameter, shard, update in zip(parameters, local, received.flatten(0, 1), strict=False):
                self._apply(group, shard, update[: len(shard)], parameter.shape)

        return finish

    def _orthogonalize_all(self, group: dict[str, Any], updates: Tensor) -> Tensor:
        """Return the orthogonalized updates (N, rows, columns) in the precision of the iteration."""
        columns = updates.size(2)
        batch = updates.view(-1, columns, columns) if group["stacked"] else updates
        return self._orthogonalize(batch, self.dtype).view(updates.shape)


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def distributed_newton_schulz(updates: list[Tensor], dtype: torch.dtype) -> None:
    """Replace each tensor of the list by the result of `newton_schulz`.

    Process r of n computes elements r, r + n, ... of the list, and sends them to the other processes.
    """
    rank, world_size = rank_and_world_size()
    broadcasts = []
    for i, update in enumerate(updates):
        owner = i % world_size
        updates[i] = newton_schulz(update, dtype) if owner == rank else torch.empty_like(update, dtype=dtype)
        if world_size > 1:
            broadcasts.append(dist.broadcast(updates[i], src=owner, async_op=True))
    for broadcast in broadcasts:
        broadcast.wait()


def newton_schulz(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrices ([N,] rows, columns) in `dtype`, with the singular values changed to about 1 (0.7 to 1.2).

    This takes five steps of a Newton-Schulz iteration with the quintic polynomial of Jordan et al. 2024. The singular
    values do not converge to exactly 1, and those that are almost 0 stay below 0.7.
    """
    # The elements of a gradient may be smaller than the smallest float16: normalize before converting to float16.
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
    """Return the optimizers of a model's trainable parameters; each parameter group stores its peak rate as `peak_lr`.

    `dtype` is the precision of Muon's matrix products: use one that the device computes without emulation
    (device.fast_dtype). Weight decay applies to tensors with two or more dimensions: embeddings and matrices, not
    biases and LayerNorms.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers: list[Optimizer] = []
    if config.name == "muon":
        matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and name.startswith("transformer.h.")}
        parameters = {name: p for name, p in parameters.items() if name not in matrices}
        stacked = [p for name, p in matrices.items() if name.endswith(".c_attn.weight")]
        single = [p for name, p in matrices.items() if not name.endswith(".c_attn.weight")]
        if matrices:  # empty if all blocks are frozen
            on_gpu = next(iter(matrices.values())).is_cuda
            optimizers.append(
                Muon(
                    stacked,
                    single,
                    config.muon_lr,
                    config.weight_decay,
                    config.muon_momentum,
                    dtype,
                    cautious=config.cautious_decay,
                    batched=on_gpu,
                    orthogonalize=Compiled(newton_schulz, "Muon's iteration") if on_gpu else newton_schulz,
                )
            )
    decayed = [p for p in parameters.values() if p.dim() >= 2]
    undecayed = [p for p in parameters.values() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    adamw = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    # Allocate the state now: if it were allocated in the first step, it would fragment the C library's heap.
    for p in parameters.values():
        step = torch.zeros((), device=p.device)
        adamw.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    optimizers.append(adamw)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(step: int, config: Optim) -> float:
    """Return the learning rate of optimizer step `step` (from 0) as a fraction of its peak, in (0, 1]."""
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
    """Set the learning rate of every group to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
