"""Ideas for training that were tried and are not in train.py. Each idea is a class that changes a run.

    python -m scripts.sweep --config configs/shakespeare-char.yaml --idea averaged

Several ideas are combined with a plus sign: `--idea per-head+normuon`. docs/recipes.md has the results. A run with an
idea uses one process. It cannot be resumed, because checkpoints do not store the state of an idea.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import train
from data.loader import MicroBatch
from model import GPT, Attention
from train import StepResult
from training.launch import StopSignal
from training.optim import Muon, learning_rate_factor
from training.setup import TrainingRun


class Idea:
    """An idea changes a run before its first step, in `__init__`, or has methods that replace functions of train.py.

    Every method of an idea calls the same method of `super()`, so that `find_idea` can combine several ideas.
    """

    def __init__(self, run: TrainingRun) -> None:
        """Change the run. Raises ValueError if the idea cannot be combined with the run's configuration."""

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        """Take one optimizer step."""
        return train.train_step(run, stop_requested, save_requested)

    def validate(self, run: TrainingRun, signal: StopSignal) -> bool:
        """Validate the run. Return False if a stop request has interrupted it."""
        return train.validate(run, signal)


class UndecayedEmbeddings(Idea):
    """The weight decay of AdamW is 0. In a run with Muon, this changes only the token and position embeddings."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        for group in run.optimizers[-1].param_groups:
            group["weight_decay"] = 0.0


class SmallPositions(Idea):
    """The standard deviation of the initial position embeddings is 0.01, as in OpenAI's code, instead of 0.02."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        with torch.no_grad():
            run.model.transformer.wpe.weight.mul_(0.5)


class Mimetic(Idea):
    """Attention begins with patterns of trained models: similar queries and keys, and sinusoids as positions.

    The queries and keys of a token then have a large product with those of the same token elsewhere. See Trockman and
    Kolter 2023, "Mimetic Initialization of Self-Attention Layers", https://arxiv.org/abs/2305.09828. The sinusoids are
    those of Vaswani et al. 2017, section 3.5. They get a small learning rate and no weight decay.
    """

    similarity, std, amplitude, rate = 0.8, 0.06, 0.14, 1e-3

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        positions, adamw = run.model.transformer.wpe.weight, run.optimizers[-1]
        T, C = positions.shape
        angles = torch.arange(T)[:, None] / 10_000 ** (torch.arange(0, C, 2) / C)
        with torch.no_grad():
            positions.copy_(self.amplitude * torch.cat([angles.sin(), angles.cos()], dim=1))
            for attention in (module for module in run.model.modules() if isinstance(module, Attention)):
                queries, keys, _ = attention.c_attn.weight.chunk(3)
                queries.normal_(std=self.std)
                keys.normal_(std=self.std * (1 - self.similarity**2) ** 0.5).add_(queries, alpha=self.similarity)
        group = adamw.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not positions]
        changes = {"params": [positions], "lr": self.rate, "peak_lr": self.rate, "weight_decay": 0.0}
        adamw.add_param_group(group | changes)


class ZLoss(Idea):
    """Adds 1e-4 times the mean of log(Z)^2 to the loss. Z is softmax's denominator (Chowdhery et al. 2022, PaLM)."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        run.loss_function = _LossWithZ(run.model)


class _LossWithZ(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        output = self.model(inputs, targets=targets, document_ids=documents, return_logits=True)
        return output.loss + 1e-4 * output.logits.float().logsumexp(-1).square().mean()


class Averaged(Idea):
    """After the last step, the weights become their mean over all steps in which the learning rate decreased."""

    first = 0.0  # fraction of the run's steps, from the start, that the mean leaves out

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self.sums, self.count = [torch.zeros_like(p) for p in run.model.parameters()], 0

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        step, optim = run.state.step, run.config.optim
        decreased = step > 0 and learning_rate_factor(step, optim) < learning_rate_factor(step - 1, optim)
        decreased = decreased and step >= self.first * optim.steps
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
    """Muon's momentum grows from 0.85 to its configured value in at most 300 steps, as in modded-nanogpt."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        if run.config.optim.name != "muon":
            raise ValueError(f"momentum-warm-up needs optim.name muon, got {run.config.optim.name}")

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        optim = run.config.optim
        fraction = min(1.0, run.state.step / min(300, optim.steps))
        for group in run.optimizers[0].param_groups:
            group["momentum"] = (1 - fraction) * 0.85 + fraction * optim.muon_momentum
        return super().train_step(run, stop_requested, save_requested)


class SmallBatchesFirst(Idea):
    """In the first third of the run, each batch gives two optimizer steps, one per half, with equal learning rates."""

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
        run.state.step -= 1  # both halves have the same step number, and so the same learning rate
        result = super().train_step(run, stop_requested, save_requested)
        run.loader = loader
        return result


class ScheduledDecay(Idea):
    """The weight decay has the schedule of the learning rate."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self.peaks = [(g, g["weight_decay"]) for optimizer in run.optimizers for g in optimizer.param_groups]

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        factor = learning_rate_factor(run.state.step, run.config.optim)
        for group, peak in self.peaks:
            group["weight_decay"] = peak * factor
        return super().train_step(run, stop_requested, save_requested)


class TailAverage(Averaged):
    """Like the idea `averaged`, but the mean is only over steps in the last third of the run."""

    first = 2 / 3


class OuterNesterov(Idea):
    """Every 5 steps, an outer optimizer with Nesterov momentum takes a step.

    The change of the weights in these 5 steps takes the place of the negative gradient. See Kallusky et al. 2025, SNOO,
    arXiv 2510.15830.
    """

    period, rate, momentum = 5, 0.8, 0.5

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self.start = [p.detach().clone() for p in run.model.parameters()]
        self.sums = [torch.zeros_like(p) for p in self.start]

    def train_step(self, run: TrainingRun, stop_requested: bool, save_requested: bool) -> StepResult:
        result = super().train_step(run, stop_requested, save_requested)
        if run.state.step % self.period == 0:
            with torch.no_grad():
                for start, total, parameter in zip(self.start, self.sums, run.model.parameters(), strict=True):
                    moved = parameter - start
                    total.mul_(self.momentum).add_(moved)
                    start.add_(moved.add(total, alpha=self.momentum), alpha=self.rate)
                    parameter.copy_(start)
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Other forms of Muon's update


class ChangedMuon(Idea):
    """The base class of ideas that change Muon.

    An idea can set `change` to a subclass of Muon. Then the methods of this subclass replace those of the run's Muon.
    """

    change: type[Muon]

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        muon = run.optimizers[0]
        if not isinstance(muon, Muon):
            raise ValueError(f"this idea changes Muon: it needs optim.name muon, got {run.config.optim.name}")
        muon.batched = True  # then all matrices of a shape go through `_orthogonalize_all`, which an idea can override
        # If several ideas are combined, `self.change` is only that of the first idea. So collect the `change` of each.
        changes = [vars(idea)["change"] for idea in type(self).__mro__ if "change" in vars(idea)]
        self.muon = muon
        muon.__class__ = type("Muon", (*changes, Muon), {"heads": run.model.config.n_head})


class _PerHead(Muon):
    heads: int

    def _orthogonalize_all(self, group: dict[str, Any], updates: Tensor) -> Tensor:
        n, rows, columns = updates.shape
        if group["stacked"]:  # (N, 3C, C): the queries of a head are neighboring rows, as are its keys and values
            heads = updates.reshape(-1, columns // self.heads, columns)
            return self._orthogonalize(heads, self.dtype).view(updates.shape)
        if rows == columns:  # the attention's c_proj, (N, C, C): neighboring columns belong to one head
            heads = updates.view(n, rows, self.heads, -1).transpose(1, 2).flatten(0, 1)
            heads = self._orthogonalize(heads, self.dtype)
            return heads.view(n, self.heads, rows, -1).transpose(1, 2).reshape(updates.shape)
        return super()._orthogonalize_all(group, updates)


class PerHead(ChangedMuon):
    """Muon orthogonalizes the matrices of the queries, keys, values and outputs of each head separately."""

    change = _PerHead


class _NorMuon(Muon):
    def _apply(self, group: dict[str, Any], parameter: Tensor, update: Tensor, shape: torch.Size) -> None:
        # `expected` is the mean square of the elements of an orthogonal matrix. The running mean `average` starts at
        # this value instead of 0, so it needs no bias correction.
        expected = 1 / (shape[1] if group["stacked"] else max(shape))
        average = self.state[parameter].setdefault("second_moment", torch.full_like(update[:, :1], expected))
        average.lerp_(update.square().mean(dim=1, keepdim=True), 0.05)
        super()._apply(group, parameter, update * (expected / average.clamp(min=1e-20)).sqrt(), shape)


class NorMuon(ChangedMuon):
    """Each row of an update is divided by the root of a running mean of its squared elements.

    See Li et al. 2025, NorMuon, https://arxiv.org/abs/2510.05491.
    """

    change = _NorMuon


class _NorMuonColumns(Muon):
    def _apply(self, group: dict[str, Any], parameter: Tensor, update: Tensor, shape: torch.Size) -> None:
        squares = update.square().mean(1 if shape[0] >= shape[1] else 0, keepdim=True)
        average = self.state[parameter].setdefault("second_moment", torch.zeros_like(squares)).lerp_(squares, 0.05)
        normalized = update * average.clamp(min=1e-20).rsqrt()
        super()._apply(group, parameter, normalized * (update.norm() / normalized.norm()), shape)


class NorMuonColumns(ChangedMuon):
    """NorMuon as in modded-nanogpt: wide matrices are normalized by columns, and each update keeps its norm."""

    change = _NorMuonColumns


class _LargerWide(Muon):
    def _apply(self, group: dict[str, Any], parameter: Tensor, update: Tensor, shape: torch.Size) -> None:
        super()._apply(group, parameter, update * max(1, shape[1] / shape[0]) ** 0.5, shape)


class LargerWide(ChangedMuon):
    """Updates of wide matrices are scaled up, so that the elements of all updates have the same root mean square.

    See Liu et al. 2025, https://arxiv.org/abs/2502.16982.
    """

    change = _LargerWide


# The coefficients (a, b, c) of the five iterations in `polar_express`, for singular values above 0.001 and a safety
# factor of 1.02, as in modded-nanogpt.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Do the same as `newton_schulz` (training/optim.py), but with the polynomials of Polar Express.

    See Amsel et al. 2025, arXiv 2505.16932.
    """
    x = matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02).clamp(min=1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


class PolarExpress(ChangedMuon):
    """Muon uses `polar_express`, which brings all singular values closer to 1 than `newton_schulz` does."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self.muon._orthogonalize = polar_express


IDEAS: dict[str, type[Idea]] = {
    "undecayed-embeddings": UndecayedEmbeddings,
    "small-positions": SmallPositions,
    "mimetic": Mimetic,
    "z-loss": ZLoss,
    "averaged": Averaged,
    "momentum-warm-up": MomentumWarmUp,
    "small-batches-first": SmallBatchesFirst,
    "scheduled-decay": ScheduledDecay,
    "tail-average": TailAverage,
    "outer-nesterov": OuterNesterov,
    "per-head": PerHead,
    "normuon": NorMuon,
    "normuon-columns": NorMuonColumns,
    "polar-express": PolarExpress,
    "larger-wide": LargerWide,
}


def find_idea(names: str) -> type[Idea]:
    """Return the idea of this name, or a combination of ideas whose names are joined by plus signs.

    Raises ValueError if one of the names is unknown.
    """
    if unknown := [name for name in names.split("+") if name not in IDEAS]:
        raise ValueError(f"there is no idea {', '.join(unknown)}: choose from {', '.join(IDEAS)}")
    return type(names, tuple(IDEAS[name] for name in names.split("+")), {})
